import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

@testable import Web

/// The screen of a guest with real agents: `crossdock console --vnc` and `--browser`, and a migration.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct DisplayEndToEnd {
    private func startGuest(_ lab: Lab) async throws -> String {
        let (disk, serial) = (lab.directory.file("disk.raw"), lab.directory.file("serial.txt"))
        try KeyboardGuest.makeDisk(disk)
        let display = ["-vga", "std", "-vnc", "unix:\(lab.directory.file("vnc.sock"))", "-serial", "file:\(serial)"]
        try await lab.startIdleGuest(disks: [disk], more: display)
        try await eventually("the guest") { (try DurableFile.read(serial) ?? []).contains(UInt8(ascii: "*")) }
        return serial
    }

    /// Starts the command, and says where viewers find the screen.
    private func relay(_ lab: Lab, _ more: [String] = []) async throws -> (ChildProcess, SocketAddress) {
        let relay = try ChildProcess([Lab.crossdock, "console", "web1", "--vnc", "--state-dir", lab.state("a")] + more)
        try await relay.wait(for: "an address") { relay.output.contains("; Ctrl-C ends this") }
        let words = relay.output.split(separator: " ").first { $0.contains("/") || $0.contains("::") }
        let place = String(try #require(words).dropLast())
        let port = place.split(separator: ":").last.flatMap { UInt16($0) }
        return (relay, port.map { .inet(host: "127.0.0.1", port: $0) } ?? .unix(path: place))
    }

    /// Types the key of B, again and again, until the guest has heard it on another host: what is typed waits for two seconds only. Its symbol has to
    /// fit to Shift, or QEMU presses Caps Lock.
    private func typeUntilHeard(
        _ symbol: UInt32,
        _ viewer: DisplayClient,
        on loop: EventLoop,
        at guests: GuestStore,
        _ condition: @Sendable (String) -> Bool
    ) async throws {
        let serial = "\(guests.runDirectory(of: "web1"))/serial.txt"
        try await eventually("the guest hears what is typed") {
            try await loop.run {
                for isDown in [true, false] { try await viewer.key(symbol, 0x30, isDown: isDown) }
                // What has come is taken, so that more does.
                let updates = viewer.updates
                try await viewer.ask(isIncremental: false)
                try await viewer.read("a picture") { $0.updates > updates }
            }
            return condition(String(decoding: (try DurableFile.read(serial)) ?? [], as: UTF8.self))
        }
    }

    @Test func aViewerOfThisHostFindsTheScreenByTheCommand() async throws {
        let lab = try Lab()
        let none = try await lab.crossdock(["console", "web1", "--vnc", "--state-dir", lab.state("a")])
        #expect(none.code == 11 && none.all.contains("There is no running destination agent"), "\(none.all)")
        try await lab.startDestination("a", more: ["--web", "127.0.0.1:0"])
        let unknown = try await lab.crossdock(["console", "web1", "--vnc", "--state-dir", lab.state("a")])
        #expect(unknown.code == 10 && unknown.all.contains("this host has no guest 'web1'"), "\(unknown.all)")
        let serial = try await startGuest(lab)
        for more in [[], ["--listen", "127.0.0.1:0"], ["--listen", "unix:\(lab.directory.file("viewer.sock"))"]] {
            let (relay, address) = try await relay(lab, more)
            let (loop, before) = (lab.loop, KeyboardGuest.typed(serial))
            try await loop.run {
                let viewer = try await DisplayClient.shakeHands(try await SocketChannel.connect(to: address, on: loop))
                try await viewer.ask(isIncremental: false)
                try await viewer.read("a picture") { $0.rectangles > 0 && $0.picture.contains { $0 != 0 } }
                #expect(viewer.names == ["web1"])
                try await viewer.key(0x61, 0x1e, isDown: true)
                try await eventually("the key") { KeyboardGuest.typed(serial) == "\(before)1E " }
                viewer.close()
            }
            // Who goes holds nothing down.
            try await eventually("the key") { KeyboardGuest.typed(serial) == "\(before)1E 9E " }
            relay.signal(SIGTERM)
            let ended = try await relay.finish()
            #expect(ended.code == 128 + SIGTERM, "\(ended.all)")
            if case .unix(let path) = address { #expect(!DurableFile.exists(path)) }
        }
        let (looker, address) = try await relay(lab, ["--view-only"])
        let (loop, before) = (lab.loop, KeyboardGuest.typed(serial))
        try await loop.run {
            let viewer = try await DisplayClient.shakeHands(try await SocketChannel.connect(to: address, on: loop))
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture") { $0.rectangles > 0 }
            viewer.close()
        }
        #expect(KeyboardGuest.typed(serial) == before)
        looker.signal(SIGINT)
        #expect(try await looker.finish().code == 128 + SIGINT)

        let refused = try await lab.crossdock([
            "console", "web1", "--vnc", "--listen", "192.0.2.1:1", "--state-dir", lab.state("a"),
        ])
        #expect(refused.code == 64 && refused.all.contains("an address of loopback"), "\(refused.all)")
        let url = try await lab.crossdock([
            "console", "web1", "--browser", "--view-only", "--state-dir", lab.state("a"),
        ])
        let parts = url.output.split(separator: "#")
        #expect(
            url.code == 0 && parts.first?.hasPrefix("https://") == true
                && parts.first?.hasSuffix("/console/web1") == true,
            "\(url.all)"
        )
        #expect(parts.last?.hasPrefix("t=") == true)
        for command in [["console", "nope", "--browser"], ["web", "ticket", "--guest", "nope"]] {
            let unknown = try await lab.crossdock(command + ["--state-dir", lab.state("a")])
            #expect(
                unknown.code == 10 && unknown.all.contains("There is no guest 'nope' on this host"),
                "\(unknown.all)"
            )
        }
        // Who comes when the agent opens nothing is told why in the agent's words.
        let (late, place) = try await self.relay(lab)
        let stopped = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")])
        #expect(stopped.code == 0, "\(stopped.all)")
        try await loop.run { try await SocketChannel.connect(to: place, on: loop).close() }
        try await late.wait(for: "why not") { late.errors.contains("crossdock: The guest does not run") }
        #expect(!late.errors.contains("409"), "\(late.errors)")
        late.signal(SIGTERM)
        _ = try await late.finish()
    }

    @Test func viewersAreToldThatTheGuestStandsStillUndecidedAndWhenItDoesNotAnyMore() async throws {
        let lab = try Lab()
        try await lab.startDestination("a")
        _ = try await startGuest(lab)
        let (relay, address) = try await relay(lab)
        let store = MigrationStore(stateDirectory: lab.state("a"))
        let id = "1700000000-0001"
        try DurableFile.makeDirectory(store.directory(of: id))
        let journal = try Journal(creating: store.journal(of: id))
        try journal.append(.offered(guest: "web1", destination: "host-b", order: 1))
        let (loop, guests) = (lab.loop, lab.guests("a"))
        let record = try #require(try guests.load("web1"))
        try await loop.run {
            let viewer = try await DisplayClient.shakeHands(try await SocketChannel.connect(to: address, on: loop))
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture") { $0.rectangles > 0 }
            #expect(viewer.names == ["web1"])
            let monitor = try await guests.connect(to: record, on: loop)
            _ = try await monitor.execute("stop")
            try await viewer.read("that it stands still") { $0.names.last?.contains("stands still ('paused')") == true }
            let name = viewer.names.last ?? ""
            #expect(name.hasPrefix("web1: 'crossdock recover \(id)' on ") && name.contains(" is needed: "), "\(name)")
            // Who has given the command is told on its own, as long as there are viewers.
            try await relay.wait(for: "the same words") { relay.errors.contains("'crossdock recover \(id)'") }
            try journal.append(.released)
            try await viewer.read("that it is undecided") {
                $0.names.last?.contains("is paused and undecided") == true
            }
            try journal.append(.rolledBack(reason: "it was taken back"))
            try await viewer.read("that it is decided") { $0.names.last == "web1" }
            #expect(viewer.names.count == 4, "\(viewer.names)")
            try await relay.wait(for: "the same words") { relay.errors.contains("needs nobody any more") }
            monitor.close()
            viewer.close()
        }
        relay.signal(SIGTERM)
        _ = try await relay.finish()
    }

    /// A guest's screen on the host that it is on: what leads from one to the other is the test's.
    private struct BothHosts: DisplaySource {
        let a: LocalDisplay
        let b: LocalDisplay

        func absence() async -> DisplayAbsence? { nil }

        func open(on loop: EventLoop) async throws(DisplayAbsence) -> DisplayRoute {
            do throws(DisplayAbsence) { return try await a.open(on: loop) } catch {
                guard case .moved(let host) = error else { throw error }
                var route = try await b.open(on: loop)
                route.host = host
                return route
            }
        }
    }

    @Test func aViewerGoesWithTheGuestToItsNextHost() async throws {
        let lab = try Lab()
        try await lab.startDestination("a")
        try await lab.startDestination("b")
        let serial = try await startGuest(lab)
        let pool = BlockingPool(width: 1)
        let source = BothHosts(
            a: LocalDisplay(guest: "web1", store: lab.guests("a"), pool: pool),
            b: LocalDisplay(guest: "web1", store: lab.guests("b"), pool: pool)
        )
        let loop = lab.loop
        let (viewer, serving) = try await loop.run {
            let (near, far) = MemoryChannel.pair(on: loop)
            let display = try await DisplayConnection.open(source, on: loop)
            let session = DisplaySession(
                .init(plain: far),
                display,
                source,
                guest: "web1",
                visitor: "x",
                mayWrite: true
            ) { true }
            let serving = Task(executorPreference: loop) { await session.serve() }
            let viewer = try await DisplayClient.shakeHands(near)
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture") { $0.rectangles > 0 && $0.picture.contains { $0 != 0 } }
            // No agent knows of this viewer: the keys are down when the guest is paused.
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await viewer.key(0xffe1, 0x2a, isDown: true)
            return (viewer, serving)
        }
        try await eventually("the keys") { KeyboardGuest.typed(serial) == "1E 2A " }
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        // The guest believes the letter to be down, and is told so once more before it is let go of; the modifier is held still.
        try await typeUntilHeard(0x42, viewer, on: loop, at: lab.guests("b")) { $0.hasPrefix("1E 9E 2A 30 B0 ") }
        #expect(KeyboardGuest.typed(serial) == "1E 2A ")
        try await loop.run { viewer.close() }
        await serving.value
    }

    @Test func whatIsSaidOfPortsIsJudged() async throws {
        let lab = try Lab()
        _ = try await startGuest(lab)
        let state = ["--state-dir", lab.state("a")]
        let set = try await lab.crossdock(["guest", "set", "web1", "--vnc-port", "5977"] + state)
        #expect(set.code == 0 && set.output.contains("screen at port 5977"), "\(set.all)")
        let wrong = try await lab.crossdock(["guest", "set", "web1", "--vnc-port", "22"] + state)
        #expect(wrong.code == 64 && wrong.all.contains("from 5900 to 6899"), "\(wrong.all)")
        let none = try await lab.crossdock(["guest", "set", "web1", "--vnc-port", "none"] + state)
        #expect(none.code == 0 && none.output.contains("nothing is said"), "\(none.all)")
        let missing = try await lab.crossdock(
            [
                "destination", "--vnc-tls", "127.0.0.1", "--vnc-authz", "viewers", "--listen", "127.0.0.1:0",
                "--nbd-listen", "127.0.0.1:0",
            ]
                + lab.credentials() + ["--state-dir", lab.state("c")]
        )
        #expect(
            missing.code != 0 && missing.all.contains("--vnc-authz viewers: Cannot find QAuthZ object ID viewers"),
            "\(missing.all)"
        )
        let alone = try await lab.crossdock(["destination", "--vnc-tls", "127.0.0.1"] + lab.credentials() + state)
        #expect(alone.code == 64 && alone.all.contains("--vnc-tls and --vnc-authz go together"), "\(alone.all)")
    }

    @Test func keysAreLetGoOfBeforeAMigrationPausesTheGuestAndTheViewerStays() async throws {
        let lab = try Lab()
        try await lab.startDestination("a")
        try await lab.startDestination("b")
        let serial = try await startGuest(lab)
        let (relay, address) = try await relay(lab)
        let loop = lab.loop
        let viewer = try await loop.run {
            let viewer = try await DisplayClient.shakeHands(try await SocketChannel.connect(to: address, on: loop))
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture") { $0.rectangles > 0 }
            try await viewer.key(0x61, 0x1e, isDown: true)
            return viewer
        }
        try await eventually("the key") { KeyboardGuest.typed(serial) == "1E " }
        // A whole picture is under way, more than fits between here and QEMU, and the viewer is slow: it takes it when the guest has gone.
        try await loop.run { try await viewer.ask(isIncremental: false) }
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)\n\(lab.destinationErrors())")
        #expect(KeyboardGuest.typed(serial) == "1E 9E ", "while it was here")
        // The former host's agent passes the other one's display on, to a viewer that has noticed nothing but a pause.
        try await loop.run {
            let before = viewer.rectangles
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture of the other host") { $0.rectangles > before }
            try await viewer.key(0x42, 0x30, isDown: true)
            try await viewer.key(0x42, 0x30, isDown: false)
        }
        let there = "\(lab.guests("b").runDirectory(of: "web1"))/serial.txt"
        func typedThere() -> String {
            ((try? DurableFile.read(there)) ?? nil).map { String(decoding: $0, as: UTF8.self) } ?? ""
        }
        try await eventually("the key on the other host") { typedThere().hasSuffix("30 B0 ") }
        // And home again: with the connection that was opened first.
        let port = lab.controlPort(of: "a")
        let back = try await lab.crossdock(
            ["migrate", "web1", "localhost:\(port)", "--state-dir", lab.state("b")] + lab.credentials()
        )
        #expect(back.code == 0, "\(back.all)\n\(lab.destinationErrors("a"))")
        let home = "\(lab.guests("a").runDirectory(of: "web1"))/serial.txt"
        try await loop.run {
            let before = viewer.rectangles
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture at home") { $0.rectangles > before }
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await viewer.key(0x61, 0x1e, isDown: false)
        }
        try await eventually("the key at home") {
            [serial, home].contains { path in
                (((try? DurableFile.read(path)) ?? nil).map { String(decoding: $0, as: UTF8.self) } ?? "")
                    .hasSuffix("1E 9E ")
            } && typedThere().hasSuffix("30 B0 ")
        }
        try await loop.run { viewer.close() }
        relay.signal(SIGTERM)
        _ = try await relay.finish()
    }
}
