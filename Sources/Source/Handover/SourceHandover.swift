internal import Emulator
internal import Migration

/// The handover of a guest, seen from the host that it leaves: where it stands, what is to be done there, and what follows from
/// what came of it. It does nothing itself.
///
/// In each state there is exactly one duty. Whoever carries it out says with an event how that went; anything that goes wrong
/// meanwhile, or is asked for from outside, is the event `failed`. Until RELEASED is durable a failure leads back to the guest
/// running here; from then on only the destination's word, or an operator's, does.
///
/// The names in capitals are those of `docs/model/handover.pml`, whose transitions are the same.
enum SourceHandover: Sendable {
    /// The guest is looked at; nothing exists that would have to be undone.
    case checking
    /// The guest was described and its move is rehearsed; the destination gives up by itself when it loses us.
    case offering
    /// The destination may have said READY, and then waits for a source that it has lost.
    case readying
    /// The mirrors run.
    case copying
    /// The memory is sent, and QEMU may stop the guest at any moment (MIGRATE).
    case sending
    /// It did not get through; the mirrors are whole, so it will be sent again.
    case retrying(reason: String)
    /// QEMU waits at pre-switchover, and the mirrors are ended.
    case paused(Pause)
    /// The rest of the memory goes over, and PREPARED is asked for: from here on the destination keeps everything until it hears a
    /// word (ASKED).
    case asking(Pause)
    /// It has promised that; its QEMU must say that it has the memory (WENT).
    case continuing(Pause)
    /// QEMU has completed the migration and runs nothing (SEEN).
    case completed(Pause)
    /// The images are out of reach of whatever might start the guest on its own (FENCED).
    case fenced(Pause)
    /// QEMU stands still, and is looked at once more (FROZEN).
    case frozen(Pause)
    /// RELEASED is being written (RELEASING).
    case releasing(Pause)
    /// It could be written, but perhaps not durably: nobody may run the guest before the destination has given it up (DOUBT).
    case inDoubt(RollBack)
    /// The guest belongs to the destination, which is asked until it answers (RELEASE).
    case released(Pause)
    /// The destination runs it; that is written down, and what is left here is removed.
    case owned(Pause)
    /// The destination will never run the guest; RECLAIMED is being written (TAKE, TAKING).
    case reclaiming(RollBack)
    /// The guest belongs to this host and is brought back to where it was (TAKEN, ROLL).
    case restoring(RollBack)
    /// It is as it was; the destination is told (ABORT).
    case telling(RollBack)
    /// Everything is as it was, and that is written down.
    case closing(RollBack)
    /// Nothing is left to do, or nothing that this process could do.
    case over(End)

    /// The guest at the switchover.
    struct Pause: Sendable, Hashable {
        /// When QEMU stopped it; nil when it did not run.
        var since: ContinuousClock.Instant?
        /// What it was doing before that.
        var guest: RunState
    }

    /// The way back.
    struct RollBack: Sendable {
        /// Why.
        var reason: MigrationError
        /// Whether anything was done to the guest's QEMU.
        var hasTouchedGuest: Bool
        /// Whether the destination has to be told.
        var telling: Telling
        /// Whether the guest is where it was.
        var isRestored = false

        /// What a destination does that is not told.
        enum Telling: Sendable, Hashable {
            /// It gives up at once, by itself.
            case needless
            /// It gives up in a while, by itself.
            case helpful
            /// It keeps everything for ever.
            case needed
        }
    }

    /// How it ended.
    enum End: Sendable {
        /// The guest belongs to the destination.
        case migrated
        /// A rehearsal, which went well.
        case rehearsed
        /// The guest belongs to this host; `isClosed` when the journal says so and nothing is left.
        case rolledBack(RollBack, isClosed: Bool)
        /// The guest belongs to the destination by the word of an operator there: it must not run here any more.
        case overruled(by: String)
    }

    /// What is to be done.
    enum Duty: Sendable {
        case check
        case offer
        case ready
        case copy
        case send
        case retry(reason: String)
        case endMirrors
        case ask
        case `continue`
        case fence
        case freeze
        case look
        case writeReleased
        case abandon(reason: String)
        case release(Pause)
        case finish
        case writeReclaimed(reason: String)
        case restore(RollBack)
        case tell(RollBack)
        case writeRolledBack(reason: String)
    }

    /// What came of it.
    enum Event: Sendable {
        /// The guest can be moved.
        case checked
        /// The rehearsal went well, and more is wanted.
        case rehearsed
        /// The rehearsal went well, and was all that was wanted.
        case rehearsalIsOver
        /// The exports are there and the destination's QEMU waits.
        case ready
        /// The disks are in sync, as far as they can be while the guest runs.
        case inSync
        /// QEMU waits at pre-switchover.
        case stopped(Pause)
        /// The memory did not get through, and may be sent again.
        case memoryLost(String)
        /// The guest goes on as if nothing had been tried.
        case mayRetry
        /// The destination has all of the disks.
        case mirrorsEnded
        /// PREPARED is durable there.
        case prepared
        /// QEMU completed the migration.
        case completed
        /// The images are out of reach.
        case fenced
        /// QEMU makes no step.
        case frozen
        /// It has not run the guest since it completed.
        case stoodStill
        /// The record that was to be written is durable.
        case written
        /// It may be found later or not.
        case doubtful(MigrationError)
        /// ABORT was acknowledged.
        case abandoned
        /// OWNED.
        case owned
        /// REFUSED.
        case refused(String)
        /// What was left here is removed.
        case finished
        /// The guest is as it was; false when that could not be reached.
        case restored(Bool)
        /// The destination knows; false when it could not be reached and keeps its copy.
        case told(Bool)
        /// An operator of the destination has taken the guest for it.
        case overruled(by: String)
        /// Something went wrong, or was asked to end.
        case failed(MigrationError)
    }

    /// The duty of the state; nil when the handover is over.
    var duty: Duty? {
        switch self {
        case .checking: .check
        case .offering: .offer
        case .readying: .ready
        case .copying: .copy
        case .sending: .send
        case .retrying(let reason): .retry(reason: reason)
        case .paused: .endMirrors
        case .asking: .ask
        case .continuing: .continue
        case .completed: .fence
        case .fenced: .freeze
        case .frozen: .look
        case .releasing: .writeReleased
        case .inDoubt(let rollBack): .abandon(reason: rollBack.reason.message)
        case .released(let pause): .release(pause)
        case .owned: .finish
        case .reclaiming(let rollBack): .writeReclaimed(reason: rollBack.reason.message)
        case .restoring(let rollBack): .restore(rollBack)
        case .telling(let rollBack): .tell(rollBack)
        case .closing(let rollBack): .writeRolledBack(reason: rollBack.reason.message)
        case .over: nil
        }
    }

    /// Whether a failure, a deadline or the operator may still end it: RELEASED may not be there yet.
    var mayBeInterrupted: Bool {
        switch self {
        case .checking, .offering, .readying, .copying, .sending, .retrying, .paused, .asking, .continuing, .completed,
            .fenced, .frozen:
            true
        case .releasing, .inDoubt, .released, .owned, .reclaiming, .restoring, .telling, .closing, .over: false
        }
    }

    /// Whether memory that did not get through can be sent again: once the mirrors are ended, another attempt would be another migration.
    var maySendAgain: Bool {
        switch self {
        case .sending, .retrying, .paused: true
        default: false
        }
    }

    /// Whether QEMU may pause the guest at any moment, or has.
    var mayPause: Bool {
        switch self {
        case .sending, .paused, .asking, .continuing, .completed, .fenced, .frozen: true
        default: false
        }
    }

    /// Whether the destination may have everything, and keep it until it hears a word.
    var mayBePrepared: Bool {
        switch self {
        case .asking, .continuing, .completed, .fenced, .frozen, .releasing, .inDoubt, .released: true
        case .restoring(let rollBack), .telling(let rollBack): rollBack.telling == .needed
        default: false
        }
    }

    /// Whether the guest must not run here.
    var isReleased: Bool {
        switch self {
        case .inDoubt, .released, .owned, .reclaiming: true
        case .over(.migrated), .over(.overruled): true
        default: false
        }
    }

    /// Goes on from what the journal of a source says whose agent has died.
    ///
    /// - Parameters:
    ///   - standing: what it says.
    ///   - guest: what the guest was doing before, as far as it was noted.
    ///   - reason: why the migration is rolled back, if it is.
    /// - Returns: nil when nothing is left to do.
    static func resuming(_ standing: SourceStanding, guest: RunState, reason: MigrationError) -> SourceHandover? {
        switch standing {
        case .open, .reclaimed:
            .restoring(.init(reason: reason, hasTouchedGuest: true, telling: .needed))
        // Whom the operator has overruled is told by other means.
        case .taken: .restoring(.init(reason: reason, hasTouchedGuest: true, telling: .needless))
        case .released: .released(.init(since: nil, guest: guest))
        case .confirmed, .overruled, .rolledBack: nil
        }
    }

    /// The state after an event. An event that the state cannot have changes nothing.
    mutating func take(_ event: Event) { self = next(event) }

    private func next(_ event: Event) -> SourceHandover {
        switch (self, event) {
        case (_, .failed(let reason)): return failed(reason)
        case (.over, _): return self
        // Before PREPARED was asked for nobody can have taken the guest for the destination, whatever that says.
        case (.inDoubt, .overruled(let by)), (.released, .overruled(let by)): return .over(.overruled(by: by))
        case (.telling(let rollBack), .overruled(let by)):
            return rollBack.telling == .needed ? .over(.overruled(by: by)) : .closing(rollBack)
        case (.checking, .checked): return .offering
        case (.offering, .rehearsed): return .readying
        case (.offering, .rehearsalIsOver): return .over(.rehearsed)
        case (.readying, .ready): return .copying
        case (.copying, .inSync): return .sending
        case (.sending, .stopped(let pause)): return .paused(pause)
        case (.sending, .memoryLost(let reason)), (.retrying, .memoryLost(let reason)),
            (.paused, .memoryLost(let reason)):
            return .retrying(reason: reason)
        case (.retrying, .mayRetry): return .sending
        case (.paused(let pause), .mirrorsEnded): return .asking(pause)
        case (.asking(let pause), .prepared): return .continuing(pause)
        case (.continuing(let pause), .completed): return .completed(pause)
        case (.completed(let pause), .fenced): return .fenced(pause)
        case (.fenced(let pause), .frozen): return .frozen(pause)
        case (.frozen(let pause), .stoodStill): return .releasing(pause)
        case (.releasing(let pause), .written): return .released(pause)
        case (.releasing, .doubtful(let reason)):
            return .inDoubt(.init(reason: reason, hasTouchedGuest: true, telling: .needless))
        case (.inDoubt(let rollBack), .abandoned): return .reclaiming(rollBack)
        case (.released(let pause), .owned): return .owned(pause)
        case (.released, .refused(let reason)):
            let reason = MigrationError(.failed, "The destination refused the guest at the end: \(reason)")
            return .reclaiming(.init(reason: reason, hasTouchedGuest: true, telling: .needless))
        case (.owned, .finished): return .over(.migrated)
        case (.reclaiming(let rollBack), .written): return .restoring(rollBack)
        case (.restoring(var rollBack), .restored(let isRestored)):
            rollBack.isRestored = isRestored
            return .telling(rollBack)
        // A migration that is not closed can be recovered: the journal says so until everything is as it was.
        case (.telling(let rollBack), .told(let isTold)):
            return isTold && rollBack.isRestored ? .closing(rollBack) : .over(.rolledBack(rollBack, isClosed: false))
        case (.closing(let rollBack), .written): return .over(.rolledBack(rollBack, isClosed: true))
        default: return self
        }
    }

    private func failed(_ reason: MigrationError) -> SourceHandover {
        func back(_ hasTouchedGuest: Bool, _ telling: RollBack.Telling) -> SourceHandover {
            .restoring(.init(reason: reason, hasTouchedGuest: hasTouchedGuest, telling: telling))
        }
        switch self {
        case .checking, .offering: return back(false, .needless)
        case .readying: return back(false, .helpful)
        case .copying, .sending, .retrying, .paused: return back(true, .helpful)
        case .asking, .continuing, .completed, .fenced, .frozen: return back(true, .needed)
        // The record was not written at all.
        case .releasing: return back(true, .needed)
        case .closing(let rollBack): return .over(.rolledBack(rollBack, isClosed: false))
        case .inDoubt, .released, .owned, .reclaiming, .restoring, .telling, .over: return self
        }
    }
}

extension SourceHandover {
    /// The states without what they carry.
    enum Kind: String, Sendable, Hashable, CaseIterable {
        case checking, offering, readying, copying, sending, retrying, paused, asking, continuing, completed, fenced,
            frozen
        case releasing, inDoubt, released, owned, reclaiming, restoring, telling, closing, over
    }

    /// The state without what it carries.
    var kind: Kind {
        switch self {
        case .checking: .checking
        case .offering: .offering
        case .readying: .readying
        case .copying: .copying
        case .sending: .sending
        case .retrying: .retrying
        case .paused: .paused
        case .asking: .asking
        case .continuing: .continuing
        case .completed: .completed
        case .fenced: .fenced
        case .frozen: .frozen
        case .releasing: .releasing
        case .inDoubt: .inDoubt
        case .released: .released
        case .owned: .owned
        case .reclaiming: .reclaiming
        case .restoring: .restoring
        case .telling: .telling
        case .closing: .closing
        case .over: .over
        }
    }

    /// A state of a kind, to go through all of them.
    static func example(_ kind: Kind, _ pause: Pause, _ rollBack: RollBack) -> SourceHandover {
        switch kind {
        case .checking: .checking
        case .offering: .offering
        case .readying: .readying
        case .copying: .copying
        case .sending: .sending
        case .retrying: .retrying(reason: rollBack.reason.message)
        case .paused: .paused(pause)
        case .asking: .asking(pause)
        case .continuing: .continuing(pause)
        case .completed: .completed(pause)
        case .fenced: .fenced(pause)
        case .frozen: .frozen(pause)
        case .releasing: .releasing(pause)
        case .inDoubt: .inDoubt(rollBack)
        case .released: .released(pause)
        case .owned: .owned(pause)
        case .reclaiming: .reclaiming(rollBack)
        case .restoring: .restoring(rollBack)
        case .telling: .telling(rollBack)
        case .closing: .closing(rollBack)
        case .over: .over(.migrated)
        }
    }
}
