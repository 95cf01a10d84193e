internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// One migration, seen from the destination: carries out what `DestinationHandover` decides.
///
/// One event at a time, with all that follows from it: a message, a timer and the operator wait for each other.
final class IncomingMigration: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    struct Refusal: Error { let obstacles: [Obstacle] }

    let id: String
    let peer: TLSPeer
    unowned let agent: DestinationAgent
    var handover: DestinationHandover
    let conversation = Conversation()
    var offer: Message.Offer?
    var disks: IncomingDisks?
    var guest: IncomingGuest?
    /// What the QEMU of a guest that is given up had against the stream.
    var refusal: String?
    /// What this host knew of a guest of the same name, which had left it earlier.
    var previous: GuestRecord?
    var journal: Journal?
    var guestLock: FileLock?
    /// Receives the files of the guest that this host does not have.
    var receiver: FileReceiver?
    /// The memory, when several connections bring it.
    var lanes: LaneReceiver?
    /// The blank copy of the guest, while its move is rehearsed.
    var shadow: ShadowEmulator?
    /// What the source says of the images that it keeps, and of the disks.
    var rehearsed = Message.Rehearsed()
    var prepared = Message.Prepared()
    /// This host's part of what proofs of lineage are bound to.
    var seedNonce: String?
    /// The old images that disks are begun with, by the disk's name, and the proofs that this host knows what they are.
    var oldImages: [String: OldImage] = [:]
    var seedProofs: [String: String] = [:]
    /// What RELEASE said of the disks, for their way back.
    var lineages: [String: [Lineage]] = [:]
    var secrets = OfferedSecrets()
    /// The disks whose backing images are here.
    var keptBacking: Set<String> = []
    /// The tap interfaces that are made for the guest.
    var taps: [GuestTap] = []
    /// How the guest is confined; nil before anything of it is made.
    var policy: ConfinementPolicy?
    /// What checks have found against the guest.
    var obstacles: [Obstacle] = []
    /// What the blank copy is.
    var sketch: Message.Shadow?
    /// What the journal says of the disks of a guest that came earlier.
    var ownedDigests: [String: String] = [:]
    /// Set once nobody waits for what is being checked.
    let abandonment = Abandonment()
    /// The digests of files that the offer names.
    private(set) lazy var fileDigests = FileDigests(agent.accounts.digests, key: peer.name, abandonment)
    /// Where the source connects from.
    var sourceAddress: String?
    /// What the source holds here.
    let holdings: SourceHoldings
    private let order = AsyncLock()
    /// Ends the wait for a source that was lost.
    var absence: LoopTimer?

    init(_ id: String, peer: TLSPeer, agent: DestinationAgent, _ handover: DestinationHandover) {
        self.id = id
        self.peer = peer
        self.agent = agent
        holdings = SourceHoldings(agent.accounts, of: peer.name)
        self.handover = handover
    }

    var files: MigrationFiles { agent.migrations.files(of: id) }
    var log: Log { agent.log }

    func exclusively(_ body: () async -> Void) async {
        await order.acquire()
        defer { order.release() }
        await body()
    }

    /// Nobody waits any more for what is being checked or read.
    func abandon() {
        disks?.interrupt()
        abandonment.happen()
        fileDigests.leave()
        holdings.leaveQueue()
    }

    // MARK: - Others who want something

    /// An operator says that the source will never run the guest: it belongs here, if it is here.
    func take(by operatorName: String, _ vouching: Vouching) async throws -> String {
        try vouching.check(source: peer.name)
        var complaint: String?
        await exclusively { complaint = await self.perform(.take(by: "\(operatorName), \(vouching.words)")) }
        if let complaint { throw GuestError(complaint) }
        return offer?.guest ?? ""
    }

    /// The agent ends: what the source can still take back by itself is given up, everything else waits for the next
    /// agent with its QEMU and its images.
    func agentStops() async {
        absence?.cancel()
        if handover.isOpen { await interrupt("The destination agent was stopped") }
        await exclusively { await self.perform(.agentStops) }
    }

    /// Lets a step that is under way end early.
    private func interrupt(_ reason: String) async {
        receiver?.abandon(ChannelError(.closed, reason))
        abandon()
        if case .offered = handover.state { guest?.interrupt() }
        let shadow = shadow
        self.shadow = nil
        await shadow?.stop()
    }

    /// Takes up what an earlier agent has left.
    func takeUp() async { await exclusively { await self.perform(.tryAgain) } }

    // MARK: - Carrying out

    /// Hands an event to the handover and does what follows, to the end.
    ///
    /// - Parameters:
    ///   - event: what happened.
    ///   - question: the message that it is.
    ///   - connection: who wants an answer.
    /// - Returns: what went wrong, for an operator.
    @discardableResult
    func perform(
        _ event: DestinationHandover.Event,
        _ question: String = "",
        for connection: MessageConnection? = nil
    ) async -> String? {
        var complaint: String?
        var actions = handover.handle(event)
        while !actions.isEmpty {
            let action = actions.removeFirst()
            if case .complain(let reason) = action { complaint = reason }
            guard let next = await carryOut(action, question, connection) else { continue }
            actions += handover.handle(next)
        }
        if handover.isOver {
            holdings.close()
            agent.ledger.drop(id)
            if conversation.isEmpty { agent.forget(self) }
        }
        return complaint
    }

    private func carryOut(_ action: DestinationHandover.Action, _ message: String, _ connection: MessageConnection?)
        async
        -> DestinationHandover.Event?
    {
        switch action {
        case .carryOut(let step): return await carryOut(step, connection)
        case .append(let record): return await append(record)
        case .admit: return await admit()
        case .answer(let answer): await send(self.message(answer), message, connection)
        case .complain(let reason):
            log(.warning, "Migration \(id): \(message): \(reason)")
            // In `prepared` and later not the end of the migration, but the source's operator should know what holds it up.
            let isOpen = handover.onWire == .aborted || handover.onWire == .new
            let words = isOpen ? reason : "\(message) failed on the destination: \(reason)"
            try? await connection?.send(.abort(words))
            connection?.channel.abort(ChannelError(.closed, "\(message) failed: \(reason)"))
        case .close(let reason):
            log(.warning, "Migration \(id): \(message): \(reason)")
            connection?.channel.abort(ChannelError(.closed, reason))
        case .tell(let reason): await conversation.tell(.abort(reason))
        case .readBack:
            guest?.forgetSecrets()
            disks?.readBack()
        case .collectDigests:
            guard let digests = await disks?.collectDigests() else { return nil }
            try? await journal?.write(.digests(digests))
        case .cleanUp(let reason): await cleanUp(reason)
        case .finish: finish()
        case .noteConfirmation: _ = await append(.confirmed)
        case .warn(let by):
            log(
                .error,
                "Migration \(id): \(by) has taken guest '\(offer?.guest ?? guestName)' for \(peer.name), but it belongs to this host: "
                    + "both may run it. Stop one of them now; the copy that is stopped must never be started again"
            )
        case .waitForSource: waitForSource()
        case .stopWaiting: absence?.cancel()
        case .tryLater:
            Task(executorPreference: agent.loop) {
                await self.agent.loop.sleep(for: .seconds(5))
                await self.exclusively { await self.perform(.tryAgain) }
            }
        }
        return nil
    }

    /// A source that is away is not waited for any more, as long as it has not been promised anything.
    func endAbsence(_ when: String) async { await exclusively { await perform(.absenceEnded(when)) } }

    private var guestName: String { ((try? agent.migrations.reading(of: id)) ?? nil)?.guest ?? "" }

    /// The source may come back: the link was cut, or its network card was changed.
    private func waitForSource() {
        let patience = agent.configuration.patience
        log(.warning, "Migration \(id): the connection to the source was lost; waiting for \(patience)")
        absence?.cancel()
        absence = agent.loop.schedule(after: patience) {
            Task(executorPreference: self.agent.loop) {
                await self.endAbsence("within \(patience)")
            }
        }
    }
}
