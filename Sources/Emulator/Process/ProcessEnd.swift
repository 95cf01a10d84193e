internal import Glibc

/// How a process has ended, in words.
enum ProcessEnd {
    /// Which signal has ended a process, and what that means.
    ///
    /// - Parameter code: its exit code, 128 and more for a signal.
    /// - Returns: nil for a process that has ended by itself.
    static func signal(_ code: Int32) -> String? {
        guard code > 128, code < 128 + 65, let name = strsignal(code - 128) else { return nil }
        let text = "it was killed by signal \(code - 128) (\(String(cString: name)))"
        switch code - 128 {
        case SIGSYS:
            return text
                + ": a filter does not allow a system call that it needs; look at SystemCallFilter= of the agent's unit"
        case SIGKILL: return text + ": the system may be out of memory; look at the kernel's log"
        default: return text
        }
    }
}
