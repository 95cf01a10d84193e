import Emulator
import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

/// Clients that want to keep others from a destination, with a certificate of the right authority and without one.
@Suite(.serialized, .timeLimit(.minutes(12)))
struct PeerBoundsTests {
    /// A conversation that is begun, and stays open until the closure returns.
    private func converse<T: Sendable>(
        _ lab: Lab,
        as directory: String? = nil,
        _ body: @escaping @Sendable (MessageConnection) async throws -> T
    ) async throws -> T {
        try await HostileNetworkTests().converse(lab, as: directory ?? lab.pki.directory, body)
    }

    /// Opens connections that stay open; `finish` closes them.
    private func open(
        _ lab: Lab,
        _ count: Int,
        on loop: EventLoop? = nil,
        _ messages: @escaping @Sendable (Int) throws -> [Message]
    ) async throws -> [MessageConnection] {
        let (port, loop) = (lab.controlPort, loop ?? lab.loop)
        let credentials = try lab.pki.credentials(.client)
        return try await loop.run {
            var opened: [MessageConnection] = []
            for index in 0..<count {
                let socket = try await SocketChannel.connect(to: .inet(host: "127.0.0.1", port: port), on: loop)
                let channel = try await TLSChannel.handshake(
                    over: socket,
                    credentials: credentials,
                    hostname: "127.0.0.1"
                )
                let connection = MessageConnection(channel)
                for message in try messages(index) { try await connection.send(message) }
                opened.append(connection)
            }
            return opened
        }
    }

    private func close(_ lab: Lab, _ connections: [MessageConnection], on loop: EventLoop? = nil) async throws {
        try await (loop ?? lab.loop).run { for connection in connections { connection.close() } }
    }

    /// Whether the agent greets another source, and answers it.
    private func isAnswered(_ lab: Lab, as directory: String, _ id: String = "9-a") async throws -> Bool {
        try await converse(lab, as: directory) { connection in
            try await connection.send(.hello(.init(role: .control, migration: id)))
            guard case .welcome = try await connection.receiveMessage() else { return false }
            try await connection.send(.ping)
            return try await connection.receiveMessage() == .pong
        }
    }

    private static func hello(_ id: String) -> Message { .hello(.init(role: .control, migration: id)) }

    // MARK: Without a certificate

    /// Connects from 127.0.0.2 as fast as it can, keeps what it has open, and prints how often it has connected.
    private static let flood = """
        import collections, socket, sys, time
        held = collections.deque()
        count = 0
        while True:
            s = socket.socket()
            s.setblocking(False)
            s.bind(("127.0.0.2", 0))
            s.connect_ex(("127.0.0.1", int(sys.argv[1])))
            held.append(s)
            count += 1
            if len(held) > 400:
                held.popleft().close()
            if count % 500 == 0:
                print(count, flush=True)
        """

    @Test func strangersWhoConnectAllTheTimeKeepNobodyOfAnotherAddressOut() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 2)])
        let port = try await lab.startDestination()
        let flood = try ChildProcess(["python3", "-c", Self.flood, "\(port)"])
        func count() -> Int { flood.output.split(separator: "\n").last.flatMap { Int($0) } ?? 0 }
        try await flood.wait(for: "the flood") { count() > 1000 }
        let before = count()
        let result = try await lab.migrate()
        #expect(result.code == 0, "\(result.all)")
        #expect(flood.isRunning && count() > before, "the attack stood during the migration: \(flood.errors)")
        flood.signal(SIGKILL)
    }

    // MARK: With a certificate

    @Test func aHelloIsShortAndWhatIsLongerIsRefusedUnread() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let answer = try await converse(lab) { connection in
            // A frame of 1 MiB is announced, and nothing of it comes.
            try await connection.channel.write([0, 0x10, 0, 0, 1])
            return try await connection.receiveMessage()
        }
        guard case .abort(let reason) = answer else {
            Issue.record("\(answer)")
            return
        }
        #expect(reason.contains("1048576 bytes where the limit is 4096 bytes"), "\(reason)")
    }

    @Test func secretsBeforeAnOfferAreBounded() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let one = Base64.encode([UInt8](repeating: 1, count: 200 << 10))
        for secrets in [
            [["a": one], ["b": one]], [Dictionary(uniqueKeysWithValues: (0..<257).map { ("\($0)", "YQ==") })],
        ] {
            let answer = try await converse(lab) { connection in
                try await connection.send(Self.hello("1-a"))
                _ = try await connection.receiveMessage()
                for values in secrets { try await connection.send(.secrets(values)) }
                return try await connection.receiveMessage()
            }
            guard case .abort(let reason) = answer else {
                Issue.record("\(answer)")
                return
            }
            #expect(reason.contains("The limit of 256 secrets of 256 KiB together is reached"), "\(reason)")
        }
        // The same one again takes the place of what was there.
        let pong = try await converse(lab) { connection in
            try await connection.send(Self.hello("1-b"))
            _ = try await connection.receiveMessage()
            for _ in 0..<5 { try await connection.send(.secrets(["a": one])) }
            try await connection.send(.ping)
            return try await connection.receiveMessage()
        }
        #expect(pong == .pong)
        #expect(lab.destination?.isRunning == true)
    }

    @Test func oneSourceCannotTakeTheConnectionsOfOthers() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let other = try lab.pki.issue("other", hosts: ["other"])
        let held = try await open(lab, 256) { [Self.hello("1-\($0)")] }
        let welcomes = try await lab.loop.run {
            var count = 0
            for connection in held {
                if case .welcome = try await connection.receiveMessage() { count += 1 }
            }
            return count
        }
        #expect(welcomes == 256)
        let answers = try await HostileNetworkTests().answer(lab, as: lab.pki.directory, [Self.hello("1-x")])
        guard case .abort(let reason)? = answers.first else {
            Issue.record("\(answers)")
            return
        }
        #expect(reason.contains("The limit of 256 connections to the control port for one source is reached"))
        #expect(try await isAnswered(lab, as: other))
        try await close(lab, Array(held[..<8]))
        try await eventually("a place is free") { try await self.isAnswered(lab, as: lab.pki.directory, "1-y") }
        try await close(lab, held)
    }

    /// How many have been answered.
    private final class Count: Sendable {
        private let count = Guarded(0)

        var value: Int { count.withLock { $0 } }

        func increase() { count.withLock { $0 += 1 } }
    }

    /// A list of a million numbers takes seconds to decode, and so do ten of them: what others say is answered before any of those.
    @Test func longMessagesOfOneSourceKeepNobodyWaiting() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let other = try lab.pki.issue("other", hosts: ["other"])
        let runs = [UInt64](repeating: 1, count: 1_000_000)
        let long = Message.prepared(.init(proofs: ["disk0": .init(runs: runs, sum: "0")]))
        // Writing them takes long as well: on a loop of their own they hold up nobody here either.
        let loop = EventLoop(name: "attack")
        defer { loop.stop() }
        let held = try await open(lab, 10, on: loop) { [Self.hello("1-\($0)")] }
        let answered = Count()
        let attack = Task(executorPreference: loop) {
            try await withThrowingDiscardingTaskGroup { group in
                for connection in held {
                    _ = try await connection.receiveMessage()
                    group.addTask(executorPreference: loop) {
                        try await connection.send(long)
                        _ = try? await connection.receiveMessage()
                        answered.increase()
                    }
                }
            }
        }
        // The first ones are there once something else is read behind them, or they have been answered.
        for index in 0..<20 {
            #expect(try await isAnswered(lab, as: other, "9-\(index)"))
        }
        #expect(answered.value < 10, "all of them were answered before anybody else")
        try await close(lab, held, on: loop)
        attack.cancel()
        _ = await attack.result
        #expect(try await isAnswered(lab, as: other))
    }

    /// Block nodes that refer to each other, each in a definition of its own.
    private static func chained(_ count: Int) -> Message {
        var arguments = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-nodefaults", "-display", "none"]
        arguments += ["-blockdev", "driver=file,node-name=n0,filename=/nonexistent"]
        for index in 1...count { arguments += ["-blockdev", "driver=raw,node-name=n\(index),file=n\(index - 1)"] }
        let offer = Message.Offer(
            guest: "hostile\(count)",
            commandLine: GuestCommandLine(arguments: arguments, directory: "/"),
            machine: "pc",
            emulatorVersion: "7.2.22",
            disks: [],
            files: [],
            hasUUID: false
        )
        return .offer(offer)
    }

    @Test func commandLinesThatTakeLongKeepNobodyWaiting() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let other = try lab.pki.issue("other", hosts: ["other"])
        let held = try await open(lab, 6) { [Self.hello("1-\($0)"), Self.chained(400 + $0)] }
        // The offers are being looked at.
        try await eventually(seconds: 60, "the offers") {
            DurableFile.list("\(lab.state("b"))/migrations").count == 6
        }
        for index in 0..<10 { #expect(try await isAnswered(lab, as: other, "9-\(index)")) }
        try await close(lab, held)
    }

    @Test func aCommandLineBeyondItsLimitIsRefusedByName() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        guard case .offer(var offer) = Self.chained(1) else { return }
        offer.commandLine.arguments.append(String(repeating: "a", count: 256 << 10))
        let message = Message.offer(offer)
        let answer = try await converse(lab) { connection in
            try await connection.send(Self.hello("1-a"))
            _ = try await connection.receiveMessage()
            try await connection.send(message)
            return try await connection.receiveMessage()
        }
        guard case .ready(let ready) = answer else {
            Issue.record("\(answer)")
            return
        }
        #expect(ready.reasons.first?.contains("The limit of 256 KiB of a command line is exceeded") == true)
    }

    // MARK: A QEMU that is not let live

    @Test func aQEMUThatASignalKillsIsReportedAsThat() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 2)])
        try await lab.startDestination(environment: ["PATH": try lab.makeEmulator("kill -SYS $$")])
        let result = try await lab.migrate()
        #expect(result.code == MigrationError.Code.refused.rawValue, "\(result.all)")
        #expect(result.errors.contains("it was killed by signal 31"), "\(result.all)")
        #expect(result.errors.contains("SystemCallFilter="), "\(result.all)")
    }
}

/// The units that are shipped.
struct UnitTests {
    private func unit(_ name: String) throws -> [Substring] {
        let bytes = try DurableFile.read("\(Lab.repository)/deploy/systemd/\(name).service") ?? []
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n")
    }

    @Test func theAgentMayDoWhatQEMUDoesToItselfAndIsStartedAgainAlways() throws {
        let lines = try unit("crossdock-destination")
        let calls = lines.filter { $0.hasPrefix("SystemCallFilter=") && !$0.hasPrefix("SystemCallFilter=~") }
            .flatMap { $0.dropFirst("SystemCallFilter=".count).split(separator: " ") }
        for call in ["seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"] {
            #expect(calls.contains(Substring(call)), "\(call)")
        }
        for setting in ["StartLimitIntervalSec=0", "OOMPolicy=continue", "Restart=always"] {
            #expect(lines.contains(Substring(setting)), "\(setting)")
        }
        for limit in ["TasksMax=", "LimitNOFILE=", "LimitMEMLOCK="] {
            #expect(lines.contains { $0.hasPrefix(limit) }, "\(limit)")
        }
    }
}
