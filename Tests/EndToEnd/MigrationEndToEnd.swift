import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// A running Linux guest moves while it writes.
@Suite(.serialized, .timeLimit(.minutes(30)))
struct MigrationEndToEnd {
    @Test(arguments: [1, 2])
    func aGuestThatWritesThroughoutMovesAndLosesNothing(_ count: Int) async throws {
        let lab = try Lab()
        var disks: [String] = []
        for index in 0..<count {
            disks.append(try await lab.makeImage("disk\(index).raw", megabytes: 256 << index, data: 20))
        }
        try await lab.startDestination()
        try await lab.startLinuxGuest(disks: disks)
        let script = lab.directory.file("start-web1.sh")
        let command = lab.linuxCommand(disks: disks).map { "'\($0)'" }.joined(separator: " ")
        try DurableFile.write(Array("#!/bin/sh\nexec \(command)\n".utf8), to: script, mode: 0o700)
        let reportPath = lab.directory.file("report.json")

        let result = try await lab.migrate(more: ["--report", reportPath])
        #expect(result.code == 0, "\(result.all)")
        #expect(result.output.contains("blackout"), "\(result.all)")

        let report = try lab.report(reportPath)
        #expect(report.outcome == .migrated)
        #expect(report.disks.count == count)
        for disk in report.disks {
            #expect(disk.digestSource != nil && disk.digestSource == disk.digestDestination)
        }
        #expect(["1.2", "1.3"].contains(report.tls?.version))
        #expect(report.blackoutMS.map { $0 > 0 } == true)
        #expect(report.ramBytesSent > 0)

        try await eventually("the guest writes on the destination") { try lab.records(lab.consoleB) > 50 }
        var proof = ["python3", "\(Lab.repository)/deploy/demo/proofs.py", "records", lab.consoleA, lab.consoleB]
        for (index, disk) in disks.enumerated() {
            let image = "\(lab.state("b"))/images/web1/disk\(index).raw"
            proof += ["--image", "\(index)=\(image)"]
            let fenced = "\(disk).released-\(report.migration)"
            let own = try await Tool.run(["python3", "\(Lab.repository)/deploy/demo/proofs.py", "digest", fenced])
            #expect(own.output.contains(report.disks[index].digestDestination ?? "none"), "\(own.all)")
        }
        let proved = try await Tool.run(proof)
        #expect(proved.code == 0, "\(proved.all)")

        // The old copy is fenced: neither the user's script nor Crossdock starts it.
        let old = try await Tool.run(["sh", script], seconds: 20)
        #expect(old.code != 0 && old.all.contains("No such file"), "\(old.all)")
        let again = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(again.code == 10 && again.all.contains("has moved to localhost"), "\(again.all)")
        let other = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + lab.linuxCommand(disks: disks)
        )
        #expect(other.code == 10, "\(other.all)")

        let status = try await lab.crossdock(["status", "--json", "--state-dir", lab.state("a")])
        #expect(status.output.contains(#""state" : "migrated""#), "\(status.all)")
        let there = try await lab.crossdock(["guest", "list", "--state-dir", lab.state("b")])
        #expect(there.output.contains("running"), "\(there.all)")
    }

    @Test func theEventsOfAMigrationAreOneJSONObjectALine() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 64, data: 8)])
        let result = try await lab.migrate(more: ["--json"])
        #expect(result.code == 0, "\(result.all)")
        let events = result.output.split(separator: "\n").map { MigrationEvent(parsing: Array($0.utf8)) }
        #expect(events.allSatisfy { $0 != nil })
        let phases = events.compactMap { $0 }.filter { $0.event == "phase" }.compactMap(\.phase)
        #expect(phases == ["check", "disks", "verify", "memory", "switchover", "release", "done"])
        #expect(events.last??.report?.outcome == .migrated)
    }

    @Test func aTerminalSeesOneLineWithPhasePercentRateAndTimeLeft() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 64, data: 32)])
        let command = ([Lab.crossdock] + lab.migrateCommand(more: ["--bandwidth", "8000000"])).joined(separator: " ")
        let result = try await Tool.run(["script", "-qec", "stty cols 100; \(command)", "/dev/null"])
        #expect(result.code == 0, "\(result.all)")
        let lines = result.output.unicodeScalars.split(separator: "\r").map { String($0) }
        #expect(
            lines.contains {
                $0.contains("copying disks") && $0.contains("%") && $0.contains("MiB/s") && $0.contains(" s left")
            },
            "\(lines)"
        )
        #expect(result.output.contains("blackout"))
    }

    @Test func theDemoProvesItsMoveThereAndBack() async throws {
        let result = try await Tool.run(
            ["python3", "\(Lab.repository)/deploy/demo/demo.py", Lab.crossdock, Lab.guestFiles, "--disk", "256"],
            seconds: 400
        )
        #expect(result.code == 0, "\(result.all)")
        #expect(result.output.contains("Every proof held"))
        #expect(result.output.contains("each proof fails when its evidence is tampered with"))
    }

    @Test func anInterruptedDemoLeavesNothingBehind() async throws {
        let temporary = try TestDirectory()
        let demo = try ChildProcess(
            ["python3", "\(Lab.repository)/deploy/demo/demo.py", Lab.crossdock, Lab.guestFiles, "--disk", "64"],
            environment: ["XD_DEMO_BASE": temporary.path]
        )
        try await demo.wait(seconds: 90, for: "the migration") { demo.output.contains("crossdock migrate") }
        // As a terminal does it: the whole process group.
        kill(-demo.pid, SIGINT)
        let result = try await demo.finish()
        #expect(result.code != 0)
        #expect(result.errors.contains("interrupted"), "\(result.all)")
        try await eventually("everything has ended") { Lab.processes(containing: temporary.path).isEmpty }
        #expect(DurableFile.list(temporary.path).isEmpty)
    }

    /// The destination agent dies while the guest is paused: the guest resumes on the source, and the next agent hears of it.
    @Test func aDestinationAgentKilledDuringTheSwitchoverGivesTheGuestBack() async throws {
        let lab = try Lab()
        let port = try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 4)
        try await lab.startLinuxGuest(disks: [disk], workload: "xd.dirty=12")
        let migration = try lab.beginMigration(more: ["--bandwidth", "6000000", "--downtime-limit", "4000"])
        try await migration.wait(seconds: 90, for: "the switchover") { migration.output.contains("switching over") }
        lab.destination?.signal(SIGKILL)
        try await eventually("the guest runs on the source again") {
            try await lab.monitor("a") { try await $0.status() } == "running"
        }
        try await lab.startDestination(more: ["--listen", "127.0.0.1:\(port)"])
        let result = try await migration.finish(seconds: 90)
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(try await lab.leftAtSource() == [])
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
        for side in ["a", "b"] {
            let status = try await lab.crossdock(["status", "--state-dir", lab.state(side)])
            #expect(status.output.contains("rolled back"), "\(status.all)")
        }
        let proved = try await Tool.run([
            "python3", "\(Lab.repository)/deploy/demo/proofs.py", "records", lab.consoleA, "--image", "0=\(disk)",
        ])
        #expect(proved.code == 0, "\(proved.all)")
    }

    /// The destination goes silent while the guest is paused: the pause ends at its deadline, on the source.
    @Test func aSilentDestinationDuringTheSwitchoverGivesTheGuestBackAtTheDeadline() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 4)
        try await lab.startLinuxGuest(disks: [disk], workload: "xd.dirty=12")
        let reportPath = lab.directory.file("report.json")
        // Twelve megabytes of memory are always dirty, and the link takes two seconds for them: the pause is long enough
        // to be hit.
        let migration = try lab.beginMigration(more: [
            "--bandwidth", "6000000", "--downtime-limit", "4000", "--blackout-deadline", "5000", "--report", reportPath,
        ])
        try await migration.wait(seconds: 90, for: "the switchover") { migration.output.contains("switching over") }
        lab.destination?.signal(SIGSTOP)
        try await eventually("the guest runs on the source again") {
            try await lab.monitor("a") { try await $0.status() } == "running"
        }
        lab.destination?.signal(SIGCONT)
        let result = try await migration.finish(seconds: 90)
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(result.errors.contains("blackout deadline"), "\(result.all)")
        #expect(try lab.report(reportPath).outcome == .rolledBack)
        #expect(try await lab.leftAtSource() == [])
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
        let before = try lab.records(lab.consoleA)
        try await eventually("the guest goes on writing") { try lab.records(lab.consoleA) > before + 20 }
        let proved = try await Tool.run([
            "python3", "\(Lab.repository)/deploy/demo/proofs.py", "records", lab.consoleA, "--image", "0=\(disk)",
        ])
        #expect(proved.code == 0, "\(proved.all)")
    }

    /// A guest that stands still has its images where it came to: whoever moves it next finds them there.
    @Test func aPausedGuestGoesThereAndBackAndRunsOnAtHome() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        try await lab.startDestination("a")
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 2)
        let base = try await lab.makeImage("base.raw", megabytes: 16, data: 1)
        let overlay = lab.directory.file("over.qcow2")
        let made = try await Tool.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay])
        #expect(made.code == 0, "\(made.all)")
        try await lab.startIdleGuest(
            disks: [disk],
            more: [
                "-drive", "file=\(overlay),format=qcow2,if=virtio", "-device", "virtio-scsi-pci", "-device",
                "scsi-cd,id=empty",
            ]
        )
        _ = try await lab.monitor("a") { try await $0.execute("stop") }
        for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
            let result = try await lab.migrate(from: from, port: lab.controlPort(of: to))
            #expect(result.code == 0, "\(from): \(result.all)")
            #expect(result.output.contains("it is paused"), "\(from): \(result.all)")
            #expect(try await lab.monitor(to) { try await $0.status() } == "paused")
        }
        try await lab.monitor("b") { try await $0.resume() }
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
        #expect(try await lab.monitor("b") { try await $0.blockExports().isEmpty })
    }
}
