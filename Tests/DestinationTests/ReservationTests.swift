import Emulator
import IO
import Migration
import TestSupport
import Testing

@testable import Destination

/// What a host has promised, to guests on their way and to those that room is kept for.
struct ReservationTests {
    private func reservation(
        _ id: String,
        _ guest: String = "web1",
        of source: String = "a",
        memory: UInt64 = 4,
        allocated: UInt64 = 2,
        expires: Int64 = 1000
    ) -> Reservation {
        Reservation(
            id: id,
            source: source,
            evacuation: "e1",
            guest: guest,
            usage: GuestUsage(memory: memory, processors: 1, disk: 8),
            allocated: allocated,
            expires: expires
        )
    }

    @Test func whatIsKeptCountsForItsSourceAsAGuestDoesAndOnlyOnce() {
        var ledger = GuestLedger()
        ledger.keep(reservation("r1"))
        ledger.keep(reservation("r2", "web2", of: "b"))
        #expect(ledger.usages(of: "a", but: "").map(\.memory) == [4])
        #expect(ledger.usages(of: "a", but: "", reservation: "r1").isEmpty)
        // Its guest is offered: the room is the guest's own then, whether the reservation is gone or not.
        ledger.begin("m1", guest: "web1", .init(source: "a", usage: GuestUsage(memory: 3)), allocated: 1)
        #expect(ledger.usages(of: "a", but: "").map(\.memory) == [3])
        #expect(ledger.incoming() == 1 && ledger.incoming(but: "m1") == 0)
        ledger.settle("m1")
        #expect(ledger.usages(of: "a", but: "").map(\.memory) == [3])
        #expect(ledger.incoming() == 0)
        // A guest of the same name that comes from somebody else is another one.
        #expect(ledger.usages(of: "b", but: "").map(\.memory) == [4])
    }

    @Test func aGuestOfTheSameNameOfAnotherSourceTakesNobodysRoom() {
        var ledger = GuestLedger()
        ledger.keep(reservation("r1"))
        let nothing = ledger.promises(HostFigures())
        #expect(nothing.memory == 4 && nothing.reservations == 1)
        ledger.begin("m1", guest: "web1", .init(source: "b", usage: GuestUsage(memory: 1)), allocated: 0)
        #expect(ledger.promises(HostFigures()).memory == 5)
        #expect(ledger.promises(HostFigures()).reservations == 1)
        ledger.drop("m1")
        ledger.begin("m2", guest: "web1", .init(source: "a", usage: GuestUsage(memory: 3)), allocated: 0)
        #expect(ledger.promises(HostFigures()).memory == 3)
        #expect(ledger.promises(HostFigures()).reservations == 0)
    }

    @Test func onlyWhoReservedGivesItBackOrUsesIt() {
        var ledger = GuestLedger()
        ledger.keep(reservation("r1"))
        #expect(ledger.reservation("r1", for: "web1", of: "b") == nil)
        #expect(ledger.reservation("r1", for: "web2", of: "a") == nil)
        #expect(ledger.reservation(nil, for: "web1", of: "a") == nil)
        #expect(ledger.reservation("r1", for: "web1", of: "a")?.id == "r1")
        #expect(ledger.reservation(for: "web1", of: "a", "e2") == nil)
        #expect(ledger.reservation(for: "web1", of: "a", "e1")?.id == "r1")
        #expect(!ledger.release("r1", of: "b", "e1") && !ledger.release("r1", of: "a", "e2"))
        #expect(ledger.release("r1", of: "a", "e1") && !ledger.release("r1", of: "a", "e1"))
        #expect(ledger.kept.isEmpty)
    }

    @Test func roomIsKeptForItsTimeWhateverTheClockDoes() {
        var ledger = GuestLedger()
        ledger.keep(reservation("r1", expires: 1000))
        ledger.keep(reservation("r2", "web2", expires: 5000))
        ledger.expire(at: 999, longest: 10_000)
        #expect(ledger.kept.map(\.id) == ["r1", "r2"])
        ledger.expire(at: 1000, longest: 10_000)
        #expect(ledger.kept.map(\.id) == ["r2"])
        // The clock was set back: nothing is kept for longer than the longest time.
        ledger.expire(at: 0, longest: 3000)
        #expect(ledger.kept.map(\.expires) == [3000])
        ledger.expire(at: .max, longest: .max)
        #expect(ledger.kept.isEmpty)
    }

    @Test func whatIsPromisedIsWhatWasNotTakenYet() {
        var ledger = GuestLedger()
        ledger.begin("m1", guest: "web1", .init(source: "a", usage: GuestUsage(memory: 100)), allocated: 50)
        ledger.keep(reservation("r1", "web2", memory: 10, allocated: 5))
        var figures = HostFigures()
        #expect(ledger.promises(figures) == .init(memory: 110, disk: 55, reservations: 1))
        #expect(ledger.promises(figures, but: "m1") == .init(memory: 10, disk: 5, reservations: 1))
        #expect(ledger.promises(figures, but: "m1", reservation: "r1") == .init())
        // Its QEMU runs, and its images grow.
        figures.memories["web1"] = .init(most: 100, taken: 30)
        figures.written["web1"] = 20
        #expect(ledger.promises(figures) == .init(memory: 80, disk: 35, reservations: 1))
        // A QEMU takes more than the memory of its guest.
        figures.memories["web1"] = .init(most: 100, taken: 130)
        figures.written["web1"] = 70
        #expect(ledger.promises(figures) == .init(memory: 10, disk: 5, reservations: 1))
        // It is here, and may still take what is its own.
        figures.memories["web1"] = .init(most: 100, taken: 40)
        ledger.settle("m1")
        #expect(ledger.promises(figures) == .init(memory: 70, disk: 5, reservations: 1))
        // So has a guest that an agent which was killed has let in, without a word about its reservation.
        figures.memories["web2"] = .init(most: 10, taken: 4)
        #expect(ledger.promises(figures) == .init(memory: 66, disk: 0, reservations: 0))
    }

    @Test func hugeFiguresAreTheMostThatThereIsAndTrapNobody() {
        var ledger = GuestLedger()
        for index in 0..<3 {
            ledger.keep(reservation("r\(index)", "web\(index)", memory: .max, allocated: .max))
            ledger.begin(
                "m\(index)",
                guest: "db\(index)",
                .init(source: "a", usage: .init(memory: .max)),
                allocated: .max
            )
        }
        let promises = ledger.promises(HostFigures())
        #expect(promises.memory == .max && promises.disk == .max)
        #expect(ledger.usages(of: "a", but: "").reduce(GuestUsage(), +).memory == .max)
        var figures = HostFigures()
        figures.freeMemory = 10
        figures.freeDisk = 10
        #expect(figures.problems(memory: .max, allocated: .max, besides: promises).count == 2)
        let state = HostState(
            memory: 1,
            freeMemory: 1,
            promisedMemory: .max,
            freeDisk: 5,
            promisedDisk: 2,
            processors: 1,
            guests: 0,
            incoming: 0
        )
        #expect(state.unpromisedMemory == 0 && state.unpromisedDisk == 3)
    }

    @Test func aRefusalHasTheFiguresAndWhereTheyAreFrom() {
        var figures = HostFigures()
        (figures.freeMemory, figures.freeDisk) = (8 << 30, 100 << 30)
        let promises = GuestLedger.Promises(memory: 5 << 30, disk: 40 << 30)
        #expect(figures.problems(memory: 3 << 30, allocated: 60 << 30, besides: promises).isEmpty)
        let memory = figures.problems(memory: 3 << 30 + 1, allocated: 0, besides: promises)
        #expect(
            memory == [
                "This host has 8G of memory free (MemAvailable), of which 5G is promised to others, and this guest wants 3G"
            ]
        )
        // Where nothing is kept for anybody the memory is not judged.
        #expect(figures.problems(memory: nil, allocated: 0, besides: promises).isEmpty)
        let disk = figures.problems(memory: nil, allocated: 61 << 30, besides: promises)
        #expect(disk.first?.contains("100G of disk free") == true && disk.first?.contains("wants 61G") == true)
    }

    @Test func whatAPolicyLeavesIsNeverLessThanNothing() {
        var limits = GuestLimits()
        (limits.memory, limits.guests) = (10, 2)
        let here = [GuestUsage(memory: 4, processors: 1), GuestUsage(memory: 8), GuestUsage()]
        let allowance = limits.allowance(besides: here)
        #expect(allowance.memory == 0 && allowance.guests == 0 && allowance.processors == nil && allowance.disk == nil)
        #expect(limits.allowance(besides: [here[0]]).memory == 6)
    }

    @Test func anOfferIsCoveredByWhatIsNotLessInAnyRespect() {
        let kept = reservation("r1", memory: 4, allocated: 2)
        #expect(kept.covers(GuestUsage(memory: 4, processors: 1, disk: 8), allocated: 2))
        #expect(!kept.covers(GuestUsage(memory: 5, processors: 1, disk: 8), allocated: 2))
        #expect(!kept.covers(GuestUsage(memory: 4, processors: 2, disk: 8), allocated: 2))
        #expect(!kept.covers(GuestUsage(memory: 4, processors: 1, disk: 9), allocated: 2))
        #expect(!kept.covers(GuestUsage(memory: 4, processors: 1, disk: 8), allocated: 3))
    }

    @Test func theFileKeepsWhatWasWrittenAndADamagedOneIsNamed() throws {
        let directory = try TestDirectory()
        let file = ReservationFile(stateDirectory: directory.path)
        #expect(try file.read().isEmpty)
        let kept = [reservation("r1"), reservation("r2", "web2")]
        try file.write(kept)
        #expect(try ReservationFile(stateDirectory: directory.path).read() == kept)
        for text in ["", "{", #"{"version":2,"reservations":[]}"#] {
            try DurableFile.write(Array(text.utf8), to: directory.file("reservations.json"))
            let error = #expect(throws: FileError.self) { try file.read() }
            #expect(error?.description.contains("reservations.json is damaged") == true)
        }
    }

    @Test func theKernelsTextsAreReadAsTheyAre() {
        let fields = HostFigures.fields(
            "MemTotal:  16 kB\nMemAvailable:\t8 kB\nHugePages_Total:   0\nX: 99999999999999999999 kB\nY: 18446744073709551615 kB"
        )
        #expect(fields == ["MemTotal": 16384, "MemAvailable": 8192, "Y": .max])
    }
}

/// Who switches over when.
struct SwitchoverTurnTests {
    @Test func guestsHaveTheirTurnOneAfterTheOtherInTheOrderOfTheirQuestions() async throws {
        try await onLoop { loop in
            let turns = SwitchoverTurns(on: loop)
            let first = try turns.request("a")
            try await first.wait {}
            let second = try turns.request("b")
            let third = try turns.request("a")
            let fourth = try turns.request("c")
            #expect(turns.waiting == 3)
            var order: [String] = []
            let waiting = [("second", second), ("fourth", fourth)].map { name, turn in
                Task(executorPreference: loop) {
                    try await turn.wait {}
                    return name
                }
            }
            // One that leaves the queue, or whose connection ends, keeps nobody waiting.
            third.end()
            first.end()
            order.append(try await waiting[0].value)
            #expect(turns.waiting == 1)
            second.end()
            second.end()
            order.append(try await waiting[1].value)
            fourth.end()
            #expect(order == ["second", "fourth"] && turns.waiting == 0)
        }
    }

    @Test func oneSourceHasOnlySoManyPlacesInTheQueue() async throws {
        try await onLoop { loop in
            let turns = SwitchoverTurns(on: loop)
            let held = try (0..<PeerLimits.turns).map { _ in try turns.request("a") }
            let error = #expect(throws: MigrationError.self) { try turns.request("a") }
            #expect(error?.message.contains("limit of 4 guests of one source") == true)
            held[1].end()
            let again = try turns.request("a")
            let others = try (0..<PeerLimits.waitingTurns - turns.waiting).map { try turns.request("peer \($0)") }
            let full = #expect(throws: MigrationError.self) { try turns.request("z") }
            #expect(full?.message.contains("limit of 64 guests that wait") == true)
            for turn in held + [again] + others { turn.end() }
            try turns.request("a").end()
            #expect(turns.waiting == 0)
        }
    }

    @Test func aTurnThatLastsTooLongGoesToWhoeverWaits() async throws {
        try await onLoop { loop in
            let turns = SwitchoverTurns(on: loop, longest: .milliseconds(20))
            let first = try turns.request("a")
            let lapsed = AsyncCondition()
            var hasLapsed = false
            try await first.wait {
                hasLapsed = true
                lapsed.signal()
            }
            // Nobody waits: it lasts as long as it likes.
            await loop.sleep(for: .milliseconds(60))
            #expect(!hasLapsed)
            let second = try turns.request("b")
            try await second.wait {}
            while !hasLapsed { await lapsed.wait() }
            first.end()
            second.end()
        }
    }
}
