import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// The life of a guest on its host: how it begins and ends, what is seen of its moves, and what stays of it.
@Suite(.serialized, .timeLimit(.minutes(5)))
struct LifeEndToEnd {
    private func guest(_ lab: Lab, _ side: String = "a", _ words: String...) async throws -> ToolResult {
        try await lab.crossdock(["guest"] + words + ["--state-dir", lab.state(side)])
    }

    private func makeLab(_ names: String..., data: Int = 1) async throws -> Lab {
        let lab = try Lab()
        for name in names.isEmpty ? ["web1"] : names {
            let disk = try await lab.makeImage("\(name).raw", megabytes: 32, data: data)
            try await lab.startIdleGuest(name, disks: [disk])
        }
        return lab
    }

    // MARK: the end

    @Test func aGuestIsAskedToShutDownAndDoes() async throws {
        let lab = try Lab()
        let (disk, serial) = (lab.directory.file("disk.raw"), lab.directory.file("serial"))
        try PowerButton.write(to: disk)
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"]
                + PowerButton.command(disk: disk, serial: serial)
        )
        #expect(started.code == 0, "\(started.all)")
        try await eventually("the guest listens") { try DurableFile.read(serial)?.contains(UInt8(ascii: "R")) ?? false }
        let stopped = try await guest(lab, "a", "stop", "web1")
        #expect(stopped.code == 0 && stopped.output.contains("Guest 'web1' is stopped"), "\(stopped.all)")
        #expect(try lab.guests("a").load("web1")?.process?.isRunning == false)
    }

    @Test func aGuestThatDoesNotShutDownGoesOnUntilItIsForced() async throws {
        let lab = try await makeLab()
        let deaf = try await guest(lab, "a", "stop", "web1", "--patience", "1s")
        #expect(deaf.code == 10 && deaf.errors.contains("has not within 1 s; it goes on"), "\(deaf.all)")
        #expect(deaf.errors.contains("'crossdock guest stop web1 --force'"), "\(deaf.all)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        // One that stands still hears nothing, and is not waited for.
        _ = try await lab.monitor("a") { try await $0.execute("stop") }
        let paused = try await guest(lab, "a", "stop", "web1", "--patience", "1h")
        #expect(paused.code == 10 && paused.errors.contains("its state is 'paused'"), "\(paused.all)")
        let forced = try await guest(lab, "a", "stop", "web1", "--force")
        #expect(forced.code == 0 && forced.output.contains("is stopped"), "\(forced.all)")
        let again = try await guest(lab, "a", "stop", "web1")
        #expect(again.code == 0 && again.output.contains("does not run here"), "\(again.all)")
        // It leaves no socket that nobody answers, and is as large as it was.
        for socket in [lab.guests("a").agentMonitor(of: "web1"), lab.guests("a").statusMonitor(of: "web1")] {
            #expect(!DurableFile.exists(socket))
        }
        let stopped = try await guest(lab, "a", "show", "web1", "--json")
        #expect(stopped.output.contains("\"memory\" : 67108864"), "\(stopped.all)")
    }

    @Test func aGuestIsRemovedWhenItIsOffAndItsImageStays() async throws {
        let lab = try await makeLab("web1", "web2")
        let running = try await guest(lab, "a", "remove", "web1")
        #expect(
            running.code == 10 && running.errors.contains("end it first with 'crossdock guest stop web1'"),
            "\(running.all)"
        )
        #expect(try await guest(lab, "a", "stop", "web1", "--force").code == 0)
        let removed = try await guest(lab, "a", "remove", "web1")
        let image = lab.directory.file("web1.raw")
        #expect(removed.code == 0 && removed.output.contains("its image \(image) stays"), "\(removed.all)")
        #expect(DurableFile.exists(image))
        #expect(lab.guests("a").names() == ["web2"])
        // Of one that has left, only what it has left can be removed.
        try await lab.startDestination()
        #expect(try await lab.migrate("web2").code == 0)
        let left = try await guest(lab, "a", "remove", "web2")
        #expect(left.code == 10 && left.errors.contains("'crossdock guest forget web2'"), "\(left.all)")
    }

    // MARK: the beginning

    /// After a restart of the host nothing runs; the journals say who is to.
    @Test func afterARestartThoseStartThatAreSetSoAndBelongToTheHost() async throws {
        let lab = try await makeLab("web1", "web2", "web3")
        for name in ["web1", "web3"] {
            let set = try await guest(lab, "a", "set", name, "--autostart", "on")
            #expect(set.code == 0 && set.output.contains("starts with its host"), "\(set.all)")
        }
        try await lab.startDestination()
        #expect(try await lab.migrate("web3").code == 0)
        // Whatever the record says, or does not say any more.
        var record = try #require(try lab.guests("a").load("web3"))
        record.released = nil
        try lab.guests("a").save(record)
        for (side, name) in [("a", "web1"), ("a", "web2"), ("b", "web3")] {
            try await lab.guests(side).load(name)?.process?.terminate(grace: .zero)
        }
        let looked = try await guest(lab, "a", "autostart", "--dry-run")
        #expect(looked.code == 0 && looked.output.contains("'web1' would be started"), "\(looked.all)")
        let here = try await guest(lab, "a", "autostart")
        #expect(here.code == 0 && here.output.contains("Guest 'web1' runs"), "\(here.all)")
        #expect(here.output.contains("Guest 'web3' has moved to localhost"), "\(here.all)")
        let states = try ["web1", "web2", "web3"].map { try lab.guests("a").load($0)?.process?.isRunning ?? false }
        #expect(states == [true, false, false])
        // It travels with the guest.
        let there = try await guest(lab, "b", "autostart")
        #expect(there.code == 0 && there.output.contains("Guest 'web3' runs"), "\(there.all)")
        #expect(try await lab.monitor("b", "web3") { try await $0.status() } == "running")
        let again = try await guest(lab, "a", "autostart")
        #expect(again.code == 0 && again.output.contains("'web1' runs already"), "\(again.all)")
    }

    // MARK: a move, seen from elsewhere

    @Test func aMoveIsWatchedAndCancelledAfterItsTerminalHasGone() async throws {
        let lab = try await makeLab(data: 16)
        try await lab.startDestination()
        let nothing = try await lab.crossdock(["cancel", "web1", "--state-dir", lab.state("a")])
        #expect(nothing.code == 10 && nothing.errors.contains("No migration of 'web1' is under way"), "\(nothing.all)")
        let migration = try lab.beginMigration(more: ["--bandwidth", "1M"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        migration.signal(SIGKILL)
        _ = try await migration.finish()
        try await eventually("the status tells how far it is") {
            let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
            return status.output.contains("phase disks, ") && status.output.contains(" %")
                && status.output.contains(" UTC")
        }
        let watcher = try ChildProcess([Lab.crossdock, "status", "--watch", "--state-dir", lab.state("a")])
        try await watcher.wait(for: "what has happened and what happens") {
            watcher.output.contains("checking both sides") && watcher.output.contains("copying disks  ")
        }
        let cancelled = try await lab.crossdock(["cancel", "web1", "--state-dir", lab.state("a")])
        #expect(cancelled.code == 0 && cancelled.output.contains("was rolled back"), "\(cancelled.all)")
        let watched = try await watcher.finish()
        #expect(watched.code == MigrationError.Code.cancelled.rawValue, "\(watched.all)")
        #expect(try await lab.leftAtSource() == [])
        let late = try await lab.crossdock(["status", "--watch", "--state-dir", lab.state("a")])
        #expect(late.code == 10, "\(late.all)")
    }

    @Test func thePauseIsToldAndWhyItWasLongerThanItWasToBe() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        let moved = try await lab.migrate(more: ["--downtime-limit", "5ms", "--blackout-deadline", "10s"])
        #expect(moved.code == 0, "\(moved.all)")
        for words in ["longer than the 5 ms of --downtime-limit", "the last of the memory took", "the handing over"] {
            #expect(moved.errors.contains(words), "'\(words)' is not in: \(moved.all)")
        }
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        let pause = try #require(moved.output.split(separator: "\n").first { $0.contains("blackout") })
        let time = pause.split(separator: " ").suffix(2).joined(separator: " ")
        #expect(status.output.contains(time), "\(time): \(status.all)")
    }

    /// Both hosts are this machine, so that the port of the display is taken there.
    @Test func aDisplayThatGetsAnotherPortIsToldAndShown() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.network("true")
        try await lab.startIdleGuest(
            disks: [disk],
            more: ["-vnc", "127.0.0.1:7", "-serial", "unix:\(lab.directory.file("serial")),server=on,wait=off"]
        )
        let here = try await guest(lab, "a", "show", "web1")
        #expect(here.output.contains("VNC display default: 127.0.0.1:5907"), "\(here.all)")
        #expect(here.output.contains("character device serial0: unix:\(lab.directory.file("serial"))"), "\(here.all)")
        try await lab.startDestination()
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        #expect(
            moved.errors.contains(
                "The VNC display default of guest 'web1' listens on 127.0.0.1:5907 here, and will on 127.0.0.1:5908 on localhost"
            ),
            "\(moved.all)"
        )
        let there = try await guest(lab, "b", "show", "web1")
        #expect(there.output.contains("VNC display default: 127.0.0.1:5908"), "\(there.all)")
    }

    // MARK: what stays

    @Test func oldImagesAreShownAndDeletedInTimeAtOnceOrByHand() async throws {
        let lab = try await makeLab("web1", "web2")
        try await lab.startDestination()
        func old() -> [String] { DurableFile.list(lab.directory.path).filter { $0.contains(".released-") } }
        #expect(try await lab.migrate("web1", more: ["--keep-source", "0s"]).code == 0)
        #expect(old() == [])
        #expect(try await lab.migrate("web2", more: ["--keep-source", "2d"]).code == 0)
        #expect(old().count == 1)
        let list = try await guest(lab, "a", "list")
        #expect(list.output.contains("1 MiB of old images are kept until 20"), "\(list.all)")
        let kept = try await guest(lab, "a", "prune")
        #expect(kept.code == 0 && kept.output.contains("web2") && kept.output.contains(" UTC"), "\(kept.all)")
        #expect(old().count == 1)
        let json = try await guest(lab, "a", "prune", "--json", "--dry-run")
        #expect(json.output.contains("\"until\"") && json.output.contains("\"bytes\" : 1048576"), "\(json.all)")
        #expect(try await guest(lab, "a", "prune", "web1", "--all").output.contains("No old images"))
        #expect(old().count == 1)
        let pruned = try await guest(lab, "a", "prune", "--all")
        #expect(pruned.code == 0 && pruned.output.contains("deleted \(lab.directory.path)/web2.raw"), "\(pruned.all)")
        #expect(old() == [])
    }

    @Test func theProgressOfALargeSparseDiskDoesNotBeginAtItsEnd() async throws {
        let lab = try Lab()
        let disk = lab.directory.file("disk.raw")
        #expect(try await Tool.run(["truncate", "-s", "2T", disk]).code == 0)
        #expect(
            try await Tool.run(["dd", "if=/dev/urandom", "of=\(disk)", "bs=1M", "count=8", "seek=1000", "conv=notrunc"])
                .code
                == 0
        )
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--json", "--bandwidth", "1M"])
        // 8 MiB at 1 MiB/s: what is said before half of the time is no end.
        try await migration.wait(seconds: 120, for: "some progress") {
            let events = migration.output.split(separator: "\n").compactMap { MigrationEvent(parsing: Array($0.utf8)) }
            return events.contains { $0.event == "progress" && $0.phase == "disks" && ($0.percent ?? 0) > 0 }
        }
        let events = migration.output.split(separator: "\n").compactMap { MigrationEvent(parsing: Array($0.utf8)) }
        let progress = events.filter { $0.event == "progress" && $0.phase == "disks" }.compactMap(\.percent)
        #expect(progress.first == 0 || (progress.first ?? 100) < 100, "\(progress)")
        #expect(zip(progress, progress.dropFirst()).allSatisfy { $0 <= $1 + 5 }, "\(progress)")
        migration.signal(SIGINT)
        #expect(try await migration.finish().code == MigrationError.Code.cancelled.rawValue)
    }
}
