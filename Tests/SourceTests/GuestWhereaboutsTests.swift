import Emulator
import IO
import Migration
import TestSupport
import Testing

/// The last sentence about a guest is true for the state that it is said in.
struct GuestWhereaboutsTests {
    let directory: TestDirectory
    var state: String { directory.path }
    var guest: GuestWhereabouts { GuestWhereabouts(of: "web1", stateDirectory: state) }

    init() throws { directory = try TestDirectory() }

    func remember() throws {
        try GuestStore(stateDirectory: state).save(
            GuestRecord(name: "web1", commandLine: GuestCommandLine(arguments: ["qemu-system-x86_64"], directory: "/"))
        )
    }

    func write(_ records: JournalRecord...) throws {
        let store = MigrationStore(stateDirectory: state)
        try DurableFile.makeDirectory(store.directory(of: "1-a"))
        let journal = try Journal(creating: store.journal(of: "1-a"))
        for record in records { try journal.append(record) }
    }

    @Test func nothingIsClaimedOfAGuestThatIsNotKnown() {
        #expect(guest == .unknown)
        #expect(guest.sentence(guest: "web1") == nil)
    }

    @Test func aGuestThatDoesNotRunIsNotSaidToStay() throws {
        try remember()
        #expect(guest.sentence(guest: "web1") == "Guest 'web1' belongs to this host and does not run")
        #expect(guest.sentence(guest: "web1", afterStop: false) == "Guest 'web1' does not run here")
        #expect(guest.sentence(guest: "web1", afterStop: true) == "Guest 'web1' is stopped")
    }

    @Test(arguments: [true, false])
    func aGuestThatWasReleasedBelongsElsewhere(_ isConfirmed: Bool) throws {
        try remember()
        let offered = JournalRecord.offered(guest: "web1", destination: "host-b", order: 0)
        if isConfirmed { try write(offered, .released, .confirmed) } else { try write(offered, .released) }
        let sentence = try #require(guest.sentence(guest: "web1"))
        #expect(sentence.contains("host-b") && !sentence.contains("stays"), "\(sentence)")
        let stopped = guest.sentence(guest: "web1", afterStop: true)
        #expect(stopped.hasPrefix("The QEMU of guest 'web1' on this host has ended. ") && stopped.contains("host-b"))
    }

    @Test func aGuestThatMovesIsNotSaidToStay() throws {
        try remember()
        let lock = try MigrationStore(stateDirectory: state).lock(guest: "web1")
        #expect(guest == .moving)
        withExtendedLifetime(lock) {}
        #expect(lock != nil)
    }
}
