internal import Glibc
public import IO

/// What a QEMU program of this host can do, asked of itself: a machine without a machine is started and ended (`-machine none`).
public struct EmulatorFacts: Sendable {
    /// Its version: "10.0.13".
    public let version: String
    /// The machine types that it has, aliases included (`query-machines`).
    public let machines: Set<String>
    /// The properties of a processor model; empty for one that it does not have.
    let processor: [DeviceProperty]
    /// The properties of types of devices; nothing of one that it does not have.
    let devices: [String: [DeviceProperty]]
    /// The members that QMP objects may have, by name, anywhere (`query-qmp-schema`).
    private let members: Set<String>

    /// Whether sockets that connect again take the delay in milliseconds, `reconnect-ms` (from QEMU 9.2 on).
    var hasReconnectMilliseconds: Bool { members.contains("reconnect-ms") }
    /// Whether they take it in seconds, `reconnect` (until QEMU 10).
    var hasReconnectSeconds: Bool { members.contains("reconnect") }

    /// Whether it was built with a filter of system calls (`-sandbox`).
    public let hasSystemCallFilter: Bool

    /// Whether it is of an older release than a version, "10.0.13"; false for a version that cannot be read.
    func isOlder(than other: String) -> Bool {
        guard let mine = QMPClient.release(of: version), let others = QMPClient.release(of: other) else { return false }
        return mine < others
    }

    /// Which program was asked, and for which model: a program that was replaced is asked again.
    private struct Key: Hashable {
        var program: String
        var processor: String
        var devices: [String]
        var file: [UInt64]
    }
    private static let known = Guarded<[Key: EmulatorFacts]>([:])

    /// Asks a program, or recalls what it said.
    ///
    /// - Parameters:
    ///   - program: its path.
    ///   - line: the guest that it is asked for: its processor model, and the types of its devices.
    ///   - policy: how it is confined while it is asked; not at all when nil.
    ///   - loop: the caller's loop.
    /// - Throws: `GuestError` with the program's own words when it does not start.
    public static func of(
        _ program: String,
        for line: GuestCommandLine,
        policy: ConfinementPolicy? = nil,
        on loop: EventLoop
    ) async throws -> EmulatorFacts {
        let processor = line.processorModel
        let devices = line.deviceTypes
        var status = stat()
        guard stat(program, &status) == 0 else {
            throw GuestError("Cannot run '\(program)': \(String(cString: strerror(errno)))")
        }
        let file = [
            UInt64(status.st_dev), UInt64(status.st_ino), UInt64(bitPattern: Int64(status.st_size)),
            UInt64(bitPattern: Int64(status.st_mtim.tv_sec)), UInt64(bitPattern: Int64(status.st_mtim.tv_nsec)),
            UInt64(bitPattern: Int64(status.st_ctim.tv_sec)), UInt64(bitPattern: Int64(status.st_ctim.tv_nsec)),
        ]
        let key = Key(program: program, processor: processor ?? "", devices: devices, file: file)
        if let facts = known.withLock({ $0[key] }) { return facts }
        let read: EmulatorFacts
        do {
            read = try await ask(program, processor, devices, policy, on: loop)
        } catch let error as QMPError where error.code == .disconnected && !devices.isEmpty {
            // There are types that QEMU cannot tell of without ending itself (7.2: `virtio-vga-gl` without its module). It has the
            // last word on the devices then.
            read = try await ask(program, processor, [], policy, on: loop)
        }
        known.withLock { known in
            // An offer names the model: what is kept does not grow with what is asked.
            if known.count >= 16 { known = [:] }
            known[key] = read
        }
        return read
    }

    private static func ask(
        _ program: String,
        _ processor: String?,
        _ devices: [String],
        _ policy: ConfinementPolicy?,
        on loop: EventLoop
    ) async throws -> EmulatorFacts {
        let directory = try BoundProcess.makeDirectory()
        let socket = "\(directory)/qmp.sock"
        let process: BoundProcess
        do {
            let confinement = try policy?.emulator(program, directories: [directory])
            process = try await BlockingPool.shared.run {
                try BoundProcess(
                    [
                        program, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp",
                        "unix:\(socket),server=on,wait=off",
                    ],
                    directory: directory,
                    confinement: confinement
                )
            }
        } catch {
            DurableFile.remove(directory)
            throw error
        }
        let monitor = try await process.monitor(at: socket, "QEMU \(program) cannot be asked about itself", on: loop)
        let facts: Result<EmulatorFacts, any Error>
        do { facts = .success(try await EmulatorFacts(monitor, processor, devices)) } catch { facts = .failure(error) }
        monitor.close()
        await process.stop(grace: .seconds(2))
        return try facts.get()
    }

    /// What is known already.
    init(
        version: String,
        machines: Set<String> = [],
        processor: [DeviceProperty] = [],
        devices: [String: [DeviceProperty]] = [:],
        members: Set<String> = [],
        hasSystemCallFilter: Bool = true
    ) {
        self.version = version
        self.hasSystemCallFilter = hasSystemCallFilter
        self.machines = machines
        self.processor = processor
        self.devices = devices
        self.members = members
    }

    private init(_ monitor: QMPClient, _ model: String?, _ types: [String]) async throws {
        version = monitor.version
        // A QEMU without one does not know the option.
        let known = try await monitor.execute("query-command-line-options").array
        hasSystemCallFilter = known.contains { $0["option"]?.string == "sandbox" }
        var machines: Set<String> = []
        for machine in try await monitor.execute("query-machines").array {
            for key in ["name", "alias"] { if let name = machine[key]?.string { machines.insert(name) } }
        }
        self.machines = machines
        var members: Set<String> = []
        for entity in try await monitor.execute("query-qmp-schema").array {
            for member in entity["members"]?.array ?? [] {
                if let name = member["name"]?.string { members.insert(name) }
            }
        }
        self.members = members
        var processor: [DeviceProperty] = []
        if let model, let target = try await monitor.execute("query-target")["arch"]?.string {
            processor = try await monitor.deviceProperties("\(model)-\(target)-cpu")
        }
        self.processor = processor
        var devices: [String: [DeviceProperty]] = [:]
        for type in types { devices[type] = try await monitor.deviceProperties(type) }
        self.devices = devices
    }
}
