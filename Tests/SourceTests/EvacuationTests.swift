import IO
import Migration
import TLS
import TestSupport
import Testing

@testable import Source

/// The plan of an evacuation as a value: what it says is to be done next.
struct EvacuationTests {
    private let near = EvacuationOrder.Target(host: "near", port: 1)
    private let far = EvacuationOrder.Target(host: "far", port: 1)

    private func order(_ change: (inout EvacuationOrder) -> Void = { _ in }) -> EvacuationOrder {
        var order = EvacuationOrder(
            targets: [near, far],
            migration: MigrationPlan(id: "", guest: "", host: "", port: 0, stateDirectory: "/nowhere"),
            credentials: CredentialSelection(objects: [], tlsCreds: nil),
            directory: "/"
        )
        change(&order)
        return order
    }

    private func evacuation(
        _ names: [String],
        groups: [String: String] = [:],
        staying: [String: String] = [:],
        _ change: (inout EvacuationOrder) -> Void = { _ in }
    ) -> Evacuation {
        let guests = names.map {
            Evacuation.Guest(name: $0, memory: 1, disk: 1, group: groups[$0], targets: [near, far])
        }
        return Evacuation(id: "e", began: 0, order: order(change), guests: guests, staying: staying)
    }

    /// Carries out what is due as a conductor would. Returns the guests that were begun, with their targets.
    @discardableResult
    private func begin(_ evacuation: inout Evacuation, at now: Int = 0) -> [String] {
        evacuation.due(at: now).compactMap { step in
            guard case .begin(let guest, let target) = step else { return nil }
            evacuation.begun(guest, migration: "m-\(guest)", target: target)
            return "\(guest) \(target.host)"
        }
    }

    @Test func copiesAreAsManyAsWereAskedForAndTheNextBeginsWhenOneHasConverged() {
        var one = evacuation(["a", "b", "c", "d"])
        #expect(begin(&one) == ["a near"])
        #expect(begin(&one) == [])
        one.entered("a", .switching)
        #expect(begin(&one) == ["b near"])
        one.entered("b", .switching)
        // Two that have converged are enough: each of them pays for its writes.
        #expect(begin(&one) == [])
        one.ended("a", .migrated(blackoutMS: 20), at: 0)
        #expect(begin(&one) == ["c near"])
        var two = evacuation(["a", "b", "c"]) { $0.parallelCopies = 2 }
        #expect(begin(&two) == ["a near", "b near"])
    }

    @Test func theNextGuestGetsReadyWhileTheCopyBeforeItEnds() {
        var evacuation = evacuation(["a", "b", "c"])
        begin(&evacuation)
        for phase in [Evacuation.Phase.preparing, .copying] {
            evacuation.entered("a", phase)
            #expect(begin(&evacuation) == [])
        }
        #expect(evacuation.entered("a", .ending) && !evacuation.entered("a", .ending))
        #expect(begin(&evacuation) == ["b near"])
        // One that is ready is enough, however long the copy takes to end.
        #expect(begin(&evacuation) == [])
        evacuation.entered("a", .verifying)
        evacuation.entered("b", .copying)
        #expect(begin(&evacuation) == [])
        evacuation.cancel()
        #expect(evacuation.due(at: 0) == ["a", "b"].map { .giveUp(guest: $0, migration: "m-\($0)") })
    }

    @Test func theLatestIsTheOneThatWasBegunLastWhateverItsIdIs() throws {
        let directory = try TestDirectory()
        let files = EvacuationFiles(stateDirectory: directory.path)
        #expect(files.latest == nil)
        func save(_ id: String) throws {
            let known = evacuation(["a"])
            try files.save(Evacuation(id: id, began: 0, order: known.order, guests: [], staying: [:]))
        }
        // As an agent has left them that noted nothing.
        for id in ["1000-a", "1001-a"] { try save(id) }
        #expect(files.latest == "1001-a")
        // Its look took long, or the clock was set back.
        try save("999-a")
        try files.noteLatest("999-a")
        #expect(files.latest == "999-a" && files.ids == ["1000-a", "1001-a", "999-a"])
        try save("1000-0")
        try files.noteLatest("1000-0")
        #expect(files.latest == "1000-0")
        DurableFile.remove(files.directory(of: "1000-0"))
        #expect(files.latest == "999-a")
    }

    @Test func aPlaceForACopyIsTakenOnceAndIsFreeWhenItsHolderLetsItGo() throws {
        let directory = try TestDirectory()
        let files = EvacuationFiles(stateDirectory: directory.path)
        let first = try #require(try files.takePlace(of: 2))
        var second = try files.takePlace(of: 2)
        #expect(second != nil)
        #expect(try files.takePlace(of: 2) == nil)
        second = nil
        #expect(try files.takePlace(of: 2) != nil)
        #expect(try files.takePlace(of: 1) == nil)
        withExtendedLifetime(first) {}
    }

    @Test func aGuestThatCouldNotBeMovedIsTriedTwiceMoreLaterAndElsewhere() {
        var evacuation = evacuation(["a"])
        #expect(begin(&evacuation) == ["a near"])
        evacuation.ended("a", .failed(code: .unreachable, reason: "away"), at: 100)
        #expect(begin(&evacuation, at: 100) == [] && evacuation.nextTime == 105 && !evacuation.isOver)
        #expect(begin(&evacuation, at: 105) == ["a far"])
        evacuation.ended("a", .failed(code: .notConverged, reason: "busy"), at: 200)
        #expect(evacuation.nextTime == 210)
        #expect(begin(&evacuation, at: 210) == ["a near"])
        evacuation.ended("a", .failed(code: .failed, reason: "again"), at: 300)
        #expect(begin(&evacuation, at: 10_000) == [] && evacuation.isOver && evacuation.code == 20)
        #expect(evacuation.guests[0].standing == .stays(reason: "again"))
    }

    @Test func aTargetThatHasNoRoomIsNotAskedAgainAndCostsNoAttempt() {
        var evacuation = evacuation(["a"])
        #expect(begin(&evacuation) == ["a near"])
        evacuation.refused("a", by: near, reason: "no memory")
        #expect(begin(&evacuation) == ["a far"])
        evacuation.ended("a", .failed(code: .refused, reason: "no bridge"), at: 0)
        #expect(begin(&evacuation) == [])
        #expect(evacuation.guests[0].standing == .stays(reason: "near:1: no memory; far:1: no bridge"))
        #expect(evacuation.guests[0].failures == 0 && evacuation.code == 20)
    }

    @Test(arguments: [MigrationError.Code.guest, .security, .cancelled])
    func whatNoOtherHostChangesIsNotTriedAgain(_ code: MigrationError.Code) {
        var evacuation = evacuation(["a"])
        begin(&evacuation)
        evacuation.ended("a", .failed(code: code, reason: "so"), at: 0)
        #expect(evacuation.guests[0].standing == .stays(reason: "so") && evacuation.isOver)
    }

    @Test func anUndecidedGuestIsNeverSentElsewhere() {
        var evacuation = evacuation(["a", "b"])
        begin(&evacuation)
        evacuation.ended("a", .undecided, at: 0)
        #expect(begin(&evacuation, at: 100_000) == ["b near"])
        evacuation.ended("b", .migrated(blackoutMS: nil), at: 0)
        #expect(evacuation.isOver && evacuation.code == 20)
        #expect(evacuation.guests[0].standing == .undecided(migration: "m-a", target: near))
    }

    @Test func membersOfAGroupDoNotMeet() {
        let groups = ["a": "db", "b": "db", "c": "db"]
        var kept = evacuation(["a", "b", "c"], groups: groups) { $0.parallelCopies = 3 }
        #expect(begin(&kept) == ["a near", "b far"])
        guard case .stays(let reason) = kept.guests[2].standing else {
            Issue.record("\(kept.guests[2].standing)")
            return
        }
        #expect(reason.contains("group 'db'"))
        var ignored = evacuation(["a", "b", "c"], groups: groups) {
            ($0.parallelCopies, $0.ignoresAffinity) = (3, true)
        }
        #expect(begin(&ignored).count == 3)
    }

    @Test func aCancelledPlanGivesUpCopiesAndLetsSwitchoversEnd() {
        var evacuation = evacuation(["a", "b", "c"])
        begin(&evacuation)
        evacuation.entered("a", .switching)
        begin(&evacuation)
        evacuation.cancel()
        #expect(evacuation.due(at: 0) == [.giveUp(guest: "b", migration: "m-b")])
        #expect(evacuation.due(at: 0) == [] && !evacuation.isOver)
        evacuation.ended("b", .failed(code: .cancelled, reason: "cancelled"), at: 0)
        #expect(!evacuation.isOver)
        evacuation.ended("a", .migrated(blackoutMS: 1), at: 0)
        #expect(evacuation.isOver && evacuation.code == 23)
        #expect(evacuation.guests[2].standing == .planned)
    }

    @Test func afterTheDeadlineNothingIsBegun() {
        var evacuation = evacuation(["a", "b"]) { $0.deadline = 100 }
        begin(&evacuation, at: 99)
        #expect(evacuation.nextTime == 100)
        #expect(evacuation.due(at: 100) == [.giveUp(guest: "a", migration: "m-a")])
        evacuation.ended("a", .failed(code: .cancelled, reason: "cancelled"), at: 101)
        #expect(evacuation.isOver && evacuation.code == 22)
        // Nobody has cancelled anything.
        #expect(evacuation.guests[0].standing == .stays(reason: "the deadline was over before it could be paused"))
    }

    @Test func aFailureEndsItWhereThatWasAskedFor() {
        var evacuation = evacuation(["a", "b"]) { $0.onFailure = .stop }
        begin(&evacuation)
        evacuation.ended("a", .failed(code: .guest, reason: "so"), at: 0)
        #expect(begin(&evacuation) == [] && evacuation.isOver && evacuation.code == 20)
    }

    @Test func aHostWithGuestsThatStayIsNotEmpty() {
        var evacuation = evacuation(["a"], staying: ["b": "it is set to stay"])
        begin(&evacuation)
        evacuation.ended("a", .migrated(blackoutMS: 1), at: 0)
        #expect(evacuation.isOver && evacuation.code == 20)
        var empty = self.evacuation(["a"])
        begin(&empty)
        empty.ended("a", .migrated(blackoutMS: 1), at: 0)
        #expect(empty.code == 0)
    }

    @Test func whoGoesOnFindsThePlanAndAsksWhatBecameOfItsMigrations() throws {
        var evacuation = evacuation(["a", "b"])
        begin(&evacuation)
        evacuation.entered("a", .switching)
        var later = try #require(Evacuation(parsing: try evacuation.encoded()))
        #expect(later.guests[0].standing == .moving(migration: "m-a", target: near))
        // Whatever it was doing: nothing is begun before it is known.
        later.found("a", .copying)
        #expect(begin(&later) == [])
        later.ended("a", .migrated(blackoutMS: 3), at: 0)
        #expect(begin(&later) == ["b near"])
        #expect(Evacuation(parsing: Array("{\"version\":9}".utf8)) == nil)
    }

    // MARK: Placement

    private func guest(
        _ name: String,
        _ memory: UInt64,
        _ disk: UInt64 = 1,
        group: String? = nil,
        fits: [Int] = [0, 1]
    )
        -> Placement.Guest
    {
        .init(name: name, memory: memory, disk: disk, group: group, fits: fits)
    }

    @Test func theLargestIsPlacedFirstAndEachTakesItsRoom() {
        let hosts = [
            Placement.Host(name: "near", memory: 10, disk: 100), Placement.Host(name: "far", memory: 6, disk: 100),
        ]
        let found = Placement.propose([guest("s", 4), guest("l", 10), guest("m", 3)], on: hosts, .kept)
        #expect(found["l"] == .hosts([0, 1]))
        #expect(found["s"] == .hosts([1, 0]))
        guard case .none(let reason)? = found["m"] else {
            Issue.record("\(found)")
            return
        }
        #expect(reason.contains("near") && reason.contains("far") && reason.contains("of memory left"))
        #expect(
            Placement.propose([guest("x", 1, fits: [])], on: hosts, .kept)["x"]
                == Placement.Proposal.none("no host can run it")
        )
    }

    @Test func aGroupIsSpreadAndMeetsOnlyWhereThatIsPermitted() {
        let hosts = [Placement.Host(name: "near"), Placement.Host(name: "far")]
        let members = ["a", "b", "c"].map { guest($0, 1, group: "db") }
        let kept = Placement.propose(members, on: hosts, .kept)
        #expect(kept["a"] == .hosts([0, 1]) && kept["b"] == .hosts([1, 0]))
        guard case .none(let reason)? = kept["c"] else {
            Issue.record("\(kept)")
            return
        }
        #expect(reason.contains("group 'db'") && reason.contains("--ignore-affinity"))
        #expect(Placement.propose(members, on: hosts, .ignored)["c"] == .hosts([0, 1]))
    }

    @Test func whoIsOnAHostAlreadyKeepsOthersOfItsGroupAway() {
        let guest = Placement.Guest(name: "db2", memory: 1, disk: 1, group: "db", fits: [0, 1, 2])
        let hosts = [
            Placement.Host(name: "near", groups: ["db": 1]), Placement.Host(name: "far"),
            Placement.Host(name: "spare", groups: ["db": 2]),
        ]
        #expect(Placement.propose([guest], on: hosts, .kept) == ["db2": .hosts([1])])
        #expect(Placement.propose([guest], on: hosts, .ignored) == ["db2": .hosts([1, 0, 2])])
        let other = Placement.Guest(name: "db3", memory: 1, disk: 1, group: "db", fits: [0])
        guard case .none(let reason)? = Placement.propose([other], on: hosts, .kept)["db3"] else {
            Issue.record("it was placed")
            return
        }
        #expect(reason.contains("is there"))
    }
}
