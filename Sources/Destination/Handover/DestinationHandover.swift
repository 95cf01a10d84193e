internal import Emulator
package import Migration

/// Whether this host may run the guest that is coming to it: what it has promised, what it has written, what it waits for.
///
/// A value without I/O. An event goes in, what is to be done comes out, and what became of that is the next event; whoever drives it
/// lets one event and all that follows from it end before the next. `docs/model/README.md` has the rules, R1 to R16.
package struct DestinationHandover: Sendable, Hashable {
    /// Where it stands.
    package indirect enum State: Sendable, Hashable {
        /// An earlier agent has left a migration that is not taken up yet.
        case stuck
        /// Nothing is known but the migration's id.
        case new
        /// OFFER has come. `isBegun` says whether `accepted` is durable; it never is for a rehearsal.
        case offered(isRehearsal: Bool, isBegun: Bool)
        /// READY was said: a source that is lost may come back and go on.
        case ready
        /// PREPARED has come: what was written is being made durable.
        case settling
        /// `prepared` is written, and may not be durable.
        case writingPrepared
        /// `prepared` is durable: only the source's word, or an operator's, ends this.
        case prepared
        /// The guest shall run here: it is being looked at.
        case examining(Claim)
        /// It is whole, and that it stands still is being noted.
        case noting(Ownership)
        /// `owner` or `taken` is written, and may not be durable.
        case writingOwner(Ownership)
        /// That record may be found later: it can only be written again, or be outweighed by `overruled`.
        case ownerInDoubt(Ownership)
        /// The guest belongs to this host and was not resumed yet.
        case owner(Ownership)
        /// The guest belongs to this host, and runs or stands as it should.
        case owned(Ownership)
        /// The same, and the source has no part in it any more. It is settled once the source has said DONE: nobody there can have taken
        /// the guest since.
        case done(takenBy: String?, isSettled: Bool = false)
        /// That an operator of the source has taken a guest which belongs to this host is being written.
        case writingOverruled(by: String)
        /// `rolledBack` or `overruled` is written, and may not be durable.
        case writingRolledBack(Refusal)
        /// That record may be found later: it can only be written again.
        case rolledBackInDoubt(Refusal)
        /// This host will never run the guest.
        case aborted(reason: String, Trace)
        /// It belongs to the source by the word of an operator there. It may run here all the same if it was this host's before.
        case overruled(by: String, wasOwner: Bool)
    }

    /// What a refusal has left in the journal.
    package enum Trace: Sendable, Hashable {
        /// `rolledBack`.
        case durable
        /// It could not be written.
        case missing
        /// There is no journal: nothing was begun.
        case none
    }

    /// Why the guest shall run here.
    package enum Claim: Sendable, Hashable {
        /// The source has released it.
        case release(Message.Release)
        /// An operator says that the source will never run it.
        case taken(by: String)
    }

    /// A guest that is about to belong to this host.
    package struct Ownership: Sendable, Hashable {
        /// Who took it; nil when the source has released it.
        var takenBy: String?
        /// What is known of its disks.
        var digests: [String: String] = [:]
        /// Whether the record is there already, perhaps.
        var isInDoubt = false

        var record: JournalRecord { takenBy.map { .taken(by: $0) } ?? .owner(digests: digests) }
    }

    /// That this host will never run the guest.
    package struct Refusal: Sendable, Hashable {
        /// The record that says so.
        var record: JournalRecord
        /// What is said once that is durable.
        var farewell: [Action]
        /// Where it stands when the record could not be written.
        var fallback: State

        var reason: String {
            switch record {
            case .rolledBack(let reason): reason
            case .overruled(let by): "\(by) has taken the guest for its source"
            default: ""
            }
        }
        var end: State {
            if case .overruled(let by) = record { return .overruled(by: by, wasOwner: false) }
            return .aborted(reason: reason, .durable)
        }
    }

    /// What can happen.
    package enum Event: Sendable, Hashable {
        // Messages of the source.
        case offer(isRehearsal: Bool)
        case rehearsed
        case mirrored
        case stream
        case prepare
        case release(Message.Release)
        case done
        case abort(String)
        case overruled(by: String)
        // The network, the clock, QEMU, the operator, the agent's own life.
        case connected
        case connectionLost
        case absenceEnded(String)
        /// `isCut` when that is what a broken stream makes of it.
        case emulatorEnded(String, isCut: Bool)
        case take(by: String)
        case agentStops
        case tryAgain
        // What became of the actions.
        case carriedOut(Step)
        case refused([String])
        case failed(String)
        case sound(digests: [String: String], stands: Bool)
        case flawed(String)
        case durable
        case notWritten(String)
        case doubtful(String)
        case resumed
        case notResumed(String)
        case restarted(DestinationStanding, wasReady: Bool)
        case superseded
    }

    /// Work that ends with `carriedOut`, `refused` or `failed`, or with what its comment says.
    package enum Step: Sendable, Hashable {
        /// Takes the guest's lock and writes `accepted`.
        case begin
        /// Checks all that can be checked, and starts a blank copy.
        case judge
        /// Makes images and exports, and starts QEMU.
        case build
        /// Reads back what has settled.
        case mirror
        /// Lets QEMU wait for the memory.
        case listen
        /// Ends all writing from the network and makes the images durable.
        case settle
        /// Looks whether QEMU and the disks are whole: `sound` or `flawed`.
        case examine(Claim)
        /// Notes durably that the guest stands still.
        case note
        /// Reads the journal that an earlier agent has left, durably: `restarted` or `superseded`.
        case takeUp
        /// Exports the images of an earlier agent again.
        case reopen
        /// Opens the images of an earlier agent that nobody writes any more.
        case adopt
    }

    /// An answer to whoever has asked.
    package enum Answer: Sendable, Hashable {
        case shadow
        case ready([String])
        case mirrored
        case stream
        case prepared
        case owned
        case refused(String)
        case done
        case abort(String)
        case overruled(String)
    }

    /// What is to be done.
    package enum Action: Sendable, Hashable {
        case carryOut(Step)
        /// Writes a record and makes it durable: `durable`, `notWritten` or `doubtful`.
        case append(JournalRecord)
        /// Lets QEMU have the images and others its monitors, and resumes a guest that shall run: `resumed`, `notResumed` or
        /// `emulatorEnded`.
        case admit
        case answer(Answer)
        /// Says what went wrong, and ends the connection.
        case complain(String)
        /// Ends the connection with a reason that is only in the log.
        case close(String)
        /// Tells the source of something that it did not ask for.
        case tell(String)
        /// Begins to read back the images, which nobody writes any more.
        case readBack
        /// Puts the digests of the disks together.
        case collectDigests
        /// Ends QEMU and removes what was made.
        case cleanUp(String)
        /// Lets go of a guest that belongs to this host.
        case finish
        /// Notes that the source has confirmed that. It decides nothing, so that the next step does not wait for what became of it.
        case noteConfirmation
        /// Says in the log that both hosts may run the guest.
        case warn(overruledBy: String)
        case waitForSource
        case stopWaiting
        /// Asks for `tryAgain` in a while.
        case tryLater
    }

    package private(set) var state: State
    /// Whether a connection of the source stands.
    private(set) var isSourceHere = false

    package init(_ state: State = .new) { self.state = state }

    // MARK: - Events

    /// Takes an event in, and says what is to be done, in this order.
    package mutating func handle(_ event: Event) -> [Action] {
        switch event {
        case .connected:
            isSourceHere = true
            return state == .ready ? [.stopWaiting] : []
        case .connectionLost: isSourceHere = false
        default: break
        }
        switch state {
        case .stuck: return takingUp(event)
        case .new, .offered, .ready, .settling, .writingPrepared: return accepting(event)
        case .prepared, .examining, .noting: return deciding(event)
        case .writingOwner(let ownership): return claiming(event, ownership)
        case .ownerInDoubt(let ownership): return doubting(event, ownership)
        case .owner(let ownership), .owned(let ownership): return owning(event, ownership)
        case .writingRolledBack(let refusal): return refusing(event, refusal)
        case .rolledBackInDoubt(let refusal): return refusingAgain(event, refusal)
        case .done, .writingOverruled, .aborted, .overruled: return ended(event)
        }
    }

    /// What nothing else is said about: a message that is not due.
    private mutating func unexpected(_ event: Event) -> [Action] {
        if case .take = event {
            return [.complain("The migration is in the state '\(onWire.rawValue)': there is nothing to decide here")]
        }
        if case .failed(let reason) = event { return [.complain(reason)] }
        guard let message = event.message else { return [] }
        let reason = "\(message) is not due in state \(onWire.rawValue)"
        switch state {
        case .new, .offered, .ready: return giveUp(reason, [.complain(reason)])
        // An ABORT in answer to ABORT would say that this migration is over, durably.
        default: return message == "ABORT" ? [.close("ABORT failed: \(reason)")] : [.complain(reason)]
        }
    }

    // MARK: - After a restart of the agent

    private mutating func takingUp(_ event: Event) -> [Action] {
        switch event {
        case .tryAgain: return [.carryOut(.takeUp)]
        case .superseded:
            state = .done(takenBy: nil)
            return []
        case .failed: return [.tryLater]
        case .restarted(.accepted, wasReady: true):
            state = .ready
            return [.carryOut(.reopen)]
        case .restarted(.accepted, wasReady: false):
            state = .offered(isRehearsal: false, isBegun: true)
            return giveUp("The destination agent ended before the guest was released", [])
        case .restarted(.prepared, _): return [.carryOut(.adopt)]
        case .carriedOut(.adopt):
            state = .prepared
            return [.readBack]
        case .restarted(.owner(let digests), _):
            state = .owner(Ownership(digests: digests))
            return [.admit]
        case .restarted(.taken(let by, let digests), _):
            state = .owner(Ownership(takenBy: by, digests: digests))
            return [.admit]
        case .restarted(.rolledBack(let reason), _):
            state = .aborted(reason: reason, .durable)
            return [.cleanUp(reason)]
        case .restarted(.overruled(let by), _):
            // One that was owned here has nothing left to take up: `finish` comes before that record.
            state = .overruled(by: by, wasOwner: false)
            return [.cleanUp("\(by) has taken the guest for its source")]
        default: return unexpected(event)
        }
    }

    // MARK: - Before `prepared` is durable

    private mutating func accepting(_ event: Event) -> [Action] {
        switch (event, state) {
        case (.offer(let isRehearsal), .new):
            state = .offered(isRehearsal: isRehearsal, isBegun: false)
            return [.carryOut(.begin)]
        case (.carriedOut(.begin), .offered(let isRehearsal, _)):
            state = .offered(isRehearsal: isRehearsal, isBegun: !isRehearsal)
            return [.carryOut(.judge)]
        case (.carriedOut(.judge), .offered): return [.answer(.shadow)]
        case (.rehearsed, .offered): return [.carryOut(.build)]
        case (.carriedOut(.build), .offered(let isRehearsal, _)):
            if !isRehearsal { state = .ready }
            return [.answer(.ready([]))]
        case (.refused(let reasons), .offered):
            return giveUp(reasons.joined(separator: "; "), [.answer(.ready(reasons))])
        case (.mirrored, .ready): return [.carryOut(.mirror)]
        case (.carriedOut(.mirror), .ready): return [.answer(.mirrored)]
        case (.stream, .ready): return [.carryOut(.listen)]
        case (.carriedOut(.listen), .ready): return [.answer(.stream)]
        case (.carriedOut(.reopen), .ready): return isSourceHere ? [] : [.waitForSource]
        case (.prepare, .ready):
            state = .settling
            return [.carryOut(.settle)]
        case (.carriedOut(.settle), .settling):
            state = .writingPrepared
            return [.append(.prepared)]
        case (.durable, .writingPrepared):
            state = .prepared
            return [.readBack, .answer(.prepared)]
        case (.notWritten(let reason), .writingPrepared): return giveUp(reason, [.complain(reason)])
        case (.doubtful(let reason), .writingPrepared):
            // Whoever finds that record later must find the other one behind it.
            var refusal = Refusal(record: .rolledBack(reason: reason), farewell: [.complain(reason)], fallback: .new)
            refusal.fallback = .rolledBackInDoubt(refusal)
            return write(refusal)
        case (.failed(let reason), _): return giveUp(reason, [.complain(reason)])
        case (.abort(let reason), .new), (.abort(let reason), .offered), (.abort(let reason), .ready):
            return giveUp(reason, [.answer(.abort(reason))])
        case (.overruled(let by), .new): return [.answer(.overruled(by))]
        case (.overruled(let by), .offered(_, isBegun: true)), (.overruled(let by), .ready):
            let refusal = Refusal(record: .overruled(by: by), farewell: [.answer(.overruled(by))], fallback: .new)
            return write(refusal, orEndAs: .aborted(reason: refusal.reason, .missing))
        case (.connectionLost, .ready): return [.waitForSource]
        case (.connectionLost, .new), (.connectionLost, .offered):
            return giveUp("The connection to the source was lost", [])
        case (.absenceEnded(let when), .ready) where !isSourceHere:
            return giveUp("The source did not come back \(when)", [])
        case (.agentStops, .new), (.agentStops, .offered), (.agentStops, .ready):
            let reason = "The destination agent was stopped"
            // A source that only lost the connection would wait for it.
            return [.tell(reason)] + giveUp(reason, [])
        case (.emulatorEnded(let reason, _), .offered): return [.tell(reason)]
        // The next STREAM starts another one.
        case (.emulatorEnded(let reason, let isCut), .ready): return isCut ? [] : [.tell(reason)]
        default: return unexpected(event)
        }
    }

    /// The guest is still the source's, and whatever was made for it here is of no use any more.
    /// Whether its source is away and has not been promised anything.
    var waitsForSource: Bool { if case .ready = state { !isSourceHere } else { false } }

    private mutating func giveUp(_ reason: String, _ farewell: [Action]) -> [Action] {
        switch state {
        case .new, .offered(_, isBegun: false):
            state = .aborted(reason: reason, .none)
            return [.cleanUp(reason)] + farewell
        default:
            return write(
                Refusal(record: .rolledBack(reason: reason), farewell: farewell, fallback: .new),
                orEndAs: .aborted(reason: reason, .missing)
            )
        }
    }

    private mutating func write(_ refusal: Refusal, orEndAs fallback: State? = nil) -> [Action] {
        var refusal = refusal
        if let fallback { refusal.fallback = fallback }
        state = .writingRolledBack(refusal)
        return [.append(refusal.record)]
    }

    // MARK: - `prepared`

    private mutating func deciding(_ event: Event) -> [Action] {
        switch (event, state) {
        case (.prepare, .prepared): return [.answer(.prepared)]
        case (.release(let release), .prepared): return examine(.release(release))
        case (.take, .prepared) where isSourceHere:
            return [.complain("The source is connected and can decide itself: run 'crossdock recover' there")]
        case (.take(let by), .prepared): return examine(.taken(by: by))
        case (.abort(let reason), .prepared):
            return write(
                Refusal(record: .rolledBack(reason: reason), farewell: [.answer(.abort(reason))], fallback: .prepared)
            )
        case (.overruled(let by), .prepared):
            return write(
                Refusal(record: .overruled(by: by), farewell: [.answer(.overruled(by))], fallback: .prepared)
            )
        case (.sound(let digests, let stands), .examining(let claim)):
            var ownership = Ownership(digests: digests)
            if case .taken(let by) = claim { ownership.takenBy = by }
            guard stands else { return writeOwner(ownership) }
            state = .noting(ownership)
            return [.carryOut(.note)]
        case (.carriedOut(.note), .noting(let ownership)): return writeOwner(ownership)
        case (.flawed(let reason), .examining(.release)):
            // The guest is whole where it came from, and nothing has happened here.
            return write(
                Refusal(record: .rolledBack(reason: reason), farewell: [.answer(.refused(reason))], fallback: .prepared)
            )
        case (.flawed(let reason), .examining(.taken)):
            state = .prepared
            return [.complain("The guest cannot run here: \(reason)")]
        case (.failed(let reason), .examining), (.failed(let reason), .noting):
            state = .prepared
            return [.complain(reason)]
        default: return unexpected(event)
        }
    }

    private mutating func examine(_ claim: Claim) -> [Action] {
        state = .examining(claim)
        return [.carryOut(.examine(claim))]
    }

    private mutating func writeOwner(_ ownership: Ownership) -> [Action] {
        state = .writingOwner(ownership)
        return [.append(ownership.record)]
    }

    // MARK: - `owner`

    private mutating func claiming(_ event: Event, _ ownership: Ownership) -> [Action] {
        switch event {
        case .durable:
            state = .owner(ownership)
            return [.admit]
        case .notWritten(let reason) where !ownership.isInDoubt:
            state = .prepared
            return [.complain(reason)]
        case .notWritten(let reason), .doubtful(let reason):
            var ownership = ownership
            ownership.isInDoubt = true
            state = .ownerInDoubt(ownership)
            return [.complain(reason)]
        default: return unexpected(event)
        }
    }

    private mutating func doubting(_ event: Event, _ ownership: Ownership) -> [Action] {
        switch event {
        case .release: return writeOwner(ownership)
        case .take where isSourceHere:
            return [.complain("The source is connected and can decide itself: run 'crossdock recover' there")]
        case .take(let by):
            var ownership = ownership
            ownership.takenBy = by
            return writeOwner(ownership)
        case .overruled(let by):
            // The only record that outweighs `owner`, and the guest has not run here.
            return write(Refusal(record: .overruled(by: by), farewell: [.answer(.overruled(by))], fallback: state))
        default: return unexpected(event)
        }
    }

    private mutating func owning(_ event: Event, _ ownership: Ownership) -> [Action] {
        let isAdmitted = if case .owned = state { true } else { false }
        switch event {
        case .release, .tryAgain: return isAdmitted ? event == .tryAgain ? [] : [.answer(.owned)] : [.admit]
        case .resumed where !isAdmitted:
            state = isSourceHere ? .owned(ownership) : .done(takenBy: ownership.takenBy)
            return [.collectDigests, .answer(.owned)] + (isSourceHere ? [] : [.finish])
        case .notResumed(let reason) where !isAdmitted:
            // Without a source nobody asks again.
            return [.complain(reason)] + (isSourceHere ? [] : [.tryLater])
        case .emulatorEnded where !isAdmitted:
            // Nothing can be resumed; the images are complete and the guest may be started here.
            state = .done(takenBy: ownership.takenBy)
            return [.finish, .answer(.owned)]
        case .done where isAdmitted:
            state = .done(takenBy: ownership.takenBy, isSettled: true)
            return [.noteConfirmation, .finish, .answer(.done)]
        case .connectionLost where isAdmitted:
            state = .done(takenBy: ownership.takenBy)
            return [.finish]
        case .connectionLost: return [.tryLater]
        case .overruled(let by):
            // What an agent that starts finds to take up it may remove: nothing is left for it first.
            state = .writingOverruled(by: by)
            return [.finish, .append(.overruled(by: by))]
        default: return unexpected(event)
        }
    }

    // MARK: - Refusing

    private mutating func refusing(_ event: Event, _ refusal: Refusal) -> [Action] {
        switch event {
        case .durable:
            state = refusal.end
            return [.cleanUp(refusal.reason)] + refusal.farewell
        case .notWritten(let reason), .doubtful(let reason):
            if case .aborted = refusal.fallback {
                // The source has not heard that it may count on anything here, and asks again.
                state = refusal.fallback
                return [.cleanUp(refusal.reason), .close(reason)]
            }
            if case .doubtful = event {
                state = .rolledBackInDoubt(refusal)
            } else {
                state = refusal.fallback
            }
            if case .rolledBackInDoubt = state, !isSourceHere { return [.close(reason), .tryLater] }
            return [.close(reason)]
        default: return unexpected(event)
        }
    }

    /// The record may be there, so that nothing else than it may follow; everything is kept until it is durable.
    private mutating func refusingAgain(_ event: Event, _ refusal: Refusal) -> [Action] {
        func again(_ farewell: [Action], _ record: JournalRecord? = nil) -> Refusal {
            var next = Refusal(record: record ?? refusal.record, farewell: farewell, fallback: .new)
            next.fallback = .rolledBackInDoubt(next)
            return next
        }
        switch event {
        case .release: return write(again([.answer(.refused(refusal.reason))]))
        case .abort(let reason): return write(again([.answer(.abort(reason))]))
        case .overruled(let by): return write(again([.answer(.overruled(by))], .overruled(by: by)))
        case .tryAgain: return write(again([]))
        case .connectionLost: return [.tryLater]
        default: return unexpected(event)
        }
    }

    // MARK: - After the last word

    private mutating func ended(_ event: Event) -> [Action] {
        switch (event, state) {
        case (.release, .done): return [.answer(.owned)]
        case (.done, .done(let by, isSettled: false)):
            state = .done(takenBy: by, isSettled: true)
            return [.noteConfirmation, .answer(.done)]
        case (.done, .done): return [.answer(.done)]
        case (.overruled, .done(_, isSettled: true)):
            return [.complain("The guest belongs to this host, and its source has confirmed that")]
        case (.overruled(let by), .done):
            state = .writingOverruled(by: by)
            return [.append(.overruled(by: by))]
        case (.durable, .writingOverruled(let by)):
            state = .overruled(by: by, wasOwner: true)
            return [.warn(overruledBy: by), .answer(.overruled(by))]
        case (.notWritten(let reason), .writingOverruled), (.doubtful(let reason), .writingOverruled):
            state = .done(takenBy: nil)
            return [.close(reason)]
        case (.release, .aborted(let reason, .durable)): return [.answer(.refused(reason))]
        case (.release, .aborted(_, .none)): return [.complain("This migration was not begun here")]
        case (.release, .aborted(let reason, .missing)):
            return write(
                Refusal(record: .rolledBack(reason: reason), farewell: [.answer(.refused(reason))], fallback: state)
            )
        case (.abort(let reason), .aborted(_, .durable)), (.abort(let reason), .aborted(_, .none)):
            return [.answer(.abort(reason))]
        case (.abort(let answer), .aborted(let reason, .missing)):
            return write(
                Refusal(record: .rolledBack(reason: reason), farewell: [.answer(.abort(answer))], fallback: state)
            )
        case (.overruled(let by), .aborted(_, .none)), (.overruled(let by), .overruled):
            return [.answer(.overruled(by))]
        case (.overruled(let by), .aborted):
            return write(Refusal(record: .overruled(by: by), farewell: [.answer(.overruled(by))], fallback: state))
        default: return unexpected(event)
        }
    }
}

// MARK: - What others ask

extension DestinationHandover {
    /// What WELCOME says.
    package var onWire: DestinationState {
        switch state {
        case .stuck, .new: .new
        case .offered, .ready, .settling, .writingPrepared: .offered
        case .prepared, .examining, .noting, .writingOwner, .ownerInDoubt, .rolledBackInDoubt: .prepared
        case .owner, .owned: .owner
        case .done, .writingOverruled, .overruled(_, wasOwner: true): .done
        case .writingRolledBack, .aborted, .overruled(_, wasOwner: false): .aborted
        }
    }

    /// Who took the guest for this host without the source's word.
    var takenBy: String? {
        switch state {
        case .owner(let ownership), .owned(let ownership): ownership.takenBy
        case .done(let takenBy, _): takenBy
        default: nil
        }
    }

    /// Whether nothing is left to do.
    var isOver: Bool {
        switch state {
        case .done, .aborted, .overruled: true
        case .new: !isSourceHere
        default: false
        }
    }

    /// Whether the migration is not taken up yet after a restart.
    var isStuck: Bool { state == .stuck }

    /// Whether the guest may still be filled, and given up at any time.
    var isOpen: Bool {
        switch state {
        case .offered, .ready: true
        default: false
        }
    }
}

extension DestinationHandover.Event {
    /// The message that it is, for sentences.
    var message: String? {
        switch self {
        case .offer: "OFFER"
        case .rehearsed: "REHEARSED"
        case .mirrored: "MIRRORED"
        case .stream: "STREAM"
        case .prepare: "PREPARED"
        case .release: "RELEASE"
        case .done: "DONE"
        case .abort: "ABORT"
        case .overruled: "OVERRULED"
        default: nil
        }
    }
}
