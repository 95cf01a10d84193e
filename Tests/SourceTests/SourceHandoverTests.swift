import Emulator
import Migration
import Testing

@testable import Source

/// The rules of ownership at the host that a guest leaves, in memory. The names in brackets are those of `docs/model/README.md`.
@Suite(.timeLimit(.minutes(1)))
struct SourceHandoverTests {
    static let reason = MigrationError(.failed, "a test")
    static let pause = SourceHandover.Pause(since: .now, guest: .running)
    static let rollBack = SourceHandover.RollBack(reason: reason, hasTouchedGuest: true, telling: .needed)

    /// The way of a migration in which nothing goes wrong.
    static let way: [SourceHandover.Event] = [
        .checked, .rehearsed, .ready, .inSync, .stopped(pause), .mirrorsEnded, .prepared, .completed, .fenced, .frozen,
        .stoodStill, .written, .owned, .finished,
    ]

    /// The handover after so many steps of that way.
    private func handover(after count: Int) -> SourceHandover {
        var handover = SourceHandover.checking
        for event in Self.way.prefix(count) { handover.take(event) }
        return handover
    }

    private func kinds(_ handover: SourceHandover, _ events: [SourceHandover.Event]) -> [SourceHandover.Kind] {
        var handover = handover
        return events.map {
            handover.take($0)
            return handover.kind
        }
    }

    @Test func theWayOfAMigrationInWhichNothingGoesWrong() {
        #expect(
            kinds(.checking, Self.way) == [
                .offering, .readying, .copying, .sending, .paused, .asking, .continuing, .completed, .fenced, .frozen,
                .releasing, .released, .owned, .over,
            ]
        )
    }

    @Test func everyStateHasADutyButTheLast() {
        for count in 0..<Self.way.count { #expect(handover(after: count).duty != nil, "after \(count) steps") }
        #expect(handover(after: Self.way.count).duty == nil)
    }

    /// [R2] RELEASE is sent once RELEASED is durable, and nothing else leads there.
    @Test func onlyADurableReleasedLeadsToRelease() {
        for kind in SourceHandover.Kind.allCases {
            guard case .release? = Self.example(kind).duty else { continue }
            #expect(kind == .released)
        }
        var releasing = Self.example(.releasing)
        releasing.take(.written)
        #expect(releasing.kind == .released)
        for kind in SourceHandover.Kind.allCases where kind != .releasing {
            for event in Self.everyEvent {
                var handover = Self.example(kind)
                handover.take(event)
                #expect(kind == .released || handover.kind != .released, "\(kind) \(event)")
            }
        }
    }

    /// [R3] RELEASED is written only after QEMU has completed the migration.
    @Test func releasedIsWrittenOnlyAfterCompleted() {
        for kind in SourceHandover.Kind.allCases where kind != .frozen {
            for event in Self.everyEvent {
                var handover = Self.example(kind)
                handover.take(event)
                #expect(kind == .releasing || handover.kind != .releasing, "\(kind) \(event)")
            }
        }
        let way = kinds(.checking, Self.way)
        #expect(way.firstIndex(of: .completed)! < way.firstIndex(of: .releasing)!)
    }

    /// The fence comes first, then QEMU stands still and is looked at once more, then RELEASED.
    @Test func theFenceAndTheFreezeComeBeforeReleased() {
        let way = kinds(.checking, Self.way)
        #expect(Array(way[7...11]) == [.completed, .fenced, .frozen, .releasing, .released])
    }

    /// [R1, R7] Once RELEASED may be found, no failure, deadline or cancellation makes the guest this host's again.
    @Test(arguments: [SourceHandover.Kind.inDoubt, .released, .owned, .reclaiming])
    func noFailureGivesAReleasedGuestBack(_ kind: SourceHandover.Kind) {
        var handover = Self.example(kind)
        handover.take(.failed(Self.reason))
        #expect(handover.kind == kind)
        #expect(!handover.mayBeInterrupted && handover.isReleased)
    }

    @Test(arguments: SourceHandover.Kind.allCases.filter { Self.example($0).mayBeInterrupted })
    func everyFailureBeforeReleasedBringsTheGuestBack(_ kind: SourceHandover.Kind) {
        var handover = Self.example(kind)
        handover.take(.failed(Self.reason))
        #expect(handover.kind == .restoring && !handover.isReleased)
    }

    /// [R7] REFUSED gives the guest back, and only once RECLAIMED is durable.
    @Test func aRefusedGuestIsResumedOnlyOnceReclaimedIsDurable() {
        var handover = Self.example(.released)
        handover.take(.refused("it is not what was sent"))
        #expect(handover.kind == .reclaiming && handover.isReleased)
        handover.take(.restored(true))
        #expect(handover.kind == .reclaiming)
        handover.take(.written)
        #expect(handover.kind == .restoring && !handover.isReleased)
    }

    /// [R8] A doubtful RELEASED is never sent on, and the guest waits until the destination has given it up.
    @Test func aDoubtfulReleasedIsNeitherSentNorForgotten() {
        var handover = Self.example(.releasing)
        handover.take(.doubtful(Self.reason))
        guard case .abandon = handover.duty else {
            Issue.record("\(handover)")
            return
        }
        for event in Self.everyEvent {
            var next = handover
            next.take(event)
            switch event {
            case .abandoned: #expect(next.kind == .reclaiming)
            case .overruled: #expect(next.kind == .over)
            default: #expect(next.kind == .inDoubt, "\(event)")
            }
        }
    }

    @Test func aReleasedThatWasNotWrittenAtAllIsNoRelease() {
        var handover = Self.example(.releasing)
        handover.take(.failed(Self.reason))
        #expect(handover.kind == .restoring)
    }

    /// [R11] Whoever was asked to prepare keeps everything until it is told, so it is told.
    @Test func aDestinationThatMayBePreparedIsTold() {
        for kind in SourceHandover.Kind.allCases where Self.example(kind).mayBeInterrupted {
            var handover = Self.example(kind)
            handover.take(.failed(Self.reason))
            guard case .restoring(let rollBack) = handover else { continue }
            let mayBePrepared: Set<SourceHandover.Kind> = [.asking, .continuing, .completed, .fenced, .frozen]
            #expect((rollBack.telling == .needed) == mayBePrepared.contains(kind), "\(kind)")
        }
    }

    @Test func aRollBackIsClosedOnlyWhenTheGuestIsBackAndTheDestinationKnows() {
        for (isRestored, isTold) in [(true, true), (true, false), (false, true), (false, false)] {
            var handover = SourceHandover.restoring(Self.rollBack)
            handover.take(.restored(isRestored))
            #expect(handover.kind == .telling)
            handover.take(.told(isTold))
            #expect((handover.kind == .closing) == (isRestored && isTold))
        }
    }

    @Test func theMemoryIsSentAgainAsLongAsTheMirrorsAreWhole() {
        let lost = SourceHandover.Event.memoryLost("the stream broke")
        #expect(kinds(Self.example(.sending), [lost, lost, .mayRetry]) == [.retrying, .retrying, .sending])
        // The loss may be noticed when the guest is paused already.
        #expect(kinds(.sending, [.stopped(Self.pause), lost, .mayRetry]) == [.paused, .retrying, .sending])
        // From PREPARED on another attempt would be another migration.
        var asking = Self.example(.asking)
        asking.take(lost)
        #expect(asking.kind == .asking)
        for kind in SourceHandover.Kind.allCases {
            var next = Self.example(kind)
            next.take(lost)
            #expect((next.kind == .retrying) == Self.example(kind).maySendAgain, "\(kind)")
        }
    }

    @Test func whatTheGuestWasDoingComesWithTheRelease() {
        var handover = SourceHandover.sending
        for event in [SourceHandover.Event.stopped(.init(since: nil, guest: .ioError))] + Self.way[5...11] {
            handover.take(event)
        }
        guard case .release(let pause)? = handover.duty else {
            Issue.record("\(handover)")
            return
        }
        #expect(pause.guest == .ioError && pause.since == nil)
    }

    /// A destination that was never asked to prepare cannot have been taken, whatever it says.
    @Test func anOperatorOfTheDestinationIsBelievedOnlyAfterPrepared() {
        for kind in SourceHandover.Kind.allCases where kind != .over {
            for telling in [SourceHandover.RollBack.Telling.needed, .helpful, .needless] {
                let rollBack = SourceHandover.RollBack(reason: Self.reason, hasTouchedGuest: true, telling: telling)
                var handover = SourceHandover.example(kind, Self.pause, rollBack)
                handover.take(.overruled(by: "root"))
                let isOverruled = if case .over(.overruled) = handover { true } else { false }
                let isBelieved = [.inDoubt, .released].contains(kind) || kind == .telling && telling == .needed
                #expect(isOverruled == isBelieved, "\(kind) \(telling)")
            }
        }
    }

    /// [R14] Recovery goes by the journal: without RELEASED the guest is brought back, with it the destination is asked.
    @Test(
        arguments: [
            (.open, .restoring), (.released, .released), (.reclaimed(reason: "x"), .restoring),
            (.taken(by: "x"), .restoring),
            (.confirmed, nil), (.rolledBack(reason: "x"), nil), (.overruled(by: "x"), nil),
        ] as [(SourceStanding, SourceHandover.Kind?)]
    )
    func recoveryGoesOnFromWhatTheJournalSays(_ standing: SourceStanding, _ kind: SourceHandover.Kind?) {
        let handover = SourceHandover.resuming(standing, guest: .paused, reason: Self.reason)
        #expect(handover?.kind == kind)
        #expect(handover.map { $0.isReleased } != .some(standing.mayRunHere))
    }

    // MARK: every state and every event

    static let everyEvent: [SourceHandover.Event] =
        way + [
            .rehearsalIsOver, .memoryLost("x"), .mayRetry, .doubtful(reason), .abandoned, .refused("x"),
            .restored(true),
            .restored(false), .told(true), .told(false), .overruled(by: "x"), .failed(reason),
        ]

    static func example(_ kind: SourceHandover.Kind) -> SourceHandover { .example(kind, pause, rollBack) }
}
