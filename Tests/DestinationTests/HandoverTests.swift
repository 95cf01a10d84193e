import Emulator
import Migration
import Testing

@testable import Destination

/// The rules of `docs/model/README.md`, one test for each that is the destination's.
struct HandoverTests {
    typealias Event = DestinationHandover.Event
    typealias Action = DestinationHandover.Action

    /// A handover and whoever drives it.
    final class Driven {
        private var handover: DestinationHandover

        init(_ state: DestinationHandover.State = .new) { handover = DestinationHandover(state) }

        var state: DestinationHandover.State { handover.state }
        var isOver: Bool { handover.isOver }
        var isStuck: Bool { handover.isStuck }
        var takenBy: String? { handover.takenBy }
        var onWire: DestinationState { handover.onWire }

        func handle(_ event: Event) -> [Action] { handover.handle(event) }
    }

    /// A handover after some events, of a source that is connected.
    func handover(_ events: [Event]) -> Driven {
        let driven = Driven()
        for event in [.connected] + events { _ = driven.handle(event) }
        return driven
    }

    static let ready: [Event] = [
        .offer(isRehearsal: false), .carriedOut(.begin), .carriedOut(.judge), .rehearsed, .carriedOut(.build),
    ]
    static let settled =
        ready + [.mirrored, .carriedOut(.mirror), .stream, .carriedOut(.listen), .prepare, .carriedOut(.settle)]
    static let prepared: [Event] = settled + [.durable]
    static let release = Event.release(.init())
    static let sound = Event.sound(digests: [:], stands: false)
    static let writingOwner: [Event] = prepared + [release, sound]
    static let inDoubt: [Event] = writingOwner + [.doubtful("EIO")]
    static let owner: [Event] = writingOwner + [.durable]
    static let owned: [Event] = owner + [.resumed]

    @Test func aMoveWithoutFaultsEndsWithTheGuestHere() {
        let handover = handover([])
        let steps: [(Event, [Action])] = [
            (.offer(isRehearsal: false), [.carryOut(.begin)]), (.carriedOut(.begin), [.carryOut(.judge)]),
            (.carriedOut(.judge), [.answer(.shadow)]), (.rehearsed, [.carryOut(.build)]),
            (.carriedOut(.build), [.answer(.ready([]))]), (.mirrored, [.carryOut(.mirror)]),
            (.carriedOut(.mirror), [.answer(.mirrored)]), (.stream, [.carryOut(.listen)]),
            (.carriedOut(.listen), [.answer(.stream)]), (.prepare, [.carryOut(.settle)]),
            (.carriedOut(.settle), [.append(.prepared)]), (.durable, [.readBack, .answer(.prepared)]),
            (Self.release, [.carryOut(.examine(.release(.init())))]), (Self.sound, [.append(.owner(digests: [:]))]),
            (.durable, [.admit]), (.resumed, [.collectDigests, .answer(.owned)]),
            (.done, [.noteConfirmation, .finish, .answer(.done)]),
        ]
        for (event, actions) in steps { #expect(handover.handle(event) == actions, "\(event)") }
        #expect(handover.state == .done(takenBy: nil, isSettled: true) && handover.isOver)
    }

    // MARK: The rules

    @Test func R4_theGuestRunsOnlyAfterOwnerIsDurable() {
        for outcome in [Event.notWritten("ENOSPC"), .doubtful("EIO")] {
            let handover = handover(Self.writingOwner)
            #expect(!handover.handle(outcome).contains(.admit))
        }
        let handover = handover(Self.writingOwner)
        #expect(handover.handle(.durable) == [.admit])
        // And there is no other way to it.
        let admitting = Set(DestinationHandover.transitions.filter { $0.to == .owner && $0.from != .owner })
        #expect(Set(admitting.map(\.from)) == [.writingOwner, .stuck])
    }

    @Test func R5_RELEASE_ownerNeedsReleaseOrAnOperatorsWord() {
        let towards = DestinationHandover.transitions.filter { $0.to == .examining && $0.from != .examining }
        #expect(Set(towards.map(\.event)) == [.release, .take] && Set(towards.map(\.from)) == [.prepared])
        let writing = DestinationHandover.transitions.filter { $0.to == .writingOwner && $0.from != .writingOwner }
        #expect(Set(writing.map(\.from)) == [.examining, .noting, .ownerInDoubt])
    }

    @Test func R5_ROLLEDBACK_ownerNeedsThatThereIsNoRolledBack() {
        // Not even one that may be there.
        let handover = handover(Self.prepared + [.abort("no"), .doubtful("EIO")])
        #expect(handover.handle(Self.release) == [.append(.rolledBack(reason: "no"))])
        #expect(handover.handle(.durable) == [.cleanUp("no"), .answer(.refused("no"))])
        let reached = DestinationHandover.transitions.filter {
            [.writingRolledBack, .rolledBackInDoubt, .aborted].contains($0.from)
        }
        #expect(!reached.contains { [.examining, .noting, .writingOwner, .owner, .owned].contains($0.to) })
    }

    @Test func R5_LOADED_ownerNeedsAGuestThatIsWhole() {
        let handover = handover(Self.prepared + [Self.release])
        #expect(handover.handle(.flawed("damaged")) == [.append(.rolledBack(reason: "damaged"))])
    }

    @Test func R6_abortIsAnsweredOnceRolledBackIsDurable() {
        for state in [Self.ready, Self.prepared] {
            let handover = handover(state)
            #expect(handover.handle(.abort("no")) == [.append(.rolledBack(reason: "no"))])
            #expect(handover.handle(.durable) == [.cleanUp("no"), .answer(.abort("no"))])
        }
        for outcome in [Event.notWritten("ENOSPC"), .doubtful("EIO")] {
            for state in [Self.ready, Self.prepared] {
                let handover = handover(state + [.abort("no")])
                #expect(!handover.handle(outcome).contains { if case .answer = $0 { true } else { false } })
                // It is asked again, and then written.
                #expect(handover.handle(.abort("no")) == [.append(.rolledBack(reason: "no"))])
            }
        }
    }

    @Test func R6_REFUSED_releaseIsRefusedOnceRolledBackIsDurable() {
        let handover = handover(Self.prepared + [Self.release, .flawed("damaged")])
        #expect(handover.handle(.durable) == [.cleanUp("damaged"), .answer(.refused("damaged"))])
        #expect(handover.handle(Self.release) == [.answer(.refused("damaged"))])
    }

    @Test func R6_REFUSE_aDestinationWhoseQEMUDiedBeforeOwnerRefuses() {
        let handover = handover(Self.prepared + [.emulatorEnded("killed", isCut: false)])
        #expect(handover.state == .prepared)
        #expect(handover.handle(Self.release) == [.carryOut(.examine(.release(.init())))])
        _ = handover.handle(.flawed("QEMU has ended"))
        #expect(handover.handle(.durable).contains(.answer(.refused("QEMU has ended"))))
    }

    @Test func R11_preparedIsAnsweredOnceItIsDurable() {
        let handover = handover(Self.settled)
        #expect(handover.handle(.durable) == [.readBack, .answer(.prepared)])
        #expect(handover.handle(.prepare) == [.answer(.prepared)])
        for outcome in [Event.notWritten("ENOSPC"), .doubtful("EIO")] {
            let handover = self.handover(Self.settled)
            guard case .append(.rolledBack) = handover.handle(outcome).first else {
                Issue.record("It does not give up")
                continue
            }
            #expect(handover.state.kind == .writingRolledBack)
        }
    }

    @Test func R11_WAIT_inPreparedItNeverGivesUpByItself() {
        let events: [Event] = [
            .connectionLost, .absenceEnded("5 min"), .agentStops, .emulatorEnded("killed", isCut: false), .tryAgain,
        ]
        for event in events {
            let handover = self.handover(Self.prepared)
            #expect(handover.handle(event) == [], "\(event)")
            #expect(handover.state == .prepared)
        }
        // What fails in it is told, and changes nothing.
        let handover = handover(Self.prepared + [Self.release])
        #expect(handover.handle(.failed("no monitor")) == [.complain("no monitor")])
        #expect(handover.state == .prepared)
    }

    @Test func R11_RESUME_afterARestartWithOwnerItResumesTheGuest() {
        let standings: [DestinationStanding] = [.owner(digests: [:]), .taken(by: "root", digests: [:])]
        for standing in standings {
            let handover = Driven(.stuck)
            #expect(handover.handle(.tryAgain) == [.carryOut(.takeUp)])
            #expect(handover.handle(.restarted(standing, wasReady: true)) == [.admit])
            // Again and again, and it does not give the guest back.
            #expect(handover.handle(.notResumed("refused")) == [.complain("refused"), .tryLater])
            #expect(handover.handle(.tryAgain) == [.admit])
            #expect(handover.handle(.resumed) == [.collectDigests, .answer(.owned), .finish])
            #expect(handover.isOver)
        }
    }

    /// What a restart finds is all that counts: nothing that the earlier agent knew has to be guessed.
    @Test func R14_afterARestartTheJournalAloneDecides() {
        func restart(_ standing: DestinationStanding, wasReady: Bool) -> (Driven, [Action]) {
            let handover = Driven(.stuck)
            let actions = handover.handle(.restarted(standing, wasReady: wasReady))
            return (handover, actions)
        }
        #expect(restart(.accepted, wasReady: true).0.state == .ready)
        #expect(restart(.accepted, wasReady: false).0.state.kind == .writingRolledBack)
        #expect(restart(.prepared, wasReady: true).1 == [.carryOut(.adopt)])
        #expect(restart(.rolledBack(reason: "no"), wasReady: true).1 == [.cleanUp("no")])
        // A journal that cannot be made durable now is tried again, and nothing is done on it.
        let handover = Driven(.stuck)
        #expect(handover.handle(.failed("EIO")) == [.tryLater])
        #expect(handover.isStuck && !handover.isOver)
    }

    @Test func R16_inDoubtAboutOwnerItDoesNotRefuseButWritesOwnerAgain() {
        for event in [
            Event.abort("no"), .prepare, .emulatorEnded("killed", isCut: false), .agentStops, .connectionLost,
        ] {
            let handover = handover(Self.inDoubt)
            #expect(!handover.handle(event).contains { if case .append = $0 { true } else { false } }, "\(event)")
            #expect(handover.state.kind == .ownerInDoubt)
        }
        let handover = handover(Self.inDoubt)
        // Without another look: what is wrong with the guest now cannot take it back.
        #expect(handover.handle(Self.release) == [.append(.owner(digests: [:]))])
        // A record that could not be written this time may still be there from the first.
        _ = handover.handle(.notWritten("ENOSPC"))
        #expect(handover.state.kind == .ownerInDoubt)
        _ = handover.handle(Self.release)
        #expect(handover.handle(.durable) == [.admit])
    }

    // MARK: The guest's own state

    @Test func thatAGuestStandsIsNotedBeforeItBelongsToThisHost() {
        let handover = handover(Self.prepared + [Self.release])
        #expect(handover.handle(.sound(digests: [:], stands: true)) == [.carryOut(.note)])
        #expect(handover.handle(.carriedOut(.note)) == [.append(.owner(digests: [:]))])
        let failing = self.handover(Self.prepared + [Self.release, .sound(digests: [:], stands: true)])
        #expect(failing.handle(.failed("ENOSPC")) == [.complain("ENOSPC")])
        #expect(failing.state == .prepared)
    }

    @Test func aGuestIsResumedOnceHoweverOftenTheSourceAsks() {
        let handover = handover(Self.owned)
        #expect(handover.handle(Self.release) == [.answer(.owned)])
        #expect(handover.handle(.tryAgain) == [])
    }

    @Test func anOwnerWhoseQEMUHasEndedStillOwns() {
        let handover = handover(Self.owner)
        #expect(handover.handle(.emulatorEnded("killed", isCut: false)) == [.finish, .answer(.owned)])
        #expect(handover.handle(Self.release) == [.answer(.owned)])
        #expect(handover.handle(.abort("no")) == [.close("ABORT failed: ABORT is not due in state done")])
    }

    // MARK: The network, and the agent's end

    @Test func aLostSourceIsWaitedForOnceReadyWasSaid() {
        let early = handover(Array(Self.ready.dropLast()))
        guard case .append(.rolledBack) = early.handle(.connectionLost).first else {
            Issue.record("It does not give up")
            return
        }
        let handover = handover(Self.ready)
        #expect(handover.handle(.connectionLost) == [.waitForSource])
        #expect(handover.handle(.connected) == [.stopWaiting])
        // The timer had fired already, and waited for its turn.
        #expect(handover.handle(.absenceEnded("5 min")) == [])
        _ = handover.handle(.connectionLost)
        guard case .append(.rolledBack) = handover.handle(.absenceEnded("5 min")).first else {
            Issue.record("It does not give up")
            return
        }
    }

    @Test func aRehearsalLeavesNoRecord() {
        let handover = handover([
            .offer(isRehearsal: true), .carriedOut(.begin), .carriedOut(.judge), .rehearsed, .carriedOut(.build),
        ])
        #expect(handover.handle(.abort("that was all")) == [.cleanUp("that was all"), .answer(.abort("that was all"))])
    }

    @Test func aRecordThatIsInDoubtIsWrittenAgainWithoutASource() {
        let handover = handover(Self.prepared + [.abort("no"), .doubtful("EIO")])
        #expect(handover.handle(.connectionLost) == [.tryLater])
        #expect(handover.handle(.tryAgain) == [.append(.rolledBack(reason: "no"))])
        #expect(handover.handle(.durable) == [.cleanUp("no")])
    }

    // MARK: The operators

    @Test func anOperatorTakesOnlyWhatASourceThatIsAwayHasPrepared() {
        let handover = self.handover(Self.prepared)
        guard case .complain = handover.handle(.take(by: "root")).first else {
            Issue.record("It was taken from a source that is connected")
            return
        }
        _ = handover.handle(.connectionLost)
        #expect(handover.handle(.take(by: "root")) == [.carryOut(.examine(.taken(by: "root")))])
        #expect(handover.handle(Self.sound) == [.append(.taken(by: "root"))])
        #expect(handover.handle(.durable) == [.admit])
        #expect(handover.handle(.resumed) == [.collectDigests, .answer(.owned), .finish])
        #expect(handover.takenBy == "root")
        // What is flawed stays as it is: the source may be alive.
        let flawed = self.handover(Self.prepared + [.connectionLost, .take(by: "root")])
        #expect(flawed.handle(.flawed("damaged")) == [.complain("The guest cannot run here: damaged")])
        #expect(flawed.state == .prepared)
    }

    @Test func anOverruledHostNeverRunsWhatItDoesNotOwnYet() {
        for state in [Self.ready, Self.prepared, Self.inDoubt] {
            let handover = handover(state)
            #expect(handover.handle(.overruled(by: "root")) == [.append(.overruled(by: "root"))])
            let actions = handover.handle(.durable)
            #expect(actions.count == 2 && actions.last == .answer(.overruled("root")))
            guard case .cleanUp = actions.first else {
                Issue.record("Something is left")
                continue
            }
            #expect(handover.state == .overruled(by: "root", wasOwner: false))
            // Its source has nothing to fear when it asks again.
            #expect(handover.onWire == .aborted)
            #expect(!handover.handle(Self.release).contains(.answer(.owned)))
        }
    }

    @Test func anOverruledOwnerIsNotTouched() {
        for state in [Self.owner, Self.owned, Self.owned + [.connectionLost]] {
            let handover = handover(state)
            // An agent that starts removes what it finds to take up: that is gone before the record is there.
            #expect(
                handover.handle(.overruled(by: "root")).filter { $0 != .finish } == [.append(.overruled(by: "root"))]
            )
            let actions = handover.handle(.durable)
            #expect(actions == [.warn(overruledBy: "root"), .answer(.overruled("root"))])
            #expect(handover.handle(.overruled(by: "root")) == [.answer(.overruled("root"))])
            #expect(handover.onWire == .done)
        }
    }

    @Test func whoHasConfirmedThatTheGuestIsHereCannotTakeItBack() {
        for state in [Self.owned + [.done], Self.owned + [.connectionLost, .done]] {
            let handover = handover(state)
            let actions = handover.handle(.overruled(by: "root"))
            guard case .complain(let reason)? = actions.first, actions.count == 1 else {
                Issue.record("\(actions)")
                continue
            }
            #expect(reason.contains("its source has confirmed that"))
            #expect(handover.state == .done(takenBy: nil, isSettled: true))
        }
    }

    // MARK: The transitions

    @Test func everyStateIsReachedAndEveryEventMatters() {
        let transitions = DestinationHandover.transitions
        #expect(Set(transitions.map(\.to)) == Set(DestinationHandover.StateKind.allCases))
        #expect(Set(transitions.map(\.event)) == Set(DestinationHandover.EventKind.allCases))
    }

    @Test func nothingLeadsBackFromTheLastWordButAnotherOne() {
        let last: Set<DestinationHandover.StateKind> = [
            .done, .writingOverruled, .overruled, .aborted, .writingRolledBack, .rolledBackInDoubt,
        ]
        let leaving = DestinationHandover.transitions.filter {
            [.done, .overruled, .aborted].contains($0.from) && !last.contains($0.to)
        }
        #expect(leaving.isEmpty)
    }
}
