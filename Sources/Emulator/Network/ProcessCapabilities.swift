internal import IO

/// What the kernel lets this process do besides what its user may.
enum ProcessCapabilities {
    /// CAP_NET_ADMIN.
    static let networkAdministration = 12

    /// Whether a capability is in force.
    static func has(_ number: Int) -> Bool {
        guard let bytes = (try? DurableFile.read("/proc/self/status")) ?? nil else { return false }
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") where line.hasPrefix("CapEff:") {
            return UInt64(line.dropFirst(7).trimmed, radix: 16).map { $0 >> UInt64(number) & 1 == 1 } ?? false
        }
        return false
    }
}
