internal import CLinux
internal import Glibc
public import IO

/// A blank copy of a guest: the same machine, paused for ever, with nothing of the guest's in it. Ends with this process.
public final class ShadowEmulator: Sendable {
    /// How long a blank copy may take for anything: so long that load is never mistaken for a verdict on the guest.
    public static let patience = Duration.seconds(60)
    /// Its monitor. Confined to the loop that it was started on.
    public let monitor: QMPClient
    private let process: BoundProcess
    /// Where its memory is, when that is a directory of its own.
    private let memory: String?

    private init(_ monitor: QMPClient, _ process: BoundProcess, memory: String?) {
        self.monitor = monitor
        self.process = process
        self.memory = memory
    }

    /// Its process number.
    public var pid: Int32 { process.pid }

    /// The socket on which it waits for a migration.
    public var incomingSocket: String { "\(process.directory)/incoming.sock" }
    /// A socket for whoever carries its outgoing migration.
    public var outgoingSocket: String { "\(process.directory)/outgoing.sock" }

    /// Starts a blank copy, with the system calls filtered that it does not need, where QEMU offers that (`-sandbox`).
    ///
    /// - Parameters:
    ///   - commandLine: the guest, as it would be started on this host.
    ///   - program: the QEMU to start; that of the command line when nil.
    ///   - material: sizes and memory.
    ///   - isIncoming: whether it waits for a migration.
    ///   - policy: how it is confined beyond that; not at all when nil.
    ///   - isFiltered: whether this QEMU can filter system calls; when nil it is tried. What another host describes has to be
    ///     given it: that host could make QEMU say what sounds as if it could not.
    ///   - isWanted: whether anybody still waits for it; one that nobody does is ended at once.
    ///   - loop: where its monitor lives.
    /// - Throws: `GuestError` with QEMU's own words when it does not start.
    public static func start(
        _ commandLine: GuestCommandLine,
        program: String? = nil,
        _ material: GuestCommandLine.ShadowMaterial,
        isIncoming: Bool,
        policy: ConfinementPolicy? = nil,
        isFiltered: Bool? = nil,
        isWanted: @escaping @Sendable () -> Bool = { true },
        on loop: EventLoop
    ) async throws -> ShadowEmulator {
        func start(isFiltered: Bool) async throws -> ShadowEmulator {
            try await Self.start(
                commandLine,
                program,
                material,
                isIncoming,
                policy,
                isFiltered: isFiltered,
                isWanted: isWanted,
                on: loop
            )
        }
        if let isFiltered { return try await start(isFiltered: isFiltered) }
        do {
            return try await start(isFiltered: true)
        } catch let error as GuestError
            where error.message.contains("seccomp") || error.message.contains("sandbox")
        {
            // A QEMU that was built without system call filters says so.
            return try await start(isFiltered: false)
        }
    }

    /// Where the memory of blank copies is: files in memory, which QEMU makes, unlinks at once and never writes.
    ///
    /// QEMU leaves memory out of the stream only when it is a shared file with a name (8.1 and later; an anonymous one is
    /// enough before). On a host without such a file system they are sparse files beside the monitor.
    ///
    /// - Returns: nil for the place beside the monitor.
    private static func makeMemoryDirectory() throws -> String? {
        let shared = "/dev/shm"
        guard xd_is_memory_file_system(shared) == 1, access(shared, W_OK | X_OK) == 0 else { return nil }
        return try DurableFile.makePrivateDirectory(in: shared)
    }

    private static func start(
        _ commandLine: GuestCommandLine,
        _ program: String?,
        _ material: GuestCommandLine.ShadowMaterial,
        _ isIncoming: Bool,
        _ policy: ConfinementPolicy?,
        isFiltered: Bool,
        isWanted: @escaping @Sendable () -> Bool,
        on loop: EventLoop
    ) async throws -> ShadowEmulator {
        guard isWanted() else { throw GuestError("Nobody waits for the blank copy of the guest any more") }
        let directory = try BoundProcess.makeDirectory()
        let socket = "\(directory)/qmp.sock"
        let process: BoundProcess
        var memory: String?
        do {
            memory = try makeMemoryDirectory()
            var count = 0
            let line = try commandLine.confined { $0 }.shadow(material, memory: memory ?? directory) { size in
                count += 1
                let path = "\(directory)/scratch\(count)"
                if size > 0 {
                    let fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
                    defer { close(fd) }
                    guard fd >= 0, ftruncate(fd, off_t(size)) == 0 else {
                        throw FileError.system("make \(path)", errno)
                    }
                }
                return path
            }
            var arguments = line.arguments
            if let program { arguments[0] = program }
            arguments += ["-S", "-qmp", "unix:\(socket),server=on,wait=off"]
            if isIncoming { arguments += ["-incoming", "defer"] }
            if isFiltered { arguments += ["-sandbox", ConfinementPolicy.systemCallFilter] }
            let words = arguments
            let confinement = try policy?.emulator(
                words[0],
                directories: [directory, memory].compactMap { $0 },
                commandLine: commandLine
            )
            process = try await BlockingPool.shared.run {
                try BoundProcess(words, directory: directory, confinement: confinement)
            }
        } catch {
            DurableFile.remove(directory)
            if let memory { DurableFile.remove(memory) }
            throw error
        }
        let monitor: QMPClient
        do {
            monitor = try await process.monitor(
                at: socket,
                "QEMU does not start a blank copy of the guest",
                isWanted: isWanted,
                on: loop
            )
        } catch {
            if let memory { DurableFile.remove(memory) }
            throw error
        }
        let shadow = ShadowEmulator(monitor, process, memory: memory)
        do {
            try await monitor.setCapabilities(["events", "return-path", "x-ignore-shared"], to: true)
            if isIncoming { try await monitor.migrateIncoming(socket: shadow.incomingSocket) }
        } catch {
            await shadow.stop()
            throw error
        }
        return shadow
    }

    /// What it said last: why it does not take a migration.
    public var words: String { process.words }

    /// Ends it and removes what was made for it.
    public func stop() async {
        monitor.close()
        await process.stop(grace: .seconds(2))
        if let memory { DurableFile.remove(memory) }
    }
}
