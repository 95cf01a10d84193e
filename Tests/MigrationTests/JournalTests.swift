import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

struct JournalTests {
    let directory: TestDirectory
    let store: MigrationStore

    init() throws {
        directory = try TestDirectory()
        store = MigrationStore(stateDirectory: directory.path)
    }

    func journal(_ id: String, _ records: [JournalRecord]) throws {
        try DurableFile.makeDirectory(store.directory(of: id))
        let journal = try Journal(creating: store.journal(of: id))
        for record in records { try journal.append(record) }
    }

    @Test func recordsAreReadBackInTheirOrder() throws {
        let records: [JournalRecord] = [
            .accepted(guest: "web1", source: "CN=host-a", order: 3), .prepared, .owner(digests: ["disk0": "ab"]),
        ]
        try journal("1-a", records)
        #expect(try Journal.read(store.journal(of: "1-a")) == records)
        #expect(throws: FileError.self) { try Journal(creating: store.journal(of: "1-a")) }
    }

    @Test func spaceForTheRecordsIsReservedAheadOfTime() throws {
        try journal("1-a", [])
        var status = stat()
        #expect(stat(store.journal(of: "1-a"), &status) == 0)
        #expect(status.st_size < 100 && Int(status.st_blocks) * 512 >= Journal.capacity)
    }

    /// A crash may leave any part of the last record, or damage a byte of it.
    @Test func aTornOrDamagedRecordDoesNotCountAndDoesNotHideWhatFollows() throws {
        try journal("1-a", [.offered(guest: "web1", destination: "host-b", order: 0), .released])
        let path = store.journal(of: "1-a")
        let whole = try DurableFile.read(path) ?? []
        let header = (whole.firstIndex(of: UInt8(ascii: "\n")) ?? 0) + 1
        let first = (whole[header...].firstIndex(of: UInt8(ascii: "\n")) ?? 0) + 1
        for length in first..<whole.count {
            try DurableFile.write(Array(whole[..<length]), to: path)
            #expect(try Journal.read(path).count == 1, "cut at \(length)")
        }
        var damaged = whole
        damaged[first + 20] ^= 1
        try DurableFile.write(damaged, to: path)
        #expect(try Journal.read(path).count == 1)
        try Journal(opening: path).append(.rolledBack(reason: "test"))
        #expect(try Journal.read(path).last == .rolledBack(reason: "test"))
    }

    /// A record that cannot be read may be the one that forbids to run the guest.
    @Test func damageBeforeTheEndIsAnErrorAndNotTheEnd() throws {
        try journal("1-a", [.offered(guest: "web1", destination: "host-b", order: 0), .released, .confirmed])
        let path = store.journal(of: "1-a")
        let whole = try DurableFile.read(path) ?? []
        let text = String(decoding: whole, as: UTF8.self)
        guard let released = text.utf8.firstRange(of: "released".utf8) else { throw TestFailure("no record") }
        var damaged = whole
        damaged[text.utf8.distance(from: text.startIndex, to: released.lowerBound)] ^= 1
        try DurableFile.write(damaged, to: path)
        let error = #expect(throws: JournalError.self) { try Journal.read(path) }
        #expect(error?.kind == .unreadable && error?.records.count == 1)
        #expect(throws: JournalError.self) { try store.startBar(of: "web1") }
        // Another guest's affairs go on.
        #expect(try store.startBar(of: "web2") == nil)
        #expect(try store.nextOrder() == 1)
        #expect(throws: JournalError.self) { try Journal(opening: path) }
    }

    @Test func aJournalOfALaterVersionIsNotTouched() throws {
        try journal("1-a", [.offered(guest: "web1", destination: "host-b", order: 0)])
        let path = store.journal(of: "1-a")
        for body in [#"{"journal":{"version":2}}"#, #"{"handedOn":{"to":"host-c"}}"#] {
            let isHeader = body.contains("version")
            let sum = HashAlgorithm.sha256.hash(Array(body.utf8)).hex.prefix(16)
            let line = Array("\(sum) \(body)\n".utf8)
            let whole = try DurableFile.read(path) ?? []
            let later = isHeader ? line + whole.drop { $0 != 10 }.dropFirst() : whole + line
            try DurableFile.write(later, to: store.journal(of: "1-a") + ".later")
            let error = #expect(throws: JournalError.self) { try Journal.read(store.journal(of: "1-a") + ".later") }
            #expect(error?.description.contains("version") == true)
        }
    }

    @Test func aJournalDoesNotGrowBeyondWhatIsReserved() throws {
        try journal("1-a", [.offered(guest: "web1", destination: "host-b", order: 0)])
        let journal = try Journal(opening: store.journal(of: "1-a"))
        // A reason is cut, so that the few records of a migration always fit.
        try journal.append(.rolledBack(reason: String(repeating: "x", count: 1 << 20)))
        #expect((try DurableFile.read(journal.path) ?? []).count < 4096)
        var error: JournalError?
        for _ in 0..<100 where error == nil {
            do { try journal.append(.reclaimed(reason: String(repeating: "x", count: 1024))) } catch let failure {
                error = failure as? JournalError
            }
        }
        #expect(error?.kind == .notWritten && error?.description.contains("is full") == true)
        #expect((try DurableFile.read(journal.path) ?? []).count <= Journal.capacity)
    }

    @Test(
        arguments: [
            ([], .open), ([.released], .released), ([.released, .reclaimed(reason: "x")], .reclaimed(reason: "x")),
            ([.released, .taken(by: "x")], .taken(by: "x")),
            ([.released, .rolledBack(reason: "x")], .rolledBack(reason: "x")), ([.released, .confirmed], .confirmed),
            ([.released, .reclaimed(reason: "x"), .rolledBack(reason: "y")], .rolledBack(reason: "y")),
            ([.released, .confirmed, .rolledBack(reason: "late")], .confirmed),
            ([.rolledBack(reason: "x"), .released], .rolledBack(reason: "x")),
            ([.released, .overruled(by: "x")], .overruled(by: "x")),
            ([.overruled(by: "x"), .released], .overruled(by: "x")),
            ([.released, .owner(digests: [:])], .released),
        ] as [([JournalRecord], SourceStanding)]
    )
    func theRecordsOfASourceSayWhereItStands(_ records: [JournalRecord], _ standing: SourceStanding) throws {
        try journal("1-a", [.offered(guest: "web1", destination: "host-b", order: 0)] + records)
        #expect(try store.reading(of: "1-a")?.standing == .source(standing))
        #expect((try store.startBar(of: "web1") == nil) == standing.mayRunHere)
    }

    @Test(
        arguments: [
            ([], .accepted), ([.prepared], .prepared),
            ([.prepared, .owner(digests: ["a": "1"])], .owner(digests: ["a": "1"])),
            ([.prepared, .owner(digests: [:]), .digests(["a": "2"])], .owner(digests: ["a": "2"])),
            ([.prepared, .taken(by: "x"), .digests(["a": "3"])], .taken(by: "x", digests: ["a": "3"])),
            ([.prepared, .rolledBack(reason: "x")], .rolledBack(reason: "x")),
            ([.prepared, .owner(digests: [:]), .rolledBack(reason: "late")], .owner(digests: [:])),
            ([.rolledBack(reason: "x"), .owner(digests: [:])], .rolledBack(reason: "x")),
            ([.prepared, .owner(digests: [:]), .overruled(by: "x")], .overruled(by: "x")),
            ([.released, .confirmed], .accepted),
        ] as [([JournalRecord], DestinationStanding)]
    )
    func theRecordsOfADestinationSayWhereItStands(_ records: [JournalRecord], _ standing: DestinationStanding) throws {
        try journal("1-a", [.accepted(guest: "web1", source: "CN=host-a", order: 0)] + records)
        #expect(try store.reading(of: "1-a")?.standing == .destination(standing))
    }

    /// The destination of a release that was asked for.
    private func released(_ guest: String) throws -> (migration: String, destination: String)? {
        guard case .released(let migration, let destination, _) = try store.startBar(of: guest) else { return nil }
        return (migration, destination)
    }

    @Test func aReleasedGuestMustNotBeStartedUntilItComesBack() throws {
        #expect(try store.startBar(of: "web1") == nil)
        // The ids are out of order, as the clocks of two hosts may be.
        try journal("900-a", [.offered(guest: "web1", destination: "host-b", order: try store.nextOrder()), .released])
        #expect(try released("web1")?.destination == "host-b")
        #expect(try store.startBar(of: "web2") == nil)
        try journal("100-b", [.accepted(guest: "web1", source: "CN=host-b", order: try store.nextOrder()), .prepared])
        #expect(try store.startBar(of: "web1") == .arriving(migration: "100-b", source: "CN=host-b"))
        try Journal(opening: store.journal(of: "100-b")).append(.owner(digests: [:]))
        #expect(try store.startBar(of: "web1") == nil)
        try journal("050-c", [.offered(guest: "web1", destination: "host-c", order: try store.nextOrder()), .released])
        #expect(try released("web1")?.destination == "host-c")
    }

    @Test func whatIsOnlyOfferedToThisHostSupersedesNothing() throws {
        try journal("1-a", [.offered(guest: "web1", destination: "host-b", order: 0), .released])
        try journal("2-b", [.accepted(guest: "web1", source: "CN=stranger", order: 1)])
        #expect(try !store.isSuperseded("1-a", of: "web1"))
        try Journal(opening: store.journal(of: "2-b")).append(.rolledBack(reason: "refused"))
        #expect(try !store.isSuperseded("1-a", of: "web1"))
        #expect(try released("web1")?.migration == "1-a")
        try journal("3-c", [.accepted(guest: "web1", source: "CN=host-b", order: 2), .prepared])
        #expect(try store.isSuperseded("1-a", of: "web1"))
        try Journal(opening: store.journal(of: "3-c")).append(.rolledBack(reason: "refused"))
        #expect(try !store.isSuperseded("1-a", of: "web1"))
    }

    @Test func aGuestThatIsArrivingBelongsToNobodyHereYet() throws {
        try journal("1-a", [.accepted(guest: "web1", source: "CN=host-a", order: 0)])
        let arriving = MigrationStore.StartBar.arriving(migration: "1-a", source: "CN=host-a")
        #expect(try store.startBar(of: "web1") == arriving)
        try Journal(opening: store.journal(of: "1-a")).append(.prepared)
        #expect(try store.startBar(of: "web1") == arriving)
        try Journal(opening: store.journal(of: "1-a")).append(.owner(digests: [:]))
        #expect(try store.startBar(of: "web1") == nil)
        try journal("0-b", [.offered(guest: "web1", destination: "host-c", order: try store.nextOrder())])
        #expect(try store.isSuperseded("1-a", of: "web1") && !store.isSuperseded("0-b", of: "web1"))
        #expect(try store.startBar(of: "web1") == nil)
    }

    @Test func onlyWhatNobodyCanBeInDoubtAboutIsForgotten() throws {
        func accepted(_ order: Int, _ source: String = "CN=mallory") -> JournalRecord {
            .accepted(guest: "web\(order)", source: source, order: order)
        }
        for order in 0..<4 { try journal("1-\(order)", [accepted(order), .rolledBack(reason: "refused")]) }
        try journal("2-a", [accepted(4), .prepared, .rolledBack(reason: "late")])
        try journal("2-b", [accepted(5), .prepared, .owner(digests: [:])])
        try journal("2-c", [accepted(6)])
        try journal("2-d", [accepted(7, "CN=honest"), .rolledBack(reason: "refused")])
        try journal("2-e", [.offered(guest: "own", destination: "CN=mallory", order: 8), .rolledBack(reason: "no")])
        #expect(store.forgetRefused(of: "CN=mallory", keeping: 2) == ["1-0", "1-1"])
        #expect(store.forgetRefused(of: "CN=mallory", keeping: 2).isEmpty)
        #expect(Set(store.ids()) == ["1-2", "1-3", "2-a", "2-b", "2-c", "2-d", "2-e"])
    }

    @Test func oneGuestIsMigratedOnceAtATime() throws {
        let lock = try store.lock(guest: "web1")
        #expect(lock != nil)
        #expect(try store.lock(guest: "web1") == nil)
        #expect(try store.lock(guest: "web2") != nil)
        withExtendedLifetime(lock) {}
    }

    @Test(arguments: ["../x", "", "A", "a/b", String(repeating: "a", count: 41)])
    func anIDThatCouldNameFilesIsRefused(_ id: String) { #expect(!MigrationStore.isID(id)) }

    @Test func madeIDsAreGood() { #expect(MigrationStore.isID(MigrationStore.makeID())) }
}
