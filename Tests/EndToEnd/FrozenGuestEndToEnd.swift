import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// What the commands say of a guest whose QEMU is frozen: at once, and the truth.
@Suite(.timeLimit(.minutes(9)))
struct FrozenGuestEndToEnd {
    private func frozen(_ lab: Lab) async throws -> EmulatorProcess {
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
        let process = try #require(try lab.guests("a").load("web1")?.process)
        #expect(try process.freeze())
        return process
    }

    private func journal(_ lab: Lab, _ records: [JournalRecord]) throws {
        let store = MigrationStore(stateDirectory: lab.state("a"))
        try DurableFile.makeDirectory(store.directory(of: "1-a"))
        let journal = try Journal(creating: store.journal(of: "1-a"))
        for record in [.offered(guest: "web1", destination: "host-b", order: 0)] + records {
            try journal.append(record)
        }
    }

    /// Every command that would talk to the guest's QEMU.
    private func say(_ lab: Lab) async throws -> [(command: String, result: ToolResult)] {
        let state = ["--state-dir", lab.state("a")]
        var said: [(command: String, result: ToolResult)] = []
        for command in [
            ["guest", "list"], ["guest", "show", "web1"],
            ["export", "web1", "--listen", "127.0.0.1:0"] + lab.credentials(),
            ["migrate", "web1", "localhost:1"] + lab.credentials(),
            ["guest", "adopt", "web1", "--qmp", lab.guests("a").agentMonitor(of: "web1")],
        ] {
            said.append(
                (command.prefix(2).joined(separator: " "), try await lab.crossdock(command + state, seconds: 20))
            )
        }
        return said
    }

    @Test func aGuestThatWasReleasedIsSaidToBe() async throws {
        let lab = try Lab()
        let process = try await frozen(lab)
        try journal(lab, [.released])
        for (command, result) in try await say(lab) {
            #expect(result.all.contains("was released to host-b by migration 1-a"), "\(command): \(result.all)")
            #expect(result.all.contains("crossdock recover 1-a"), "\(command): \(result.all)")
        }
        let stopped = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")])
        #expect(stopped.code == 10 && stopped.errors.contains("was released to host-b"), "\(stopped.all)")
        #expect(process.isFrozen)
    }

    @Test func aGuestOfADeadAgentCanBeRecovered() async throws {
        let lab = try Lab()
        _ = try await frozen(lab)
        try journal(lab, [])
        for (command, result) in try await say(lab) {
            #expect(result.all.contains("is frozen"), "\(command): \(result.all)")
            if !command.hasPrefix("migrate") {
                #expect(result.all.contains("'crossdock recover 1-a' lets it go on"), "\(command): \(result.all)")
            }
        }
    }

    @Test func aGuestThatSomebodyElseStoppedIsToldApartAndCanBeEnded() async throws {
        let lab = try Lab()
        let process = try await frozen(lab)
        for (command, result) in try await say(lab) {
            #expect(result.all.contains("is frozen"), "\(command): \(result.all)")
            if !command.hasPrefix("migrate") {
                #expect(result.all.contains("'kill -CONT \(process.pid)'"), "\(command): \(result.all)")
            }
        }
        let stopped = try await lab.crossdock(
            ["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")],
            seconds: 20
        )
        #expect(stopped.code == 0 && stopped.output == "Guest 'web1' is stopped.\n", "\(stopped.all)")
        #expect(!process.isRunning)
    }

    @Test func aGuestThatMovesIsLeftAlone() async throws {
        let lab = try Lab()
        let process = try await frozen(lab)
        let lock = try MigrationStore(stateDirectory: lab.state("a")).lock(guest: "web1")
        #expect(lock != nil)
        let listed = try await lab.crossdock(["guest", "list", "--state-dir", lab.state("a")], seconds: 20)
        #expect(listed.output.contains("is frozen while the guest moves to another host"), "\(listed.all)")
        let stopped = try await lab.crossdock(
            ["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")],
            seconds: 20
        )
        #expect(stopped.code == MigrationError.Code.busy.rawValue, "\(stopped.all)")
        #expect(process.isFrozen)
        withExtendedLifetime(lock) {}
    }

    @Test func whatIsLeftOfAGuestThatHasMovedCanBeEnded() async throws {
        let lab = try Lab()
        let process = try await frozen(lab)
        try journal(lab, [.released, .confirmed])
        let stopped = try await lab.crossdock(
            ["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")],
            seconds: 20
        )
        #expect(stopped.code == 0 && stopped.output.contains("has moved to host-b"), "\(stopped.all)")
        #expect(!process.isRunning)
        let again = try await lab.crossdock(
            ["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")],
            seconds: 20
        )
        #expect(again.code == 0 && again.output.contains("does not run here"), "\(again.all)")
        #expect(again.output.contains("has moved to host-b"), "\(again.all)")
    }
}
