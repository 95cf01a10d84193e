/// How a mirror bears outages.
public struct MirrorEndurance: Sendable {
    /// How long the destination may be away, or without space, before the mirror fails.
    public var patience: Duration
    /// How many bytes a mirror keeps in memory at most: what is under way, and what is not yet durable there.
    public var memory: Int
    /// How many bytes are to be copied, as far as that is known: a hundredth of them may be sent twice in an outage.
    public var expected: UInt64
    /// Whether the export has a new life under each `NAME#NUMBER`, so that what is left of lost connections is fenced.
    public var isFenced: Bool

    /// Makes limits.
    public init(
        patience: Duration = .seconds(300),
        memory: Int = 64 << 20,
        expected: UInt64 = 0,
        isFenced: Bool = false
    ) {
        self.expected = expected
        self.patience = patience
        self.memory = memory
        self.isFenced = isFenced
    }
}
