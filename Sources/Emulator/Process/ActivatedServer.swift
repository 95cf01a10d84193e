internal import CLinux
internal import Glibc
internal import IO

/// A server that is given a socket to listen on, as systemd does it (LISTEN_FDS), and that ends with this process.
public final class ActivatedServer: Sendable {
    /// The socket.
    public let socket: String
    private let process: BoundProcess

    private init(socket: String, process: BoundProcess) {
        (self.socket, self.process) = (socket, process)
    }

    /// Starts a program with a socket of its own, on which clients may connect at once.
    ///
    /// - Parameter command: the program, looked up in PATH, and its arguments.
    /// - Throws: `GuestError` or `FileError` that names what could not be done.
    public static func start(_ command: [String]) async throws -> ActivatedServer {
        // The pool's threads stay for as long as the process, which is what the server's life hangs on.
        try await BlockingPool.shared.run { try startNow(command) }
    }

    private static func startNow(_ command: [String]) throws -> ActivatedServer {
        guard let program = command.first, EmulatorProcess.find(program) != nil else {
            throw GuestError("The program '\(command.first ?? "")' is not installed on this host")
        }
        let directory = try BoundProcess.makeDirectory()
        let path = "\(directory)/nbd.sock"
        let descriptor = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        guard descriptor >= 0 else { throw FileError.system("make a socket", errno) }
        defer { close(descriptor) }
        guard xd_unix_bind(descriptor, path) == 0, listen(descriptor, 64) == 0 else {
            throw FileError.system("listen on \(path)", errno)
        }
        // The number of the process is known to itself only.
        let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3<&0 </dev/null"
        _ = fcntl(descriptor, F_SETFL, 0)
        let process = try BoundProcess(["sh", "-c", script, "sh"] + command, directory: directory, input: descriptor)
        return ActivatedServer(socket: path, process: process)
    }

    /// Why it has ended; nil while it runs.
    public var ending: String? {
        guard let code = process.exitCode() else { return nil }
        let words = process.words
        return words.isEmpty ? "it ended with \(code)" : words
    }

    /// Ends it in order, by force after two seconds, and removes what it left. Blocks.
    public func end() { process.end(grace: .seconds(2)) }
}
