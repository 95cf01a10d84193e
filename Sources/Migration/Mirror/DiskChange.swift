internal import NBD

/// A change on its way to the destination, and afterwards until it is durable there.
final class DiskChange {
    enum Kind {
        case write, zero, trim
    }
    let id: UInt64
    let kind: Kind
    let range: Range<UInt64>
    let payload: Payload?
    let mayDeallocate: Bool
    /// Whether the data is nothing but zeroes.
    var wasZero = false
    /// Whether the destination acknowledged it before and it is sent once more.
    var isRepeated = false

    init(_ id: UInt64, _ kind: Kind, _ range: Range<UInt64>, payload: Payload? = nil, mayDeallocate: Bool = true) {
        self.id = id
        self.kind = kind
        self.range = range
        self.payload = payload
        self.mayDeallocate = mayDeallocate
    }

    /// Whether it is data, and not zeroes or a hole.
    var isData: Bool { kind == .write && payload != nil && !wasZero }
    var bytes: Int { payload?.count ?? 0 }
}
