internal import Emulator

/// How much less QEMU sends than the pages have that it sends, where it remembers them and sends what has changed (XBZRLE).
///
/// QEMU itself reckons with whole pages when it decides whether what is left fits the pause: a guest that changes the same pages again and
/// again would never get through, though next to nothing of them is sent.
struct DeltaYield {
    /// Less than that is not believed.
    private static let least = 1.0 / 32
    /// How much more than in the passes before the next one may send.
    private static let reserve = 1.25
    /// A pass over fewer bytes of memory tells nothing.
    private static let tellingPass: UInt64 = 1 << 20

    private var passBegan: (round: Int, sent: UInt64, processed: UInt64)?
    private var passes: [Double] = []

    /// Bytes that are sent for each byte of memory that has changed, 1/32 to 1: by the worse of the last two passes, and something to spare.
    var share: Double {
        guard passes.count == 2, let most = passes.max() else { return 1 }
        return min(max(most * Self.reserve, Self.least), 1)
    }

    /// Looks at where QEMU is.
    mutating func add(_ state: MigrationState) {
        // The first pass has all of the memory, which nobody remembers yet.
        guard state.rounds >= 2 else { return }
        guard let began = passBegan else { return passBegan = (state.rounds, state.transferred, state.processed) }
        guard state.rounds > began.round, state.transferred >= began.sent,
            state.processed >= began.processed + Self.tellingPass
        else { return }
        passes.append(Double(state.transferred - began.sent) / Double(state.processed - began.processed))
        if passes.count > 2 { passes.removeFirst() }
        passBegan = (state.rounds, state.transferred, state.processed)
    }
}
