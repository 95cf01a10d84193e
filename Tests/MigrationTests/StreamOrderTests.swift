import IO
import Migration
import Testing

/// The order of pieces, and what no honest peer sends.
struct StreamOrderTests {
    private func joined(_ lanes: Int) throws -> StreamOrder {
        var order = StreamOrder()
        for _ in 0..<lanes { try order.join() }
        return order
    }

    @Test func piecesPassInOrderWhicheverConnectionBringsThemFirst() throws {
        var order = try joined(3)
        #expect(try !order.arrived(1) && !order.arrived(2))
        #expect(try order.arrived(0))
        #expect(try order.passed() == 1 && order.passed() == 2 && order.passed() == nil)
        #expect(try order.arrived(3))
        #expect(try !order.arrived(4))
        #expect(try order.passed() == 4 && order.passed() == nil)
        for lane in 0..<3 {
            #expect(!order.isOver, "\(lane)")
            try order.ended(5)
        }
        #expect(order.isOver)
    }

    @Test func aStreamWithoutPiecesIsOverOnceAllHaveEnded() throws {
        var order = try joined(2)
        try order.ended(0)
        #expect(!order.isOver)
        try order.ended(0)
        #expect(order.isOver)
    }

    @Test func aPieceComesOnce() throws {
        var order = try joined(4)
        #expect(try order.arrived(0))
        #expect(throws: ChannelError.self) { try order.arrived(0) }
        #expect(try !order.arrived(2))
        #expect(throws: ChannelError.self) { try order.arrived(2) }
        #expect(try order.passed() == nil)
        #expect(throws: ChannelError.self) { try order.arrived(0) }
    }

    @Test func aPieceThatNobodyCanBringIsMissed() throws {
        // All hold one and wait for another.
        var waiting = try joined(2)
        #expect(try !waiting.arrived(1))
        #expect(throws: ChannelError.self) { try waiting.arrived(.max) }
        // One has ended, and the other waits.
        var ended = try joined(2)
        #expect(try !ended.arrived(5))
        #expect(throws: ChannelError.self) { try ended.ended(6) }
        // All have ended.
        var over = try joined(1)
        #expect(try over.arrived(0) && over.passed() == nil)
        #expect(throws: ChannelError.self) { try over.ended(2) }
        // It is found out when the piece before it has passed.
        var late = try joined(2)
        #expect(try late.arrived(0))
        #expect(try !late.arrived(2))
        #expect(try late.passed() == nil)
        #expect(throws: ChannelError.self) { try late.arrived(3) }
    }

    @Test func theEndIsTheSameOnEachConnectionAndNothingComesAfterIt() throws {
        var order = try joined(3)
        try order.ended(2)
        #expect(throws: ChannelError.self) { try order.ended(3) }
        #expect(throws: ChannelError.self) { try order.arrived(2) }
        #expect(throws: ChannelError.self) { try order.join() }
        var passed = try joined(2)
        #expect(try passed.arrived(0) && passed.passed() == nil)
        #expect(throws: ChannelError.self) { try passed.ended(0) }
    }

    @Test func connectionsAreBounded() throws {
        var order = try joined(StreamPiece.mostLanes)
        #expect(throws: ChannelError.self) { try order.join() }
    }

    @Test func aPieceThatIsTooLargeIsNone() {
        var header = [UInt8](repeating: 0, count: StreamPiece.headerSize)
        header.withUnsafeMutableBytes { StreamPiece(number: 7, count: StreamPiece.largest).write(into: $0) }
        let largest = header.withUnsafeBytes { try? StreamPiece(parsing: $0) }
        #expect(largest == StreamPiece(number: 7, count: StreamPiece.largest))
        header[11] = 1
        #expect(throws: ChannelError.self) { try header.withUnsafeBytes { try StreamPiece(parsing: $0) } }
    }
}
