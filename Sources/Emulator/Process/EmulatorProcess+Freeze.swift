internal import Glibc
internal import IO

extension EmulatorProcess {
    /// Whether the process is stopped.
    public var isFrozen: Bool {
        guard isRunning, let bytes = (try? DurableFile.read("/proc/\(pid)/stat")) ?? nil,
            let close = bytes.lastIndex(of: UInt8(ascii: ")")), close + 2 < bytes.count
        else { return false }
        return bytes[close + 2] == UInt8(ascii: "T")
    }

    /// Lets a frozen process go on; nothing happens to one that is not frozen.
    public func thaw() { signal(SIGCONT) }
}
