import Emulator
import IO
import Migration
import Source
import TLS
import TestSupport
import Testing

extension AdmissionEndToEnd {
    // MARK: TURN

    @Test func switchoversTakeTurnsAndADeadHolderKeepsNobodyWaiting() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let (one, two) = (try target(lab, "1-e"), try target(lab, "1-f"))
        let first = try await #require(try one.turn(for: "web1", patience: .seconds(10)))
        #expect(first.isHeld)
        let late = await #expect(throws: MigrationError.self) {
            try await two.turn(for: "web2", patience: .milliseconds(200))
        }
        #expect(late?.code == .busy && late?.message.contains("web2") == true)
        // The other questions are answered meanwhile.
        #expect(try await one.state() != nil)
        let second = Task { try await two.turn(for: "web2", patience: .seconds(60)) }
        #expect(try await two.state() != nil)
        first.end()
        let turn = try await #require(try second.value)
        #expect(turn.isHeld && !first.isHeld)
        // The holder's connection is cut.
        let third = Task { try await one.turn(for: "web3", patience: .seconds(60)) }
        #expect(try await one.state() != nil)
        two.close()
        #expect(try await third.value?.isHeld == true)
        try await eventually("the lost turn is known to be lost") { !turn.isHeld }
        // Who asks no longer leaves the queue.
        let abandoned = Task { try await two.turn(for: "web4", patience: .seconds(60)) }
        #expect(try await two.state() != nil)
        abandoned.cancel()
        let error = await #expect(throws: MigrationError.self) { try await abandoned.value }
        #expect(error?.code == .cancelled)
        _ = await third.result
    }

    @Test func aHolderThatIsSilentLosesItsTurn() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let other = try target(lab, "1-f")
        // It holds the turn, keeps the connection open, and never says anything again.
        let held = try await lab.loop.run { [lab] in
            let socket = try await SocketChannel.connect(
                to: .inet(host: "127.0.0.1", port: lab.controlPort),
                on: lab.loop
            )
            let channel = try await TLSChannel.handshake(
                over: socket,
                credentials: lab.pki.credentials(.client),
                hostname: "127.0.0.1"
            )
            let connection = MessageConnection(channel)
            try await connection.send(.hello(.init(role: .host, migration: "1-e")))
            _ = try await connection.receiveMessage()
            try await connection.send(.host(.init(1, .turn("web1"))))
            guard case .host(let answer) = try await connection.receiveMessage(), case .turn = answer.content else {
                throw TestFailure("no turn")
            }
            return connection
        }
        let turn = try await other.turn(for: "web2", patience: .seconds(100))
        #expect(turn?.isHeld == true)
        try await lab.loop.run { held.close() }
    }

    // MARK: hostile

    @Test func aFloodOfExaminationsIsRefusedAndKeepsNobodyWaiting() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let other = try lab.pki.issue("other", hosts: ["other"])
        let count: UInt32 = 500
        let (examined, refused) = try await HostileNetworkTests().converse(lab, as: other) { connection in
            try await connection.send(.hello(.init(role: .host, migration: "3-a")))
            _ = try await connection.receiveMessage()
            let examine = HostMessage.Examine(address: String(repeating: "x", count: 200), measuresDisk: false)
            async let asked: Void = {
                for number in 1...count { try await connection.send(.host(.init(number, .examine(examine)))) }
            }()
            var (examined, refused) = (0, 0)
            while examined + refused < count, case .host(let answer) = try await connection.receiveMessage() {
                switch answer.content {
                case .examined: examined += 1
                case .denied(let reason) where reason.contains("is under way already"): refused += 1
                default: Issue.record("\(answer)")
                }
            }
            try await asked
            return (examined, refused)
        }
        #expect(examined >= 1 && examined + refused == count && refused > count / 2, "\(examined), \(refused)")
        #expect(try await target(lab).state() != nil)
        #expect(lab.destination?.isRunning == true)
    }

    @Test func aFloodOfReservationsIsBoundedAndKeepsNobodyWaiting() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let other = try lab.pki.issue("other", hosts: ["other"])
        let honest = try target(lab, as: other)
        let flood = try target(lab)
        for index in 0..<256 {
            _ = try granted(try await flood.reserve(room("web\(index)", memory: 1 << 10, disk: 1, allocated: 1)))
        }
        let reason = try denied(try await flood.reserve(room("one-more", memory: 1, allocated: 1)))
        #expect(reason.contains("limit of 256 guests of one source that room is kept for"), "\(reason)")
        _ = try granted(try await flood.reserve(room("web7", memory: 2 << 10, disk: 1, allocated: 1)))
        _ = try granted(try await honest.reserve(room("web1", memory: 1 << 20, allocated: 1)))
        // Figures that no host has.
        for huge in [
            room("a", memory: .max), room("a", disk: .max), room("a", allocated: .max), room("a", seconds: 0),
            room("../a"), room(String(repeating: "a", count: 49)),
        ] {
            let reason = try denied(try await honest.reserve(huge))
            #expect(reason.contains("malformed") || reason.contains("is no name"), "\(reason)")
        }
        // Connections of one identity are few, and what is no question ends its own only.
        let more = try (0..<20).map { try target(lab, "2-\($0)") }
        var refused = 0
        for target in more {
            do { _ = try await target.state() } catch let error as MigrationError {
                #expect(error.message.contains("limit of 16 connections for evacuations"), "\(error)")
                refused += 1
            }
        }
        #expect(refused == 5)
        #expect(try await honest.state() != nil)
        let answers = try await HostileNetworkTests().converse(lab, as: other) { connection in
            try await connection.send(.hello(.init(role: .host, migration: "3-a")))
            _ = try await connection.receiveMessage()
            let text = #"{"type":"RESERVE","body":{"number":1,"content":{"guest":"a","usage":{"memory":-1}}}}"#
            let payload = Array(text.utf8)
            try await connection.channel.write([0, 0, 0, UInt8(payload.count), 1] + payload)
            return try await connection.receiveMessage()
        }
        guard case .abort = answers else {
            Issue.record("\(answers)")
            return
        }
        #expect(lab.destination?.isRunning == true)
    }
}
