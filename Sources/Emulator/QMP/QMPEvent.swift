/// Something that QEMU reported on its own.
public struct QMPEvent: Sendable {
    /// The name: "STOP", "BLOCK_JOB_READY".
    public let name: String
    /// What came with it.
    public let data: JSONValue
    /// When it was received, by this process's monotonic clock.
    public let received: ContinuousClock.Instant
}
