/// One piece of a block status: so many bytes of one kind (NBD specification, "Metadata querying").
public struct Extent: Sendable, Equatable {
    /// How many bytes.
    public var length: UInt64
    /// What they are, in the terms of the context: bits of `base:allocation`, a depth, a mark.
    public var flags: UInt64

    /// Makes an extent of any context.
    public init(length: UInt64, flags: UInt64) {
        self.length = length
        self.flags = flags
    }

    /// Makes an extent of `base:allocation`.
    public init(length: UInt64, isHole: Bool, isZero: Bool) {
        self.init(length: length, flags: (isHole ? 1 : 0) | (isZero ? 2 : 0))
    }

    /// Nothing is allocated there (`base:allocation`).
    public var isHole: Bool { flags & 1 != 0 }
    /// It reads as zeroes (`base:allocation`).
    public var isZero: Bool { flags & 2 != 0 }
}
