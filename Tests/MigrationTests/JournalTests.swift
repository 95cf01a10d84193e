import Glibc
import IO
import Migration
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
        #expect(throws: ChannelError.self) { try Journal(creating: store.journal(of: "1-a")) }
    }

    @Test func spaceForTheRecordsIsReservedAheadOfTime() throws {
        try journal("1-a", [])
        var status = stat()
        #expect(stat(store.journal(of: "1-a"), &status) == 0)
        #expect(status.st_size == 0 && Int(status.st_blocks) * 512 >= 65536)
    }

    /// A crash may leave any part of the last record, or damage a byte of it.
    @Test func aTornOrDamagedRecordDoesNotCountAndDoesNotHideWhatFollows() throws {
        try journal("1-a", [.offered(guest: "web1", destination: "host-b", order: 0), .released])
        let path = store.journal(of: "1-a")
        let whole = try DurableFile.read(path) ?? []
        let first = (whole.firstIndex(of: UInt8(ascii: "\n")) ?? 0) + 1
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

    @Test func aReleasedGuestMustNotBeStartedUntilItComesBack() throws {
        #expect(try store.release(of: "web1") == nil)
        // The ids are out of order, as the clocks of two hosts may be.
        try journal("900-a", [.offered(guest: "web1", destination: "host-b", order: try store.nextOrder()), .released])
        #expect(try store.release(of: "web1")?.destination == "host-b")
        #expect(try store.release(of: "web2") == nil)
        try journal("100-b", [.accepted(guest: "web1", source: "CN=host-b", order: try store.nextOrder()), .prepared])
        #expect(try store.release(of: "web1")?.migration == "900-a")
        try Journal(opening: store.journal(of: "100-b")).append(.owner(digests: [:]))
        #expect(try store.release(of: "web1") == nil)
        try journal("050-c", [.offered(guest: "web1", destination: "host-c", order: try store.nextOrder()), .released])
        #expect(try store.release(of: "web1")?.destination == "host-c")
    }

    @Test func aGuestThatIsArrivingBelongsToNobodyHereYet() throws {
        try journal("1-a", [.accepted(guest: "web1", source: "CN=host-a", order: 0)])
        #expect(try store.arrival(of: "web1")?.source == "CN=host-a")
        #expect(try store.latest(of: "web1") == "1-a")
        try Journal(opening: store.journal(of: "1-a")).append(.prepared)
        #expect(try store.arrival(of: "web1") != nil)
        try Journal(opening: store.journal(of: "1-a")).append(.owner(digests: [:]))
        #expect(try store.arrival(of: "web1") == nil)
        try journal("0-b", [.offered(guest: "web1", destination: "host-c", order: try store.nextOrder())])
        #expect(try store.latest(of: "web1") == "0-b")
        #expect(try store.arrival(of: "web1") == nil)
    }

    @Test func aRolledBackMigrationReleasesNothing() throws {
        try journal(
            "1-a",
            [.offered(guest: "web1", destination: "host-b", order: 0), .released, .rolledBack(reason: "not sent")]
        )
        #expect(try store.release(of: "web1") == nil)
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
