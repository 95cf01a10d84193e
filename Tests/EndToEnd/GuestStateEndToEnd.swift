import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// What the guest, its administrator or somebody else on the host does while a guest is moved: it always has an owner, keeps
/// its state, and nothing about it changes unnoticed.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct GuestStateEndToEnd {
    static let panics = ["-device", "pvpanic", "-action", "panic=pause"]

    /// A migration of an idle guest that is held in the copy of its disk.
    struct Copying {
        let lab: Lab
        let disk: String
        let report: String
        let migration: ChildProcess
    }

    private func begin(_ lab: Lab, disk: String, bandwidth: Int = 2_000_000) async throws -> Copying {
        let report = lab.directory.file("report.json")
        let migration = try lab.beginMigration(more: ["--bandwidth", "\(bandwidth)", "--report", report])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        return Copying(lab: lab, disk: disk, report: report, migration: migration)
    }

    private func copy(with more: [String] = []) async throws -> Copying {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 48, data: 16)
        try await lab.startIdleGuest(disks: [disk], more: more)
        return try await begin(lab, disk: disk)
    }

    @discardableResult
    private func execute(_ lab: Lab, _ command: String, _ arguments: JSONValue = [:]) async throws -> JSONValue {
        try await lab.monitor("a") { try await $0.execute(command, arguments) }
    }

    /// A command of the human monitor: with `o`, what the guest's own access to a port does.
    ///
    /// - Returns: what it says.
    @discardableResult
    private func human(_ lab: Lab, _ line: String) async throws -> String {
        try await execute(lab, "human-monitor-command", ["command-line": .string(line)]).string ?? ""
    }

    private func state(_ lab: Lab, _ side: String) async throws -> String {
        try await lab.monitor(side) { try await $0.status() }
    }

    private func emulators(_ lab: Lab, _ side: String) -> [Int32] {
        Lab.processes(containing: "\(lab.state(side))/").filter { $0.line.contains("qemu-system") }.map(\.pid)
    }

    /// The guest is on one host, in a state; the other has nothing of it; the migration is over on the source.
    ///
    /// - Returns: the host.
    @discardableResult
    private func expectOneOwner(_ lab: Lab, _ result: ToolResult, state wanted: String) async throws -> String {
        let home = result.code == 0 ? "b" : "a"
        let found = try await state(lab, home)
        #expect(found == wanted, "on host \(home): \(result.all)")
        let other = home == "a" ? "b" : "a"
        try await eventually("host \(other) has no QEMU of the guest: \(result.all)") {
            emulators(lab, other).isEmpty
        }
        let status = try await lab.crossdock(["status", "--json", "--state-dir", lab.state("a")])
        #expect(status.output.contains(home == "b" ? #""migrated""# : #""rolled back""#), "\(status.all)")
        return home
    }

    // MARK: The guest's own state

    @Test func aGuestWithoutRoomForItsWritesStaysInThatStateAndHasAnOwner() async throws {
        let lab = try Lab()
        let images = lab.directory.directory("fs")
        try await lab.mount("mount -t tmpfs -o size=24m none \(images)")
        try await lab.startDestination()
        let disk = "\(images)/disk.raw"
        // A boot sector that waits for a key and then writes 32 KiB after 32 KiB.
        let sector =
            #"\061\300\216\330\264\000\315\026\276\032\174\270\000\103\262\200\315\023\146\203\006\042\174\100\353\356\020\000"#
            + #"\100\000\000\000\000\360\000\040\001\000\000\000\000\000\000"#
        let script = """
            truncate -s 96M \(disk) && printf '\(sector)' | dd of=\(disk) conv=notrunc status=none
            printf '\\125\\252' | dd of=\(disk) bs=1 seek=510 conv=notrunc status=none
            dd if=/dev/urandom of=\(disk) bs=1M seek=1 count=12 conv=notrunc status=none
            """
        let made = try await Tool.run(lab.prefix + ["sh", "-ec", script])
        #expect(made.code == 0, "\(made.all)")
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"]
                + lab.portable([
                    "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none",
                    "-vga", "std", "-drive", "file=\(disk),format=raw,if=ide",
                ])
        )
        #expect(started.code == 0, "\(started.all)")
        // The firmware takes its time until the boot sector is there and waits for the key.
        try await eventually("the guest has booted") {
            try await human(lab, "xp /1xw 0x7c00").contains("0xd88ec031")
        }
        // Long enough for a guest on a busy host to fill its disk meanwhile.
        let copying = try await begin(lab, disk: disk, bandwidth: 600_000)
        try await eventually("the guest is stopped for its disk") {
            try await human(lab, "sendkey ret")
            return try await state(lab, "a") == "io-error"
        }
        let result = try await copying.migration.finish(seconds: 120)
        let home = try await expectOneOwner(lab, result, state: "io-error")
        if home == "a" { #expect(result.errors.contains("io-error"), "\(result.all)") }
    }

    @Test func aGuestThatPanicsStaysPanickedAndHasAnOwner() async throws {
        let copying = try await copy(with: Self.panics)
        try await human(copying.lab, "o /b 0x505 1")
        let result = try await copying.migration.finish(seconds: 120)
        let home = try await expectOneOwner(copying.lab, result, state: "guest-panicked")
        if home == "a" { #expect(result.errors.contains("panicked"), "\(result.all)") }
    }

    @Test func aGuestThatIsPausedInTheMiddleStaysPaused() async throws {
        let copying = try await copy()
        try await execute(copying.lab, "stop")
        let result = try await copying.migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        try await expectOneOwner(copying.lab, result, state: "paused")
        // It stays so without anybody's hand.
        try await Task.sleep(for: .seconds(2))
        #expect(try await state(copying.lab, "b") == "paused")
    }

    @Test func aGuestThatIsPausedCanBeMovedAndHasNoBlackout() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 2)
        try await lab.startIdleGuest(disks: [disk])
        try await execute(lab, "stop")
        let report = lab.directory.file("report.json")
        let result = try await lab.migrate(more: ["--report", report])
        #expect(result.code == 0, "\(result.all)")
        try await expectOneOwner(lab, result, state: "paused")
        let written = try lab.report(report)
        #expect(written.outcome == .migrated && written.blackoutMS == nil)
        // Its administrator lets it go on.
        try await lab.monitor("b") { try await $0.resume() }
        #expect(try await state(lab, "b") == "running")
    }

    @Test func aPausedGuestOfAMigrationThatIsGivenUpStaysPaused() async throws {
        let copying = try await copy()
        try await execute(copying.lab, "stop")
        copying.migration.signal(SIGINT)
        let result = try await copying.migration.finish(seconds: 60)
        #expect(result.code == MigrationError.Code.cancelled.rawValue, "\(result.all)")
        try await expectOneOwner(copying.lab, result, state: "paused")
    }

    // MARK: What the guest has

    /// The disk is found in the check, with the lock that QEMU takes and without.
    @Test(arguments: ["share-rw", "no locks"])
    func aDiskThatAnotherGuestUsesIsRefusedByName(_ way: String) async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let shared = try await lab.makeImage("shared.raw", megabytes: 4, data: 1)
        let locking = way == "no locks" ? ",file.locking=off" : ""
        for name in ["web1", "web2"] {
            let own = try await lab.makeImage("\(name).raw", megabytes: 4, data: 1)
            try await lab.startIdleGuest(
                name,
                disks: [own],
                more: [
                    "-drive", "file=\(shared),format=raw,if=none,id=s\(locking)",
                    "-device", "virtio-blk-pci,drive=s,share-rw=on",
                ]
            )
        }
        let result = try await lab.migrate()
        #expect(result.code == MigrationError.Code.guest.rawValue, "\(result.all)")
        #expect(result.errors.contains("shared.raw"), "\(result.all)")
        #expect(DurableFile.exists(shared))
        #expect(try lab.leftAtDestination() == [])
        #expect(try await lab.leftAtSource() == [])
    }

    @Test func aDiskThatSomebodyOpensInTheMiddleIsNotReleased() async throws {
        let copying = try await copy()
        let lab = copying.lab
        let other = try ChildProcess(
            lab.prefix + ["sh", "-c", "exec 9<>\(copying.disk) && echo open && exec sleep 300"]
        )
        try await other.wait(for: "another process with the image") { other.output.contains("open") }
        let result = try await copying.migration.finish(seconds: 120)
        #expect(result.code != 0, "\(result.all)")
        #expect(result.errors.contains("disk.raw") && result.errors.contains("\(other.pid)"), "\(result.all)")
        try await expectOneOwner(lab, result, state: "running")
        #expect(DurableFile.exists(copying.disk))
    }

    /// The drive of a guest's disc as the guest sees it: whether the tray is open, and what is in it.
    private func disc(_ lab: Lab, _ side: String) async throws -> String {
        let drives = try await lab.monitor(side) { try await $0.execute("query-block").array }
        guard let drive = drives.first(where: { $0["qdev"]?.string?.contains("cd0") == true }) else {
            return "no drive"
        }
        let tray = drive["tray_open"]?.bool == true ? "open" : "closed"
        guard let path = drive["inserted"]?["image"]?["filename"]?.string else { return "\(tray), empty" }
        return "\(tray), \(String(describing: try DurableFile.read(path)?.first))"
    }

    @Test(arguments: ["change", "eject"])
    func aDiscThatIsChangedInTheMiddleIsWhatTheGuestHasAfterwards(_ action: String) async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let (old, new) = (lab.directory.file("old.iso"), lab.directory.file("new.iso"))
        try DurableFile.write([UInt8](repeating: 1, count: 65536), to: old)
        try DurableFile.write([UInt8](repeating: 2, count: 65536), to: new)
        let disk = try await lab.makeImage("disk.raw", megabytes: 48, data: 16)
        try await lab.startIdleGuest(
            disks: [disk],
            more: [
                "-drive", "file=\(old),if=none,id=c0,media=cdrom,format=raw,readonly=on", "-device",
                "ide-cd,drive=c0,id=cd0",
            ]
        )
        let copying = try await begin(lab, disk: disk)
        try await human(lab, action == "change" ? "change c0 \(new) raw" : "eject -f c0")
        let wanted = try await disc(lab, "a")
        #expect(!wanted.contains("Optional(1)"))
        let result = try await copying.migration.finish(seconds: 120)
        let home = try await expectOneOwner(lab, result, state: "running")
        #expect(try await disc(lab, home) == wanted, "on host \(home): \(result.all)")
        if home == "a" { #expect(result.errors.contains("c0") || result.errors.contains("cd0"), "\(result.all)") }
    }

    @Test(arguments: ["device_add usb-tablet,bus=x.0,id=hot1", "device_del tablet0"])
    func aDeviceThatIsPluggedOrUnpluggedInTheMiddleIsNotForgotten(_ line: String) async throws {
        let copying = try await copy(with: ["-device", "qemu-xhci,id=x", "-device", "usb-kbd,bus=x.0,id=tablet0"])
        let lab = copying.lab
        func devices(_ side: String) async throws -> [Bool] {
            let tree = try await lab.monitor(side) {
                try await $0.execute("human-monitor-command", ["command-line": "info qtree"]).string ?? ""
            }
            return ["\"hot1\"", "\"tablet0\""].map { tree.contains($0) }
        }
        try await human(lab, line)
        let wanted = try await devices("a")
        #expect(wanted != [false, true], "nothing happened")
        let result = try await copying.migration.finish(seconds: 120)
        let home = try await expectOneOwner(lab, result, state: "running")
        #expect(try await devices(home) == wanted, "on host \(home): \(result.all)")
        let name = line.contains("hot1") ? "hot1" : "tablet0"
        if home == "a" { #expect(result.errors.contains(name), "\(result.all)") }
    }

    @Test func aLimitOfADiskThatIsSetInTheMiddleIsNotForgotten() async throws {
        let copying = try await copy()
        let lab = copying.lab
        func limit(_ side: String) async throws -> Int? {
            let drives = try await lab.monitor(side) { try await $0.execute("query-block").array }
            return drives.compactMap { $0["inserted"]?["iops"]?.integer }.first { $0 > 0 }.map(Int.init)
        }
        try await human(lab, "block_set_io_throttle virtio0 0 0 0 4000 0 0")
        #expect(try await limit("a") == 4000)
        let result = try await copying.migration.finish(seconds: 120)
        let home = try await expectOneOwner(lab, result, state: "running")
        #expect(try await limit(home) == 4000, "on host \(home): \(result.all)")
        if home == "a" {
            #expect(result.errors.contains("virtio0") || result.errors.contains("disk0"), "\(result.all)")
        }
    }

    /// Before the copy begins; later QEMU itself refuses it.
    @Test func aDiskThatGrowsInTheMiddleHasItsSizeAfterwards() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 48, data: 16)
        try await lab.startIdleGuest(disks: [disk])
        func size(_ side: String) async throws -> Int? {
            let drives = try await lab.monitor(side) { try await $0.execute("query-block").array }
            return drives.compactMap { $0["inserted"]?["image"]?["virtual-size"]?.integer }.first.map(Int.init)
        }
        let migration = try lab.beginMigration(more: ["--bandwidth", "1500000"])
        // The offer has the size by then, and the rehearsal is still to come.
        try await migration.wait(for: "the offer") { !DurableFile.list("\(lab.state("b"))/migrations").isEmpty }
        _ = try? await execute(lab, "block_resize", ["device": "virtio0", "size": .integer(64 << 20)])
        let wanted = try await size("a")
        let result = try await migration.finish(seconds: 120)
        let home = try await expectOneOwner(lab, result, state: "running")
        #expect(try await size(home) == wanted, "on host \(home): \(result.all)")
    }

    // MARK: Other monitors

    /// Says `cont` over and over once QEMU is done with the memory. Returns whether the guest ran there by that.
    private static func insist(_ monitor: QMPClient) async -> Bool {
        while true {
            guard let state = try? await monitor.status(timeout: .seconds(3)) else { return false }
            if state == "finish-migrate" || state == "postmigrate" { break }
        }
        while true {
            do { try await monitor.execute("cont", timeout: .seconds(3)) } catch let error as QMPError
                where error.code != .disconnected
            { continue } catch { return false }
            guard let state = try? await monitor.status(timeout: .seconds(3)) else { return false }
            if state == "running" { return true }
        }
    }

    @Test(arguments: ["blockdev", "auto-read-only=off"])
    func anotherMonitorThatLetsTheOldCopyGoOnNeverMakesTwoRun(_ way: String) async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 4)
        let drive =
            way == "blockdev"
            ? [
                "-blockdev", "driver=file,filename=\(disk),node-name=f0", "-blockdev",
                "driver=raw,file=f0,node-name=d0", "-device", "virtio-blk-pci,drive=d0",
            ] : ["-drive", "file=\(disk),format=raw,if=virtio,auto-read-only=off"]
        try await lab.startIdleGuest(disks: [], more: drive)
        async let ran = lab.monitor("a") { await Self.insist($0) }
        let result = try await lab.migrate()
        let home = try await expectOneOwner(lab, result, state: "running")
        // A guest that went on here belongs here.
        let wentOn = try await ran
        #expect(!wentOn || home == "a", "\(result.all)")
    }

    // MARK: Names of the image

    @Test(arguments: ["moved", "replaced"])
    func anImageThatIsNotUnderItsNameAnyMoreIsRefused(_ way: String) async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        #expect(rename(disk, "\(disk).moved") == 0)
        if way == "replaced" { _ = try await lab.makeImage("disk.raw", megabytes: 16, data: 2) }
        let before = try lab.snapshot()
        let result = try await lab.migrate()
        #expect(result.code == MigrationError.Code.guest.rawValue, "\(result.all)")
        #expect(result.errors.contains("disk.raw"), "\(result.all)")
        #expect(try lab.snapshot() == before)
        #expect(try lab.leftAtDestination() == [])
        #expect(try await lab.leftAtSource() == [])
    }

    @Test(arguments: ["bound", "hard link", "long name"])
    func anImageThatCannotBeFencedIsRefusedBeforeTheFirstByte(_ way: String) async throws {
        let lab = try Lab()
        var disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        switch way {
        case "bound":
            let other = try await lab.makeImage("other.raw", megabytes: 16, data: 1)
            try await lab.mount("mount --bind \(other) \(disk)")
        case "hard link": #expect(link(disk, lab.directory.file("second.raw")) == 0)
        default:
            let long = lab.directory.file(String(repeating: "d", count: 251) + ".raw")
            #expect(rename(disk, long) == 0)
            disk = long
        }
        try await lab.startDestination()
        try await lab.startIdleGuest(disks: [disk])
        let shown = try await lab.crossdock(["guest", "show", "web1", "--json", "--state-dir", lab.state("a")])
        #expect(shown.output.contains("\"migratable\" : false") && shown.output.contains(disk), "\(shown.all)")
        for more in [["--dry-run"], []] {
            let result = try await lab.migrate(more: more)
            #expect(result.code == MigrationError.Code.guest.rawValue, "\(more): \(result.all)")
            #expect(result.errors.contains(disk), "\(result.all)")
            #expect(try lab.leftAtDestination() == [])
        }
        #expect(DurableFile.exists(disk))
        #expect(try await lab.leftAtSource() == [])
    }

    @Test func behindASymbolicLinkTheFileItselfIsFenced() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let file = try await lab.makeImage("file.raw", megabytes: 16, data: 1)
        let disk = lab.directory.file("disk.raw")
        #expect(symlink(file, disk) == 0)
        try await lab.startIdleGuest(disks: [disk])
        let result = try await lab.migrate()
        let home = try await expectOneOwner(lab, result, state: "running")
        // Nobody who follows the link, or knows the file, finds an image that has left.
        #expect(DurableFile.exists(file) == (home == "a"), "\(result.all)")
    }

    // MARK: Another guest of the same name

    @Test func anOfferOfAGuestOfTheSameNameLeavesTheRecoveryWorking() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        #expect(try await lab.migrate().code == 0)
        // The word of the destination is lost.
        let store = MigrationStore(stateDirectory: lab.state("a"))
        let journal = store.journal(of: DurableFile.list(store.directory).first ?? "")
        try Lab.forgetLastRecord(of: journal)
        let undecided = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        #expect(undecided.output.contains("undecided"), "\(undecided.all)")

        // A host that has nothing to do with it offers its guest to this one.
        let port = try await lab.startDestination("a")
        let other = try await lab.makeImage("other.raw", megabytes: 16, data: 8)
        let started = try await lab.crossdock([
            "guest", "start", "web1", "--state-dir", lab.state("c"), "--", "qemu-system-x86_64", "-machine",
            "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-drive",
            "file=\(other),format=raw,if=virtio",
        ])
        #expect(started.code == 0, "\(started.all)")
        defer { try? lab.guests("c").load("web1")?.process?.signal(SIGKILL) }
        let offer = try ChildProcess(
            lab.prefix + [Lab.crossdock]
                + lab.migrateCommand(from: "c", port: port, more: ["--bandwidth", "100000"])
        )
        try await eventually("the offer is answered") {
            !offer.isRunning || offer.output.contains("copying disks")
        }
        offer.signal(SIGINT)
        #expect(try await offer.finish(seconds: 60).code != 0)

        let recovered = try await lab.crossdock(["recover", "--state-dir", lab.state("a")])
        #expect(recovered.code == 0 && recovered.output.contains("which has taken it over"), "\(recovered.all)")
        #expect(try Journal.read(journal).last == .confirmed)
        #expect(try await state(lab, "b") == "running")
    }
}
