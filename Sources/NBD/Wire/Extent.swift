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

/// The names of metadata contexts that are known to more than one implementation.
public enum MetaContext {
    /// Holes and zeroes.
    public static let allocation = "base:allocation"
    /// How far down in a chain of images the data is: QEMU's context.
    public static let allocationDepth = "qemu:allocation-depth"
    /// What QEMU's dirty bitmaps are called, with the name of the bitmap after it.
    public static let dirtyBitmapPrefix = "qemu:dirty-bitmap:"

    /// Whether a query of a client means this context.
    ///
    /// - Parameters:
    ///   - query: an exact name; when listing also the beginning of names, up to a colon.
    ///   - name: the context's name.
    ///   - listing: whether the client only asks what there is.
    static func query(_ query: String, matches name: String, listing: Bool) -> Bool {
        query == name || listing && query.hasSuffix(":") && name.hasPrefix(query)
    }
}

/// What sizes of requests an export takes (NBD specification, "Block size constraints").
public struct BlockSizes: Sendable, Equatable {
    /// Offsets and lengths are multiples of this, in bytes; a power of two, at most 64 KiB.
    public var minimum: UInt32
    /// What works best, in bytes; a power of two and at least 512.
    public var preferred: UInt32
    /// The longest payload of a request, in bytes.
    public var maximum: UInt32

    /// Makes constraints.
    public init(minimum: UInt32 = 1, preferred: UInt32 = 65536, maximum: UInt32 = UInt32(NBDWire.maximumPayload)) {
        self.minimum = minimum
        self.preferred = preferred
        self.maximum = maximum
    }

    /// Whether the numbers are what the specification allows.
    var isSane: Bool {
        func isPowerOfTwo(_ value: UInt32) -> Bool { value != 0 && value & (value - 1) == 0 }
        return isPowerOfTwo(minimum) && minimum <= 65536 && isPowerOfTwo(preferred) && preferred >= 512
            && preferred >= minimum && maximum >= minimum && (maximum == .max || maximum % minimum == 0)
    }
}
