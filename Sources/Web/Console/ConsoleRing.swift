/// The latest of what a guest has written to its console. Bytes have offsets, which go on for as long as the ring does.
public struct ConsoleRing: Sendable, Hashable {
    /// The most bytes that are kept.
    public let capacity: Int
    /// The offset of the byte that comes next.
    public private(set) var next: UInt64 = 0
    private var bytes: [UInt8] = []
    /// Where in `bytes` the oldest is, once they are as many as are kept.
    private var head = 0

    /// The largest offset that is taken from others: what a JavaScript number can hold.
    public static let mostOffset: UInt64 = 1 << 53

    /// Makes an empty ring.
    public init(capacity: Int) {
        self.capacity = max(capacity, 1)
    }

    /// The offset of the oldest byte that is kept; `next` when there is none.
    public var oldest: UInt64 { next - UInt64(bytes.count) }

    /// Adds what the guest has written.
    public mutating func append(_ new: some Collection<UInt8>) {
        next += UInt64(new.count)
        var rest = Array(new.suffix(capacity))
        if bytes.count < capacity {
            let count = min(capacity - bytes.count, rest.count)
            bytes.append(contentsOf: rest[..<count])
            rest.removeFirst(count)
        }
        for part in [rest.prefix(capacity - head), rest.dropFirst(capacity - head)] where !part.isEmpty {
            bytes.replaceSubrange(head..<(head + part.count), with: part)
            head = (head + part.count) % capacity
        }
    }

    /// What is kept from an offset on.
    ///
    /// - Parameters:
    ///   - offset: where to begin; what is not kept any more is left out, and what has not come yet is nothing.
    ///   - most: how many bytes at most.
    /// - Returns: the bytes, and the offset of the first.
    public func read(from offset: UInt64, most: Int) -> (offset: UInt64, bytes: [UInt8]) {
        let start = min(max(offset, oldest), next)
        let count = min(Int(next - start), max(most, 0))
        if count == 0 { return (start, []) }
        let first = (head + Int(start - oldest)) % bytes.count
        let straight = bytes[first..<min(first + count, bytes.count)]
        return (start, Array(straight) + bytes[..<(count - straight.count)])
    }

    /// The latest bytes, and the offset of the first.
    public func tail(_ count: Int) -> (offset: UInt64, bytes: [UInt8]) {
        read(from: next - min(UInt64(max(count, 0)), next - oldest), most: count)
    }

    /// Goes on at a later offset: what is missing before it is not known, and what was kept before that is dropped.
    ///
    /// - Returns: false for an offset before the end, or one that is none: nothing has changed.
    public mutating func skip(to offset: UInt64) -> Bool {
        guard offset >= next, offset <= Self.mostOffset else { return false }
        if offset == next { return true }
        (bytes, head, next) = ([], 0, offset)
        return true
    }

    /// Adds what of a piece of the same stream is not here yet; the offsets go on also where something is missing before it.
    ///
    /// - Returns: false when the piece ends before the end of this, or has no such offset: nothing has changed.
    public mutating func extend(with piece: [UInt8], at offset: UInt64) -> Bool {
        guard offset <= Self.mostOffset, next <= offset + UInt64(piece.count), skip(to: max(offset, next)) else {
            return false
        }
        append(piece.dropFirst(Int(next - offset)))
        return true
    }

    /// Puts the end of another host's ring before what is here: the offsets go on where they ended there.
    ///
    /// - Returns: false when those are none: nothing has changed.
    public mutating func follow(_ tail: [UInt8], at offset: UInt64) -> Bool {
        guard offset <= Self.mostOffset, tail.count <= capacity else { return false }
        let own = read(from: oldest, most: capacity).bytes
        let lost = next - UInt64(own.count)
        self = ConsoleRing(capacity: capacity)
        next = offset
        append(tail)
        next += lost
        // What is missing in between was written here before anybody could read it, and is not kept any more.
        if lost > 0 { (bytes, head) = ([], 0) }
        append(own)
        return true
    }
}
