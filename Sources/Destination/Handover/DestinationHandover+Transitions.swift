internal import Emulator
internal import Migration

extension DestinationHandover {
    /// A state without its data.
    enum StateKind: String, Sendable, Hashable, CaseIterable {
        case stuck, new, offered, ready, settling, writingPrepared, prepared, examining, noting, writingOwner,
            ownerInDoubt
        case owner, owned, done, writingOverruled, writingRolledBack, rolledBackInDoubt, aborted, overruled
    }

    /// An event without its data.
    enum EventKind: String, Sendable, Hashable, CaseIterable {
        case offer, rehearsed, mirrored, stream, prepare, release, done, abort, overruled, connected, connectionLost
        case absenceEnded, emulatorEnded, take, agentStops, tryAgain, carriedOut, refused, failed, sound, flawed,
            durable
        case notWritten, doubtful, resumed, notResumed, restarted, superseded
    }

    /// That an event can lead from one state to another.
    struct Transition: Sendable, Hashable {
        let from: StateKind
        let event: EventKind
        let to: StateKind
    }

    /// Every transition that there is: the value is driven with every event in every state that it can be driven into.
    static var transitions: Set<Transition> {
        var found: Set<Transition> = []
        var known: Set<DestinationHandover> = [DestinationHandover(), DestinationHandover(.stuck)]
        var open = Array(known)
        while let handover = open.popLast() {
            for event in Event.samples where handover.isAwaiting(event) {
                var next = handover
                _ = next.handle(event)
                found.insert(Transition(from: handover.state.kind, event: event.kind, to: next.state.kind))
                if known.insert(next).inserted { open.append(next) }
            }
        }
        return found
    }

    /// Whether an event can come now: what becomes of an action only while it is under way, and nothing else meanwhile.
    func isAwaiting(_ event: Event) -> Bool {
        switch (state, event) {
        case (.writingPrepared, .durable), (.writingPrepared, .notWritten), (.writingPrepared, .doubtful),
            (.writingOwner, .durable), (.writingOwner, .notWritten), (.writingOwner, .doubtful),
            (.writingRolledBack, .durable), (.writingRolledBack, .notWritten), (.writingRolledBack, .doubtful),
            (.writingOverruled, .durable), (.writingOverruled, .notWritten), (.writingOverruled, .doubtful):
            true
        case (.writingPrepared, _), (.writingOwner, _), (.writingRolledBack, _), (.writingOverruled, _): false
        case (_, .durable), (_, .notWritten), (_, .doubtful): false
        case (.settling, .carriedOut(.settle)), (.settling, .failed): true
        case (.settling, _): false
        case (.examining, .sound), (.examining, .flawed), (.examining, .failed): true
        case (.examining, _), (_, .sound), (_, .flawed): false
        case (.noting, .carriedOut(.note)), (.noting, .failed): true
        case (.noting, _): false
        case (.offered, .carriedOut(let step)): [.begin, .judge, .build].contains(step)
        case (.ready, .carriedOut(let step)): [.mirror, .listen, .reopen].contains(step)
        case (.stuck, .carriedOut(let step)): step == .adopt
        case (_, .carriedOut): false
        case (.offered, .refused), (.offered, .failed), (.ready, .failed), (.stuck, .failed): true
        case (_, .refused), (_, .failed): false
        case (.owner, .resumed), (.owner, .notResumed): true
        case (_, .resumed), (_, .notResumed): false
        case (.stuck, .restarted), (.stuck, .superseded), (.stuck, .tryAgain): true
        case (.stuck, _), (_, .restarted), (_, .superseded): false
        default: true
        }
    }
}

extension DestinationHandover.State {
    var kind: DestinationHandover.StateKind {
        switch self {
        case .stuck: .stuck
        case .new: .new
        case .offered: .offered
        case .ready: .ready
        case .settling: .settling
        case .writingPrepared: .writingPrepared
        case .prepared: .prepared
        case .examining: .examining
        case .noting: .noting
        case .writingOwner: .writingOwner
        case .ownerInDoubt: .ownerInDoubt
        case .owner: .owner
        case .owned: .owned
        case .done: .done
        case .writingOverruled: .writingOverruled
        case .writingRolledBack: .writingRolledBack
        case .rolledBackInDoubt: .rolledBackInDoubt
        case .aborted: .aborted
        case .overruled: .overruled
        }
    }
}

extension DestinationHandover.Event {
    var kind: DestinationHandover.EventKind {
        switch self {
        case .offer: .offer
        case .rehearsed: .rehearsed
        case .mirrored: .mirrored
        case .stream: .stream
        case .prepare: .prepare
        case .release: .release
        case .done: .done
        case .abort: .abort
        case .overruled: .overruled
        case .connected: .connected
        case .connectionLost: .connectionLost
        case .absenceEnded: .absenceEnded
        case .emulatorEnded: .emulatorEnded
        case .take: .take
        case .agentStops: .agentStops
        case .tryAgain: .tryAgain
        case .carriedOut: .carriedOut
        case .refused: .refused
        case .failed: .failed
        case .sound: .sound
        case .flawed: .flawed
        case .durable: .durable
        case .notWritten: .notWritten
        case .doubtful: .doubtful
        case .resumed: .resumed
        case .notResumed: .notResumed
        case .restarted: .restarted
        case .superseded: .superseded
        }
    }

    /// One of every kind that makes a difference.
    static let samples: [DestinationHandover.Event] = messages + surroundings + outcomes + steps + restarts

    private static let messages: [DestinationHandover.Event] = [
        .offer(isRehearsal: false), .offer(isRehearsal: true), .rehearsed, .mirrored, .stream, .prepare,
        .release(.init()),
        .done, .abort("x"), .overruled(by: "x"),
    ]
    private static let surroundings: [DestinationHandover.Event] = [
        .connected, .connectionLost, .absenceEnded("x"), .emulatorEnded("x", isCut: false),
        .emulatorEnded("x", isCut: true), .take(by: "x"), .agentStops, .tryAgain,
    ]
    private static let outcomes: [DestinationHandover.Event] = [
        .refused(["x"]), .failed("x"), .sound(digests: [:], stands: false), .sound(digests: [:], stands: true),
        .flawed("x"), .durable, .notWritten("x"), .doubtful("x"), .resumed, .notResumed("x"), .superseded,
    ]
    private static let steps: [DestinationHandover.Event] = [
        .carriedOut(.begin), .carriedOut(.judge), .carriedOut(.build), .carriedOut(.mirror), .carriedOut(.listen),
        .carriedOut(.settle), .carriedOut(.note), .carriedOut(.reopen), .carriedOut(.adopt),
    ]
    private static let standings: [DestinationStanding] = [
        .accepted, .prepared, .owner(digests: [:]), .taken(by: "x", digests: [:]), .overruled(by: "x"),
        .rolledBack(reason: "x"),
    ]
    private static let restarts: [DestinationHandover.Event] = standings.flatMap { standing in
        [false, true].map { DestinationHandover.Event.restarted(standing, wasReady: $0) }
    }
}
