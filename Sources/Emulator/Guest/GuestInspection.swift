internal import CLinux
internal import Glibc
internal import IO
public import TLS

/// What a running QEMU is: its description for another host, its disks, and what keeps it from moving.
public struct GuestInspection: Sendable {
    /// The command line with everything that was plugged in since, and with what QEMU derived from this host fixed.
    public internal(set) var commandLine: GuestCommandLine
    /// How it differs from the command line that QEMU was started with, a sentence each.
    public internal(set) var changes: [String] = []
    /// Why the guest cannot be migrated, a sentence each.
    public internal(set) var blockers: [String] = []
    /// Those of them that are about devices and options of this host.
    public internal(set) var immovable: Set<String> = []
    /// The disks that have a medium.
    public internal(set) var disks: [GuestDisk] = []
    /// The disk of each path of the command line.
    public internal(set) var diskOfPath: [String: GuestDisk] = [:]
    /// The id of the secret that opens a disk, by the disk's path in the command line.
    public internal(set) var keySecret: [String: String] = [:]
    /// Where each path of the command line leads on this host, absolute.
    public internal(set) var resolved: [String: String] = [:]
    /// The name of the machine's memory object.
    public internal(set) var memoryID: String?
    /// The bytes of each block node and drive by its name, and of each path.
    public internal(set) var sizes: [String: UInt64] = [:]
    /// What devices, and the "processor", are given that they have anyway: "DRIVER property" to the value as it is given.
    public internal(set) var standards: [String: String] = [:]
    /// The values of the guest's secrets, by id.
    public internal(set) var secrets: [String: SecretBytes] = [:]
    /// The networks that are interfaces of this host, with the names that the kernel has for them.
    public internal(set) var networks: [HostNetwork] = []
    /// The machine type with its version.
    public internal(set) var machine = ""
    /// The processor's model.
    public internal(set) var processor = ""
    /// Whether the command line names all that the guest's processor has and has not.
    public internal(set) var isProcessorFixed = false
    /// How many processors it has now.
    public internal(set) var processors = 0
    /// The memory at its start, in bytes.
    public internal(set) var memory: UInt64 = 0
    /// QEMU's version.
    public internal(set) var emulatorVersion = ""
    /// The run state.
    public internal(set) var status = ""

    /// Asks the running QEMU of a guest that is on record.
    ///
    /// - Throws: `QMPError` when QEMU does not answer.
    public static func inspect(_ monitor: QMPClient, _ record: GuestRecord) async throws -> GuestInspection {
        let pid = record.process?.pid ?? 0
        let emulator = try? await BlockingPool.shared.run { try RunningEmulator(pid: pid) }
        // The record of an adopted guest leaves out what must not be on a disk.
        let line =
            record.adopted == nil
            ? nil : emulator.map { GuestCommandLine(arguments: $0.arguments, directory: $0.directory) }
        return try await inspect(monitor, line ?? record.commandLine, emulator)
    }

    /// Asks a running QEMU.
    ///
    /// Nothing of the guest is changed. What cannot be moved is among the `blockers`.
    ///
    /// - Parameters:
    ///   - monitor: its monitor.
    ///   - commandLine: how it was started.
    ///   - emulator: its process, where /proc tells about it.
    /// - Throws: `QMPError` when QEMU does not answer.
    public static func inspect(
        _ monitor: QMPClient,
        _ commandLine: GuestCommandLine,
        _ emulator: RunningEmulator?
    ) async throws -> GuestInspection {
        var inspector = GuestInspector(monitor, commandLine, emulator)
        try await inspector.run()
        return inspector.result
    }
}
