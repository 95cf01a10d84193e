internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO

/// A process that helps this one and ends with it, with a private directory for its sockets and its words.
final class BoundProcess: Sendable {
    /// Where its sockets are; nobody else may enter.
    let directory: String
    /// Its process number.
    let pid: pid_t
    /// How it ended, once that was noticed: then its number may be somebody else's.
    private let ended = Guarded<Int32?>(nil)

    /// Where the directories of such processes are.
    static var parent: String { ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp" }

    /// A directory for a process that is about to be started.
    static func makeDirectory() throws -> String { try DurableFile.makePrivateDirectory(in: parent) }

    /// Starts it. Blocks: run it on the pool, whose threads stay as long as this process, which is what the child's life
    /// hangs on.
    ///
    /// - Parameters:
    ///   - arguments: the program, looked up in PATH, and its arguments.
    ///   - directory: from `makeDirectory`; removed here when the program cannot be started.
    ///   - input: what it reads; nothing when nil.
    ///   - confinement: what it may reach; everything when nil.
    init(_ arguments: [String], directory: String, input: Int32? = nil, confinement: Confinement? = nil) throws {
        self.directory = directory
        let null = open("/dev/null", O_RDONLY | O_CLOEXEC)
        let output = open("\(directory)/log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        var argv = arguments.map { strdup($0) } + [nil]
        defer {
            close(null)
            close(output)
            for pointer in argv { free(pointer) }
        }
        do {
            pid = try ConfinedStart.run(confinement, arguments[0]) { confinement, environment, step in
                xd_spawn_bound(&argv, environment, nil, input ?? null, output, output, confinement, step)
            }
        } catch {
            DurableFile.remove(directory)
            throw error
        }
    }

    /// Its exit code, 128 and more for a signal; nil while it runs.
    func exitCode() -> Int32? {
        ended.withLock { ended in
            if let ended { return ended }
            var status: Int32 = 0
            guard xd_wait_nohang(pid, &status) == pid else { return nil }
            ended = xd_exit_code(status)
            return ended
        }
    }

    /// Waits for its end. Blocks.
    ///
    /// - Parameter limit: how long; then it is killed, and what it left is removed.
    /// - Returns: its exit code; nil when it had to be killed.
    func waitForEnd(_ limit: Duration) -> Int32? {
        let end = ContinuousClock.now + limit
        while true {
            if let code = exitCode() { return code }
            guard ContinuousClock.now < end else {
                kill()
                return nil
            }
            usleep(1_000)
        }
    }

    /// Whether it has ended.
    func hasEnded() -> Bool { exitCode() != nil }

    private func signal(_ number: Int32) {
        ended.withLock { if $0 == nil { Glibc.kill(pid, number) } }
    }

    /// The last thing that it said; nil when it said nothing.
    var lastWords: String? {
        let words =
            ((try? DurableFile.read("\(directory)/log")) ?? nil).map { String(decoding: $0, as: UTF8.self) } ?? ""
        // QEMU puts its name and the option before what it has to say.
        return words.split(separator: "\n").last.map(String.init) ?? exitCode().flatMap(ProcessEnd.signal)
    }

    /// Everything that it said, as one line, and the signal when one has ended it.
    var words: String {
        let words = EmulatorProcess.tail(of: "\(directory)/log")
        guard let signal = exitCode().flatMap(ProcessEnd.signal) else { return words }
        return words.isEmpty ? signal : "\(words); \(signal)"
    }

    /// How it ended, when it said nothing.
    private var ending: String {
        guard let code = exitCode(), code > 128 else { return "it said nothing" }
        let filtered = code - 128 == SIGSYS ? ", which a filter of system calls sends" : ""
        return "it said nothing and was ended by the signal \(code - 128)\(filtered)"
    }

    /// Connects to its monitor, once it is there.
    ///
    /// - Parameters:
    ///   - socket: where the monitor will be.
    ///   - failure: what is said before QEMU's own words when it ends instead.
    ///   - isWanted: whether anybody still waits for it.
    /// - Throws: `GuestError`; the process has ended then, and what it left is removed.
    func monitor(
        at socket: String,
        _ failure: String,
        isWanted: () -> Bool = { true },
        on loop: EventLoop
    ) async throws -> QMPClient {
        let end = ContinuousClock.now + .seconds(60)
        while true {
            if hasEnded() {
                let words = words.isEmpty ? ending : words
                clear()
                throw GuestError("\(failure): \(words)")
            }
            if DurableFile.exists(socket), let monitor = try? await QMPClient.connect(to: socket, on: loop) {
                return monitor
            }
            guard isWanted() else {
                await stop(grace: .zero)
                throw GuestError("\(failure): nobody waits for it any more")
            }
            guard ContinuousClock.now < end else {
                await stop()
                throw GuestError("\(failure): its monitor did not answer within 60 s")
            }
            await loop.sleep(for: .milliseconds(5))
        }
    }

    /// Removes what a process that has ended left.
    func clear() { DurableFile.remove(directory) }

    /// Ends it at once, and removes what it left. Blocks.
    func kill() {
        signal(SIGKILL)
        while !hasEnded() { usleep(1_000) }
        clear()
    }

    /// Ends it in order, and by force after a while. Nothing happens to one that has ended.
    func stop(grace: Duration = .seconds(10)) async {
        _ = await BlockingPool.shared.value { [self] in end(grace: grace) }
    }

    /// The same, for who may block.
    func end(grace: Duration) {
        signal(SIGTERM)
        let end = ContinuousClock.now + grace
        while !hasEnded() {
            if ContinuousClock.now > end { signal(SIGKILL) }
            usleep(2_000)
        }
        clear()
    }
}
