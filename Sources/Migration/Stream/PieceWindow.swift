internal import IO

/// How much of a stream in pieces may be under way: given to the connections, and not yet passed on to QEMU at the other end. A value.
///
/// Connections take what their buffers hold, and what is between the hosts may hold much more. All of that is before what QEMU sends while
/// the guest is paused. So no more is given to them than keeps the line full: one and a half times what it holds at the rate at which pieces are passed on.
struct PieceWindow {
    /// What may be under way before anything is known of the line, and on any line, in bytes.
    static let least = 4 << 20

    private var path: PathEstimate
    /// Those under way, from `first` on, in their order.
    private var pieces: [(bytes: Int, sent: ContinuousClock.Instant)] = []
    private var first = 0
    /// How many pieces were passed on.
    private(set) var passed: UInt64 = 0
    /// How many bytes are under way.
    private(set) var bytes = 0
    /// Bytes per second that the line takes: what arrived in the last period for most of which more was waiting; nil before there was one.
    private(set) var lineRate: Double?
    /// How long something had to wait in the present period, and when that began.
    private var waiting = Duration.zero
    private var began: ContinuousClock.Instant?

    /// - Parameter path: what is known of the line.
    init(_ path: PathEstimate = PathEstimate()) { self.path = path }

    /// How many bytes may be.
    var limit: Int { max(Self.least, path.product / 2 * 3) }

    /// Whether a piece may follow.
    func hasRoom(_ count: Int) -> Bool { bytes == 0 || bytes + count <= limit }

    /// What there is to send had to wait for so long, for room or for the connections to take it.
    mutating func waited(_ time: Duration) { waiting += time }

    /// The next piece is given to a connection.
    mutating func send(_ count: Int, now: ContinuousClock.Instant = .now) {
        pieces.append((count, now))
        bytes += count
    }

    /// A piece that was given to a connection became smaller than it was.
    ///
    /// - Parameters:
    ///   - number: its number in the stream.
    ///   - count: its bytes on the line.
    mutating func shrink(_ number: UInt64, to count: Int) {
        guard number >= passed, number - passed < UInt64(pieces.count - first) else { return }
        let index = first + Int(number - passed)
        bytes -= pieces[index].bytes - count
        pieces[index].bytes = count
    }

    /// So many pieces were passed on, in all.
    ///
    /// - Throws: `ChannelError` with `protocolViolation` for a number below an earlier one, or for pieces that were not sent.
    mutating func pass(_ number: UInt64, now: ContinuousClock.Instant = .now) throws {
        guard number >= passed, number - passed <= UInt64(pieces.count - first) else {
            throw ChannelError(
                .protocolViolation,
                "The other side says that \(number) pieces of the migration stream were passed on, after \(passed) of "
                    + "\(passed + UInt64(pieces.count - first))"
            )
        }
        for piece in pieces[first..<(first + Int(number - passed))] {
            bytes -= piece.bytes
            guard path.answered(piece.bytes, sent: piece.sent, now: now) else { continue }
            if let began, waiting >= (now - began) / 2 { lineRate = path.latest }
            (began, waiting) = (now, .zero)
        }
        first += Int(number - passed)
        passed = number
        if first > 64, first > pieces.count / 2 {
            pieces.removeFirst(first)
            first = 0
        }
    }
}
