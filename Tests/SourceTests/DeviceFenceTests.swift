import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

@testable import Source

/// A loop device that goes away with its last reference.
final class LoopDevice {
    let path: String

    init?(_ file: String) async throws {
        guard geteuid() == 0 else { return nil }
        let made = try await Tool.run(["losetup", "-f", "--show", file])
        guard made.code == 0 else { return nil }
        path = made.output.filter { !$0.isNewline }
    }

    deinit {
        var status: Int32 = 0
        var arguments = (["losetup", "-d", path] as [String]).map { strdup($0) } + [nil]
        var pid: pid_t = 0
        if posix_spawnp(&pid, "losetup", nil, nil, &arguments, environ) == 0 { waitpid(pid, &status, 0) }
        for pointer in arguments { free(pointer) }
    }
}

@Suite(.timeLimit(.minutes(2)), .enabled(if: geteuid() == 0))
struct DeviceFenceTests {
    let lab: FenceLab
    init() throws { lab = try FenceLab() }

    private func device() async throws -> LoopDevice {
        let image = try lab.image("behind.raw")
        truncate(image, 8 << 20)
        guard let device = try await LoopDevice(image) else { throw TestFailure("No loop device") }
        return device
    }

    /// A machine with the device as its disk, which may be written.
    private func guest(_ device: LoopDevice, _ name: String) throws -> ChildProcess {
        try ChildProcess([
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none",
            "-blockdev", "driver=host_device,filename=\(device.path),node-name=f", "-blockdev",
            "driver=raw,file=f,node-name=d", "-device", "virtio-blk-pci,drive=d", "-qmp",
            "unix:\(lab.directory.file("qmp-\(name)")),server=on,wait=off",
        ])
    }

    private func monitor<T: Sendable>(_ name: String, _ body: @escaping @Sendable (QMPClient) async throws -> T)
        async throws -> T
    {
        let path = lab.directory.file("qmp-\(name)")
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        return try await loop.run {
            let monitor = try await QMPClient.connect(to: path, on: loop)
            defer { monitor.close() }
            return try await body(monitor)
        }
    }

    @Test func aDeviceIsKeptFromOtherQEMUsAndFromTheOldOneUntilTheFenceIsLifted() async throws {
        let device = try await device()
        let old = try guest(device, "old")
        let socket = lab.directory.file("qmp-old")
        try await old.wait(for: "a monitor") { isListening(socket) }
        // It answers when its devices are there.
        #expect(try await monitor("old") { try await $0.status() } == "running")
        let fence = lab.fence([device.path], EmulatorProcess(pid: old.pid))
        #expect(fence.check() == [])
        #expect(fence.users(lab.guests).obstacles == [])
        // It has the locks itself.
        #expect(throws: MigrationError.self) { try fence.raise() }
        try await monitor("old") { monitor in
            try await monitor.execute("migrate", ["uri": "exec:cat > /dev/null"])
            while try await monitor.migrationState().status != "completed" {
                await monitor.loop.sleep(for: .milliseconds(10))
            }
        }
        try fence.raise()
        let holder = try #require(lab.holder().recorded)
        try fence.raise()
        #expect(lab.holder().processes() == [holder])
        #expect(fence.users(lab.guests).obstacles == [])

        let refused = try await guest(device, "new").finish()
        #expect(refused.code != 0 && refused.errors.contains("write\" lock"), "\(refused.all)")
        let cont = try await monitor("old") { monitor in
            do {
                try await monitor.resume()
                return ""
            } catch { return "\(error)" }
        }
        #expect(cont.contains("lock"))
        #expect(try await Tool.run(["mount", device.path, "/mnt"]).code != 0)
        // Readers, who compare what is there, are let in.
        #expect(
            try await Tool.run(["qemu-img", "convert", "-O", "raw", device.path, lab.directory.file("out.raw")]).code
                == 0
        )

        // A signal that means other programs is none to it.
        holder.signal(SIGTERM)
        #expect(holder.isRunning)
        #expect(fence.lift() == [])
        #expect(!holder.isRunning && fence.lift() == [])
        try await monitor("old") { try await $0.resume() }
    }

    @Test func aHolderThatWasNeverRecordedIsEndedAllTheSame() async throws {
        let device = try await device()
        let fence = lab.fence([device.path])
        try fence.raise()
        let holder = try #require(lab.holder().recorded)
        unlink(lab.migrations.files(of: "1-a").process(.holder))
        #expect(fence.lift() == [])
        #expect(!holder.isRunning)
    }

    @Test func devicesAreHeldAgainAfterARestartUntilTheirTimeIsOver() async throws {
        let device = try await device()
        try lab.record(
            [.init(device.path)],
            [.offered(guest: "web1", destination: "host-b", order: 0), .released]
        )
        let state = lab.directory.file("state")
        let result = try await Tool.run([Tool.crossdock, "hold-devices", "--state-dir", state])
        #expect(result.code == 0, "\(result.all)")
        let holder = try #require(lab.holder().recorded)
        #expect(DeviceHolder.holdAgain(lab.migrations, program: Tool.crossdock) == [])
        #expect(lab.holder().processes() == [holder])
        let refused = try await guest(device, "new").finish()
        #expect(refused.errors.contains("write\" lock"), "\(refused.all)")

        try Journal(opening: lab.migrations.journal(of: "1-a")).append(.confirmed)
        try FencedImages.remember(lab.fence([device.path]), migration: "1-a", keep: 10, lab.migrations)
        FencedImages.purge(lab.migrations)
        #expect(holder.isRunning)
        holder.signal(SIGKILL)
        try await eventually("the holder is gone") { !holder.isRunning }
        #expect(DeviceHolder.holdAgain(lab.migrations, program: Tool.crossdock) == [])
        let second = try #require(lab.holder().recorded)
        FencedImages.purge(lab.migrations, now: time(nil) + 20)
        #expect(!second.isRunning)
        try FencedImages.remember(lab.fence([device.path]), migration: "1-a", keep: 0, lab.migrations)
        #expect(DeviceHolder.holdAgain(lab.migrations, program: Tool.crossdock) == [])
        #expect(lab.holder().recorded == nil)
    }

    @Test func aGuestThatComesBackFindsItsDeviceFree() async throws {
        let device = try await device()
        try lab.record(
            [.init(device.path)],
            [.offered(guest: "web1", destination: "host-b", order: 0), .released]
        )
        let fence = lab.fence([device.path])
        try fence.raise()
        let holder = try #require(lab.holder().recorded)
        // Only when it certainly runs elsewhere.
        #expect(try DeviceHolder.letGo([device.path], of: "web1", lab.migrations) == [])
        #expect(holder.isRunning)
        try Journal(opening: lab.migrations.journal(of: "1-a")).append(.confirmed)
        #expect(try DeviceHolder.letGo([device.path], of: "web2", lab.migrations) == [])
        #expect(holder.isRunning)
        #expect(try DeviceHolder.letGo([device.path], of: "web1", lab.migrations) == [])
        #expect(!holder.isRunning)
        try DurableFile.makeDirectory(lab.migrations.directory(of: "2-a"))
        try Journal(creating: lab.migrations.journal(of: "2-a")).append(
            .accepted(guest: "web1", source: "CN=host-b", order: 1)
        )
        #expect(DeviceHolder.holdAgain(lab.migrations, program: Tool.crossdock) == [])
        #expect(lab.holder().recorded == nil)
    }

    /// The guest has come back to this host; whether to the device that it left shows in its description.
    @Test(arguments: [false, true])
    func aDeviceThatAGuestLeftIsHeldAgainUnlessItCameBackToIt(_ toTheSame: Bool) async throws {
        let device = try await device()
        try lab.record(
            [.init(device.path)],
            [.offered(guest: "web1", destination: "host-b", order: 0), .released, .confirmed]
        )
        try DurableFile.makeDirectory(lab.migrations.directory(of: "2-a"))
        let journal = try Journal(creating: lab.migrations.journal(of: "2-a"))
        for record: JournalRecord in [
            .accepted(guest: "web1", source: "CN=host-b", order: 1), .prepared, .owner(digests: [:]),
        ] {
            try journal.append(record)
        }
        let disk = toTheSame ? device.path : try lab.image("other.raw")
        let line = GuestCommandLine(
            arguments: ["qemu-system-x86_64", "-drive", "file=\(disk),format=raw"],
            directory: "/"
        )
        try GuestStore(stateDirectory: lab.migrations.stateDirectory).save(GuestRecord(name: "web1", commandLine: line))
        #expect(DeviceHolder.holdAgain(lab.migrations, program: Tool.crossdock) == [])
        let holder = lab.holder().recorded
        #expect((holder == nil) == toTheSame)
        holder?.signal(SIGKILL)
    }

    @Test func aDeviceThatIsNotThereIsNamed() async throws {
        var disk = SavedDisk("/dev/loop-that-is-not-there")
        let device = try await device()
        disk.image = FencedImage(device.path)
        try lab.record([disk], [.offered(guest: "web1", destination: "host-b", order: 0), .released])
        // As the device's name may lead nowhere after a restart.
        let text = String(decoding: try DurableFile.read(lab.migrations.files(of: "1-a").disks) ?? [], as: UTF8.self)
        try DurableFile.write(
            Array(
                text.replacing(device.path.replacing("/", with: "\\/"), with: "\\/nowhere").replacing(
                    device.path,
                    with: "/nowhere"
                ).utf8
            ),
            to: lab.migrations.files(of: "1-a").disks
        )
        let problems = DeviceHolder.holdAgain(lab.migrations, program: Tool.crossdock)
        #expect(problems.count == 1 && problems[0].contains("Cannot hold the device /nowhere"), "\(problems)")
    }

    @Test func aQEMUWithDeviceNodesOfItsOwnIsWarnedAbout() async throws {
        let device = try await device()
        let process = try await lab.startEmulator([device.path], driver: "host_device")
        #expect(lab.fence([device.path], process).warnings() == [])
        let numbers = try await Tool.run(["stat", "-c", "%Hr %Lr", device.path]).output.split(
            whereSeparator: \.isWhitespace
        )
        let node = lab.directory.file("node")
        #expect(try await Tool.run(["mknod", node, "b"] + numbers.map(String.init)).code == 0)
        let warnings = lab.fence([node], process).warnings()
        #expect(lab.fence([node], process).check() == [])
        #expect(warnings.count == 1 && warnings[0].contains("uses another device node than \(node)"), "\(warnings)")
    }

    @Test func whatTheKernelDoesWithADeviceOrAFileIsFound() async throws {
        let device = try await device()
        let file = lab.fence([lab.directory.file("behind.raw")]).users(lab.guests).obstacles
        #expect(file.contains { $0.contains("is attached as \(device.path) too") }, "\(file)")
        #expect(try await Tool.run(["mkfs.ext2", "-q", device.path]).code == 0)
        let place = lab.directory.directory("place")
        // Seen from here it is not mounted anywhere.
        let mounted = try ChildProcess(
            Namespace.mount + ["sh", "-c", "mount -o ro \(device.path) \(place) && echo up && exec sleep infinity"]
        )
        try await mounted.wait(for: "the mount") { mounted.output.contains("up") }
        let users = lab.fence([device.path]).users(lab.guests).obstacles
        #expect(users.count == 1 && users[0].contains("\(device.path) is claimed by this host"), "\(users)")
    }
}
