import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

extension QMPClient {
    var hasJobs: Bool { get async throws { try await !execute("query-jobs").array.isEmpty } }
}

/// What an outage does to a migration: nothing that anybody would miss.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct OutageEndToEnd {
    func makeLab(data: Int, rate: String? = nil) async throws -> Lab {
        let lab = try Lab()
        if let rate { try await lab.throttle(rate) }
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 2 * data, data: data)])
        return lab
    }

    /// Waits until a part of the disk has been copied.
    func waitForCopy(_ lab: Lab, _ migration: ChildProcess, percent: Int64) async throws {
        try await migration.wait(seconds: 60, for: "\(percent) % of the disk") {
            try await lab.monitor("a") {
                let job = try await $0.execute("query-jobs").array.first
                let (current, total) = (job?["current-progress"]?.integer ?? 0, job?["total-progress"]?.integer ?? 0)
                return total > 0 && current * 100 >= total * percent
            }
        }
    }

    func inNamespace(_ lab: Lab, _ command: String) async throws {
        let result = try await Tool.run(lab.prefix + ["sh", "-c", command])
        #expect(result.code == 0, "\(result.all)")
    }

    /// The link swallows everything for a while.
    @Test func aCutLinkIsWaitedForAndTheCopyGoesOn() async throws {
        let lab = try await makeLab(data: 64, rate: "160mbit")
        try await lab.startDestination()
        let report = lab.directory.file("report.json")
        let migration = try lab.beginMigration(more: ["--report", report])
        try await waitForCopy(lab, migration, percent: 60)
        try await inNamespace(lab, "ip link set lo down")
        try await eventually(seconds: 40, "the outage is noticed") {
            migration.errors.contains("trying again for 300 s")
        }
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        try await inNamespace(lab, "ip link set lo up")
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        let written = try lab.report(report)
        #expect(written.reconnects > 0)
        // Only what was not acknowledged went out twice.
        #expect(written.bytesResent == 0)
        #expect(written.disks[0].digestSource == written.disks[0].digestDestination)
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    @Test func aDestinationAgentThatIsKilledAndStartedAgainGoesOnWithTheCopy() async throws {
        let lab = try await makeLab(data: 192, rate: "400mbit")
        try await lab.startDestination()
        let report = lab.directory.file("report.json")
        let migration = try lab.beginMigration(more: ["--report", report])
        try await waitForCopy(lab, migration, percent: 90)
        try await lab.replaceDestination()
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        #expect(result.errors.contains("Connected to localhost again"), "\(result.errors)")
        let written = try lab.report(report)
        let data: UInt64 = 192 << 20
        #expect(written.disks[0].bytesSent < data + data / 50)
        // A hundredth of what was acknowledged; of a disk as small as this one, a few requests.
        #expect(written.bytesResent <= max(data / 100, 10 << 20), "\(written.bytesResent) bytes were sent twice")
        #expect(written.disks[0].digestSource == written.disks[0].digestDestination)
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    @Test func aQcow2DiskGoesOnAfterItsAgentWasReplaced() async throws {
        let lab = try await makeLab(data: 48, rate: "80mbit")
        try await lab.startDestination()
        let report = lab.directory.file("report.json")
        let migration = try lab.beginMigration(more: ["--report", report, "--format", "qcow2"])
        try await waitForCopy(lab, migration, percent: 70)
        try await lab.replaceDestination()
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        let written = try lab.report(report)
        #expect(written.disks[0].digestSource == written.disks[0].digestDestination)
    }

    @Test func aFullDiskThatIsEmptiedAgainIsWaitedFor() async throws {
        let lab = try await makeLab(data: 32, rate: "40mbit")
        let images = lab.directory.directory("small")
        try await lab.startDestination(images: images, mounting: "mount -t tmpfs -o size=48M none \(images)")
        let report = lab.directory.file("report.json")
        let migration = try lab.beginMigration(more: ["--report", report])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        guard let agent = lab.destination?.pid else { return }
        let inside = Namespace.enter(agent)
        let filled = try await Tool.run(inside + ["sh", "-c", "head -c 40M /dev/zero > \(images)/other; true"])
        #expect(filled.code == 0, "\(filled.all)")
        try await eventually(seconds: 60, "the full disk is noticed") { migration.errors.contains("No space left") }
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        #expect(try await Tool.run(inside + ["rm", "\(images)/other"]).code == 0)
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        let written = try lab.report(report)
        #expect(written.disks[0].digestSource == written.disks[0].digestDestination)
    }

    @Test func theMemoryIsSentAgainWithoutTheDisk() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.throttle("160mbit")
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 8)
        try await lab.startLinuxGuest(disks: [disk], workload: "xd.dirty=96")
        try await lab.startDestination()
        let report = lab.directory.file("report.json")
        let migration = try lab.beginMigration(more: ["--report", report])
        try await migration.wait(seconds: 60, for: "the memory") {
            try await lab.monitor("a") {
                let state = try await $0.migrationState()
                return state.status == "active" && state.transferred > 4 << 20
            }
        }
        try await lab.replaceDestination()
        try await eventually(seconds: 60, "the memory is sent again") { migration.errors.contains("sending it again") }
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        migration.signal(SIGINT)
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == MigrationError.Code.cancelled.rawValue, "\(result.all)")
        #expect(try await lab.leftAtSource() == [])
        try await eventually("the destination has cleaned up") {
            let left = try lab.leftAtDestination()
            if !left.isEmpty { print(left, lab.destination?.errors ?? "") }
            return left == []
        }
    }

    @Test func aGuestThatItsSourceHasGivenUpIsOfferedAgainAtOnce() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 12)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "1500000", "--patience", "1s"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        let ports = (control: lab.controlPort, nbd: lab.nbdPort)
        lab.stopDestination("b")
        #expect(try await migration.finish(seconds: 120).code != 0)
        // The next agent waits five minutes for the source of the migration that it takes up.
        try await lab.startDestination(ports: ports)
        try await eventually("it waits for it") { lab.destinationErrors("b").contains("was lost; waiting for") }
        let again = try await lab.migrate()
        #expect(again.code == 0, "\(again.all)")
        #expect(lab.destinationErrors("b").contains("before it offered the guest anew"))
    }
}
