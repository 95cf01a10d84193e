/// How much memory QEMU gets to remember pages that it has sent, so that it sends what has changed of them instead (XBZRLE); it can only be
/// given before the migration begins.
///
/// That pays where the guest changes the same pages again and again, faster than a slow line carries them, and where the memory holds all
/// of these pages: a cache that is too small costs processor time and saves nothing.
struct DeltaCache: Hashable {
    /// On a line that is faster than so many bytes a second it is not worth QEMU's time.
    static let fastLine = 200e6
    /// The bounds of what QEMU gets, in bytes. It takes powers of two.
    private static let (least, most): (UInt64, UInt64) = (16 << 20, 512 << 20)
    /// Each page has one place, by its address, and the one that comes later takes it: with room for as many pages as are changed, a third of
    /// them is sent whole all the same, with eight times as much room every eighth. What stays empty takes no memory.
    private static let roominess = 8.0

    /// Bytes, a power of two.
    let bytes: UInt64

    /// Decides; nil where pages are sent whole.
    ///
    /// - Parameters:
    ///   - dirtyRate: bytes of memory that the guest changes in a second, each page once.
    ///   - lineRate: bytes a second that the line carries.
    ///   - memory: bytes of memory that the guest has.
    init?(dirtyRate: Double, lineRate: Double, memory: UInt64) {
        guard lineRate > 0, lineRate <= Self.fastLine, dirtyRate >= lineRate / 4 else { return nil }
        guard 1.5 * dirtyRate <= Double(min(Self.most, max(memory / 4, Self.least))) else { return nil }
        let limit = min(Self.most, max(memory / 2, Self.least))
        var size = Self.least
        while Double(size) < Self.roominess * dirtyRate, size * 2 <= limit { size *= 2 }
        bytes = size
    }
}
