internal import CLinux
internal import Glibc
internal import IO

/// Freezing a process: it keeps its memory and its descriptors, and not one of its threads runs.
extension EmulatorProcess {
    /// What a thread does, as the kernel says.
    private enum ThreadState {
        case stopped
        case ended
        case other(Character)
    }

    /// Whether this user may send it signals, without which it can be neither frozen nor ended. True of one that has ended.
    public var maySignal: Bool {
        let descriptor = xd_pidfd_open(pid)
        guard descriptor >= 0 else { return errno == ESRCH }
        defer { close(descriptor) }
        return !isRunning || xd_pidfd_signal(descriptor, 0) == 0 || errno != EPERM
    }

    /// Whether it is there and every thread of it is stopped by a signal, whoever sent that.
    public var isFrozen: Bool {
        guard isRunning, let threads = threads() else { return false }
        return !threads.isEmpty && threads.values.allSatisfy { if case .other = $0 { false } else { true } }
            && threads.values.contains { if case .stopped = $0 { true } else { false } }
    }

    /// Stops every thread of the process with SIGSTOP, and returns when all of them are stopped. Blocks.
    ///
    /// A thread that waits for a disk stops only when that has answered.
    ///
    /// - Parameter limit: how long that may take.
    /// - Returns: whether it ran until now; false when somebody else had stopped it before, so that a `thaw` would undo that.
    /// - Throws: `GuestError` when it cannot be signalled, ends, or does not stop in time. Then SIGSTOP may still take effect
    ///   later: `thaw` takes it back.
    @discardableResult
    public func freeze(within limit: Duration = .seconds(5)) throws -> Bool {
        let wasFrozen = isFrozen
        try send(SIGSTOP, "frozen")
        let end = ContinuousClock.now + limit
        // A thread may start another one after the list was read and before it stops itself: the same list twice is whole.
        var before: Set<Int32>?
        while true {
            guard isRunning, let threads = threads() else {
                throw GuestError("QEMU (process \(pid)) ended while it was frozen")
            }
            let running = threads.first { if case .other = $0.value { true } else { false } }
            if running == nil, before == Set(threads.keys) { return !wasFrozen }
            before = running == nil ? Set(threads.keys) : nil
            guard ContinuousClock.now < end else {
                throw GuestError(
                    "QEMU (process \(pid)) could not be frozen within \(limit)"
                        + (running.map { "; \(Self.reason($0))" } ?? "")
                )
            }
            if running != nil { usleep(200) }
        }
    }

    /// Lets a process go on that is stopped by SIGSTOP, whoever sent that. Nothing happens to one that runs or has ended.
    ///
    /// - Throws: `GuestError` when it cannot be signalled.
    public func thaw() throws {
        guard isRunning else { return }
        try send(SIGCONT, "thawed")
    }

    /// A signal whose failure matters. The descriptor is opened first and the identity checked then, so that no later process
    /// with the same number is meant.
    private func send(_ number: Int32, _ what: String) throws {
        let descriptor = xd_pidfd_open(pid)
        guard descriptor >= 0, isRunning else {
            if descriptor >= 0 { close(descriptor) }
            throw GuestError("QEMU (process \(pid)) cannot be \(what): it has ended")
        }
        defer { close(descriptor) }
        guard xd_pidfd_signal(descriptor, number) == 0 else {
            let error = errno
            throw GuestError(
                "QEMU (process \(pid)) cannot be \(what): \(String(cString: strerror(error)))"
                    + (error == EPERM ? "; run this as root or as the user of QEMU" : "")
            )
        }
    }

    private static func reason(_ thread: (key: Int32, value: ThreadState)) -> String {
        guard case .other(let state) = thread.value else { return "" }
        let why =
            switch state {
            case "D": "waits for a disk or a file system that does not answer"
            case "t": "is held by a debugger"
            default: "is in the state '\(state)'"
            }
        return "its thread \(thread.key) \(why)"
    }

    /// Its threads by number; nil when it has ended.
    private func threads() -> [Int32: ThreadState]? {
        guard let directory = opendir("/proc/\(pid)/task") else { return nil }
        defer { closedir(directory) }
        var found: [Int32: ThreadState] = [:]
        while let entry = readdir(directory) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            guard let thread = Int32(name) else { continue }
            guard let bytes = (try? DurableFile.read("/proc/\(pid)/task/\(thread)/stat")) ?? nil,
                // The name in parentheses may contain anything.
                let close = bytes.lastIndex(of: UInt8(ascii: ")")), close + 2 < bytes.count
            else {
                found[thread] = .ended
                continue
            }
            switch bytes[close + 2] {
            case UInt8(ascii: "T"): found[thread] = .stopped
            case UInt8(ascii: "X"), UInt8(ascii: "x"), UInt8(ascii: "Z"): found[thread] = .ended
            case let state: found[thread] = .other(Character(UnicodeScalar(state)))
            }
        }
        return found
    }
}
