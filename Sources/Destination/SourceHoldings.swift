internal import IO
internal import Migration

/// What the source of one migration holds of the agent, in the books of its identity; all of it is given back at once.
final class SourceHoldings: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    private let accounts: PeerAccounts
    private let identity: String
    /// Bytes of what is kept of the source's messages, by the kind of message.
    private var kept: [String: Int] = [:]
    /// Whether the guest is one of those that the source has on the way.
    private var isCounted = false
    /// The right to start a blank copy, and to keep it.
    private var turn: KeyedSemaphore.Permit?

    init(_ accounts: PeerAccounts, of identity: String) {
        (self.accounts, self.identity) = (accounts, identity)
    }

    /// Counts the bytes of a message that waits.
    ///
    /// - Throws: `ChannelError` that names the limit.
    func hold(_ bytes: Int) throws { try accounts.hold(bytes, for: identity) }

    /// A message waits no longer.
    func release(_ bytes: Int) { accounts.release(bytes, for: identity) }

    /// Counts the bytes of a message that is kept, in the place of an earlier one of its kind.
    ///
    /// - Throws: `ChannelError` that names the limit.
    func keep(_ bytes: Int, of kind: String) throws {
        release(kept.removeValue(forKey: kind) ?? 0)
        try hold(bytes)
        kept[kind] = bytes
    }

    /// Counts the guest among those that its source has on the way.
    ///
    /// - Throws: `MigrationError` that names the limit.
    func countGuest() throws {
        guard !isCounted else { return }
        try accounts.beginGuest(identity)
        isCounted = true
    }

    /// Waits until the source may have one more blank copy.
    ///
    /// - Throws: what `KeyedSemaphore.Permit.wait` throws when nobody waits any more.
    func awaitBlankCopy() async throws {
        let turn = accounts.blankCopies.request(identity)
        self.turn = turn
        try await turn.wait()
    }

    /// Gives up the place in the queue for a blank copy; the right to one that is there stays.
    func leaveQueue() { turn?.leave() }

    /// The blank copy is gone, or will not come.
    func endBlankCopy() {
        turn?.end()
        turn = nil
    }

    /// The migration is over.
    func close() {
        release(kept.values.reduce(0, +))
        kept = [:]
        if isCounted { accounts.endGuest(identity) }
        isCounted = false
        endBlankCopy()
    }
}
