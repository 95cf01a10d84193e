public import IO

/// How a mirror bears outages.
public struct MirrorEndurance: Sendable {
    /// How long the destination may be away, or without space, before the mirror fails.
    public var patience: Duration
    /// How many bytes a mirror keeps in memory at most: what is under way, and what is not yet durable there, a half of it each. It
    /// comes near that on a long and fast line only: both follow what the line holds.
    public var memory: Int
    /// How many bytes are to be copied, as far as that is known: a hundredth of them may be sent twice in an outage.
    public var expected: UInt64
    /// Whether the export has a new life under each `NAME#NUMBER`, so that what is left of lost connections is fenced.
    public var isFenced: Bool
    /// How many bytes a second a disk that was begun with an image may send; 0 for no limit. Another disk's limit is its job's.
    public var bandwidth: UInt64
    /// What tells that another guest of this host is paused; nil when nobody tells.
    public var beacon: PauseBeacon?

    /// Whether writes are compressed; the server has to take that.
    public var compression = Compression.off
    /// What the line was measured to take, in bytes per second; nil when it was not.
    public var lineRate: Double?

    /// How many bytes may be under way on any line.
    static let leastPending = 32 << 20

    /// Makes limits.
    public init(
        patience: Duration = .seconds(300),
        memory: Int = 256 << 20,
        expected: UInt64 = 0,
        isFenced: Bool = false,
        bandwidth: UInt64 = 0,
        beacon: PauseBeacon? = nil
    ) {
        self.beacon = beacon
        self.bandwidth = bandwidth
        self.expected = expected
        self.patience = patience
        self.memory = memory
        self.isFenced = isFenced
    }
}
