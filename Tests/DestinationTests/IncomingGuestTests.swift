import Emulator
import IO
import Migration
import TestSupport
import Testing

@testable import Destination

/// A guest of a real QEMU arrives at another one.
@Suite(.timeLimit(.minutes(2)))
final class IncomingGuestTests: @unchecked Sendable {
    // Unchecked: each test uses its own from one task.
    let directory: TestDirectory
    let loop = EventLoop(name: "test")

    init() throws { directory = try TestDirectory() }

    deinit {
        for side in ["a", "b"] { (try? store(side).load("web1"))??.process?.signal(9) }
        loop.stop()
    }

    func store(_ side: String) -> GuestStore { GuestStore(stateDirectory: directory.file(side)) }

    func record(_ more: [String] = []) -> GuestRecord {
        let machine = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "16", "-nodefaults", "-display", "none"]
        return GuestRecord(
            name: "web1",
            commandLine: GuestCommandLine(arguments: machine + more, directory: directory.path)
        )
    }

    /// Moves a guest to a QEMU that waits for it, without anybody's word.
    func arrive(
        _ commands: [String] = [],
        more: [String] = [],
        before: @Sendable (GuestStore) async throws -> Void = { _ in }
    ) async throws -> IncomingGuest {
        var leaving = record()
        let source = try await store("a").start(&leaving, on: loop)
        for command in commands { try await source.execute(command) }
        let guest = IncomingGuest("web1", hasUUID: false, store("b"), on: loop) { _, _ in }
        try await guest.start(record(more))
        try await before(store("b"))
        try await guest.listen()
        try await source.setCapabilities(["events", "return-path"], to: true)
        try await source.migrate(toSocket: guest.streamSocket ?? "")
        while try await source.migrationState().status != "completed" { await loop.sleep(for: .milliseconds(10)) }
        source.close()
        return guest
    }

    func status() async throws -> String {
        let monitor = try await QMPClient.connect(to: store("b").statusMonitor(of: "web1"), on: loop)
        defer { monitor.close() }
        return try await monitor.status()
    }

    func state(_ look: IncomingGuest.Look) -> RunState? {
        if case .loaded(let state) = look { state } else { nil }
    }

    @Test func aGuestThatRanRunsOnceItBelongsToThisHost() async throws {
        try await loop.run {
            let guest = try await self.arrive()
            #expect(self.state(try await guest.look(for: RunState.running.arrivals)) == .paused)
            let record = try #require(guest.record)
            let state = await self.store("b").state(of: record, on: self.loop)
            #expect(state == "arriving")
            try await guest.admit()
            #expect(try await self.status() == "running" && guest.resumedAt != nil)
            guest.release()
        }
    }

    @Test func aGuestThatWasPausedStaysPaused() async throws {
        try await loop.run {
            let guest = try await self.arrive(["stop"])
            #expect(self.state(try await guest.look(for: RunState.paused.arrivals)) == .paused)
            guest.standsAs = .paused
            try await guest.admit()
            #expect(try await self.status() == "paused" && guest.resumedAt == nil)
            // An agent that starts admits it again.
            try await guest.admit()
            #expect(try await self.status() == "paused")
            guest.release()
        }
    }

    @Test func aGuestThatArrivesInAnotherStateThanItLeftInIsNamed() async throws {
        try await loop.run {
            let guest = try await self.arrive()
            guard case .flawed(let reason) = try await guest.look(for: RunState.panicked.arrivals) else {
                Issue.record("It was taken")
                return
            }
            #expect(reason == "The guest arrived in the state 'paused' instead of guest-panicked")
            guest.release()
        }
    }

    /// The device of a monitor that shares it with something else is not held, only hidden.
    @Test func aGuestThatSomebodyStartsBeforeItBelongsToThisHostIsFlawed() async throws {
        try await loop.run {
            let more = [
                "-chardev", "socket,id=m0,path=\(self.directory.file("m0.sock")),server=on,wait=off,mux=on", "-mon",
                "chardev=m0,mode=control",
            ]
            let guest = try await self.arrive(more: more) { store in
                let path = "\(store.arrivals(of: "web1"))/0"
                let other = try await QMPClient.connect(to: path, on: self.loop)
                try await other.resume()
                other.close()
            }
            guard case .flawed(let reason) = try await guest.look(for: RunState.running.arrivals) else {
                Issue.record("It was taken")
                return
            }
            #expect(reason.contains("before it was released"))
            guest.release()
        }
    }
}
