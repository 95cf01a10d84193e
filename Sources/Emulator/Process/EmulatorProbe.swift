internal import CLinux
internal import Glibc
internal import IO

/// Asks a QEMU program about itself.
public enum EmulatorProbe {
    /// The machine types that a QEMU program has, aliases included (`-machine help`).
    ///
    /// - Throws: `GuestError` when the program cannot be run.
    public static func machines(of program: String) async throws -> Set<String> {
        let output = try await BlockingPool.shared.run { try run([program, "-machine", "help"]) }
        var machines: Set<String> = []
        for line in output.split(separator: "\n").dropFirst() {
            if let name = line.split(separator: " ").first { machines.insert(String(name)) }
        }
        return machines
    }

    private static func run(_ arguments: [String]) throws -> String {
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { throw ChannelError.system("make a pipe", errno) }
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        let null = open("/dev/null", O_RDWR | O_CLOEXEC)
        var argv = arguments.map { strdup($0) } + [nil]
        defer {
            for pointer in argv { free(pointer) }
            close(ends[0])
            close(null)
        }
        let pid = xd_spawn_child(&argv, environ, nil, null, ends[1], null)
        let number = errno
        close(ends[1])
        guard pid > 0 else {
            throw GuestError("Cannot run '\(arguments[0])': \(String(cString: strerror(number)))")
        }
        var bytes: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = read(ends[0], &piece, piece.count)
            if count < 0, errno == EINTR { continue }
            if count <= 0 || bytes.count > 1 << 20 { break }
            bytes.append(contentsOf: piece[..<count])
        }
        var status: Int32 = 0
        while waitpid(pid, &status, 0) < 0, errno == EINTR {}
        return String(decoding: bytes, as: UTF8.self)
    }
}
