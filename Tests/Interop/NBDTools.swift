import Glibc
import IO
import NBD
import TestSupport
import Testing

/// `crossdock nbd serve` as a process, for peers and for our own tools.
final class NBDServerProcess: Sendable {
    let process: ChildProcess
    let socket: String
    let directory: TestDirectory
    let pki: TestPKI?
    let port: UInt16

    /// Starts a server on a Unix socket, or over TLS on localhost.
    init(_ arguments: [String], tls: Bool = false, in directory: TestDirectory? = nil) async throws {
        let directory = try directory ?? TestDirectory()
        self.directory = directory
        socket = directory.file("nbd-\(UInt32.random(in: 0...UInt32.max)).sock")
        var command = [Tool.crossdock, "nbd", "serve"]
        if tls {
            let made = try TestPKI()
            pki = made
            command += ["-b", "localhost", "-p", "0", "--tls-creds", "t"]
            command += ["--object", "tls-creds-x509,id=t,endpoint=server,dir=\(made.directory)"]
        } else {
            pki = nil
            command += ["-k", socket]
        }
        process = try ChildProcess(command + arguments)
        try await process.wait(for: "the NBD server") { [process] in process.errors.contains("listening on") }
        let line = process.errors.split(separator: "\n").first { $0.contains("listening on") } ?? ""
        port = line.split(separator: ":").last.flatMap { UInt16($0) } ?? 0
    }

    func uri(_ export: String = "") -> String {
        guard let pki else { return "nbd+unix:///\(export)?socket=\(socket)" }
        return "nbds://localhost:\(port)/\(export)?tls-certificates=\(pki.directory)"
    }

    func stop() async throws -> ToolResult {
        process.signal(SIGTERM)
        return try await process.finish(seconds: 20)
    }
}

func nbd(_ arguments: String..., seconds: Int = 60) async throws -> ToolResult {
    try await Tool.run([Tool.crossdock, "nbd"] + arguments, seconds: seconds)
}

/// A file of random data with holes.
func makeImage(_ path: String, mebibytes: Int, random: ClosedRange<Int>? = nil) async throws {
    let range = random ?? 0...(mebibytes - 1)
    let made = try await Tool.run([
        "sh", "-c",
        "truncate -s \(mebibytes)M \(path) && dd if=/dev/urandom of=\(path) bs=1M count=\(range.count) "
            + "seek=\(range.lowerBound) conv=notrunc status=none",
    ])
    #expect(made.code == 0, "\(made.all)")
}

/// A server in the background, which its file names.
struct BackgroundServer {
    let pid: Int32
    private let pidFile: String

    init(pidFile: String) throws {
        self.pidFile = pidFile
        pid = try #require(Int32(String(decoding: DurableFile.read(pidFile) ?? [], as: UTF8.self).dropLast()))
        #expect(pid > 0)
    }

    func stop() async throws {
        kill(pid, SIGTERM)
        try await eventually("the server has ended") { !DurableFile.exists(pidFile) && kill(pid, 0) != 0 }
    }
}
