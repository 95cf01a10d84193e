internal import Emulator
internal import Glibc
public import IO
public import Migration
internal import NBD
public import TLS

/// One migration, seen from the source: it carries out what `SourceHandover` says is to be done, and tells it what came of that.
///
/// Confined to its control loop. Until RELEASED is durable every failure ends with the guest here, as it was, and nothing left
/// behind; from then on the guest belongs to the destination and only its word ends the migration.
public final class OutgoingMigration: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    static let superseded = "Its source agent ended; a later migration followed"

    let context: MigrationContext
    let link: DestinationLink
    let mirrors: DiskMirrors
    let memory: MemoryTransfer
    let known: RehearsedFigures
    let rehearsalTurn: KeyedSemaphore.Permit?
    var handover = SourceHandover.checking
    var record: GuestRecord?
    var monitor: QMPClient?
    var watch: GuestWatch?
    var guestLock: FileLock?
    var journal: Journal?
    var offering: GuestOffering?
    var rehearsal: Rehearsal?
    var rehearsed = Message.Rehearsed()
    /// How lineages are proved to the destination; nil when it does not want that.
    var exchange: SeedExchange?
    var description: GuestDescriptionWatch?
    var watchdog: SwitchoverWatchdog?
    var deadline: LoopTimer?
    /// Why the agent has ended whose place this one takes; nil when that is not known.
    var endOfAgent: String?
    var fence: ImageFence?
    /// That no other guest of the evacuation has its switchover.
    var turn: EvacuationTurn?
    /// Who has taken the guest for this host although it was released; the destination is told instead of asked.
    var overruler: String?
    /// Whether the destination says that the guest is its own although it was taken for this host.
    var mayRunTwice = false
    /// How often QEMU had said that it runs the guest when it completed the migration.
    var resumesAtCompletion = 0
    /// The digests of the images, read in full while the guest is paused.
    var fullDigests: [String: String] = [:]

    var plan: MigrationPlan { context.plan }

    /// Makes a migration.
    ///
    /// - Parameters:
    ///   - plan: what to do.
    ///   - credentials: a client's.
    ///   - loop: the control loop.
    ///   - dataLoops: where disks and memory are carried.
    ///   - known: what earlier rehearsals have measured already.
    ///   - rehearsalTurn: waited for before blank copies are started, and ended after them; of the control loop. Nil when nobody
    ///     else rehearses.
    ///   - emit: gets every event, on the control loop.
    public init(
        plan: MigrationPlan,
        credentials: any TLSCredentials,
        loop: EventLoop,
        dataLoops: EventLoopGroup,
        known: RehearsedFigures = RehearsedFigures(),
        rehearsalTurn: KeyedSemaphore.Permit? = nil,
        emit: @escaping @Sendable (MigrationEvent) -> Void
    ) {
        context = MigrationContext(
            plan: plan,
            credentials: credentials,
            loop: loop,
            dataLoops: dataLoops,
            emit: emit
        )
        self.known = known
        self.rehearsalTurn = rehearsalTurn
        link = DestinationLink(context)
        mirrors = DiskMirrors(context, link)
        memory = MemoryTransfer(context, link, mirrors)
        context.mayBeInterrupted = { [unowned self] in handover.mayBeInterrupted }
        link.mayBePrepared = { [unowned self] in handover.mayBePrepared }
        context.onFault = { [unowned self] in link.interrupt($0) }
        link.onReconnect = { [unowned self] in mirrors.move(to: $0) }
        mirrors.onOutage = { [unowned self] in
            // QEMU pauses a guest that dirties nothing whatever the downtime limit is, and then waits for the mirrors.
            if case .sending = handover, watch?.isAtSwitchover == false {
                memory.lose(mirrors.absence)
            }
        }
    }

    // MARK: From outside

    /// Asks for a roll-back. Without effect once the guest was released. From any thread.
    public func cancel() {
        context.loop.execute { self.context.fail(MigrationError(.cancelled, "The migration was cancelled")) }
    }

    /// Migrates the guest, or leaves everything as it was.
    ///
    /// - Returns: the report; its `code` is the exit code.
    public func start() async throws -> MigrationReport {
        try await context.loop.run {
            await self.carryOut()
            return await self.conclude()
        }
    }

    // MARK: The conductor

    /// Carries out one duty after another until there is none.
    func carryOut() async {
        while let duty = handover.duty {
            let event: SourceHandover.Event
            do {
                event = try await perform(duty)
                if handover.mayBeInterrupted { try context.checkFault() }
            } catch let lost as MemoryLost {
                let isAgain = mirrors.areWhole && handover.maySendAgain
                handover.take(isAgain ? .memoryLost(lost.reason) : .failed(.init(.failed, lost.reason)))
                continue
            } catch {
                handover.take(.failed(context.fault ?? Self.reason(of: error)))
                continue
            }
            handover.take(event)
        }
    }

    static func reason(of error: any Error) -> MigrationError {
        (error as? MigrationError) ?? MigrationError(error is CredentialError ? .security : .failed, "\(error)")
    }

    private func perform(_ duty: SourceHandover.Duty) async throws -> SourceHandover.Event {
        switch duty {
        case .check: try await check()
        case .offer: try await offer()
        case .ready: try await makeReady()
        case .copy: try await copy()
        case .send: try await send()
        case .retry(let reason): try await retry(reason)
        case .endMirrors: try await endMirrors()
        case .ask: try await ask()
        case .continue: try await complete()
        case .fence: try await raiseFence()
        case .freeze: try await freeze()
        case .look: try await look()
        case .writeReleased: try await writeReleased()
        case .abandon(let reason): await abandon(reason)
        case .release(let pause): await release(pause)
        case .finish: await finish()
        case .writeReclaimed(let reason): await writeReclaimed(reason)
        case .restore(let rollBack): await restore(rollBack)
        case .tell(let rollBack): await tell(rollBack)
        case .writeRolledBack(let reason): try await writeRolledBack(reason)
        }
    }

    func guest() throws -> (monitor: QMPClient, record: GuestRecord, watch: GuestWatch) {
        guard let monitor, let record, let watch else { throw MigrationError(.failed, "The guest is not known yet") }
        return (monitor, record, watch)
    }

    // MARK: The end

    private func conclude() async -> MigrationReport {
        turn = nil
        if case .over(.overruled(let by)) = handover { await learnOverruling(by) }
        mirrors.account()
        context.report.ramBytesSent = memory.bytesSent
        context.report.ramBytesOnLine = memory.bytesOnLine
        if let control = link.control {
            let count = 1 + (memory.stream?.connections ?? 0) + mirrors.connections
            context.report.tls = .init(
                version: control.session.version,
                cipher: control.session.cipher,
                connections: count
            )
        }
        memory.abort("The migration is over")
        mirrors.giveUpDialled()
        await rehearsal?.end()
        rehearsalTurn?.end()
        if !handover.isReleased { await switchOff() }
        removeSockets()
        link.close()
        watchdog?.dismiss()
        monitor?.close()
        if context.forgetsGuest { context.guests.remove(plan.guest) }
        guestLock = nil
        context.finish()
        return context.report
    }

    /// A guest that is off has no QEMU but while it is moved.
    func switchOff() async {
        guard var record, record.isOff == true else { return }
        monitor?.onDisconnect = nil
        monitor?.close()
        do { try await context.guests.switchOff(&record) } catch { context.warn("\(error)") }
        self.record = record
    }

    func removeSockets() { for socket in context.files.sockets { unlink(socket) } }
}
