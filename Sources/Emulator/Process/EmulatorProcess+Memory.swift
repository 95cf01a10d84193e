internal import IO

extension EmulatorProcess {
    /// How many bytes of memory the process has used and not given back, in pages of every size; nil when that is not known.
    public var residentMemory: UInt64? {
        guard isRunning, let bytes = (try? DurableFile.read("/proc/\(pid)/status")) ?? nil else { return nil }
        var found: UInt64?
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") {
            let words = line.split(whereSeparator: \.isWhitespace)
            // What it maps of files is not the guest's.
            guard words.count > 1, ["RssAnon:", "RssShmem:", "HugetlbPages:"].contains(words[0]),
                let count = UInt64(words[1])
            else { continue }
            found = (found ?? 0) + count << 10
        }
        return found
    }
}
