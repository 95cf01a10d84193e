internal import Synchronization

/// How many TLS handshakes this process has performed as a server since it began. From any thread.
public enum ServerHandshakes {
    private static let acceptedCount = Atomic<UInt64>(0)
    private static let failedCount = Atomic<UInt64>(0)

    /// Those that went well; whether the peer may do anything is asked behind them.
    public static var accepted: UInt64 { acceptedCount.load(ordering: .relaxed) }
    /// Those that did not: no TLS, no version or cipher in common, a certificate that is missing or of somebody else's authority, too slow, or given up.
    public static var failed: UInt64 { failedCount.load(ordering: .relaxed) }

    static func count(isAccepted: Bool) {
        if isAccepted {
            acceptedCount.wrappingAdd(1, ordering: .relaxed)
        } else {
            failedCount.wrappingAdd(1, ordering: .relaxed)
        }
    }
}
