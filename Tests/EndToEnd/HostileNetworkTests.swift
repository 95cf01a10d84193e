import Emulator
import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

/// Peers that want something else than to migrate a guest of theirs.
@Suite(.serialized, .timeLimit(.minutes(9)))
struct HostileNetworkTests {
    /// Speaks the protocol with a certificate of the right authority, and says what it likes.
    func converse<T: Sendable>(
        _ lab: Lab,
        as directory: String,
        _ body: @escaping @Sendable (MessageConnection) async throws -> T
    ) async throws -> T {
        let port = lab.controlPort
        let credentials = try X509Credentials(id: "tls0", directory: directory, endpoint: .client, sanityCheck: false)
        let loop = lab.loop
        return try await loop.run {
            let socket = try await SocketChannel.connect(to: .inet(host: "127.0.0.1", port: port), on: loop)
            let channel = try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: "127.0.0.1")
            defer { channel.close() }
            return try await body(MessageConnection(channel))
        }
    }

    func answer(_ lab: Lab, as directory: String, _ messages: [Message]) async throws -> [Message] {
        try await converse(lab, as: directory) { connection in
            var answers: [Message] = []
            for message in messages {
                try await connection.send(message)
                do { answers.append(try await connection.receiveMessage()) } catch { break }
            }
            return answers
        }
    }

    func isRefused(_ message: Message?, _ words: String) -> Bool {
        if case .abort(let reason) = message { return reason.contains(words) }
        return false
    }

    @Test func anotherSourceHasNoPartInAMigrationAndNoSecondOneTakesTheSameGuest() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 16)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "500000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        let id = DurableFile.list("\(lab.state("a"))/migrations").first ?? ""
        let other = try lab.pki.issue("other", hosts: ["other"])
        for role in [Message.Hello.Role.control, .stream] {
            let answers = try await answer(lab, as: other, [.hello(.init(role: role, migration: id))])
            #expect(isRefused(answers.first, role == .control ? "belongs to another source" : "no such migration"))
        }
        // A stream of its own is not due before the source says so.
        let early = try await answer(lab, as: lab.pki.directory, [.hello(.init(role: .stream, migration: id))])
        #expect(early.count == 1)
        // Another host has a guest of the same name.
        let otherDisk = try await lab.makeImage("other.raw", megabytes: 16, data: 1)
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("c"), "--", "qemu-system-x86_64", "-machine"]
                + ["pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
                + ["-drive", "file=\(otherDisk),format=raw,if=virtio"]
        )
        #expect(started.code == 0, "\(started.all)")
        defer { (try? lab.guests("c").load("web1"))??.process?.signal(SIGKILL) }
        let second = try await lab.migrate(from: "c", port: lab.controlPort, credentials: lab.credentials(other))
        #expect(second.code == MigrationError.Code.refused.rawValue, "\(second.all)")
        #expect(second.errors.contains("is being migrated on this host already"), "\(second.all)")
        let result = try await migration.finish(seconds: 90)
        #expect(result.code == 0, "\(result.all)")
        // The end of it can be asked for again, by its source only.
        let release: [Message] = [.hello(.init(role: .control, migration: id)), .release(.init())]
        guard case .owned? = try await answer(lab, as: lab.pki.directory, release).last else {
            Issue.record("The destination does not repeat OWNED")
            return
        }
        #expect(isRefused(try await answer(lab, as: other, release).first, "belongs to another source"))
        let before: [Message] = [.hello(.init(role: .control, migration: id)), .abort("take it back")]
        // An ABORT in answer would say that the guest will never run there.
        let late = try await answer(lab, as: lab.pki.directory, before)
        #expect(late.count == 1 && !isRefused(late.last, ""))
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    @Test func messagesThatAreNotDueChangeNothing() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let messages: [Message] = [
            .release(.init()), .prepared(.init()), .stream, .mirrored, .done, .rehearsed(.init()),
            .owned(.init(digests: [:])), .refused("no"), .welcome(.init(state: .owner)), .need([0]),
        ]
        for (index, message) in messages.enumerated() {
            let hello = Message.hello(.init(role: .control, migration: "1-\(index)"))
            let answers = try await answer(lab, as: lab.pki.directory, [hello, message])
            guard case .welcome(let welcome)? = answers.first else {
                Issue.record("No welcome before \(message.name)")
                continue
            }
            #expect(welcome.state == .new)
            if answers.count > 1 { #expect(isRefused(answers[1], "is not due"), "\(message.name): \(answers[1])") }
        }
        for id in ["../../x", "", "A", String(repeating: "1", count: 41)] {
            let answers = try await answer(lab, as: lab.pki.directory, [.hello(.init(role: .control, migration: id))])
            #expect(isRefused(answers.first, "malformed"))
        }
        // Half a frame, a frame of a gigabyte, a frame of an unknown kind.
        for bytes: [UInt8] in [[0, 0, 1, 0, 1, 123], [0x40, 0, 0, 0, 1], [0, 0, 0, 1, 9, 0]] {
            try await converse(lab, as: lab.pki.directory) { connection in
                try await connection.send(.hello(.init(role: .control, migration: "2-a")))
                _ = try await connection.receiveMessage()
                try await connection.channel.write(bytes)
            }
        }
        #expect(DurableFile.list("\(lab.state("b"))/migrations").isEmpty)
        #expect(try lab.leftAtDestination() == [])
        #expect(lab.destination?.isRunning == true)
    }

    /// Leaves a journal at the destination, as an earlier agent would.
    private func leave(_ lab: Lab, _ id: String, _ records: [JournalRecord]) throws {
        let store = MigrationStore(stateDirectory: lab.state("b"))
        try DurableFile.makeDirectory(store.directory(of: id))
        let journal = try Journal(creating: store.journal(of: id))
        for record in records { try journal.append(record) }
    }

    @Test func aHostThatWasOverruledLearnsItAndOneThatHasTakenAGuestSaysSo() async throws {
        let lab = try Lab()
        let begin: [JournalRecord] = [.accepted(guest: "web1", source: "CN=host", order: 0), .prepared]
        try leave(lab, "1-a", begin + [.owner(digests: [:])])
        try leave(lab, "1-b", begin + [.taken(by: "root")])
        try leave(lab, "1-c", begin + [.overruled(by: "root of host a")])
        try leave(lab, "1-d", begin + [.owner(digests: [:]), .confirmed])
        try await lab.startDestination()
        let overruled: [Message] = [.hello(.init(role: .control, migration: "1-a")), .overruled("root of host a")]
        for _ in 0..<2 {
            let answers = try await answer(lab, as: lab.pki.directory, overruled)
            #expect(answers.last == .overruled("root of host a"), "\(answers)")
        }
        let store = MigrationStore(stateDirectory: lab.state("b"))
        #expect(try store.reading(of: "1-a")?.standing == .destination(.overruled(by: "root of host a")))
        #expect(lab.destination?.errors.contains("both may run it") == true)
        // Nothing is claimed for it any more.
        let release: [Message] = [.hello(.init(role: .control, migration: "1-a")), .release(.init())]
        #expect(isRefused(try await answer(lab, as: lab.pki.directory, release).last, "is not due"))
        let taken = try await answer(lab, as: lab.pki.directory, [.hello(.init(role: .control, migration: "1-b"))])
        guard case .welcome(let welcome)? = taken.first else {
            Issue.record("No welcome")
            return
        }
        #expect(welcome.takenBy == "root" && welcome.state == .done)
        // One that never had it has nothing that could run twice, however often it is told.
        let told: [Message] = [.hello(.init(role: .control, migration: "1-c")), .overruled("root of host a")]
        let never = try await answer(lab, as: lab.pki.directory, told)
        guard case .welcome(let state)? = never.first else {
            Issue.record("No welcome: \(never)")
            return
        }
        #expect(state.state == .aborted && never.last == .overruled("root of host a"))
        // A source that has confirmed it cannot take it back.
        let late: [Message] = [.hello(.init(role: .control, migration: "1-d")), .overruled("liar")]
        #expect(isRefused(try await answer(lab, as: lab.pki.directory, late).last, "its source has confirmed that"))
        #expect(try store.reading(of: "1-d")?.standing == .destination(.owner(digests: [:])))
        #expect(Feature.known(welcome.features) == Set(Feature.allCases))
    }

    /// Whether it is the same guest cannot be known here before the journal is settled.
    @Test func aGuestThatWasReleasedFromHereAndIsNotConfirmedIsNotTaken() async throws {
        let lab = try Lab()
        try leave(lab, "1-a", [.offered(guest: "web1", destination: "host-c", order: 0), .released])
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        let result = try await lab.migrate()
        #expect(result.code == MigrationError.Code.refused.rawValue, "\(result.all)")
        #expect(result.errors.contains("has not confirmed it; run 'crossdock recover 1-a' here"), "\(result.all)")
        #expect(DurableFile.list("\(lab.state("b"))/migrations") == ["1-a"])
    }

    /// A hundred connections that say nothing: a guest is migrated all the same, and the log stays short.
    @Test func silentConnectionsKeepNobodyOut() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 2)])
        let port = try await lab.startDestination()
        let loop = lab.loop
        let silent = try await loop.run {
            var channels: [SocketChannel] = []
            for _ in 0..<100 {
                channels.append(try await SocketChannel.connect(to: .inet(host: "127.0.0.1", port: port), on: loop))
            }
            return channels
        }
        let result = try await lab.migrate()
        #expect(result.code == 0, "\(result.all)")
        let lines = (lab.destination?.errors ?? "").split(separator: "\n").filter { $0.contains("HELLO") }
        #expect(!lines.isEmpty && lines.count <= LogLimit.lines, "\(lines.count) lines")
        try await loop.run { for channel in silent { channel.close() } }
    }

    @Test func theLogOfRefusalsIsBoundedAndSaysWhatItLeftOut() {
        var limit = LogLimit()
        let start = ContinuousClock.now
        let first = (0..<1000).compactMap { limit.line("refused \($0)", now: start) }
        #expect(first.count == LogLimit.lines)
        let next = limit.line("refused", now: start + LogLimit.period)
        #expect(next == "refused (and \(1000 - LogLimit.lines) other refusals that were not logged)")
        #expect(limit.line("refused", now: start + LogLimit.period) == "refused")
    }

    @Test func aLinkInThePlaceOfAGuestsImagesIsNotFollowed() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 2)])
        let elsewhere = lab.directory.directory("elsewhere")
        try DurableFile.makeDirectory("\(lab.state("b"))/images")
        #expect(symlink(elsewhere, "\(lab.state("b"))/images/web1") == 0)
        try await lab.startDestination()
        let result = try await lab.migrate()
        #expect(result.code == MigrationError.Code.refused.rawValue, "\(result.all)")
        #expect(result.errors.contains("a link would lead the images elsewhere"), "\(result.all)")
        #expect(DurableFile.list(elsewhere).isEmpty)
    }
}
