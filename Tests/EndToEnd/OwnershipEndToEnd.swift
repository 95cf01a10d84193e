import Emulator
import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

/// What an operator decides when a host is gone, and how the other host learns it.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct OwnershipEndToEnd {
    /// A guest that was released, and whose destination has not confirmed it as far as the journal says.
    struct Undecided {
        let lab: Lab
        let disk: String
        let id: String
        var store: MigrationStore { MigrationStore(stateDirectory: lab.state("a")) }
        var records: [JournalRecord] { get throws { try Journal.read(store.journal(of: id)) } }

        func recover(_ more: String..., before: [String] = []) async throws -> ToolResult {
            try await Tool.run(
                before + [Lab.crossdock, "recover", id, "--state-dir", lab.state("a")] + more,
                seconds: 120
            )
        }

        /// Ends the destination's agent and guest.
        func endDestination() async throws {
            lab.destination?.signal(SIGKILL)
            _ = try await lab.destination?.finish()
            try lab.guests("b").load("web1")?.process?.signal(SIGKILL)
        }
    }

    func makeUndecided() async throws -> Undecided {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 2)
        try await lab.startIdleGuest(disks: [disk])
        #expect(try await lab.migrate().code == 0)
        let id = DurableFile.list("\(lab.state("a"))/migrations").first ?? ""
        let undecided = Undecided(lab: lab, disk: disk, id: id)
        let journal = undecided.store.journal(of: id)
        try Lab.forgetLastRecord(of: journal)
        #expect(try undecided.records.last == .released)
        return undecided
    }

    /// While the guest was away something else has taken its image's name.
    @Test func aGuestNeverGoesOnWithWhatHasTakenItsImagesName() async throws {
        let undecided = try await makeUndecided()
        let lab = undecided.lab
        try await undecided.endDestination()
        let other = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        #expect(other == undecided.disk)
        let taken = try await undecided.recover("--take-ownership", "--other-host-was-erased", "localhost")
        #expect(taken.code != 0 && taken.errors.contains("is in the way"), "\(taken.all)")
        let started = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(started.code == 10 && started.errors.contains("is still called"), "\(started.all)")
        #expect(unlink(other) == 0)
        let recovered = try await undecided.recover()
        #expect(recovered.code == 0 && recovered.output.contains("belongs to this host"), "\(recovered.all)")
        #expect(DurableFile.exists(undecided.disk))
        let again = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(again.code == 0, "\(again.all)")
    }

    @Test func silenceIsNoProofAndTheOperatorVouches() async throws {
        let undecided = try await makeUndecided()
        // In a network that loses every packet the other host, which is well, says nothing; nor in one without a route.
        let lost = try await undecided.recover("--take-ownership", before: Namespace.blackHole)
        #expect(lost.code == MigrationError.Code.undecided.rawValue, "\(lost.all)")
        #expect(lost.errors.contains("127.0.0.1:") && lost.errors.contains("timed out"), "\(lost.all)")
        #expect(lost.errors.contains("--other-host-is-off"), "\(lost.all)")
        let asked = try await undecided.recover("--take-ownership", before: Namespace.network)
        #expect(asked.code == MigrationError.Code.undecided.rawValue, "\(asked.all)")
        #expect(asked.errors.contains("127.0.0.1:") && asked.errors.contains("unreachable"), "\(asked.all)")
        #expect(asked.errors.contains("--other-host-is-off"), "\(asked.all)")
        let erased = try await undecided.recover(
            "--take-ownership",
            "--other-host-was-erased",
            "localhost",
            before: Namespace.network
        )
        #expect(erased.code == MigrationError.Code.undecided.rawValue, "\(erased.all)")
        #expect(try undecided.records.last == .released)
        try await undecided.endDestination()
        let taken = try await undecided.recover("--take-ownership", "--other-host-is-off", before: Namespace.network)
        #expect(taken.code == 0 && taken.output.contains("belongs to this host"), "\(taken.all)")
        #expect(taken.errors.contains("both hosts run the guest"), "\(taken.all)")
        guard case .taken(let by) = try undecided.records.last else {
            throw TestFailure("\(try undecided.records)")
        }
        #expect(by.hasSuffix("with 'crossdock recover --take-ownership --other-host-is-off'"), "\(by)")
        #expect(DurableFile.exists(undecided.disk))
        let status = try await undecided.lab.crossdock(["status", "--state-dir", undecided.lab.state("a")])
        #expect(status.output.contains("localhost does not know it yet"), "\(status.all)")
        let start = try await undecided.lab.crossdock([
            "guest", "start", "web1", "--state-dir", undecided.lab.state("a"),
        ])
        #expect(start.code == 0, "\(start.all)")
        // The other host is still away, which holds nobody up.
        let later = try await undecided.lab.crossdock(["recover", "--state-dir", undecided.lab.state("a")])
        #expect(later.code == 0 && later.errors.contains("does not know yet"), "\(later.all)")
        #expect(try await undecided.lab.monitor("a") { try await $0.status() } == "running")
    }

    /// Also when the guest has long gone on to another host.
    @Test(arguments: [false, true])
    func aHostThatWasTakenFromLearnsIt(_ isSuperseded: Bool) async throws {
        let undecided = try await makeUndecided()
        try await undecided.endDestination()
        if isSuperseded {
            try DurableFile.makeDirectory(undecided.store.directory(of: "9-later"))
            let later = try Journal(creating: undecided.store.journal(of: "9-later"))
            try later.append(.offered(guest: "web1", destination: "c", order: 1))
            try later.append(.rolledBack(reason: "it was cancelled"))
        }
        try Journal(opening: undecided.store.journal(of: undecided.id)).append(.taken(by: "root"))
        let heard = Guarded<[Message]>([])
        let agent = try await LaconicAgent.start(undecided.lab, port: undecided.lab.controlPort) { message in
            heard.withLock { $0.append(message) }
            switch message {
            case .hello: return .welcome(.init(state: .prepared))
            case .overruled: return message
            default: return nil
            }
        }
        let told = try await undecided.recover()
        agent.stop()
        #expect(told.code == 0 && told.output.contains("belongs to this host"), "\(told.all)")
        let words = heard.withLock { $0 }
        #expect(words.contains(.overruled("root")), "\(words)")
        guard case .rolledBack(let reason) = try undecided.records.last else {
            throw TestFailure("\(try undecided.records)")
        }
        #expect(reason == "root has taken the guest for this host")
        let nothing = try await undecided.lab.crossdock(["recover", "--state-dir", undecided.lab.state("a")])
        #expect(nothing.output.contains("nothing to recover"), "\(nothing.all)")
    }

    /// An operator of the destination was sure that this host was off; it was not.
    @Test func aGuestThatWasTakenForTheDestinationIsNotThisHostsAnyMore() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 16)
        try await lab.startIdleGuest(disks: [disk])
        let migration = try lab.beginMigration(more: ["--bandwidth", "1500000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        for process in Lab.processes(containing: "source-watchdog") where process.line.contains(lab.state("a")) {
            kill(process.pid, SIGKILL)
        }
        try lab.sourceAgent().signal(SIGKILL)
        lab.destination?.signal(SIGKILL)
        _ = try await lab.destination?.finish()
        let port = lab.controlPort
        let agent = try await LaconicAgent.start(lab, port: port) { message in
            if case .hello = message { .welcome(.init(state: .owner, takenBy: "root of b")) } else { nil }
        }
        _ = try await migration.finish(seconds: 60)
        let recovered = try await lab.crossdock(["recover", "--state-dir", lab.state("a")])
        agent.stop()
        #expect(recovered.code == MigrationError.Code.undecided.rawValue, "\(recovered.all)")
        #expect(recovered.errors.contains("both hosts may run it"), "\(recovered.all)")
        #expect(recovered.output.contains("belongs to localhost"), "\(recovered.all)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        #expect(status.output.contains("overruled") && status.output.contains("root of b"), "\(status.all)")
        #expect(status.output.contains("both hosts may run it"), "\(status.all)")
        let stopped = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")])
        #expect(stopped.code == 0 && stopped.output.contains("belongs to localhost"), "\(stopped.all)")
        let start = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(start.code == MigrationError.Code.guest.rawValue, "\(start.all)")
    }

    /// QEMU is frozen from the fence on, and belongs to nobody until the destination has spoken.
    @Test func aFrozenQEMUGoesOnOnceTheGuestBelongsHereAgainAndNotBefore() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 16)
        try await lab.startIdleGuest(disks: [disk])
        let migration = try lab.beginMigration(more: ["--bandwidth", "1500000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        for process in Lab.processes(containing: "source-watchdog") where process.line.contains(lab.state("a")) {
            kill(process.pid, SIGKILL)
        }
        let id = DurableFile.list("\(lab.state("a"))/migrations").first ?? ""
        try lab.sourceAgent().signal(SIGKILL)
        lab.destination?.signal(SIGKILL)
        _ = try await lab.destination?.finish()
        let emulator = try #require(try lab.guests("a").load("web1")?.process)
        let store = MigrationStore(stateDirectory: lab.state("a"))
        try Journal(opening: store.journal(of: id)).append(.released)
        emulator.signal(SIGSTOP)
        try await eventually("QEMU is frozen") { emulator.isFrozen }
        let waiting = try ChildProcess([Lab.crossdock, "recover", id, "--state-dir", lab.state("a")])
        try await waiting.wait(for: "a word of the recovery") { waiting.errors.contains("--take-ownership") }
        #expect(emulator.isFrozen)
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        #expect(status.output.contains("its QEMU, process \(emulator.pid), is frozen"), "\(status.all)")
        #expect(status.output.contains("has not confirmed that it has it"), "\(status.all)")
        waiting.signal(SIGKILL)
        _ = try await waiting.finish()
        let port = lab.controlPort
        let agent = try await LaconicAgent.start(lab, port: port) { message in
            switch message {
            case .hello: .welcome(.init(state: .aborted))
            case .release: .refused("it was not whole")
            case .abort: message
            default: nil
            }
        }
        let recovered = try await lab.crossdock(["recover", id, "--state-dir", lab.state("a")])
        agent.stop()
        #expect(recovered.code == 0 && recovered.output.contains("belongs to this host"), "\(recovered.all)")
        #expect(!emulator.isFrozen)
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        _ = try await migration.finish(seconds: 60)
    }

    /// Another host offers a guest of the same name, which decides nothing about ours.
    @Test func anUnrelatedOfferDoesNotKeepAGuestFromBeingRecovered() async throws {
        let undecided = try await makeUndecided()
        let lab = undecided.lab
        let other = try await lab.makeImage("other.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(on: "c", disks: [other])
        try await lab.startDestination("a")
        let offered = try await lab.migrate(from: "c", port: lab.controlPort(of: "a"))
        #expect(offered.code == MigrationError.Code.refused.rawValue, "\(offered.all)")
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        // Refused before anything was written: the guest that left is not decided about yet.
        #expect(!status.output.contains("destination") && status.output.contains("undecided"), "\(status.all)")
        let recovered = try await undecided.recover()
        #expect(recovered.code == 0 && recovered.output.contains("belongs to localhost"), "\(recovered.all)")
        #expect(try undecided.records.last == .confirmed)
    }

    @Test func nothingFalseIsSaidOfAGuestThatHasMoved() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
        #expect(try await lab.migrate().code == 0)
        let again = try await lab.migrate()
        #expect(again.code == MigrationError.Code.guest.rawValue, "\(again.all)")
        #expect(again.errors.contains("has moved to localhost") && !again.errors.contains("stays"), "\(again.all)")
        let stopped = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")])
        #expect(stopped.output.hasPrefix("Guest 'web1' does not run here. Guest 'web1' has moved to"), "\(stopped.all)")
        let unknown = try await lab.migrate("web2")
        #expect(!unknown.errors.contains("stays"), "\(unknown.all)")
        let running = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("b")])
        #expect(running.output == "Guest 'web1' is stopped.\n", "\(running.all)")
    }

    @Test func whatAGuestHasLeftIsForgottenOnceItBelongsToTheOtherHostAndNotBefore() async throws {
        let undecided = try await makeUndecided()
        let lab = undecided.lab
        let old = "\(undecided.disk).released-\(undecided.id)"
        let forget = ["guest", "forget", "web1", "--state-dir"]
        let early = try await lab.crossdock(forget + [lab.state("a")])
        #expect(early.code == MigrationError.Code.guest.rawValue, "\(early.all)")
        #expect(early.errors.contains("has not confirmed") && DurableFile.exists(old), "\(early.all)")
        let kept = try await lab.crossdock(["guest", "prune", "--all", "--state-dir", lab.state("a")])
        #expect(kept.code == 0 && kept.output.contains(old), "\(kept.all)")
        #expect(kept.output.contains("localhost confirms") && DurableFile.exists(old), "\(kept.all)")
        #expect(try await undecided.recover().code == 0)
        let owned = try await lab.crossdock(forget + [lab.state("b")])
        #expect(owned.code == MigrationError.Code.guest.rawValue, "\(owned.all)")
        #expect(owned.errors.contains("belongs to this host"), "\(owned.all)")
        let forgotten = try await lab.crossdock(forget + [lab.state("a")])
        #expect(forgotten.code == 0 && forgotten.output.contains("deleted \(old)"), "\(forgotten.all)")
        #expect(!DurableFile.exists(old))
        #expect(try lab.guests("a").load("web1") == nil)
        let start = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(start.errors.contains("has moved to localhost"), "\(start.all)")
        let taken = try await undecided.recover("--take-ownership")
        #expect(taken.code == MigrationError.Code.guest.rawValue, "\(taken.all)")
        #expect(taken.errors.contains("there is nothing to take"), "\(taken.all)")
    }
}

/// A destination agent of few words, at a port where a real one was.
final class LaconicAgent: Sendable {
    private let loop: EventLoop

    private init(_ loop: EventLoop) { self.loop = loop }

    static func start(
        _ lab: Lab,
        port: UInt16,
        says answer: @escaping @Sendable (Message) -> Message?
    ) async throws -> LaconicAgent {
        let credentials = try lab.pki.credentials(.server)
        let loop = EventLoop(name: "laconic")
        try await loop.run {
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: port), loop: loop)
            Task(executorPreference: loop) {
                while let socket = try? await listener.accept() {
                    Task(executorPreference: loop) {
                        let channel = try await TLSChannel.handshake(over: socket, credentials: credentials)
                        let connection = MessageConnection(channel)
                        while let message = try? await connection.receiveMessage() {
                            if case .ping = message { continue }
                            guard let reply = answer(message) else { break }
                            try await connection.send(reply)
                        }
                        socket.close()
                    }
                }
            }
        }
        return LaconicAgent(loop)
    }

    func stop() { loop.stop() }
}
