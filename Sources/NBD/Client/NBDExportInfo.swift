/// What a server says about an export.
public struct NBDExportInfo: Sendable, Equatable {
    /// The name that the server gave, or the one that it was asked for.
    public var name: String
    /// What it is, for people; nil when the server did not say.
    public var summary: String?
    /// How many bytes it has.
    public var size: UInt64
    /// What the server understands.
    public var flags: TransmissionFlags
    /// The sizes of requests; nil when the server did not say.
    public var blockSizes: BlockSizes?

    /// The sizes of requests to go by (NBD specification: without word from the server, 512 bytes and 32 MiB).
    public var effectiveBlockSizes: BlockSizes { blockSizes ?? BlockSizes(minimum: 512, preferred: 4096) }
}
