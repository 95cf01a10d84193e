import Emulator
import Glibc
import IO
import Migration
import Source
import TestSupport
import Testing

/// A host is emptied: real guests, two targets, the coordinator's own process.
@Suite(.timeLimit(.minutes(6)))
struct EvacuationEndToEnd {
    private func evacuate(
        _ lab: Lab,
        to sides: [String] = ["b", "c"],
        _ more: [String] = []
    ) async throws -> ToolResult {
        try await lab.crossdock(words(lab, to: sides, more), seconds: 300)
    }

    private func words(_ lab: Lab, to sides: [String], _ more: [String]) -> [String] {
        let hosts = sides.map { "localhost:\(lab.controlPort(of: $0))" }.joined(separator: ",")
        // Other tests have QEMUs on this machine, too.
        return ["evacuate", "--to", hosts, "--known-only", "--state-dir", lab.state("a")] + lab.credentials() + more
    }

    private func again(_ lab: Lab, _ words: [String]) async throws -> ToolResult {
        try await lab.crossdock(["evacuate", "--state-dir", lab.state("a")] + words, seconds: 300)
    }

    /// Guests on host a, and agents on b and c.
    private func prepare(_ names: [String], megabytes: Int = 16, data: Int = 2) async throws -> Lab {
        let lab = try Lab()
        for name in names {
            let disk = try await lab.makeImage("\(name).raw", megabytes: megabytes, data: data)
            try await lab.startIdleGuest(name, disks: [disk])
        }
        try await lab.startDestination("b")
        try await lab.startDestination("c")
        return lab
    }

    private func change(_ lab: Lab, _ name: String, _ body: (inout GuestPlacement) -> Void) throws {
        var record = try #require(try lab.guests("a").load(name))
        var placement = record.placement ?? GuestPlacement()
        body(&placement)
        record.placement = placement
        try lab.guests("a").save(record)
    }

    /// The sides on which a guest has a QEMU and is not said to have left.
    private func homes(_ lab: Lab, _ name: String) throws -> [String] {
        try ["a", "b", "c"].filter { side in
            guard let record = try lab.guests(side).load(name) else { return false }
            return record.released == nil && record.process?.isRunning == true
        }
    }

    @Test func everyGuestLeavesAndThoseOfOneGroupDoNotMeet() async throws {
        let lab = try await prepare(["web1", "web2", "web3"])
        for name in ["web1", "web2"] { try change(lab, name) { $0.antiAffinity = "db" } }
        let look = try await evacuate(lab, ["--dry-run"])
        #expect(look.code == 0 && look.output.contains("ESTIMATED PAUSE"), "\(look.all)")
        #expect(try homes(lab, "web1") == ["a"] && Cordon.read(stateDirectory: lab.state("a")) == nil)
        let done = try await evacuate(lab)
        #expect(done.code == 0 && done.output.contains("3 guests have moved; this host is empty"), "\(done.all)")
        let places = try ["web1", "web2", "web3"].map { try homes(lab, $0) }
        #expect(places[0] + places[1] == ["b", "c"] || places[0] + places[1] == ["c", "b"], "\(places)")
        #expect(places[2].count == 1 && places[2] != ["a"])
        #expect(try Cordon.read(stateDirectory: lab.state("a")) != nil)
        // One that comes later is kept apart from those that are there already.
        try await lab.startIdleGuest("web4", disks: [try await lab.makeImage("web4.raw", megabytes: 16, data: 1)])
        try change(lab, "web4") { $0.antiAffinity = "db" }
        let apart = try await evacuate(lab, ["--dry-run"])
        #expect(apart.code == 21 && apart.output.contains("another guest of the group 'db' is there"), "\(apart.all)")
        let together = try await evacuate(lab, ["--dry-run", "--ignore-affinity"])
        #expect(together.code == 0, "\(together.all)")
        let status = try await again(lab, ["--status"])
        #expect(status.code == 0 && status.output.contains("this host is empty"), "\(status.all)")
        let id = try #require(EvacuationFiles(stateDirectory: lab.state("a")).latest)
        let line = status.output.split(separator: "\n").last.map(String.init) ?? ""
        #expect(line.hasPrefix("Evacuation \(id), begun ") && line.contains(" UTC, ended "), "\(line)")
        let report = try await again(lab, ["--status", "--json"])
        #expect(report.output.contains("\"blackout_ms\""), "\(report.all)")
        // Nothing is left to cancel or to go on with.
        #expect(try await again(lab, ["--cancel"]).code == 10)
        #expect(try await again(lab, ["--resume"]).output.contains("No evacuation of this host was interrupted"))
    }

    @Test func aTargetThatIsPassedOverIsNamedWithTheReason() async throws {
        let lab = try Lab()
        for name in ["web1", "web2"] {
            let disk = try await lab.makeImage("\(name).raw", megabytes: 16, data: 1)
            try await lab.startIdleGuest(name, disks: [disk])
        }
        try await lab.startDestination("b", more: ["--most-memory", "16M"])
        try await lab.startDestination("c")
        let look = try await evacuate(lab, ["--dry-run"])
        #expect(look.code == 0, "\(look.all)")
        let words = "localhost:\(lab.controlPort(of: "b")) does not take web1, web2: The limit of 16M of memory"
        #expect(look.errors.contains(words), "\(look.all)")
    }

    @Test func aGuestThatCannotGoStopsItBeforeItBeginsUnlessThatWasPermitted() async throws {
        let lab = try await prepare(["web1", "web2"])
        // The image of one is used by somebody else.
        let user = try ChildProcess(["setsid", "sh", "-c", "exec sleep 600 < \(lab.directory.file("web2.raw"))"])
        defer { user.signal(SIGKILL) }
        let refused = try await evacuate(lab)
        #expect(refused.code == 21 && refused.output.contains("web2 cannot go"), "\(refused.all)")
        #expect(try homes(lab, "web1") == ["a"] && homes(lab, "web2") == ["a"])
        #expect(try Cordon.read(stateDirectory: lab.state("a")) == nil)
        #expect(EvacuationFiles(stateDirectory: lab.state("a")).ids.isEmpty)
        let some = try await evacuate(lab, ["--start-anyway"])
        #expect(some.code == 20 && some.errors.contains("still: web2"), "\(some.all)")
        #expect(try homes(lab, "web1") == ["b"] && homes(lab, "web2") == ["a"])
        // Left on purpose it keeps nobody, and the host is not empty all the same.
        let left = try await evacuate(lab, ["--leave", "web2"])
        #expect(left.code == 20, "\(left.all)")
        let except = try await evacuate(lab, ["--except", "web2"])
        #expect(except.code == 0, "\(except.all)")
    }

    @Test func itGoesOnWhereAKilledCoordinatorStoppedAndAsksTheJournals() async throws {
        let lab = try await prepare(["web1", "web2"], megabytes: 32, data: 12)
        let begun = try await evacuate(lab, ["--detach", "--bandwidth", "2000000"])
        #expect(begun.code == 0, "\(begun.all)")
        let files = EvacuationFiles(stateDirectory: lab.state("a"))
        let id = try #require(files.latest)
        try await eventually(seconds: 120, "the first guest moves") {
            guard let plan = try? files.load(id), let guest = plan.guests.first,
                case .moving(let migration, _) = guest.standing
            else { return false }
            return DurableFile.exists("\(lab.state("a"))/migrations/\(migration)/journal")
        }
        let coordinator = try #require(Lab.processes(containing: "\(EvacuationProcess.command)\0\(id)").first)
        kill(coordinator.pid, SIGKILL)
        try await eventually("it is gone") { !files.isCoordinated }
        let status = try await again(lab, ["--status"])
        #expect(status.output.contains("was interrupted"), "\(status.all)")
        // A second evacuation finds a guest that moves.
        let second = try await evacuate(lab)
        #expect(second.code == 21 && second.output.contains("being migrated already"), "\(second.all)")
        let resumed = try await again(lab, ["--resume"])
        #expect(
            resumed.code == 0 && resumed.output.contains("2 guests have moved; this host is empty"),
            "\(resumed.all)"
        )
        #expect(try homes(lab, "web1").count == 1 && homes(lab, "web1") != ["a"])
        #expect(try homes(lab, "web2").count == 1 && homes(lab, "web2") != ["a"])
    }

    /// Three of the records; `make evacuation` has all of them.
    @Test(.enabled(if: geteuid() == 0, "only root makes namespaces"))
    func aCoordinatorKilledAtARecordOfItsPlanKeepsNoGuestAndRunsNoneTwice() async throws {
        let result = try await Tool.run(
            ["python3", "\(Lab.repository)/Tests/Evacuation/records.py", Lab.crossdock, "--fast"],
            seconds: 300
        )
        #expect(result.code == 0, "\(result.all)")
    }

    @Test func aCancelledOneRollsTheCopyBackAndLeavesTheOthers() async throws {
        let lab = try await prepare(["web1", "web2"], megabytes: 32, data: 12)
        let child = try ChildProcess([Lab.crossdock] + words(lab, to: ["b"], ["--bandwidth", "1000000"]))
        let files = EvacuationFiles(stateDirectory: lab.state("a"))
        try await child.wait(for: "the first copy") { child.output.contains("copying") }
        let id = try #require(files.latest)
        let busy = try await evacuate(lab, to: ["c"], [])
        #expect(busy.code == 17 && busy.errors.contains("is under way"), "\(busy.all)")
        // Nobody lets guests in while others are sent away.
        let restored = try await lab.crossdock(["restore", "--state-dir", lab.state("a")] + lab.credentials())
        #expect(restored.code == 17 && restored.errors.contains("is under way"), "\(restored.all)")
        #expect(try Cordon.read(stateDirectory: lab.state("a")) != nil)
        let cancelled = try await again(lab, ["--cancel", id])
        #expect(cancelled.code == 23 && cancelled.errors.contains("was cancelled"), "\(cancelled.all)")
        #expect(try await child.finish().code == 23)
        #expect(try homes(lab, "web1") == ["a"] && homes(lab, "web2") == ["a"])
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
    }

    @Test func whatAnEvacuationMovedAwayComesHomeWhereThatIsAllowed() async throws {
        let lab = try await prepare(["web1", "web2"], megabytes: 32, data: 8)
        try await lab.startDestination("a")
        #expect(try await evacuate(lab, to: ["b"], []).code == 0)
        func restore(_ more: [String]) async throws -> ToolResult {
            try await lab.crossdock(
                ["restore", "--address", "localhost:\(lab.controlPort(of: "a"))", "--state-dir", lab.state("a")]
                    + lab.credentials() + more,
                seconds: 300
            )
        }
        let refused = try await restore([])
        #expect(refused.code == 20 && refused.errors.contains("allow-recall"), "\(refused.all)")
        let identity = try #require(refused.errors.split(separator: "'").map(String.init).first { $0.contains("CN=") })
        try await lab.replaceDestination(more: ["--allow-recall", identity])
        let asked = try await restore(["--dry-run"])
        #expect(asked.code == 0 && asked.output.contains("would send it"), "\(asked.all)")
        #expect(try homes(lab, "web1") == ["b"])
        let one = try await restore(["--skip", "web2"])
        #expect(one.code == 0 && one.output.contains("web1  is home"), "\(one.all)")
        // The host that has had it notes a moment later that it has left.
        try await eventually("web1 is home") {
            try homes(lab, "web1") == ["a"] && homes(lab, "web2") == ["b"]
        }
        let all = try await restore([])
        #expect(all.code == 0 && all.output.contains("1 of 1 guests are home"), "\(all.all)")
        try await eventually("web2 is home") { try homes(lab, "web2") == ["a"] }
        #expect(try Cordon.read(stateDirectory: lab.state("a")) == nil)
        let unknown = try await restore(["--skip", "web3"])
        #expect(unknown.code == 10 && unknown.errors.contains("no guest 'web3' to be skipped"), "\(unknown.all)")
        // The old images were used: next to nothing crossed the line.
        var reports: [MigrationReport] = []
        // The agents that have sent them say so a moment after they are here.
        try await eventually("both have a report") {
            reports = try DurableFile.list("\(lab.state("b"))/migrations").compactMap { id in
                try DurableFile.read("\(lab.state("b"))/migrations/\(id)/report.json").map {
                    try MigrationReport(parsing: $0)
                }
            }.filter { $0.outcome == .migrated }
            return reports.count == 2
        }
        #expect(reports.allSatisfy { $0.disks.allSatisfy { $0.bytesSent < 1 << 20 } }, "\(reports)")
        #expect(
            try await restore([]).output.contains("No evacuation of this host has moved a guest that is still away")
        )
        // One that came home and was removed here is not away.
        for words in [["guest", "stop", "web2", "--force"], ["guest", "remove", "web2"]] {
            let done = try await lab.crossdock(words + ["--state-dir", lab.state("a")])
            #expect(done.code == 0, "\(done.all)")
        }
        let after = try await restore([])
        #expect(after.code == 0 && after.output.contains("still away"), "\(after.all)")
    }

    @Test func aGuestThatIsOffMovesAndStaysOff() async throws {
        let lab = try await prepare(["web1"])
        let digest = try ChunkDigests.digest(of: lab.directory.file("web1.raw"))
        let stopped = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")])
        #expect(stopped.code == 0, "\(stopped.all)")
        let look = try await lab.migrate(more: ["--dry-run"])
        #expect(look.code == 0, "\(look.all)")
        #expect(try lab.guests("a").load("web1")?.process == nil)
        // One that does not get there is off here as before.
        try await lab.startDestination("b", more: ["--most-memory", "1M"])
        let refused = try await lab.migrate()
        #expect(refused.code == 13, "\(refused.all)")
        let kept = try #require(try lab.guests("a").load("web1"))
        #expect(kept.process == nil && kept.isOff == nil && kept.released == nil)
        let report = lab.directory.file("off.json")
        try await lab.startDestination("b")
        let moved = try await lab.migrate(more: ["--report", report])
        #expect(moved.errors.contains("does not run here, and moves as one that is off"), "\(moved.all)")
        #expect(moved.output.contains("is off there as it was here; 'crossdock guest start web1'"), "\(moved.all)")
        #expect(try lab.report(report).isOff == true)
        try await lab.startDestination("a")
        let back = try await lab.migrate(from: "b", port: lab.controlPort(of: "a"))
        #expect(back.code == 0, "\(back.all)")
        let done = try await evacuate(lab, to: ["c"], [])
        #expect(done.code == 0, "\(done.all)")
        let record = try #require(try lab.guests("c").load("web1"))
        #expect(record.process == nil && record.isOff == nil && record.released == nil)
        #expect(
            Lab.processes(containing: "\(lab.state("c"))/guests").filter { $0.line.contains("qemu-system") }.isEmpty
        )
        let images = try record.commandLine.paths().filter { $0.kind == .disk }.map(\.path)
        #expect(try images.map { try ChunkDigests.digest(of: $0) } == [digest])
        let list = try await lab.crossdock(["guest", "list", "--state-dir", lab.state("c")])
        #expect(list.output.contains("stopped"), "\(list.all)")
        let started = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("c")])
        #expect(started.code == 0, "\(started.all)")
    }

    @Test func onlyWhatIsSetToBeStoppedIsAskedToAndOneThatDoesNotShutDownStays() async throws {
        let lab = try await prepare(["web1"])
        try change(lab, "web1") { $0.evacuation = .stop }
        let refused = try await evacuate(lab)
        #expect(refused.code == 21 && refused.output.contains("--stop-ok permits that"), "\(refused.all)")
        // Its firmware knows no such button.
        let stays = try await evacuate(lab, ["--stop-ok", "--stop-patience", "1s"])
        #expect(stays.code == 20 && stays.output.contains("it goes on running here"), "\(stays.all)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
    }

    @Test func aGuestGoesElsewhereWhenItsTargetDiesAndACordonedTargetIsNamed() async throws {
        let lab = try await prepare(["web1"], megabytes: 32, data: 12)
        let child = try ChildProcess(
            [Lab.crossdock] + words(lab, to: ["b", "c"], ["--bandwidth", "2000000", "--patience", "1s"])
        )
        try await child.wait(for: "the copy") { child.output.contains("copying") && child.output.contains("%") }
        lab.stopDestination("b")
        let code = try await child.finish().code
        #expect(code == 0 && child.output.contains("it is tried again"), "\(child.output)\(child.errors)")
        #expect(try await lab.monitor("c") { try await $0.status() } == "running")
        #expect(try !homes(lab, "web1").contains("a"))
        // Nobody is asked to go where nobody is let in.
        let cordoned = try await lab.crossdock(["cordon", "--message", "new disks", "--state-dir", lab.state("a")])
        #expect(cordoned.code == 0, "\(cordoned.all)")
        try await lab.startDestination("a")
        let refused = try await lab.crossdock(
            [
                "evacuate", "--to", "localhost:\(lab.controlPort(of: "a"))", "--known-only", "--state-dir",
                lab.state("c"),
            ]
                + lab.credentials()
        )
        #expect(refused.code == 13 && refused.errors.contains("new disks"), "\(refused.all)")
    }

    @Test func anAgentOfTheReleaseBeforeTakesGuestsWithoutRoomAndTurns() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("web1.raw", megabytes: 16, data: 2)
        try await lab.startIdleGuest("web1", disks: [disk])
        try await lab.startDestination(program: PreviousReleaseEndToEnd.program)
        let done = try await evacuate(lab, to: ["b"], [])
        #expect(done.code == 0 && done.errors.contains("is of an earlier release"), "\(done.all)")
        #expect(try homes(lab, "web1") == ["b"])
    }

    @Test func badInputIsNamed() async throws {
        let lab = try await prepare(["web1"])
        for (more, code, text) in [
            (["--only", "nobody"], Int32(10), "There is no guest 'nobody' on this host; there are: web1"),
            (["--except", "env=prod"], 10, "No guest on this host has the label env=prod"),
            (["--leave", "nobody"], 10, "There is no guest 'nobody'"),
            (["--to", "localhost:\(lab.controlPort(of: "b"))"], 10, "is named twice"),
            (["--deadline", "0s"], 64, "is over already"),
            (["--parallel-copies", "0"], 64, "--parallel-copies takes"),
        ] {
            let result = try await evacuate(lab, more)
            #expect(result.code == code && result.errors.contains(text), "\(more): \(result.all)")
        }
        for none in ["", ",", ",,"] {
            let result = try await lab.crossdock(
                ["evacuate", "--to", none, "--state-dir", lab.state("a")] + lab.credentials()
            )
            #expect(result.code == 64 && result.errors.contains("--to HOST says"), "\(result.all)")
        }
        // One host under two names, and this host under a name of its own.
        let twice = try await evacuate(lab, to: ["b"], ["--to", "127.0.0.1:\(lab.controlPort(of: "b"))"])
        #expect(twice.code == 10 && twice.errors.contains("are the same host"), "\(twice.all)")
        try await lab.startDestination("a")
        let itself = try await evacuate(lab, to: ["a"])
        #expect(itself.code == 10 && itself.errors.contains("is this host itself"), "\(itself.all)")
        #expect(try Cordon.read(stateDirectory: lab.state("a")) == nil)
        let away = try await lab.crossdock(
            ["evacuate", "--to", "localhost:1", "--known-only", "--state-dir", lab.state("a")] + lab.credentials()
        )
        #expect(away.code == 11, "\(away.all)")
        #expect(try await again(lab, ["--status", "nonsense"]).code == 10)
        #expect(try await again(lab, []).code == 64)
        try DurableFile.makeDirectory("\(lab.state("a"))/evacuations/1-abc")
        try DurableFile.write(Array("{".utf8), to: "\(lab.state("a"))/evacuations/1-abc/plan.json")
        let damaged = try await again(lab, ["--resume", "1-abc"])
        #expect(damaged.code == 16 && damaged.errors.contains("is damaged"), "\(damaged.all)")
        #expect(try homes(lab, "web1") == ["a"])
    }
}
