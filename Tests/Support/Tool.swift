internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO

/// What a finished program printed.
public struct ToolResult: Sendable {
    /// Its exit code; 128 plus the number for a signal.
    public let code: Int32
    /// Its standard output.
    public let output: String
    /// Its standard error.
    public let errors: String
    /// Both, for messages.
    public var all: String { output + errors }
}

/// Runs programs that tests use as real peers.
public enum Tool {
    /// The program under test, which is built beside the tests.
    public static let crossdock = built("crossdock")

    /// The path of a program that is built beside the tests.
    public static func built(_ name: String) -> String {
        let own = DurableFile.resolve("/proc/self/exe", in: "/")
        return own.split(separator: "/").dropLast().reduce("") { "\($0)/\($1)" } + "/\(name)"
    }

    /// Runs a program to its end. A missing program fails the test.
    ///
    /// - Parameters:
    ///   - arguments: the program and its arguments.
    ///   - seconds: after this time it is killed and an error is thrown.
    public static func run(_ arguments: [String], seconds: Int = 60) async throws -> ToolResult {
        let child = try ChildProcess(arguments)
        return try await child.finish(seconds: seconds)
    }
}

/// How many times longer than on an idle machine something may take: suites run beside each other, on machines that others use.
private let patience = 4

/// A program that runs beside the test; killed when the last reference goes.
public final class ChildProcess: @unchecked Sendable {
    // Unchecked: the fields do not change but for `reaped`, which only `finish` and `deinit` touch.

    /// The process.
    public let pid: Int32
    private let directory: TestDirectory
    private let name: String
    private var reaped: Int32?

    /// Starts a program in its own process group.
    public init(_ arguments: [String], environment: [String: String] = [:]) throws {
        name = arguments.joined(separator: " ")
        directory = try TestDirectory()
        let input = open("/dev/null", O_RDONLY | O_CLOEXEC)
        let output = open(directory.file("out"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        let errors = open(directory.file("err"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        defer {
            close(input)
            close(output)
            close(errors)
        }
        var argv = arguments.map { strdup($0) } + [nil]
        var merged = ProcessInfo.processInfo.environment
        for (key, value) in environment { merged[key] = value }
        var envp = merged.map { strdup("\($0.key)=\($0.value)") } + [nil]
        defer {
            for pointer in argv { free(pointer) }
            for pointer in envp { free(pointer) }
        }
        pid = xd_spawn_child(&argv, &envp, nil, input, output, errors)
        guard pid > 0 else { throw TestFailure("Cannot start \(name): \(String(cString: strerror(errno)))") }
    }

    deinit {
        // One that could not be started has -1 for a number, which would be every process there is.
        if reaped == nil, pid > 0 {
            kill(-pid, SIGKILL)
            kill(pid, SIGKILL)
            var status: Int32 = 0
            waitpid(pid, &status, 0)
        }
    }

    /// What it printed so far.
    public var output: String { Self.contents(directory.file("out")) }
    /// What it printed to standard error so far.
    public var errors: String { Self.contents(directory.file("err")) }

    /// Whether it has not ended.
    public var isRunning: Bool {
        if reaped != nil { return false }
        var status: Int32 = 0
        if xd_wait_nohang(pid, &status) == pid {
            reaped = xd_exit_code(status)
            return false
        }
        return true
    }

    /// Sends a signal.
    public func signal(_ number: Int32) { if reaped == nil { kill(pid, number) } }

    /// Waits for its end.
    public func finish(seconds: Int = 60) async throws -> ToolResult {
        let seconds = seconds * patience
        let end = ContinuousClock.now + .seconds(seconds)
        while isRunning {
            if ContinuousClock.now > end {
                throw TestFailure("\(name) did not end within \(seconds) s; it printed: \(output)\(errors)")
            }
            try await Task.sleep(for: .milliseconds(10))
        }
        return ToolResult(code: reaped ?? -1, output: output, errors: errors)
    }

    /// Waits until `condition` holds; fails when the program ends first or the time is over.
    public func wait(seconds: Int = 30, for what: String, _ condition: () async throws -> Bool) async throws {
        let seconds = seconds * patience
        let end = ContinuousClock.now + .seconds(seconds)
        while try await !condition() {
            guard isRunning else { throw TestFailure("\(name) ended while waiting for \(what): \(output)\(errors)") }
            if ContinuousClock.now > end { throw TestFailure("No \(what) within \(seconds) s: \(output)\(errors)") }
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    private static func contents(_ path: String) -> String {
        String(decoding: (try? DurableFile.read(path)) ?? [], as: UTF8.self)
    }
}

/// Waits until a condition holds, for states that only polling can see.
public func eventually(seconds: Int = 30, _ what: String, _ condition: () async throws -> Bool) async throws {
    let seconds = seconds * patience
    let end = ContinuousClock.now + .seconds(seconds)
    while try await !condition() {
        if ContinuousClock.now > end { throw TestFailure("It took more than \(seconds) s until \(what)") }
        try await Task.sleep(for: .milliseconds(20))
    }
}
