import Emulator
import FoundationEssentials
import IO
import Migration
import TLS
import TestSupport
import Testing

@testable import Web

/// A web server with a state directory of its own, on the loopback of this machine.
final class WebLab: Sendable {
    let directory: TestDirectory
    let pki: TestPKI
    let server: WebServer
    let port: UInt16
    let metricsPort: UInt16
    let state: String
    /// What it has said to its operator.
    let log = Lines()

    /// The lines of a log.
    final class Lines: Sendable {
        private let lines = Guarded<[String]>([])
        func add(_ line: String) { lines.withLock { $0.append(line) } }
        var all: [String] { lines.withLock { $0 } }
    }

    /// Starts a server.
    ///
    /// - Parameters:
    ///   - authorization: the id of an authorisation for those who look with a certificate.
    ///   - objects: the objects of the process.
    ///   - unix: whether it listens on a Unix socket.
    ///   - change: changes the configuration.
    init(
        authorization: String? = nil,
        objects: ObjectStore = ObjectStore(),
        unix: Bool = false,
        _ change: (inout WebServer.Configuration) -> Void = { _ in }
    ) async throws {
        directory = try TestDirectory()
        pki = try TestPKI()
        state = directory.directory("state")
        var host = WebHost(
            name: "host-a",
            version: "1.2.3",
            address: "127.0.0.1:1",
            stateDirectory: state,
            imageDirectory: directory.directory("images"),
            credentials: pki.directory
        )
        host.figures = {
            .init(
                memory: .init(total: 100, available: 60, promised: 20),
                disk: .init(total: 10, available: 5, promised: 9)
            )
        }
        let log = self.log
        var configuration = WebServer.Configuration(
            host: host,
            access: AccessControl(objects: objects, authorization: authorization),
            log: Log(level: .debug) { log.add($0) }
        )
        configuration.listen = unix ? .unix(path: directory.file("web.sock")) : .inet(host: "127.0.0.1", port: 0)
        configuration.metrics = .inet(host: "127.0.0.1", port: 0)
        configuration.credentials = try pki.credentials(.server)
        change(&configuration)
        server = try await WebServer.start(configuration)
        func port(_ address: String?) -> UInt16 {
            let digits = address?.split(separator: ":").last?.prefix { $0.isNumber } ?? ""
            return UInt16(digits) ?? 0
        }
        self.port = port(server.addresses.first)
        metricsPort = port(server.metricsAddresses.first)
    }

    /// A directory with the authority's certificate and no other: a browser.
    func browserCredentials() throws -> X509Credentials {
        let path = directory.directory("browser")
        try DurableFile.write(try DurableFile.read("\(pki.directory)/ca-cert.pem") ?? [], to: "\(path)/ca-cert.pem")
        return try pki.credentials(.client, directory: path)
    }

    var address: SocketAddress { .inet(host: "127.0.0.1", port: port) }
    var host: String { "localhost:\(port)" }
    var origin: String { "https://localhost:\(port)" }

    /// Runs `body` with a client's connection.
    func client<T: Sendable>(
        _ credentials: (any TLSCredentials)? = nil,
        _ body: @escaping @Sendable (HTTPClient) async throws -> T
    ) async throws -> T {
        let loop = EventLoop(name: "client")
        defer { loop.stop() }
        let credentials = try credentials ?? browserCredentials()
        let address = address
        return try await loop.run {
            let client = try await HTTPClient.connect(to: address, credentials, on: loop)
            defer { client.close() }
            return try await body(client)
        }
    }

    /// A ticket's secret.
    func ticket(_ rights: WebRights = [.view, .act], guest: String? = nil) async throws -> String {
        let grant = WebGrant(name: "operator", rights: rights, guest: guest)
        let url = try await server.makeTicket(grant, life: .seconds(60))
        return String(url.split(separator: "=").last ?? "")
    }

    /// The cookie of a session with these rights, as `Cookie:` has it.
    func cookie(_ rights: WebRights = [.view, .act], guest: String? = nil) async throws -> String {
        let secret = try await ticket(rights, guest: guest)
        let (host, origin) = (host, origin)
        return try await client { client in
            let answer = try await client.ask(
                "POST",
                "/session",
                ["Host": host, "Origin": origin],
                body: #"{"ticket":"\#(secret)"}"#
            )
            #expect(answer.status == 204, "\(answer.text)")
            let cookie = answer.fields["set-cookie"] ?? ""
            #expect(cookie.hasPrefix("__Host-crossdock="))
            for word in ["; Path=/", "; Secure", "; HttpOnly", "; SameSite=Strict"] {
                #expect(cookie.contains(word), "\(cookie)")
            }
            #expect(!cookie.contains("Domain"))
            return String(cookie.prefix { $0 != ";" })
        }
    }
}
