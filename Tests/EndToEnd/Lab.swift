import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TLS
import TestSupport

/// Two hosts on this machine: state directories `a` and `b`, real programs, real guests under TCG.
///
/// Everything that was started is ended with the lab.
final class Lab: @unchecked Sendable {
    // Unchecked: each test uses its lab from one task.
    static let repository: String = {
        // Tests/EndToEnd/Lab.swift
        let parts = #filePath.split(separator: "/").dropLast(3)
        return "/" + parts.joined(separator: "/")
    }()
    static let crossdock = Tool.crossdock
    static let guestFiles = "\(repository)/.cache/guest"

    let directory: TestDirectory
    let pki: TestPKI
    let loop = EventLoop(name: "lab")
    /// Put before every program, to run it in a namespace.
    var prefix: [String] = []
    /// The QEMUs of the hosts a and b, "7.2:10.0", when the tests are run with others than the system's (`make versions`): the
    /// whole run has that of a for the system's, and what is of host b is started with its own.
    static let emulators: (a: String, b: String)? = {
        let words = (ProcessInfo.processInfo.environment["CROSSDOCK_QEMU"] ?? "").split(separator: ":").map(String.init)
        return words.count == 2 ? (words[0], words[1]) : nil
    }()
    /// The QEMUs of this lab's hosts; nil for the one that the whole run has.
    private let versions: (a: String?, b: String?)
    private let isAboutVersions: Bool

    /// Put before the programs of a host with another QEMU.
    private func versionPrefix(_ isB: Bool) -> [String] {
        guard let version = isB ? versions.b : versions.a else { return [] }
        return ["\(Self.repository)/deploy/qemu", version]
    }
    /// The same guest for hosts with different QEMUs: a machine type that both have, and a processor that both can give.
    func portable(_ arguments: [String]) -> [String] {
        guard !isAboutVersions, let pair = Self.emulators, pair.a != pair.b else { return arguments }
        var previous = ""
        return arguments.map { word in
            defer { previous = word }
            switch (previous, String(word.prefix { $0 != "," })) {
            case ("-machine", "pc"): return "pc-i440fx-7.2" + word.dropFirst(2)
            case ("-machine", "q35"): return "pc-q35-7.2" + word.dropFirst(3)
            case ("-cpu", "max"): return "Nehalem" + word.dropFirst(3)
            default: return word
            }
        }
    }
    private(set) var destination: ChildProcess?
    private var destinations: [String: ChildProcess] = [:]
    private var children: [ChildProcess] = []

    /// QEMUs for tests whose guest must run on after its memory was sent for long or several times: 7.2 emulates processors that go on writing
    /// to pages they know of without a note, and one guest in thirty crashes of that after many passes.
    static let whole = (a: "10.0", b: "10.0")

    /// Makes the hosts.
    ///
    /// - Parameter emulators: their QEMUs, when the test is about two versions.
    init(emulators: (a: String, b: String)? = nil) throws {
        isAboutVersions = emulators != nil
        if let emulators {
            versions = (emulators.a, emulators.b)
        } else {
            versions = (nil, Self.emulators.flatMap { $0.a == $0.b ? nil : $0.b })
        }
        directory = try TestDirectory()
        pki = try TestPKI()
    }

    deinit {
        for agent in destinations.values { agent.signal(SIGKILL) }
        for side in ["a", "b", "c"] {
            let store = GuestStore(stateDirectory: state(side))
            for name in store.names() { (try? store.load(name))??.process?.signal(SIGKILL) }
        }
        loop.stop()
    }

    /// Puts everything that is started from here on into a network namespace whose loopback carries so much:
    /// `160mbit`.
    func throttle(_ rate: String) async throws {
        let limit = "tc qdisc add dev lo root tbf rate \(rate) burst 128kb latency 50ms"
        prefix = Namespace.enterNetwork(
            try await hold(Namespace.network, "ip link set lo mtu 1500 up && \(limit)")
        )
    }

    /// Puts everything that is started from here on into a network namespace with its own `/sys`, in which commands have been run.
    func network(_ commands: String) async throws {
        // As udev makes it; where there is no udev, only root may open it.
        let tun = directory.file("tun")
        let device = "{ mknod -m 0666 \(tun) c 10 200 && mount --bind \(tun) /dev/net/tun || true; } 2>/dev/null"
        let first = "ip link set lo up && mount -t sysfs none /sys && \(device)"
        prefix = Namespace.enterHost(try await hold(Namespace.host, "\(first) && \(commands)"))
    }

    /// A process that keeps namespaces in which commands have been run.
    private func hold(_ namespaces: [String], _ commands: String) async throws -> Int32 {
        let holder = try ChildProcess(namespaces + ["sh", "-c", "\(commands) && echo up && exec sleep infinity"])
        children.append(holder)
        try await holder.wait(for: "the namespaces") { holder.output.contains("up") }
        return holder.pid
    }

    /// Puts everything that is started from here on into a mount namespace in which commands have been run.
    func mount(_ commands: String) async throws {
        prefix = Namespace.enter(try await hold(Namespace.mount, commands))
    }

    func state(_ side: String) -> String { directory.file(side) }
    func guests(_ side: String) -> GuestStore { GuestStore(stateDirectory: state(side)) }

    func credentials(_ path: String? = nil, _ more: String = "") -> [String] {
        ["--object", "tls-creds-x509,id=tls0,dir=\(path ?? pki.directory)\(more)", "--tls-creds", "tls0"]
    }

    func crossdock(_ arguments: [String], seconds: Int = 120) async throws -> ToolResult {
        try await Tool.run(
            prefix + versionPrefix(arguments.contains(state("b"))) + [Self.crossdock] + arguments,
            seconds: seconds
        )
    }

    // MARK: Guests

    /// A sparse image with some data in it.
    func makeImage(_ name: String, megabytes: Int, data: Int) async throws -> String {
        let path = directory.file(name)
        let made = try await Tool.run([
            "sh", "-c",
            "truncate -s \(megabytes)M \(path) && "
                + "dd if=/dev/urandom of=\(path) bs=1M count=\(data) seek=\(megabytes / 2) conv=notrunc status=none",
        ])
        guard made.code == 0 else { throw TestFailure(made.all) }
        return path
    }

    /// A machine without an operating system: it runs, idles in its firmware, and starts in no time.
    func startIdleGuest(
        _ name: String = "web1",
        on side: String = "a",
        disks: [String],
        more: [String] = []
    ) async throws {
        var command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
        for disk in disks { command += ["-drive", "file=\(disk),format=raw,if=virtio"] }
        let started = try await crossdock(
            ["guest", "start", name, "--state-dir", state(side), "--"] + portable(command + more)
        )
        guard started.code == 0 else { throw TestFailure("The guest did not start: \(started.all)") }
    }

    /// The command line of a Linux guest that writes numbered records; its kernel command line can ask for more.
    func linuxCommand(disks: [String], workload: String = "", memory: Int = 256) -> [String] {
        var command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", "\(memory)"]
        command += ["-nodefaults", "-display", "none", "-no-reboot", "-kernel", "\(Self.guestFiles)/vmlinuz"]
        command += [
            "-initrd", "\(Self.guestFiles)/initrd", "-append",
            "console=ttyS0 quiet no_timer_check cryptomgr.notests \(workload)",
        ]
        for disk in disks { command += ["-drive", "file=\(disk),format=raw,if=virtio"] }
        return portable(command + ["-serial", "file:\(directory.file("console.log"))"])
    }

    func startLinuxGuest(disks: [String], workload: String = "") async throws {
        let command = linuxCommand(disks: disks, workload: workload)
        let started = try await crossdock(["guest", "start", "web1", "--state-dir", state("a"), "--"] + command)
        guard started.code == 0 else { throw TestFailure("The guest did not start: \(started.all)") }
        try await eventually(seconds: 180, "the guest writes records") { try self.records(self.consoleA) > 20 }
    }

    var consoleA: String { directory.file("console.log") }
    var consoleB: String { "\(guests("b").directory(of: "web1"))/run/console.log" }

    func records(_ console: String) throws -> Int {
        // Lines end in CR LF, which is one character of a Swift string, so the bytes are looked at.
        let bytes = try DurableFile.read(console) ?? []
        return bytes.split(separator: UInt8(ascii: "\n")).count { $0.starts(with: "REC".utf8) }
    }

    /// Starts a QEMU as somebody else would: with a monitor at `foreign.sock`, and nothing of Crossdock.
    func startForeignGuest(_ arguments: [String], monitor: String = "foreign.sock") async throws -> ChildProcess {
        let child = try ChildProcess(
            prefix + versionPrefix(false) + ["qemu-system-x86_64"] + portable(arguments)
                + ["-display", "none", "-qmp", "unix:\(directory.file(monitor)),server=on,wait=off"]
        )
        children.append(child)
        // The socket has its name a moment before anybody listens there.
        try await eventually("a monitor answers") {
            if !child.isRunning { throw TestFailure("QEMU ended: \(child.output)\(child.errors)") }
            return (try? await foreignMonitor(monitor) { _ in true }) ?? false
        }
        return child
    }

    /// Puts a program of one's own in the place of `qemu-system-x86_64`, and returns a PATH that finds it first.
    func makeEmulator(_ script: String) throws -> String {
        let tools = directory.directory("tools")
        try DurableFile.write(Array("#!/bin/sh\n\(script)\n".utf8), to: "\(tools)/qemu-system-x86_64", mode: 0o755)
        return "\(tools):\(ProcessInfo.processInfo.environment["PATH"] ?? "/usr/bin:/bin")"
    }

    /// A monitor of a QEMU that something else started.
    func foreignMonitor<T: Sendable>(
        _ name: String = "foreign.sock",
        _ body: @escaping @Sendable (QMPClient) async throws -> T
    ) async throws -> T {
        let path = directory.file(name)
        let loop = loop
        return try await loop.run {
            let monitor = try await QMPClient.connect(to: path, on: loop)
            defer { monitor.close() }
            return try await body(monitor)
        }
    }

    /// What a guest of host a can see of its machine.
    func fingerprint(_ socket: String) async throws -> MachineFingerprint {
        try await foreignMonitor(socket) { try await MachineFingerprint(of: $0) }
    }

    /// What a guest can see of its machine.
    func identity(_ side: String) async throws -> MachineFingerprint {
        try await monitor(side) { try await MachineFingerprint(of: $0) }
    }

    // MARK: Agents

    /// The users of guests on the hosts of a lab.
    static let guestUsers: ClosedRange<UInt32> = 1_910_000_000...1_910_009_999

    /// Tests about other things leave no packet filter on this machine, and their guests may reach what they like: their users are no others', for
    /// whom there may be one.
    private func network(_ program: String, _ more: [String]) -> [String] {
        if program != Self.crossdock || more.contains("--guest-network") { return [] }
        return [
            "--guest-network", "host", "--guest-users", "\(Self.guestUsers.lowerBound)-\(Self.guestUsers.upperBound)",
        ]
    }

    /// Starts a destination agent, which may be another release's, and returns its control port.
    @discardableResult
    func startDestination(
        _ side: String = "b",
        program: String = Lab.crossdock,
        credentials: [String]? = nil,
        before: [String] = [],
        environment: [String: String] = [:],
        ports: (control: UInt16, nbd: UInt16) = (0, 0),
        more: [String] = []
    ) async throws -> UInt16 {
        let agent = try ChildProcess(
            prefix + versionPrefix(side == "b") + before + [program, "destination", "--state-dir", state(side)]
                + ["--listen", "127.0.0.1:\(ports.control)", "--nbd-listen", "127.0.0.1:\(ports.nbd)"]
                + (credentials ?? self.credentials()) + network(program, more) + more,
            environment: environment
        )
        destination = agent
        destinations[side] = agent
        try await agent.wait(for: "a destination agent") { agent.output.contains("listening on") }
        return controlPort(of: side)
    }

    /// What the destination agent of a host has said.
    func destinationOutput(_ side: String = "b") -> String { destinations[side]?.output ?? "" }
    /// What it has said to its operator.
    func destinationErrors(_ side: String = "b") -> String { destinations[side]?.errors ?? "" }

    /// Kills the destination agent of a host and starts another one in its place, as a supervisor would.
    func replaceDestination(_ side: String = "b", more: [String] = []) async throws {
        let ports = (control: controlPort(of: side), nbd: port(after: "NBD port ", of: side))
        destinations[side]?.signal(SIGKILL)
        _ = try await destinations[side]?.finish()
        try await startDestination(side, ports: ports, more: more)
    }

    /// Kills the destination agent of a host.
    func stopDestination(_ side: String) {
        destinations[side]?.signal(SIGKILL)
        destinations[side] = nil
    }

    /// Takes the last record out of a journal: the word of the destination is lost.
    static func forgetLastRecord(of journal: String) throws {
        let lines = (try DurableFile.read(journal) ?? []).split(separator: UInt8(ascii: "\n"))
        try DurableFile.write(Array(lines.dropLast().joined(separator: [UInt8(ascii: "\n")])) + [10], to: journal)
    }

    /// The source agent of the only migration of host a.
    func sourceAgent() throws -> EmulatorProcess {
        let id = DurableFile.list("\(state("a"))/migrations").first ?? ""
        guard let bytes = try DurableFile.read("\(state("a"))/migrations/\(id)/agent.json"),
            let process = JSONText.decode(EmulatorProcess.self, from: bytes)
        else { throw TestFailure("There is no source agent") }
        return process
    }

    /// Starts a destination agent in a mount namespace of its own, after `mount` commands for its image directory.
    func startDestination(images: String, mounting commands: String) async throws {
        try await startDestination(
            before: Namespace.mount + ["sh", "-c", "\(commands) && exec \"$@\"", "sh"],
            more: ["--image-dir", images]
        )
    }

    /// The ports that the agent printed: "listening on 127.0.0.1:PORT, NBD port PORT".
    private func port(after marker: String, of side: String = "b") -> UInt16 {
        let text = destinations[side]?.output ?? ""
        guard let range = text.firstRange(of: marker) else { return 0 }
        return UInt16(text[range.upperBound...].prefix { $0.isNumber }) ?? 0
    }
    func controlPort(of side: String) -> UInt16 { port(after: "127.0.0.1:", of: side) }
    var controlPort: UInt16 { controlPort(of: "b") }
    var nbdPort: UInt16 { port(after: "NBD port ") }

    func migrateCommand(
        _ guest: String = "web1",
        from side: String = "a",
        host: String = "localhost",
        port: UInt16? = nil,
        credentials: [String]? = nil,
        more: [String] = []
    ) -> [String] {
        ["migrate", guest, "\(host):\(port ?? controlPort(of: side == "a" ? "b" : "a"))", "--state-dir", state(side)]
            + (credentials ?? self.credentials()) + more
    }

    func migrate(
        _ guest: String = "web1",
        from side: String = "a",
        host: String = "localhost",
        port: UInt16? = nil,
        credentials: [String]? = nil,
        more: [String] = []
    ) async throws -> ToolResult {
        try await crossdock(
            migrateCommand(guest, from: side, host: host, port: port, credentials: credentials, more: more),
            seconds: 240
        )
    }

    /// Crossdock on host a, with that host's QEMU.
    var crossdockOfA: [String] { prefix + versionPrefix(false) + [Self.crossdock] }

    /// Starts a migration and leaves it running.
    func beginMigration(more: [String]) throws -> ChildProcess {
        let child = try ChildProcess(crossdockOfA + migrateCommand(more: more))
        children.append(child)
        return child
    }

    func report(_ path: String) throws -> MigrationReport {
        try MigrationReport(parsing: DurableFile.read(path) ?? [])
    }

    // MARK: What is left

    /// The monitor of a guest, as a third party sees it.
    func monitor<T: Sendable>(
        _ side: String,
        _ guest: String = "web1",
        _ body: @escaping @Sendable (QMPClient) async throws -> T
    ) async throws -> T {
        let path = (try guests(side).load(guest)).map(guests(side).statusMonitor(of:)) ?? ""
        let loop = loop
        return try await loop.run {
            let monitor = try await QMPClient.connect(to: path, on: loop)
            defer { monitor.close() }
            return try await body(monitor)
        }
    }

    /// What the processes of host a's migrations have said, and what they have told of.
    func sourceLogs() -> String {
        let directory = "\(state("a"))/migrations"
        let paths = DurableFile.list(directory).flatMap { id in
            DurableFile.list("\(directory)/\(id)").filter { $0.hasSuffix(".log") || $0.hasSuffix(".jsonl") }
                .map { "\(directory)/\(id)/\($0)" }
        }
        return paths.map { path in
            let text = String(decoding: ((try? DurableFile.read(path)) ?? nil) ?? [], as: UTF8.self)
            return "\n\(path):\n\(text.suffix(4000))"
        }
        .joined()
    }

    /// What a failed migration may not leave at the source: a job, a node, a paused guest, a socket. Empty when clean.
    func leftAtSource() async throws -> [String] {
        var left = try await monitor("a") { monitor in
            var left: [String] = []
            let status = try await monitor.status()
            if status != "running" { left.append("the guest is \(status)") }
            if try await !monitor.execute("query-jobs").array.isEmpty { left.append("a block job") }
            let nodes = try await monitor.execute("query-named-block-nodes", ["flat": true]).array
            for node in nodes.compactMap({ $0["node-name"]?.string }) where node.hasPrefix("xdt-") { left.append(node) }
            return left
        }
        for id in DurableFile.list("\(state("a"))/migrations") {
            for name in DurableFile.list("\(state("a"))/migrations/\(id)") where name.hasSuffix(".sock") {
                left.append(name)
            }
        }
        return left
    }

    /// What a failed migration may not leave at the destination: a QEMU, an image, a guest. Empty when clean.
    func leftAtDestination(images: String? = nil) throws -> [String] {
        var left = guests("b").names().map { "guest \($0)" }
        for name in DurableFile.list(images ?? "\(state("b"))/images") where name != ".files" {
            left.append("image \(name)")
        }
        for (pid, line) in Self.processes(containing: "\(state("b"))/") where line.contains("qemu-system") {
            left.append("process \(pid)")
        }
        return left
    }

    /// Every file of the lab's directory with what a stranger's hand would change: inode, size, times, contents.
    func snapshot() throws -> [String: String] {
        var result: [String: String] = [:]
        for name in DurableFile.list(directory.path) {
            var status = stat()
            let path = directory.file(name)
            guard lstat(path, &status) == 0, status.st_mode & S_IFMT != S_IFDIR else { continue }
            var text = "\(status.st_ino) \(status.st_mode) \(status.st_size)"
            if status.st_mode & S_IFMT == S_IFREG {
                text += " \(status.st_mtim.tv_sec).\(status.st_mtim.tv_nsec) \(try ChunkDigests.digest(of: path))"
                // The guest itself writes to its memory, and its firmware to its variables.
                if name == "memory" || name == "vars.fd" { text = "\(status.st_ino) \(status.st_size)" }
            }
            result[name] = text
        }
        return result
    }

    /// The processes whose command line has a text.
    static func processes(containing text: String) -> [(pid: Int32, line: String)] {
        DurableFile.list("/proc").compactMap { Int32($0) }.compactMap { pid in
            let bytes = (try? DurableFile.read("/proc/\(pid)/cmdline")) ?? nil
            let line = String(decoding: bytes ?? [], as: UTF8.self)
            return line.contains(text) ? (pid, line) : nil
        }
    }
}
