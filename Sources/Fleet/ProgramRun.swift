internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO

/// A program that was run to its end, here or on another host.
struct ProgramRun: Sendable {
    /// Its exit code; 128 and more for a signal.
    let code: Int32
    /// Its standard output.
    let output: [UInt8]
    /// Its standard error.
    let errors: String

    /// Its last words, on one line.
    var words: String {
        errors.split(whereSeparator: \.isNewline).map(String.init).filter { !$0.isEmpty }.suffix(2).joined(
            separator: " "
        )
        .shown(most: 500)
    }

    /// The most bytes of an answer.
    private static let limit: off_t = 16 << 20

    /// Runs a program. Blocks: run it on the pool.
    ///
    /// - Parameters:
    ///   - arguments: the program, looked up in PATH, and its arguments; no shell is involved.
    ///   - input: what it reads.
    ///   - environment: what is set in addition.
    /// - Throws: `FleetError` when it cannot be started.
    static func run(
        _ arguments: [String],
        input: [UInt8] = [],
        environment: [String: String] = [:]
    ) throws -> ProgramRun {
        let files = [xd_memory_file("input"), xd_memory_file("output"), xd_memory_file("errors")]
        defer { for file in files { close(file) } }
        guard files.allSatisfy({ $0 >= 0 }) else { throw FleetError("There is no memory to run \(arguments[0])") }
        try DurableFile.append(input, to: files[0], path: "the input of \(arguments[0])")
        lseek(files[0], 0, SEEK_SET)
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        for (index, file) in files.enumerated() { posix_spawn_file_actions_adddup2(&actions, file, Int32(index)) }
        var merged = ProcessInfo.processInfo.environment
        for (key, value) in environment { merged[key] = value }
        var argv = arguments.map { strdup($0) } + [nil]
        var envp = merged.map { strdup("\($0.key)=\($0.value)") } + [nil]
        defer {
            for pointer in argv { free(pointer) }
            for pointer in envp { free(pointer) }
        }
        var child: pid_t = 0
        let failure = posix_spawnp(&child, arguments[0], &actions, nil, &argv, &envp)
        guard failure == 0 else {
            throw FleetError("\(arguments[0]) cannot be started: \(String(cString: strerror(failure)))")
        }
        var status: Int32 = 0
        while waitpid(child, &status, 0) < 0, errno == EINTR {}
        return ProgramRun(
            code: xd_exit_code(status),
            output: read(files[1]),
            errors: String(decoding: read(files[2]), as: UTF8.self)
        )
    }

    private static func read(_ file: Int32) -> [UInt8] {
        let size = min(max(lseek(file, 0, SEEK_END), 0), limit)
        var bytes = [UInt8](repeating: 0, count: Int(size))
        let count = bytes.withUnsafeMutableBytes { pread(file, $0.baseAddress, $0.count, 0) }
        return Array(bytes.prefix(max(count, 0)))
    }
}
