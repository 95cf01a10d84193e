import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

@testable import Source

/// What is found on a host that is to be emptied.
@Suite(.timeLimit(.minutes(3)))
struct InventoryTests {
    @Test func guestsThatHaveLeftDoNotCountAndOtherQEMUsAreNamedWithWhatToDo() async throws {
        let lab = try TestDirectory()
        let state = lab.directory("state")
        let store = GuestStore(stateDirectory: state)
        for name in ["here", "left", "broken"] {
            try store.save(
                GuestRecord(
                    name: name,
                    commandLine: GuestCommandLine(arguments: ["qemu-system-x86_64"], directory: "/")
                )
            )
        }
        try DurableFile.write(Array("{".utf8), to: "\(state)/guests/broken/guest.json")
        let files = MigrationStore(stateDirectory: state).files(of: "1-abc")
        try DurableFile.makeDirectory(files.directory)
        let journal = try Journal(creating: files.journal)
        for record: JournalRecord in [.offered(guest: "left", destination: "b", order: 0), .released, .confirmed] {
            try journal.append(record)
        }
        let socket = lab.file("monitor")
        let stranger = try ChildProcess([
            "qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults", "-name", "guest=alien", "-qmp",
            "unix:\(socket),server=on,wait=off",
        ])
        try await stranger.wait(for: "a monitor") { isListening(socket) }
        let found = try Inventory(stateDirectory: state, knownOnly: false)
        #expect(found.guests.map(\.name) == ["broken", "here"])
        #expect(found.guests[0].obstacle?.contains("is damaged") == true && found.guests[1].obstacle == nil)
        let alien = try #require(found.strangers.first { $0.process == stranger.pid })
        #expect(
            alien.name == "alien" && alien.manager == nil && alien.remedy.contains("guest adopt NAME --qmp \(socket)")
        )
        #expect(found.left(ignoring: ["broken"]).contains("alien") && !found.left(ignoring: []).contains("left"))
        #expect(try Inventory(stateDirectory: state, knownOnly: true).strangers.isEmpty)
    }
}
