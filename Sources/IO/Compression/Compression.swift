/// How data between the agents is compressed.
public enum Compression: Sendable, Hashable, Codable {
    /// Where the line is slower than the processor.
    case auto
    /// Never.
    case off
    /// Always, at this level of zstd, unless a piece does not shrink.
    case level(Int)
}
