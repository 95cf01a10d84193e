import Emulator
import Glibc
import IO
import Migration
import Source
import TestSupport
import Testing

/// A guest that comes back finds its old image there, and only what differs is sent.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct SeedsEndToEnd {
    static let chunk = 64 << 10

    /// Two hosts with destination agents, and an idle guest on host a.
    func lab(
        megabytes: Int = 64,
        data: Int = 24,
        emulator: String? = nil,
        before: [String] = []
    ) async throws -> Lab {
        let lab = try Lab(emulators: emulator.map { ($0, $0) })
        try await lab.startDestination("b", before: before)
        try await lab.startDestination("a", before: before)
        let disk = try await lab.makeImage("disk.raw", megabytes: megabytes, data: data)
        try await lab.startIdleGuest(disks: [disk])
        return lab
    }

    func image(_ lab: Lab, _ side: String) -> String { "\(lab.state(side))/images/web1/disk.raw" }

    /// The images of host a that bear the name of a release.
    func oldImages(_ lab: Lab) -> [String] {
        DurableFile.list(lab.directory.path).filter { $0.contains(".released-") }.map { lab.directory.file($0) }
    }

    /// Moves the guest, and returns the report.
    func move(_ lab: Lab, from side: String, more: [String] = []) async throws -> MigrationReport {
        let path = lab.directory.file("report.json")
        unlink(path)
        let result = try await lab.migrate(from: side, more: ["--report", path] + more)
        guard result.code == 0 else {
            throw TestFailure("\(result.all)\n\(lab.destinationOutput(side == "a" ? "b" : "a"))")
        }
        return try lab.report(path)
    }

    /// Writes over chunks of an image, as its guest might.
    func change(_ path: String, chunks: [Int], bytes: Int = SeedsEndToEnd.chunk) async throws {
        for chunk in chunks {
            let made = try await Tool.run([
                "dd", "if=/dev/urandom", "of=\(path)", "bs=\(bytes)", "count=1", "seek=\(chunk * Self.chunk / bytes)",
                "conv=notrunc", "status=none",
            ])
            guard made.code == 0 else { throw TestFailure(made.all) }
        }
    }

    /// Whether QEMU zeroes the target of a mirror first, or asks what is zero there, is its version's affair.
    @Test(arguments: [nil, "10.0"])
    func onTheWayBackOnlyWhatDiffersIsSent(_ emulator: String?) async throws {
        let lab = try await lab(emulator: emulator)
        let out = try await move(lab, from: "a")
        #expect(out.disks[0].seededBytes == nil && out.disks[0].bytesSent >= 24 << 20)
        let old = try #require(oldImages(lab).first)
        // Whole chunks, a part of one, and one where there was a hole.
        try await change(image(lab, "b"), chunks: [512, 600])
        try await change(image(lab, "b"), chunks: [700], bytes: 4096)
        try await change(image(lab, "b"), chunks: [3])
        let back = try await move(lab, from: "b")
        let disk = back.disks[0]
        #expect(disk.bytesSent == UInt64(4 * Self.chunk), "\(disk)")
        #expect(disk.seededBytes == 64 << 20 - UInt64(4 * Self.chunk), "\(disk)")
        #expect(disk.digestSource != nil && disk.digestSource == disk.digestDestination)
        // The old image is the guest's own again, and no old copy.
        #expect(!DurableFile.exists(old) && oldImages(lab) == [])
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        var status = stat()
        #expect(stat(image(lab, "a"), &status) == 0 && status.st_mode & 0o777 == 0o600)
        let user = try lab.guests("a").load("web1")?.confinement?.policy.user
        #expect(status.st_uid == user ?? geteuid())
        let later = time(nil) + 30 * 86400
        #expect(FencedImages.purge(MigrationStore(stateDirectory: lab.state("a")), now: later) == [])
        // It is still sparse.
        #expect(status.st_blocks * 512 < 30 << 20)
        // And once more there: the lineage goes with the guest.
        let again = try await move(lab, from: "a")
        #expect(again.disks[0].bytesSent == 0 && again.disks[0].seededBytes == 64 << 20, "\(again.disks[0])")
    }

    /// As in the shipped unit: an image that its guest's user had is used all the same, and one that is open is not.
    @Test(.enabled(if: geteuid() == 0), arguments: [false, true])
    func anAgentWithoutThePrivilegeOfLeasesFindsOutWhoHasAnImageOpen(_ isOpen: Bool) async throws {
        let lab = try await lab(megabytes: 16, data: 4, before: ["setpriv", "--bounding-set=-lease"])
        _ = try await move(lab, from: "a")
        let back = try await move(lab, from: "b")
        #expect(back.disks[0].seededBytes == 16 << 20)
        let directory = "\(lab.state("b"))/images/web1"
        let old = try #require(DurableFile.list(directory).first { $0.contains(".released-") })
        var before = stat()
        #expect(stat("\(directory)/\(old)", &before) == 0 && before.st_uid != 0)
        let holder =
            try isOpen ? ChildProcess(["sh", "-c", "exec 3<\(directory)/\(old); echo open; exec sleep 1000"]) : nil
        try await holder?.wait(for: "the holder") { holder?.output.contains("open") == true }
        let again = try await move(lab, from: "a")
        #expect(again.disks[0].seededBytes == (isOpen ? nil : 16 << 20), "\(again.disks[0])")
        #expect(DurableFile.exists("\(directory)/\(old)") == isOpen)
        holder?.signal(SIGKILL)
    }

    @Test func eachDiskOfAGuestFindsItsOwn() async throws {
        let lab = try Lab()
        try await lab.startDestination("b")
        try await lab.startDestination("a")
        let disks = [
            try await lab.makeImage("disk.raw", megabytes: 16, data: 4),
            try await lab.makeImage("data.raw", megabytes: 16, data: 6),
        ]
        try await lab.startIdleGuest(disks: disks)
        let unclear = try await lab.migrate(more: ["--seed", "x"])
        #expect(unclear.code != 0 && unclear.all.contains("--seed DISK=NAME"), "\(unclear.all)")
        _ = try await move(lab, from: "a")
        try await change("\(lab.state("b"))/images/web1/data.raw", chunks: [140])
        let back = try await move(lab, from: "b")
        #expect(back.disks.map(\.bytesSent) == [0, UInt64(Self.chunk)], "\(back.disks)")
        #expect(back.disks.allSatisfy { $0.digestSource == $0.digestDestination && $0.digestSource != nil })
        // Another format has no use for a raw image.
        let other = try await move(lab, from: "a", more: ["--format", "qcow2"])
        #expect(other.disks.allSatisfy { $0.seededBytes == nil && $0.bytesSent > 0 }, "\(other.disks)")
    }

    // MARK: What is no seed

    @Test(arguments: ["linked", "open", "another lineage", "no lineage", "another size"])
    func whatIsNotSurelyTheSameDiskIsSentAsAWhole(_ flaw: String) async throws {
        let lab = try await lab(megabytes: 16, data: 4)
        _ = try await move(lab, from: "a")
        let old = try #require(oldImages(lab).first)
        let digest = try ChunkDigests.digest(of: old)
        var holder: ChildProcess?
        switch flaw {
        case "linked": #expect(link(old, old + ".link") == 0)
        case "open": holder = try ChildProcess(["sh", "-c", "exec 3<\(old); echo open; exec sleep 1000"])
        case "another lineage":
            let migrations = MigrationStore(stateDirectory: lab.state("a"))
            let files = migrations.files(of: try #require(migrations.ids().first))
            var record = try #require(FencedRecord(of: files))
            #expect(record.lineages?.count == 1)
            record.add(old, Lineage())
            try record.save(files)
        case "no lineage":
            // A guest of the same name that is another one.
            var record = try #require(try lab.guests("b").load("web1"))
            #expect(record.lineages?.values.first?.count == 1)
            record.lineages = nil
            try lab.guests("b").save(record)
        default: #expect(truncate(old, 8 << 20) == 0)
        }
        try await holder?.wait(for: "the holder") { holder?.output.contains("open") == true }
        let back = try await move(lab, from: "b")
        #expect(back.disks[0].seededBytes == nil && back.disks[0].bytesSent == 4 << 20, "\(back.disks[0])")
        #expect(DurableFile.exists(old))
        if flaw != "another size" { #expect(try ChunkDigests.digest(of: old) == digest) }
        holder?.signal(SIGKILL)
    }

    @Test func anOldImageInAnotherFileSystemStaysWhereItIs() async throws {
        let lab = try Lab()
        let images = "/dev/shm/\(lab.directory.path.split(separator: "/").last ?? "xd")-images"
        defer { DurableFile.remove(images) }
        mkdir(images, 0o711)
        try await lab.startDestination("b")
        try await lab.startDestination("a", more: ["--image-dir", images])
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 4)])
        _ = try await move(lab, from: "a")
        let back = try await move(lab, from: "b")
        #expect(back.disks[0].seededBytes == nil && back.disks[0].bytesSent == 4 << 20, "\(back.disks[0])")
        #expect(oldImages(lab).count == 1)
        #expect(lab.destinationErrors("a").contains("not in the file system"), "\(lab.destinationErrors("a"))")
    }

    // MARK: What goes wrong

    /// Begins a move back in which 8 MiB are sent slowly, and waits until what was there before them is through.
    private func beginSlowMove(_ lab: Lab) async throws -> ChildProcess {
        try await change(image(lab, "b"), chunks: Array(640..<768))
        let slow = ["--json", "--bandwidth", "1500000"]
        let moving = try ChildProcess([Lab.crossdock] + lab.migrateCommand(from: "b", more: slow))
        try await eventually(seconds: 60, "what is there is through") {
            moving.output.split(separator: "\n").contains {
                (MigrationEvent(parsing: Array($0.utf8))?.seededBytes ?? 0) > 32 << 20
            }
        }
        return moving
    }

    @Test func aBitThatFlipsInTheSeedIsFoundBeforeTheGuestRuns() async throws {
        let lab = try await lab()
        _ = try await move(lab, from: "a")
        let old = try #require(oldImages(lab).first)
        var before = stat()
        #expect(stat(old, &before) == 0)
        let moving = try await beginSlowMove(lab)
        #expect(!DurableFile.exists(old))
        // The digests were taken, and what is here was not sent.
        let flipped = try await Tool.run([
            "sh", "-c", "printf x | dd of=\(image(lab, "a")) bs=1 seek=\(33 << 20) conv=notrunc status=none",
        ])
        #expect(flipped.code == 0)
        let result = try await moving.finish(seconds: 120)
        #expect(result.code != 0 && result.all.contains("is not what the source sent"), "\(result.all)")
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
        // It is an old copy again, as it was.
        try await eventually("the old image is back") { DurableFile.exists(old) }
        var after = stat()
        #expect(stat(old, &after) == 0)
        #expect(after.st_ino == before.st_ino && after.st_uid == before.st_uid && after.st_mode == before.st_mode)
        #expect(!DurableFile.exists(image(lab, "a")))
        try await eventually("the guest is forgotten") { try lab.guests("a").load("web1")?.released != nil }
        // What was sent need not be sent again, and what was damaged is.
        let back = try await move(lab, from: "b")
        #expect(back.disks[0].bytesSent == UInt64(Self.chunk), "\(back.disks[0])")
        #expect(back.disks[0].digestSource == back.disks[0].digestDestination)
    }

    @Test func anAgentThatIsKilledMeanwhileCostsNothingThatWasThere() async throws {
        let lab = try await lab()
        _ = try await move(lab, from: "a")
        let moving = try await beginSlowMove(lab)
        try await lab.replaceDestination("a")
        let result = try await moving.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)\n\(lab.destinationOutput("a"))")
        let finished = result.output.split(separator: "\n").last.flatMap { MigrationEvent(parsing: Array($0.utf8)) }
        let disk = try #require(finished?.report?.disks.first)
        #expect(disk.digestSource != nil && disk.digestSource == disk.digestDestination)
        #expect(disk.bytesSent <= 9 << 20 && oldImages(lab) == [], "\(disk)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
    }

    @Test func anAgentThatFindsAMigrationGivenUpGivesTheOldImageBack() async throws {
        let lab = try await lab()
        _ = try await move(lab, from: "a")
        let old = try #require(oldImages(lab).first)
        let moving = try await beginSlowMove(lab)
        moving.signal(SIGINT)
        let result = try await moving.finish(seconds: 120)
        #expect(result.code != 0, "\(result.all)")
        try await eventually("the old image is back") { DurableFile.exists(old) }
        let back = try await move(lab, from: "b")
        #expect(back.disks[0].seededBytes != nil && oldImages(lab) == [], "\(back.disks[0])")
    }

    // MARK: Images of the operator

    @Test func aDiskBeginsWithACopyOfTheImageThatIsNamed() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 8)
        let backups = lab.directory.directory("backups")
        let template = lab.directory.directory("backups/web") + "/web1.raw"
        #expect(try await Tool.run(["cp", "--sparse=always", disk, template]).code == 0)
        let digest = try ChunkDigests.digest(of: template)
        symlink("../disk.raw", "\(backups)/link.raw")
        try await lab.startDestination(more: ["--allow-seed", "CN=host=\(backups)"])
        try await lab.startIdleGuest(disks: [disk])
        try await change(disk, chunks: [260, 300])
        for name in ["web/none.raw", "../disk.raw", "link.raw", "web"] {
            let refused = try await lab.migrate(more: ["--seed", name])
            #expect(refused.code != 0 && refused.all.contains("seed '\(name)'"), "\(refused.all)")
        }
        let unknown = try await lab.migrate(more: ["--seed", "disk7=web/web1.raw"])
        #expect(unknown.code != 0 && unknown.all.contains("no disk 'disk7'"), "\(unknown.all)")
        let report = try await move(lab, from: "a", more: ["--seed", "disk0=web/web1.raw"])
        #expect(report.disks[0].bytesSent == UInt64(2 * Self.chunk), "\(report.disks[0])")
        #expect(report.disks[0].digestSource == report.disks[0].digestDestination)
        // The image is what it was, and not the guest's.
        #expect(try ChunkDigests.digest(of: template) == digest)
    }

    @Test func aCopyWritesOnlyWhatTheTargetHasNot() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 4)
        let target = lab.directory.file("older.raw")
        #expect(try await Tool.run(["cp", "--sparse=always", disk, target]).code == 0)
        try await change(disk, chunks: [130, 150])
        let copied = try await Tool.run([Lab.crossdock, "nbd", "copy", "--seed", "--verify", "--json", disk, target])
        #expect(copied.code == 0 && copied.output.contains("\"written\": \(2 * Self.chunk),"), "\(copied.all)")
        #expect(try ChunkDigests.digest(of: target) == ChunkDigests.digest(of: disk))
        for wrong in [[lab.directory.file("none.raw")], ["null:"], ["--target-is-zero", target]] {
            let refused = try await Tool.run([Lab.crossdock, "nbd", "copy", "--seed", disk] + wrong)
            #expect(refused.code != 0, "\(refused.all)")
        }
        #expect(truncate(target, 8 << 20) == 0)
        let short = try await Tool.run([Lab.crossdock, "nbd", "copy", "--seed", disk, target])
        #expect(short.code != 0 && short.all.contains("not an earlier copy"), "\(short.all)")
    }

    @Test func aSourceThatMayNameNoSeedsLearnsNothing() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 8, data: 2)
        let backups = lab.directory.directory("backups")
        #expect(try await Tool.run(["cp", disk, "\(backups)/web1.raw"]).code == 0)
        try await lab.startDestination(more: ["--allow-seed", "CN=other=\(backups)"])
        try await lab.startIdleGuest(disks: [disk])
        for name in ["web1.raw", "none.raw"] {
            let refused = try await lab.migrate(more: ["--seed", name])
            #expect(refused.code != 0 && refused.all.contains("'CN=host' may name no seeds"), "\(refused.all)")
        }
        #expect(try lab.leftAtDestination() == [])
    }
}
