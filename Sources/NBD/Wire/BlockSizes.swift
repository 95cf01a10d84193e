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
