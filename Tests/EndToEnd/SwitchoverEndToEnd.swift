import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// Faults while the guest is paused, and after it was released: it is never lost and never runs twice.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct SwitchoverEndToEnd {
    struct Paused {
        let lab: Lab
        let disk: String
        let migration: ChildProcess
    }

    /// A migration whose guest is paused for seconds: that long the link takes for what is always dirty.
    func pause(deadline: Int, seconds: Int = 2) async throws -> Paused {
        // A QEMU to which each pass is a risk may pause the guest for all of that at once.
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 4)
        try await lab.startLinuxGuest(disks: [disk], workload: "xd.dirty=12")
        let migration = try lab.beginMigration(more: [
            "--bandwidth", "\(12_000_000 / seconds)", "--downtime-limit", "\(2000 * seconds)", "--blackout-deadline",
            "\(deadline)",
        ])
        try await migration.wait(seconds: 90, for: "the switchover") { migration.output.contains("switching over") }
        return Paused(lab: lab, disk: disk, migration: migration)
    }

    func expectTheGuestOnTheSource(_ paused: Paused) async throws {
        let lab = paused.lab
        try await eventually("the guest runs on the source again") {
            try await lab.monitor("a") { try await $0.status() } == "running"
        }
        let result = try await paused.migration.finish(seconds: 90)
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(try await lab.leftAtSource() == [])
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
        let before = try lab.records(lab.consoleA)
        try await eventually("the guest goes on writing") { try lab.records(lab.consoleA) > before + 20 }
        let proved = try await Tool.run([
            "python3", "\(Lab.repository)/deploy/demo/proofs.py", "records", lab.consoleA, "--image",
            "0=\(paused.disk)",
        ])
        #expect(proved.code == 0, "\(proved.all)")
        try await eventually("no process is left") {
            Lab.processes(containing: lab.state("a")).allSatisfy { $0.line.contains("qemu-system") }
        }
    }

    @Test(arguments: [SIGKILL, SIGSTOP])
    func theWatchdogOfASourceAgentThatDiesOrStandsStillResumesTheGuest(_ signal: Int32) async throws {
        let paused = try await pause(deadline: 4000)
        try paused.lab.sourceAgent().signal(signal)
        try await expectTheGuestOnTheSource(paused)
        let status = try await paused.lab.crossdock(["status", "--state-dir", paused.lab.state("a")])
        #expect(status.output.contains("rolled back"), "\(status.all)")
        let directory = "\(paused.lab.state("a"))/migrations"
        let report = try paused.lab.report("\(directory)/\(DurableFile.list(directory).first ?? "")/report.json")
        let reason = report.reason ?? "no reason"
        #expect(reason.contains("was ended by its watchdog: it had not been heard") == (signal == SIGSTOP), "\(reason)")
    }

    @Test func aGuestThatSomebodyElsePausedStaysPausedWhenTheSourceAgentDies() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 16)
        try await lab.startLinuxGuest(disks: [disk])
        let migration = try lab.beginMigration(more: ["--bandwidth", "1500000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        try await lab.monitor("a") { _ = try await $0.execute("stop") }
        let agent = try lab.sourceAgent()
        agent.signal(SIGKILL)
        let result = try await migration.finish(seconds: 60)
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        try await eventually("the watchdog has rolled back") {
            let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
            return status.output.contains("rolled back")
        }
        #expect(try await lab.leftAtSource() == ["the guest is paused"])
    }

    /// The copy was damaged after it was written and before it was read back.
    @Test func aDamagedCopyIsNotRun() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 16)
        try await lab.startLinuxGuest(disks: [disk])
        let migration = try lab.beginMigration(more: ["--bandwidth", "8000000"])
        let image = "\(lab.state("b"))/images/web1/disk.raw"
        let place: UInt64 = 33 << 20
        try await migration.wait(for: "a part of the copy") {
            guard let copy = try? RawFileProbe.byte(of: image, at: place) else { return false }
            return try copy == RawFileProbe.byte(of: disk, at: place) && copy != 0
        }
        try RawFileProbe.flip(image, at: place)
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(result.errors.contains("disk0 is not what the source sent"), "\(result.all)")
        try await expectTheGuestOnTheSource(Paused(lab: lab, disk: disk, migration: migration))
        #expect(DurableFile.exists(disk))
        let journal = MigrationStore(stateDirectory: lab.state("a"))
        let reading = try journal.reading(of: DurableFile.list(journal.directory).first ?? "")
        guard let reading, case .source(.rolledBack) = reading.standing, reading.wasReleased else {
            throw TestFailure("\(String(describing: reading))")
        }
        // The old image got its name back, and the guest can be moved again.
        #expect(try await lab.migrate().code == 0)
    }

    @Test func aFullVerificationReadsBothImagesBeforeTheGuestMoves() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 16)
        try await lab.startLinuxGuest(disks: [disk])
        let report = lab.directory.file("report.json")
        let result = try await lab.migrate(more: ["--verify=full", "--report", report])
        #expect(result.code == 0, "\(result.all)")
        let written = try lab.report(report)
        #expect(written.disks[0].digestDestination == written.disks[0].digestSource)
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    /// Something has the image open on the destination when QEMU is to write to it: the guest belongs there and cannot run.
    @Test(arguments: [false, true])
    func aGuestThatQEMUDoesNotResumeGoesOnOnceItCanOrIsGivenUp(_ isGivenUp: Bool) async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 8)
        try await lab.startIdleGuest(disks: [disk])
        let migration = try lab.beginMigration(more: ["--bandwidth", "2000000"])
        let image = "\(lab.state("b"))/images/web1/disk.raw"
        try await migration.wait(for: "the image") { DurableFile.exists(image) }
        // QEMU's lock of whoever writes, held by somebody who is no QEMU.
        let holder = try ChildProcess([
            "python3", "-c",
            """
            import fcntl, struct, sys, time
            file = open(sys.argv[1], "rb")
            fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 101, 1, 0))
            print("held", flush=True)
            time.sleep(1000)
            """, image,
        ])
        defer { holder.signal(SIGKILL) }
        try await holder.wait(for: "the lock") { holder.output.contains("held") }
        try await migration.wait(seconds: 90, for: "the refusal") { migration.errors.contains("does not run") }
        #expect(migration.errors.contains("\"write\" lock"), "\(migration.errors)")
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        #expect(status.output.contains("has not confirmed") && status.output.contains("does not run"), "\(status.all)")
        if isGivenUp {
            let stopped = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("b")])
            #expect(stopped.code == 0, "\(stopped.all)")
        } else {
            holder.signal(SIGKILL)
        }
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        if isGivenUp {
            holder.signal(SIGKILL)
            _ = try await holder.finish()
            let start = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("b")])
            #expect(start.code == 0, "\(start.all)")
        }
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    /// The word of the destination is lost, and then the destination with all it had.
    @Test func anOperatorTakesTheGuestOfADestinationThatIsGone() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 4)
        try await lab.startIdleGuest(disks: [disk])
        #expect(try await lab.migrate().code == 0)
        let store = MigrationStore(stateDirectory: lab.state("a"))
        let id = DurableFile.list(store.directory).first ?? ""
        try Lab.forgetLastRecord(of: store.journal(of: id))
        let asked = try await lab.crossdock(["recover", id, "--take-ownership", "--state-dir", lab.state("a")])
        // It is there after all, and has the guest.
        #expect(asked.code == 0 && asked.output.contains("belongs to localhost"), "\(asked.all)")
        #expect(try Journal.read(store.journal(of: id)).last == .confirmed)
        try Lab.forgetLastRecord(of: store.journal(of: id))
        lab.destination?.signal(SIGKILL)
        try lab.guests("b").load("web1")?.process?.signal(SIGKILL)
        let early = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(early.code == 10, "\(early.all)")
        let nameless = try await lab.crossdock(["recover", "--take-ownership", "--state-dir", lab.state("a")])
        #expect(nameless.code != 0 && nameless.errors.contains("needs the migration's id"), "\(nameless.all)")
        // A port that refuses connections is a host that answers.
        let arguments = ["recover", id, "--state-dir", lab.state("a"), "--take-ownership"]
        for more in [[], ["--other-host-is-off"], ["--other-host-was-erased", "another"]] {
            let refused = try await lab.crossdock(arguments + more)
            #expect(refused.code == MigrationError.Code.undecided.rawValue, "\(refused.all)")
            #expect(refused.errors.contains(more.count == 2 ? "'another'" : "refused"), "\(refused.all)")
        }
        #expect(try Journal.read(store.journal(of: id)).last == .released)
        let taken = try await lab.crossdock(arguments + ["--other-host-was-erased", "localhost"])
        #expect(taken.code == 0 && taken.output.contains("belongs to this host"), "\(taken.all)")
        let isTaken = try Journal.read(store.journal(of: id)).contains { if case .taken = $0 { true } else { false } }
        #expect(isTaken)
        #expect(DurableFile.exists(disk))
        let start = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(start.code == 0, "\(start.all)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
    }

    /// A destination that was asked to prepare keeps its copy, and refuses the guest, until it is told.
    @Test func whatADestinationCouldNotBeToldItIsToldBeforeTheNextMigration() async throws {
        let paused = try await pause(deadline: 8000, seconds: 4)
        let lab = paused.lab
        let ports = (control: lab.controlPort, nbd: lab.nbdPort)
        let store = MigrationStore(stateDirectory: lab.state("b"))
        let id = DurableFile.list(store.directory).first ?? ""
        try await eventually("the destination is prepared") {
            try Journal.read(store.journal(of: id)).contains(.prepared)
        }
        lab.destination?.signal(SIGKILL)
        _ = try await lab.destination?.finish()
        let result = try await paused.migration.finish(seconds: 120)
        #expect(result.code != 0 && result.errors.contains("could not be told of the roll-back"), "\(result.all)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        // What fails before anybody is asked forgets nothing.
        let failed = try await lab.migrate(port: 1)
        #expect(failed.code == MigrationError.Code.unreachable.rawValue, "\(failed.all)")
        let source = MigrationStore(stateDirectory: lab.state("a"))
        #expect(try source.reading(of: id)?.standing == .source(.open))
        try await lab.startDestination(ports: ports)
        let again = try await lab.migrate()
        #expect(again.code == 0, "\(again.all)")
        guard case .source(.rolledBack) = try source.reading(of: id)?.standing,
            case .destination(.rolledBack) = try store.reading(of: id)?.standing
        else { throw TestFailure("The first migration is not closed on both hosts") }
    }

    /// QEMU opens its images by their names when it goes on: without one there would be a guest that nobody can run.
    @Test func anImageThatIsMovedAwayOnTheDestinationGivesTheGuestBack() async throws {
        let paused = try await pause(deadline: 8000, seconds: 4)
        let lab = paused.lab
        let store = MigrationStore(stateDirectory: lab.state("b"))
        let id = DurableFile.list(store.directory).first ?? ""
        try await eventually("the destination is prepared") {
            try Journal.read(store.journal(of: id)).contains(.prepared)
        }
        let image = "\(lab.state("b"))/images/web1/disk.raw"
        #expect(rename(image, image + ".away") == 0)
        let result = try await paused.migration.finish(seconds: 120)
        #expect(
            result.code != 0 && result.errors.contains("was moved or replaced while the guest was on its way"),
            "\(result.all)"
        )
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
    }

    /// The journal of the destination is the only thing that says why a released guest is paused there.
    @Test func whatAPreparedDestinationSaysAndDoesWithoutItsSource() async throws {
        // The rest of the memory takes seconds on this line: the promise is there before it.
        let paused = try await pause(deadline: 20000, seconds: 6)
        let lab = paused.lab
        let watchdogs = Lab.processes(containing: "source-watchdog").filter { $0.line.contains(lab.state("a")) }
        let (agent, emulator) = (try lab.sourceAgent(), try #require(try lab.guests("a").load("web1")?.process))
        // Everything on the source goes at once, as with a host that loses its power.
        let store = MigrationStore(stateDirectory: lab.state("b"))
        let id = DurableFile.list(store.directory).first ?? ""
        try await eventually("the destination is prepared") {
            try Journal.read(store.journal(of: id)).contains(.prepared)
        }
        agent.signal(SIGSTOP)
        for process in watchdogs { kill(process.pid, SIGKILL) }
        agent.signal(SIGKILL)
        emulator.signal(SIGKILL)
        _ = try await paused.migration.finish(seconds: 90)
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("b")])
        #expect(status.output.contains("prepared") && status.output.contains("CN=host"), "\(status.all)")
        let told = try await lab.crossdock(["recover", "--state-dir", lab.state("b")])
        #expect(told.output.contains("If CN=host is gone for good"), "\(told.all)")
        #expect(told.code == MigrationError.Code.undecided.rawValue)
        // Its QEMU has only a part of the memory, so nobody can make it run.
        let take = ["recover", id, "--take-ownership", "--state-dir", lab.state("b")]
        let unfounded = try await lab.crossdock(take)
        #expect(unfounded.code != 0 && unfounded.errors.contains("--other-host-is-off"), "\(unfounded.all)")
        let elsewhere = try await lab.crossdock(take + ["--other-host-was-erased", "CN=other"])
        #expect(elsewhere.code != 0 && elsewhere.errors.contains("comes from 'CN=host'"), "\(elsewhere.all)")
        let taken = try await lab.crossdock(take + ["--other-host-is-off"])
        #expect(taken.code != 0 && taken.errors.contains("cannot run here"), "\(taken.all)")
        // The source comes back.
        let recovered = try await lab.crossdock(["recover", "--state-dir", lab.state("a")])
        #expect(recovered.code == 0 && recovered.output.contains("belongs to this host"), "\(recovered.all)")
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
        let start = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(start.code == 0, "\(start.all)")
    }
}

/// Single bytes of an image that somebody else has open.
enum RawFileProbe {
    static func byte(of path: String, at offset: UInt64) throws -> UInt8 {
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw FileError.system("open \(path)", errno) }
        defer { close(fd) }
        var byte: UInt8 = 0
        guard pread(fd, &byte, 1, off_t(offset)) == 1 else { throw FileError.system("read \(path)", errno) }
        return byte
    }

    static func flip(_ path: String, at offset: UInt64) throws {
        var byte = try byte(of: path, at: offset) ^ 1
        let fd = open(path, O_WRONLY | O_CLOEXEC)
        guard fd >= 0 else { throw FileError.system("open \(path)", errno) }
        defer { close(fd) }
        guard pwrite(fd, &byte, 1, off_t(offset)) == 1 else { throw FileError.system("write \(path)", errno) }
    }
}
