internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO

/// A process that outlives whoever started it, told apart from a later one with the same number.
public struct EmulatorProcess: Sendable, Codable, Hashable {
    /// The process number.
    public let pid: Int32
    /// When it started, in clock ticks since boot.
    public let startTime: UInt64
    /// Which boot of the host it belongs to.
    public let boot: String

    /// Identifies a running process; nil when there is none with this number.
    public init?(pid: Int32) {
        guard let startTime = Self.startTime(of: pid) else { return nil }
        self.pid = pid
        self.startTime = startTime
        boot = Self.bootID
    }

    /// A process that has ended before it could be identified.
    private init(ended pid: Int32) {
        self.pid = pid
        startTime = 0
        boot = Self.bootID
    }

    /// This boot of the host.
    public static let bootID: String = {
        let bytes = try? DurableFile.read("/proc/sys/kernel/random/boot_id")
        return String(decoding: (bytes ?? nil) ?? [], as: UTF8.self).trimmed
    }()

    private static func startTime(of pid: Int32) -> UInt64? {
        guard pid > 0, let bytes = try? DurableFile.read("/proc/\(pid)/stat") else { return nil }
        // The name in parentheses may contain anything, so the fields are counted from the last one.
        guard let close = bytes.lastIndex(of: UInt8(ascii: ")")) else { return nil }
        let fields = bytes[(close + 2)...].split(separator: UInt8(ascii: " "))
        guard fields.count > 19, fields[0].first != UInt8(ascii: "Z") else { return nil }
        return UInt64(String(decoding: fields[19], as: UTF8.self))
    }

    /// Whether the process still runs.
    public var isRunning: Bool { boot == Self.bootID && Self.startTime(of: pid) == startTime }

    /// Sends a signal, if the process still is the one that is meant.
    public func signal(_ number: Int32) {
        let descriptor = xd_pidfd_open(pid)
        guard descriptor >= 0 else { return }
        defer { close(descriptor) }
        if isRunning { _ = xd_pidfd_signal(descriptor, number) }
    }

    /// Ends the process: SIGTERM, and SIGKILL when it is still there after `grace`.
    ///
    /// One that is frozen is ended with SIGKILL at once: it could not answer SIGTERM, and must not run until it does.
    public func terminate(grace: Duration = .seconds(5)) async {
        signal(isFrozen ? SIGKILL : SIGTERM)
        let end = ContinuousClock.now + grace
        // Not `Task.sleep`: the caller's task may be cancelled, and the loop would spin.
        func pause() async { _ = try? await BlockingPool.shared.run { usleep(10_000) } }
        while isRunning, ContinuousClock.now < end { await pause() }
        while isRunning {
            signal(SIGKILL)
            await pause()
        }
    }

    /// Starts a program in a session of its own, its input from /dev/null and its output appended to a log.
    ///
    /// - Parameters:
    ///   - arguments: the program, looked up in PATH, and its arguments.
    ///   - directory: its working directory.
    ///   - log: where its output goes.
    ///   - keep: descriptors that it inherits, under the same numbers.
    ///   - confinement: what it may reach; everything when nil, with the environment of this process.
    /// - Returns: the process. It may have done its work and ended already, which `isRunning` tells.
    /// - Throws: `FileError` that names the log, or `GuestError` that names the program.
    public static func start(
        _ arguments: [String],
        directory: String,
        log: String,
        keep: [Int32] = [],
        confinement: Confinement? = nil
    ) throws -> EmulatorProcess {
        let input = open("/dev/null", O_RDONLY | O_CLOEXEC)
        let output = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        defer {
            close(input)
            if output >= 0 { close(output) }
        }
        guard output >= 0 else { throw FileError.system("write the log \(log)", errno) }
        var argv = arguments.map { strdup($0) } + [nil]
        defer { for pointer in argv { free(pointer) } }
        let pid = try ConfinedStart.run(confinement, arguments[0]) { confinement, environment, step in
            let count = Int32(keep.count)
            return xd_spawn_detached(
                &argv,
                environment,
                directory,
                input,
                output,
                output,
                keep,
                count,
                confinement,
                step
            )
        }
        return EmulatorProcess(pid: pid) ?? EmulatorProcess(ended: pid)
    }

    /// The last lines of a log, for messages; warnings only where there is nothing else.
    public static func tail(of log: String, lines: Int = 5) -> String {
        guard let bytes = try? DurableFile.read(log) else { return "" }
        let said = bytes.suffix(4096).split(separator: UInt8(ascii: "\n")).map { String(decoding: $0, as: UTF8.self) }
        let errors = said.filter { !$0.contains(": warning: ") }
        return (errors.isEmpty ? said : errors).suffix(lines).joined(separator: "; ")
    }

    /// Where PATH finds a program; nil when it does not. A name with a slash is only checked.
    public static func find(_ program: String) -> String? {
        if program.contains("/") { return access(program, X_OK) == 0 ? program : nil }
        let path = ProcessInfo.processInfo.environment["PATH"] ?? "/usr/local/bin:/usr/bin:/bin"
        return path.split(separator: ":").map { "\($0)/\(program)" }.first { access($0, X_OK) == 0 }
    }
}
