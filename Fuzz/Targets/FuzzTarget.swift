internal import Glibc
internal import IO
internal import Migration
internal import TLS
internal import TestSupport
internal import Web

/// The decoders that take a stranger's bytes, each as a function that must return, whatever it is given.
///
/// The fuzzer calls them with inputs of its own, the tests with the inputs in `Fuzz/Corpus`.
public enum FuzzTarget: String, CaseIterable, Sendable {
    /// `--object` and QMP's object-add: keyval and JSON.
    case object
    /// The heads of websocket frames.
    case frame
    /// A websocket's whole inbound side, after the handshake.
    case websocket
    /// The HTTP heads of both ends.
    case handshake
    /// What a browser may send to the page, up to the names in its path.
    case http
    /// The files of a credential directory: the first byte says which one.
    case credentials
    /// Base64.
    case base64
    /// Records and handshake messages that come to a TLS server.
    case tls
    /// Everything that a client may say to an NBD server.
    case nbdServer = "nbd-server"
    /// Everything that a server may say to an NBD client.
    case nbdClient = "nbd-client"
    /// NBD URIs.
    case nbdURI = "nbd-uri"
    /// What a QEMU monitor may say, up to the description of its guest.
    case qmp
    /// QEMU command lines: one word a line.
    case commandLine = "command-line"
    /// Everything that a source may say to a destination, in every state of a migration.
    case control
    /// What another host offers, up to the command line of the blank copy.
    case offer
    /// The table of what a destination has of a disk: how many chunks, how long each frame is, and the frames.
    case seedTable = "seed-table"
    /// What agents and readers say about consoles.
    case console

    /// What a guest's display may say to an agent.
    case display
    /// What a viewer may say to an agent.
    case viewer

    /// Runs the decoder on an input.
    public func run(_ input: UnsafeRawBufferPointer) {
        switch self {
        case .object: object(String(decoding: input, as: UTF8.self))
        case .frame: frame(input)
        case .websocket: websocket(Array(input))
        case .handshake: handshake(Array(input))
        case .http: http(Array(input))
        case .credentials: credentials(input)
        case .base64: base64(input)
        case .tls: tls(input)
        case .nbdServer: NBDFuzz.server(input)
        case .nbdClient: NBDFuzz.client(input)
        case .nbdURI: NBDFuzz.uri(input)
        case .qmp: EmulatorFuzz.monitor(Array(input))
        case .control: ControlFuzz.conversation(input)
        case .offer: OfferFuzz.offer(String(decoding: input, as: UTF8.self))
        case .seedTable: seedTable(Array(input))
        case .console: ConsoleFuzz.conversation(input)
        case .display: DisplayFuzz.server(Array(input))
        case .viewer: DisplayFuzz.viewer(Array(input))
        case .commandLine: EmulatorFuzz.commandLine(String(decoding: input, as: UTF8.self))
        }
    }

    private func object(_ text: String) {
        guard let description = try? ObjectDescription(parsing: text) else { return }
        // Only types that open no file of the input's choice.
        guard description.type.hasPrefix("authz-"), description.type != "authz-list-file" else { return }
        let store = ObjectStore()
        guard (try? store.add(description)) != nil else { return }
        _ = try? store.authorizer(description.id).allows(["CN=host", "DNS:host"])
    }

    private func seedTable(_ input: [UInt8]) {
        guard input.count > 3 else { return }
        let (chunks, length) = (Int(input[0]) << 8 | Int(input[1]), Int(input[2]) + 1)
        var table = SeedTable(chunks: chunks)
        var rest = input.dropFirst(3)
        while !rest.isEmpty {
            let before = table.end
            guard (try? table.append(Array(rest.prefix(length)))) != nil else {
                precondition(table.end == before, "a frame that is none was taken")
                return
            }
            precondition(table.end > before && table.end <= chunks, "a table is longer than its disk")
            for chunk in [before, table.end - 1] {
                precondition(table.withDigest(of: chunk) { $0.count } == 16, "a chunk that was told is not known")
            }
            precondition(table.withDigest(of: table.end) { $0.count } == nil, "a chunk that was not told is known")
            rest = rest.dropFirst(length)
        }
    }

    private func frame(_ input: UnsafeRawBufferPointer) {
        for masked in [true, false] {
            guard case .head(let head, let size) = WebSocketFrameHead.parse(input, masked: masked) else { continue }
            var bytes = [UInt8](repeating: 0, count: WebSocketFrameHead.maximumLength)
            let written = bytes.withUnsafeMutableBytes { head.write(to: $0) }
            // The shortest form is the only one, so writing gives the same bytes again.
            precondition(written == size && bytes[..<size].elementsEqual(input[..<size]), "a head does not round-trip")
        }
    }

    private static let loop = EventLoop(name: "fuzz")
    private static let request = Array(
        ("GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
            + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n").utf8
    )

    private func websocket(_ input: [UInt8]) {
        let done = Gate()
        let loop = Self.loop
        Task(executorPreference: loop) {
            let (a, b) = MemoryChannel.pair(on: loop, capacity: input.count + 4096)
            try? await a.write(Self.request + input)
            try? await a.finishWriting()
            if let channel = try? await WebSocketChannel.accept(over: b) {
                let buffer = IOBuffer(capacity: 512)
                while let count = try? await channel.readSome(into: buffer.mutable(0..<512)), count > 0 {}
                channel.close()
            }
            a.close()
            done.open()
        }
        done.wait()
    }

    private func handshake(_ input: [UInt8]) {
        _ = try? WebSocketHandshake.response(to: input)
        try? WebSocketHandshake.check(response: input, key: "dGhlIHNhbXBsZSBub25jZQ==")
    }

    private func http(_ input: [UInt8]) {
        let end = input.withUnsafeBytes { HTTPFields.endOfHead(in: $0) } ?? input.count
        _ = try? HTTPResponseHead(parsing: Array(input[..<end]))
        guard let head = try? HTTPRequestHead(parsing: Array(input[..<end])) else { return }
        precondition(end <= HTTPFields.headLimit, "a head is longer than it may be")
        guard let request = try? HTTPRequest(head) else { return }
        _ = request.cookie("__Host-crossdock")
        for name in request.path {
            precondition(name != ".." && !name.contains("/") && !name.utf8.contains(0), "a path leads elsewhere")
        }
    }

    /// An authority and a host of its own, in whose directory one file is replaced.
    private static let pki = Result { try TestPKI() }
    private static let host = (try? pki.get().directory) ?? "/nonexistent"

    private func credentials(_ input: UnsafeRawBufferPointer) {
        let names = ["ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem", "keys.psk"]
        guard let first = input.first else { return }
        let name = names[Int(first) % names.count]
        let host = Self.host
        let good = "\(host)/good"
        let path = "\(host)/\(name)"
        let hadFile = rename(path, good) == 0
        let fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0o600)
        let rest = UnsafeRawBufferPointer(rebasing: input.dropFirst())
        _ = write(fd, rest.baseAddress, rest.count)
        close(fd)
        if name == "keys.psk" {
            _ = try? PSKCredentials(id: "p", directory: host, endpoint: .server)
        } else {
            _ = try? X509Credentials(id: "x", directory: host, endpoint: .server)
            _ = CredentialDirectory(checking: host)
        }
        unlink(path)
        if hadFile { rename(good, path) }
    }

    private func base64(_ input: UnsafeRawBufferPointer) {
        guard let bytes = Base64.decode(input) else { return }
        precondition(Base64.decode(Base64.encode(bytes).utf8) == bytes, "Base64 does not round-trip")
    }

    private static let server: X509Credentials? = try? X509Credentials(
        id: "x",
        directory: host,
        endpoint: .server
    )

    private func tls(_ input: UnsafeRawBufferPointer) {
        guard let server = Self.server, let session = try? TLSSession(credentials: server) else { return }
        session.receive(input)
        session.receive(UnsafeRawBufferPointer(start: nil, count: 0))
        _ = try? session.handshake(with: "fuzz")
    }
}
