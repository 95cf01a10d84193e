internal import CLinux
public import Emulator
internal import Glibc
internal import IO

/// A process that keeps others from the block devices that a guest has left, until it is ended.
///
/// It has the devices open with the byte-range locks of QEMU's `file-posix` driver that say "nobody else may write". They
/// belong to the open file, not to a process: whoever starts the holder takes them, and the holder inherits them, so that
/// there is no moment without. A QEMU that has handed its guest over has dropped its own, and gets them back only when the
/// holder has ended. Readers are let in. Where it is possible the device is claimed as well (O_EXCL), so that it cannot be
/// mounted or taken by the device mapper. Who opens it with `locking=off` or through another device node is not kept out.
public struct DeviceHolder: Sendable {
    private let guest: String
    private let files: MigrationFiles
    private let program: String

    /// The holder of a migration.
    ///
    /// - Parameters:
    ///   - guest: the guest that leaves.
    ///   - files: the migration's, among which the holder is recorded.
    ///   - program: this program.
    public init(guest: String, files: MigrationFiles, program: String = Self.program) {
        self.guest = guest
        self.files = files
        self.program = program
    }

    /// This program.
    public static var program: String { DurableFile.resolve("/proc/self/exe", in: "/") }
    /// The hidden command that a holder runs.
    public static let command = "hold-devices"

    /// QEMU's bytes for permissions that are not shared: write, write unchanged, resize.
    private static let unshared = off_t(201)
    /// Its bytes for the same permissions, held.
    private static let held = off_t(101)
    private static let count = off_t(3)

    /// How a holder's command line begins: who looks at it shall know what it is for, and this program which one it is.
    private var words: [String] { [Self.command, "--record", files.process(.holder), "--guest", guest] }

    /// What is in the way of holding a device; nil when nothing is.
    public static func obstacle(_ path: String) -> String? {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor < 0 else {
            close(descriptor)
            return nil
        }
        return
            "The device \(path) cannot be opened by this user, so it could not be held when the guest has left: "
            + "\(String(cString: strerror(errno))); run this as root or as the user of QEMU"
    }

    /// Takes the devices and starts the process that holds them from now on, unless there is one. Blocks for milliseconds.
    ///
    /// - Throws: `MigrationError` that names the device.
    public func hold(_ devices: [String]) throws {
        if recorded != nil { return }
        var descriptors: [Int32] = []
        defer { for descriptor in descriptors { close(descriptor) } }
        for device in devices { descriptors.append(try Self.take(device)) }
        let process = try EmulatorProcess.start(
            [program] + words
                + devices.flatMap { ["--device", $0] },
            directory: "/",
            log: files.log(.holder),
            keep: descriptors
        )
        do {
            guard process.isRunning else {
                throw MigrationError(
                    .failed,
                    "The process that holds the devices of guest '\(guest)' ended at once: "
                        + "\(EmulatorProcess.tail(of: files.log(.holder)))"
                )
            }
            try DurableFile.write(try JSONText.encode(process), to: files.process(.holder))
        } catch {
            process.signal(SIGKILL)
            throw error
        }
    }

    /// Opens a device with the locks. They need no right to write.
    private static func take(_ path: String) throws -> Int32 {
        var descriptor = open(path, O_RDONLY | O_EXCL | O_CLOEXEC)
        // Claimed by the kernel for something else: the locks alone, then.
        if descriptor < 0, errno == EBUSY { descriptor = open(path, O_RDONLY | O_CLOEXEC) }
        guard descriptor >= 0 else {
            throw MigrationError(.failed, "Cannot hold the device \(path): \(String(cString: strerror(errno)))")
        }
        guard xd_is_block_device(descriptor) != 0 else {
            close(descriptor)
            throw MigrationError(.failed, "Cannot hold \(path), which is no block device any more")
        }
        guard xd_lock_ofd(descriptor, unshared, count, 0) == 0, xd_test_ofd(descriptor, held, count, 1) == 0 else {
            close(descriptor)
            throw MigrationError(.failed, "Cannot hold the device \(path): another QEMU has it open for writing")
        }
        return descriptor
    }

    /// Ends whoever holds the devices, and waits until they are free.
    ///
    /// - Returns: what could not be done.
    @discardableResult
    public func end() -> [String] {
        var problems: [String] = []
        for process in processes() {
            process.signal(SIGKILL)
            let end = ContinuousClock.now + .seconds(5)
            while process.isRunning, ContinuousClock.now < end { usleep(500) }
            if process.isRunning {
                problems.append(
                    "Process \(process.pid), which holds the devices of guest '\(guest)', does not end; end it with 'kill -9'"
                )
            }
        }
        if problems.isEmpty { unlink(files.process(.holder)) }
        return problems
    }

    /// The holder that is on record and lives.
    public var recorded: EmulatorProcess? {
        guard let bytes = (try? DurableFile.read(files.process(.holder))) ?? nil,
            let process = JSONText.decode(EmulatorProcess.self, from: bytes), process.isRunning
        else { return nil }
        return process
    }

    /// Every holder of this migration, also one whose starter died before it could be recorded.
    public func processes() -> [EmulatorProcess] {
        let words = words.map { Array($0.utf8) }
        var found = recorded.map { [$0] } ?? []
        for pid in DurableFile.list("/proc").compactMap({ Int32($0) }) where !found.contains(where: { $0.pid == pid }) {
            guard let line = (try? DurableFile.read("/proc/\(pid)/cmdline")) ?? nil,
                Array(line.split(separator: 0).dropFirst().prefix(words.count).map { Array($0) }) == words,
                let process = EmulatorProcess(pid: pid)
            else { continue }
            found.append(process)
        }
        return found
    }

    /// Whether a guest that has left this host for good is what a device is held for.
    public static func isHeld(_ device: String, for guest: String, _ migrations: MigrationStore) -> Bool {
        migrations.ids().contains { id in
            guard let reading = (try? migrations.reading(of: id)) ?? nil, reading.guest == guest,
                reading.standing == .source(.confirmed)
            else { return false }
            return DeviceHolder(guest: guest, files: migrations.files(of: id)).holds([device])
        }
    }

    /// Whether one of these devices is among those that are held.
    private func holds(_ devices: [String]) -> Bool {
        func number(_ path: String) -> UInt64? {
            var status = stat()
            guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFBLK else { return nil }
            return UInt64(status.st_rdev)
        }
        let wanted = Set(devices.compactMap(number))
        return processes().contains { process in
            let descriptors = "/proc/\(process.pid)/fd"
            return DurableFile.list(descriptors).contains {
                number("\(descriptors)/\($0)").map(wanted.contains) ?? false
            }
        }
    }

    /// Lets the devices go that a guest has left this host on and comes back to. What it has left behind elsewhere stays held.
    ///
    /// - Returns: what could not be done, a sentence each.
    public static func letGo(_ devices: [String], of guest: String, _ migrations: MigrationStore) throws -> [String] {
        var problems: [String] = []
        for id in migrations.ids() where DurableFile.exists(migrations.files(of: id).process(.holder)) {
            guard let reading = try migrations.reading(of: id), reading.guest == guest,
                reading.standing == .source(.confirmed)
            else { continue }
            let holder = DeviceHolder(guest: guest, files: migrations.files(of: id))
            if holder.holds(devices) { problems += holder.end() }
        }
        return problems
    }

    /// What a holder does: nothing, until it is killed.
    public static func stay() -> Never {
        // Whoever ends all processes of a user or of a terminal does not mean it.
        for number in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] { Glibc.signal(number, SIG_IGN) }
        while true { pause() }
    }
}
