/// What the source says of a disk at the end: the checksum over those of all chunks that it knows.
public struct DiskProof: Sendable, Hashable, Codable {
    /// How many chunks are known, not known, known, and so on, from the beginning.
    public var runs: [UInt64]
    /// The checksum of the known chunks' checksums, in their order.
    public var sum: String

    /// Makes a proof.
    public init(runs: [UInt64], sum: String) {
        self.runs = runs
        self.sum = sum
    }

    /// How many runs a message carries.
    public static let maximumRuns = 100_000

    /// How many chunks nothing is said about.
    public var unknown: UInt64 {
        var sum: UInt64 = 0
        for (index, run) in runs.enumerated() where index % 2 == 1 { sum &+= run }
        return sum
    }
}
