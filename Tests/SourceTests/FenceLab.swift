import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport

@testable import Source

/// A state directory, images, and QEMUs that have them open without locking them.
final class FenceLab {
    let directory: TestDirectory
    let migrations: MigrationStore
    let guests: GuestStore
    let migration = "1-a"
    private var count = 0
    private var emulators: [ChildProcess] = []
    private var detached: [EmulatorProcess] = []

    init() throws {
        directory = try TestDirectory()
        migrations = MigrationStore(stateDirectory: directory.file("state"))
        guests = GuestStore(stateDirectory: directory.file("state"))
        try DurableFile.makeDirectory(migrations.directory(of: migration))
    }

    deinit {
        for process in detached { process.signal(SIGKILL) }
        for holder in holder().processes() { holder.signal(SIGKILL) }
    }

    func image(_ name: String = "disk.raw") throws -> String {
        try DurableFile.write([UInt8](repeating: 7, count: 65536), to: directory.file(name))
        return directory.file(name)
    }

    /// A QEMU without a machine that has images open for writing.
    ///
    /// - Parameters:
    ///   - images: the images.
    ///   - driver: how they are opened: "file", "host_device".
    ///   - locking: whether they are locked.
    ///   - prefix: what runs it.
    ///   - isDetached: whether it is no child of this process.
    func startEmulator(
        _ images: [String],
        driver: String = "file",
        locking: Bool = false,
        prefix: [String] = [],
        isDetached: Bool = false
    ) async throws -> EmulatorProcess {
        count += 1
        let socket = directory.file("qmp\(count)")
        var command = prefix + ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
        for (index, image) in images.enumerated() {
            command += [
                "-blockdev",
                "driver=\(driver),filename=\(image),node-name=f\(index),locking=\(locking ? "on" : "off")",
            ]
        }
        command += ["-qmp", "unix:\(socket),server=on,wait=off"]
        if isDetached {
            let process = try EmulatorProcess.start(command, directory: "/", log: directory.file("log"))
            detached.append(process)
            try await eventually("a monitor") { isListening(socket) }
            try await answers(socket)
            return process
        }
        let child = try ChildProcess(command)
        emulators.append(child)
        try await child.wait(for: "a monitor") { isListening(socket) }
        try await answers(socket)
        guard let process = EmulatorProcess(pid: child.pid) else { throw TestFailure("QEMU ended: \(child.errors)") }
        return process
    }

    /// QEMU makes its monitors before it opens images, and obeys them after that.
    private func answers(_ socket: String) async throws {
        let loop = EventLoop(name: "monitor")
        defer { loop.stop() }
        try await loop.run { try await QMPClient.connect(to: socket, on: loop).close() }
    }

    func fence(_ images: [String], _ process: EmulatorProcess? = nil, migration: String? = nil) -> ImageFence {
        ImageFence(
            of: images.map { FencedImage($0) },
            process: process,
            guest: "web1",
            migration: migration ?? self.migration,
            in: migrations,
            program: Tool.crossdock
        )
    }

    func holder() -> DeviceHolder {
        DeviceHolder(
            guest: "web1",
            files: migrations.files(of: migration),
            program: Tool.crossdock
        )
    }

    /// Writes what a source agent saves of its disks and decides.
    func record(_ disks: [SavedDisk], _ records: [JournalRecord]) throws {
        try DurableFile.write(try JSONText.encode(disks), to: migrations.files(of: migration).disks)
        let journal = try Journal(creating: migrations.journal(of: migration))
        for record in records { try journal.append(record) }
    }

    func names() -> [String] { DurableFile.list(directory.path).filter { !$0.hasPrefix("qmp") && $0 != "state" } }
}

extension SavedDisk {
    init(_ path: String) {
        self.init(path: path, format: "raw", size: 65536, isSealed: false, image: FencedImage(path))
    }
}
