import Emulator
import IO
import Migration
import TestSupport
import Testing

/// A destination that says what it was not asked for, or something else than what it was asked for.
@Suite(.serialized, .timeLimit(.minutes(9)))
struct LyingDestinationEndToEnd {
    private func move(words: @escaping LyingDestination.Words) async throws -> (lab: Lab, result: ToolResult) {
        let lab = try Lab()
        try await lab.startDestination()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 4)])
        let liar = try await LyingDestination.start(lab, words: words)
        defer { liar.stop() }
        return (lab, try await lab.migrate(port: liar.port))
    }

    private func expectTheGuestOnTheSource(_ lab: Lab, _ result: ToolResult, _ words: String) async throws {
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(result.errors.contains(words), "\(result.all)\(lab.sourceLogs())")
        let left = try await lab.leftAtSource()
        #expect(left.isEmpty, "\(left)")
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
    }

    /// After one answer comes the next, for which nobody has asked.
    @Test(arguments: [(Message.mirrored, Message.stream), (.stream, .prepared(.init())), (.mirrored, .mirrored)])
    func anAnswerThatComesBeforeItsQuestionIsNone(_ after: Message, _ early: Message) async throws {
        let (lab, result) = try await move { $0.name == after.name ? [$0, early] : [$0] }
        try await expectTheGuestOnTheSource(lab, result, "said \(early.name) before it was asked")
    }

    @Test(arguments: [
        (Message.mirrored, Message.refused("not today"), "localhost refuses MIRRORED: not today"),
        (.stream, .mirrored, "localhost answered STREAM with MIRRORED"),
        (.mirrored, .overruled("root"), "localhost answered MIRRORED with OVERRULED"),
        (.prepared(.init()), .refused("not\u{1b}[2J today"), "localhost refuses PREPARED: not"),
        (.prepared(.init()), .overruled("root"), "was taken for localhost by root, without this host's word"),
    ])
    func whatIsSaidInsteadOfTheAnswerIsTold(_ answer: Message, _ instead: Message, _ words: String) async throws {
        let (lab, result) = try await move { $0.name == answer.name ? [instead] : [$0] }
        try await expectTheGuestOnTheSource(lab, result, words)
        #expect(!result.all.contains("\u{1b}"), "\(result.all)")
    }

    /// Who has said whose the guest is before it was told loses only the connection: the question is asked again.
    @Test func aDestinationThatOwnsTheGuestBeforeItIsReleasedIsAskedAgain() async throws {
        let (lab, result) = try await move { message in
            if case .prepared = message { return [message, .owned(.init(digests: [:]))] }
            return [message]
        }
        #expect(result.code == 0, "\(result.all)")
        #expect(result.errors.contains("said OWNED before it was asked"), "\(result.all)")
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    /// What is wrong with a stream only the QEMU that reads it can tell.
    @Test func whyTheDestinationsQEMURefusesTheMemoryIsTold() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 4)])
        let liar = try await LyingDestination.start(lab, spoils: 64 << 10)
        defer { liar.stop() }
        let result = try await lab.migrate(port: liar.port, more: ["--patience", "1s", "--compress", "off"])
        try await expectTheGuestOnTheSource(lab, result, "QEMU on the destination ended: ")
        #expect(result.errors.contains("load of migration failed"), "\(result.all)\(lab.destinationErrors())")
    }

    @Test(arguments: [-1, 16, Int.max]) func aConnectionOfTheMemoryThatNobodyKnowsIsRefusedInWords(_ number: Int)
        async throws
    {
        let lab = try Lab()
        try await lab.startDestination()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 4)])
        let liar = try await LyingDestination.start(lab, lane: { _ in number })
        defer { liar.stop() }
        // Compressed memory goes in pieces.
        let result = try await lab.migrate(port: liar.port, more: ["--patience", "1s", "--compress", "1"])
        try await expectTheGuestOnTheSource(lab, result, "A stream has at most 16 connections, numbered from 0")
    }
}
