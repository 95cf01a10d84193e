import Emulator
import Glibc
import IO
import TLS
import TestSupport
import Testing

@testable import Web

/// Screens of real guests, over the server's real sockets.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct DisplayTests {
    @Test func viewersSeeTheScreenAndTypeAndWhoOnlyLooksDoesNot() async throws {
        let world = try await DisplayLab()
        let (act, look) = (try await world.lab.cookie(guest: "web1"), try await world.lab.cookie(.view, guest: "web1"))
        try await world.begin()
        try await world.run {
            let (first, second, third) = (
                try await world.viewer(act), try await world.viewer(look),
                try await world.viewer(act, query: "?view=only")
            )
            #expect(first.names == ["web1"] && first.width >= 640)
            for viewer in [first, second, third] {
                try await viewer.ask(isIncremental: false)
                try await viewer.read("a picture") { $0.rectangles > 0 && $0.picture.contains { $0 != 0 } }
            }
            // Nothing of these is to be seen behind what is typed later over the same connections.
            for viewer in [second, third] {
                try await viewer.key(0x62, 0x30, isDown: true)
                try await viewer.send(.pointer(buttons: 1, x: 5, y: 5))
                try await viewer.send(.key(isDown: true, symbol: 0x62))
                try await viewer.send(.cutText([65]))
                try await viewer.ask(isIncremental: false)
                let before = viewer.updates
                try await viewer.read("an answer") { $0.updates > before }
            }
            let before = second.picture
            try await first.key(0x61, 0x1e, isDown: true)
            try await first.key(0x61, 0x1e, isDown: false)
            try await world.typed("1E 9E ")
            try await second.read("what was typed") { $0.picture != before }
            // Whoever goes holds nothing down any more.
            try await first.key(0xffe1, 0x2a, isDown: true)
            try await world.typed("1E 9E 2A ")
            first.close()
            try await world.typed("1E 9E 2A AA ")
        }
        await world.lab.server.stop()
    }

    @Test func aViewerStaysWhileTheGuestIsStartedAgain() async throws {
        let world = try await DisplayLab()
        try await world.begin()
        try await world.run {
            let viewer = try await world.viewer()
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture") { $0.rectangles > 0 }
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await viewer.key(0xffe1, 0x2a, isDown: true)
            try await world.typed("1E 2A ")
            world.record.process?.signal(SIGKILL)
            try await viewer.read("a sign") { $0.names.last == "web1: the guest does not run" }
            let (before, updates) = (viewer.rectangles, viewer.updates)
            #expect(viewer.picture.contains { $0 != 0 }, "the last picture stays")
            try await viewer.key(0x62, 0x30, isDown: true)
            try await viewer.key(0x62, 0x30, isDown: false)
            unlink(world.serial)
            try await world.start()
            try await viewer.read("the picture anew") { $0.rectangles > before && $0.names.last == "web1" }
            #expect(viewer.updates > updates)
            try await world.begin()
            // It knows nothing of what was pressed before it was there.
            try await viewer.key(0x63, 0x2e, isDown: true)
            try await viewer.key(0x63, 0x2e, isDown: false)
            try await viewer.key(0xffe1, 0x2a, isDown: false)
            try await world.typed("2E AE ")
        }
        await world.lab.server.stop()
    }

    @Test func keysAreLetGoOfBeforeThePauseAndWhatIsTypedThenComesAfterwards() async throws {
        let world = try await DisplayLab()
        try await world.begin()
        try await world.run {
            let viewer = try await world.viewer()
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await viewer.key(0xffe3, 0x1d, isDown: true)
            try await world.typed("1E 1D ")
            await world.lab.server.releaseInput(of: "web2")
            await world.lab.server.releaseInput(of: "web1")
            try await world.typed("1E 1D 9D 9E ")
            // The guest is not paused after all: what was typed comes, once it is clear, and the modifier that is held with it.
            try await viewer.key(0x63, 0x2e, isDown: true)
            try await viewer.key(0x63, 0x2e, isDown: false)
            try await world.typed("1E 1D 9D 9E 1D 2E AE ")
            viewer.close()
            try await world.typed("1E 1D 9D 9E 1D 2E AE 9D ")
        }
        await world.lab.server.stop()
    }

    @Test func whoMayNotHasNoScreen() async throws {
        let world = try await DisplayLab()
        let (lab, host) = (world.lab, world.lab.host)
        let (own, other, all) = (
            try await lab.cookie(.view, guest: "web1"), try await lab.cookie(guest: "web2"), try await lab.cookie()
        )
        func statuses(_ credentials: (any TLSCredentials)?, _ cookie: String?, origin: Bool = true) async throws
            -> [Int]
        {
            var found: [Int] = []
            for guest in ["web1", "web3"] {
                for upgrades in [false, true] {
                    found.append(
                        try await lab.client(credentials) { client in
                            var fields: KeyValuePairs = ["Host": host, "Cookie": cookie ?? "x=y"]
                            if upgrades {
                                fields = [
                                    "Host": host, origin ? "Origin" : "X": "https://\(host)", "Cookie": cookie ?? "x=y",
                                    "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                                    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
                                ]
                            }
                            return try await client.ask("GET", "/consoles/\(guest)/vnc", fields).status
                        }
                    )
                }
            }
            return found
        }
        #expect(try await statuses(nil, nil) == [401, 401, 401, 401])
        #expect(try await statuses(try lab.pki.credentials(.client), nil) == [403, 403, 403, 403])
        #expect(try await statuses(nil, other) == [403, 403, 403, 403])
        #expect(try await statuses(nil, own) == [200, 101, 403, 403])
        #expect(try await statuses(nil, all) == [200, 101, 200, 404])
        #expect(try await statuses(nil, all, origin: false) == [200, 403, 200, 403])
        await lab.server.stop()
    }

    @Test func aGuestThatHasMovedIsSaidToBeElsewhere() async throws {
        let world = try await DisplayLab()
        try await world.begin()
        try await world.run {
            let viewer = try await world.viewer()
            world.record.released = .init(migration: "x", destination: "host-b:1")
            try world.store.save(world.record)
            world.record.process?.signal(SIGKILL)
            try await viewer.readToTheEnd()
            #expect(viewer.closing == (4001, "host-b:1"))
        }
        await world.lab.server.stop()
    }

    @Test func aPortOfLoopbackIsFoundAlsoWhenQEMUHasTakenTheNext() async throws {
        // Somebody else has the first one.
        let taken = EventLoop(name: "taken")
        defer { taken.stop() }
        let (listener, port) = try await taken.run {
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: taken)
            return (listener, listener.address.port ?? 0)
        }
        defer { taken.execute { listener.close() } }
        let display = Int(port) - 5900
        let world = try await DisplayLab(display: "127.0.0.1:\(display),to=\(min(display + 50, 59635))")
        try await world.begin()
        try await world.run {
            let viewer = try await world.viewer()
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await world.typed("1E ")
        }
        await world.lab.server.stop()
    }

    @Test func nothingIsTypedToWhoIsNotTheGuest() async throws {
        let world = try await DisplayLab()
        try await world.begin()
        let answer = try await world.run {
            unlink(world.socket)
            let trap = try await Listener.listen(on: .unix(path: world.socket), loop: world.loop)
            defer { trap.close() }
            let client = try await HTTPClient.connect(to: world.local, nil, on: world.loop)
            defer { client.close() }
            let fields: KeyValuePairs = [
                "Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            ]
            return try await client.ask("GET", "/consoles/web1/vnc", fields)
        }
        #expect(answer.status == 409 && answer.text.contains("is not the guest's QEMU"), "\(answer.text)")
        await world.lab.server.stop()
    }

    @Test func whatTheAgentCannotShowIsSaidWithAReason() async throws {
        let reasons = [
            "unix:/x,password=on": "'password=on'", "unix:/x,tls-creds=tls0": "'tls-creds'",
            "192.0.2.1:1": "neither a Unix socket nor loopback",
            "none": "give QEMU -vnc unix:PATH",
        ]
        for (display, reason) in reasons {
            let world = try await DisplayLab(display: display, isStarted: false)
            let answer = try await world.run {
                let client = try await HTTPClient.connect(to: world.local, nil, on: world.loop)
                defer { client.close() }
                return try await client.ask("GET", "/consoles/web1/vnc", ["Host": "localhost"])
            }
            #expect(answer.status == 200 && answer.text.contains(#""exists":false"#), "\(answer.text)")
            #expect(answer.text.contains(reason), "\(answer.text)")
            await world.lab.server.stop()
        }
        let off = try await DisplayLab(isStarted: false)
        let answer = try await off.run {
            let client = try await HTTPClient.connect(to: off.local, nil, on: off.loop)
            defer { client.close() }
            return try await client.ask("GET", "/consoles/web1/vnc", ["Host": "localhost"])
        }
        #expect(
            answer.status == 200 && answer.text.contains(#""available":false"#) && answer.text.contains("does not run")
        )
        await off.lab.server.stop()
    }

    @Test func theViewerOfBrowsersComesFromItsPackageAndNothingElseDoes() async throws {
        let directory = try TestDirectory()
        _ = directory.directory("novnc")
        let core = directory.directory("novnc/core")
        try DurableFile.write(Array("export default 1;\n".utf8), to: "\(core)/rfb.js")
        try DurableFile.write(Array("no".utf8), to: "\(core)/.secret.js")
        try DurableFile.write(Array("no".utf8), to: directory.file("novnc/vnc.html"))
        let files = directory.file("novnc")
        let lab = try await WebLab { $0.viewerFiles = files }
        let host = lab.host
        let answers = try await lab.client { client in
            var answers: [Int] = []
            for path in [
                "core/rfb.js", "core/.secret.js", "vnc.html", "core", "core/none.js", "", "core/%2e%2e/vnc.html",
            ] {
                answers.append(try await client.ask("GET", "/novnc/\(path)", ["Host": host]).status)
            }
            return answers
        }
        #expect(answers == [200, 404, 404, 404, 404, 404, 400])
        await lab.server.stop()
        let bare = try await WebLab { $0.viewerFiles = "/nonexistent" }
        let bareHost = bare.host
        let absent = try await bare.client { try await $0.ask("GET", "/novnc/core/rfb.js", ["Host": bareHost]) }
        #expect(absent.status == 404 && absent.text.contains("apt-get install novnc"))
        await bare.server.stop()
    }

    @Test func viewersOfVNCComeByTLSWithACertificateThatIsNamed() async throws {
        let objects = ObjectStore()
        try objects.add(
            ObjectDescription(
                parsing:
                    "authz-list,id=viewers,policy=deny,rules.0.match=*viewer*,rules.0.policy=allow,rules.0.format=glob"
            )
        )
        let access = AccessControl(objects: objects, authorization: "viewers")
        let world = try await DisplayLab(objects: objects) { $0.screens = .init(host: "127.0.0.1", access: access) }
        try await world.begin()
        let loop = world.loop
        let free = try await loop.run {
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            defer { listener.close() }
            return listener.address.port ?? 0
        }
        world.record.placement = GuestPlacement()
        world.record.placement?.vncPort = free
        try world.store.save(world.record)
        let address = SocketAddress.inet(host: "127.0.0.1", port: free)
        try await eventually("a port") {
            world.lab.log.all.contains { $0.contains("find the screen of guest 'web1' at") }
        }
        let good = try world.lab.pki.credentials(
            .client,
            directory: try world.lab.pki.issue("viewer", hosts: ["viewer"])
        )
        let other = try world.lab.pki.credentials(.client)
        let nobody = try world.lab.browserCredentials()
        @Sendable func refusal(_ credentials: X509Credentials) async -> String? {
            do { try await DisplayClient.connect(vencrypt: address, credentials, on: loop).close() } catch {
                return "\(error)"
            }
            return nil
        }
        try await world.run {
            let viewer = try await DisplayClient.connect(vencrypt: address, good, on: loop)
            #expect(viewer.names == ["web1"])
            try await viewer.ask(isIncremental: false)
            try await viewer.read("a picture") { $0.rectangles > 0 && $0.picture.contains { $0 != 0 } }
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await world.typed("1E ")
            // It stays while the guest is started again.
            world.record.process?.signal(SIGKILL)
            try await viewer.read("a sign") { $0.names.last == "web1: the guest does not run" }
            #expect(await refusal(good) == "The guest does not run")
            try await world.start()
            try await viewer.read("the guest") { $0.names.last == "web1" }
            #expect(await refusal(other) == "This certificate opens no screens here")
            #expect(await refusal(nobody) != nil)
            // In clear text there is nothing.
            let plain = try await SocketChannel.connect(to: address, on: loop)
            try await plain.write(Array("RFB 003.008\n".utf8))
            let said = try await plain.read(exactly: 14)
            #expect(said == Array("RFB 003.008\n".utf8) + [1, 19])
            try await plain.write([1])
            let rest = try? await plain.read(exactly: 1)
            #expect(rest == nil)
            plain.close()
            // The port goes with the guest.
            world.record.placement?.vncPort = nil
            try world.store.save(world.record)
            try await eventually("no port") {
                guard let found = try? await SocketChannel.connect(to: address, on: loop) else { return true }
                found.close()
                return false
            }
            viewer.close()
        }
        await world.lab.server.stop()
    }

    @Test func aViewerThatTakesNothingSlowsNobody() async throws {
        let world = try await DisplayLab()
        try await world.begin()
        let cookie = try await world.lab.cookie()
        try await world.run {
            let (slow, fast) = (try await world.viewer(cookie), try await world.viewer())
            // Each picture has more than a megabyte, and none of them is taken.
            for _ in 0..<64 { try await slow.ask(isIncremental: false) }
            for count in 1...20 {
                try await fast.key(0x61, 0x1e, isDown: true)
                try await fast.key(0x61, 0x1e, isDown: false)
                try await world.typed(String(repeating: "1E 9E ", count: count))
                try await fast.ask(isIncremental: false)
                let before = fast.rectangles
                try await fast.read("a picture") { $0.rectangles > before }
            }
            // It has been forgotten by nobody.
            try await slow.read("a picture") { $0.rectangles > 0 }
            slow.close()
            fast.close()
        }
        await world.lab.server.stop()
    }

    // MARK: displays that are no QEMU's

    /// A display that says what a test has it say.
    private final class Stage: DisplaySource, @unchecked Sendable {
        // Unchecked: confined to the loop.
        var channels: [(MemoryChannel, host: String?)] = []
        var absences: [DisplayAbsence] = []

        func absence() async -> DisplayAbsence? { nil }

        func open(on loop: EventLoop) async throws(DisplayAbsence) -> DisplayRoute {
            if !absences.isEmpty { throw absences.removeFirst() }
            if channels.isEmpty { throw .waiting("nobody is there") }
            let (channel, host) = channels.removeFirst()
            return DisplayRoute(channel: channel, host: host)
        }

        /// A display of this size, and the end of it that the test speaks at; it has been greeted.
        func add(_ width: UInt16, _ height: UInt16, host: String? = nil, on loop: EventLoop) async throws
            -> MemoryChannel
        {
            let (near, far) = MemoryChannel.pair(on: loop, capacity: 1 << 20)
            let format = try PixelFormat([32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0])
            let screen = ServerInit(width: width, height: height, format: format, name: "QEMU")
            try await far.write(Array("RFB 003.008\n".utf8) + [1, 1, 0, 0, 0, 0] + screen.bytes)
            channels.append((near, host))
            return far
        }
    }

    /// A session with a display of 8 by 4 pixels.
    private static func session(_ stage: Stage, on loop: EventLoop) async throws -> (
        DisplayClient, Task<Void, Never>, MemoryChannel
    ) {
        let far = try await stage.add(8, 4, on: loop)
        let (viewer, agent) = MemoryChannel.pair(on: loop, capacity: 1 << 20)
        let accepting = Task(executorPreference: loop) { try await WebSocketChannel.accept(over: agent) }
        let client = try await WebSocketChannel.connect(over: viewer, host: "x")
        let display = try await DisplayConnection.open(stage, on: loop)
        let session = DisplaySession(
            .init(try await accepting.value),
            display,
            stage,
            guest: "web1",
            visitor: "x",
            mayWrite: true
        ) { true }
        let serving = Task(executorPreference: loop) { await session.serve() }
        let connected = try await DisplayClient.shakeHands(client)
        return (connected, serving, far)
    }

    /// A session of a viewer that speaks RFB and nothing else, with the display that is there, and with little between it and the agent.
    private static func plainSession(
        _ stage: Stage,
        reserve: DisplayReserve = DisplayReserve(),
        silence: Duration = WebLimits.silence,
        on loop: EventLoop
    ) async throws -> (DisplayClient, DisplaySession, Task<Void, Never>) {
        let (viewer, agent) = MemoryChannel.pair(on: loop, capacity: 16 << 10)
        let display = try await DisplayConnection.open(stage, on: loop)
        let session = DisplaySession(
            .init(plain: agent),
            display,
            stage,
            guest: "web1",
            visitor: "x",
            mayWrite: true,
            reserve: reserve,
            silence: silence
        ) { true }
        let serving = Task(executorPreference: loop) { await session.serve() }
        return (try await DisplayClient.shakeHands(viewer), session, serving)
    }

    /// What a display is told: everything up to and with these bytes, without what the handshake has.
    private static func told(_ far: MemoryChannel, until end: [UInt8], handshake: Int = 14) async throws -> [UInt8] {
        var bytes: [UInt8] = []
        while bytes.count < handshake + end.count || !bytes.suffix(end.count).elementsEqual(end) {
            bytes += try await far.read(exactly: 1)
        }
        return Array(bytes.dropFirst(handshake))
    }

    private static let update: [UInt8] =
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 8, 0, 4, 0, 0, 0, 0] + [UInt8](repeating: 9, count: 128)

    @Test func aDisplayThatFollowsIsToldWhatTheViewerWants() async throws {
        let loop = EventLoop(name: "stage")
        defer { loop.stop() }
        try await loop.run {
            let stage = Stage()
            let (viewer, serving, first) = try await Self.session(stage, on: loop)
            let area = RFBRectangle(width: 8, height: 4)
            try await viewer.ask(isIncremental: false)
            let wishes = try await Self.told(
                first,
                until: RFBClientMessage.updateRequest(isIncremental: false, area).bytes
            )
            let relayed = [0, -223, -239, -258, -308].map { RFBEncoding(rawValue: $0) }
            let encodings = RFBClientMessage.setEncodings(relayed).bytes
            #expect(wishes.dropFirst(20).starts(with: encodings))
            try await first.write(Self.update)
            try await viewer.read("a picture") { $0.rectangles == 1 }
            _ = try await Self.told(
                first,
                until: RFBClientMessage.updateRequest(isIncremental: true, area).bytes,
                handshake: 0
            )
            // A letter and a modifier are held; the guest is elsewhere without a word, and its screen has another size.
            try await viewer.key(0x61, 0x1e, isDown: true)
            try await viewer.key(0xffe1, 0x2a, isDown: true)
            let shift = RFBClientMessage.extendedKey(isDown: true, symbol: 0xffe1, code: 0x2a).bytes
            _ = try await Self.told(first, until: shift, handshake: 0)
            stage.absences = [.waiting("the guest moves")]
            let second = try await stage.add(16, 2, host: "host-b", on: loop)
            first.close()
            try await viewer.read("the other size") { $0.sizes.last == [16, 2] }
            #expect(viewer.names == ["web1", "web1: the guest moves"])
            let whole = RFBClientMessage.updateRequest(isIncremental: false, RFBRectangle(width: 16, height: 2)).bytes
            let letter = [true, false].flatMap {
                RFBClientMessage.extendedKey(isDown: $0, symbol: 0x61, code: 0x1e).bytes
            }
            let again = try await Self.told(second, until: shift)
            #expect(again == wishes.prefix(20) + encodings + whole + letter + shift)
            try await viewer.read("its name") { $0.names.last == "web1" }
            second.close()
            stage.absences = [.never("there is none")]
            try await viewer.readToTheEnd()
            #expect(viewer.closing == (4000, "there is none"))
            await serving.value
        }
    }

    @Test func aGuestThatHasGoneIsFollowedWhereSomethingLeadsToIt() async throws {
        let loop = EventLoop(name: "stage")
        defer { loop.stop() }
        try await loop.run {
            let stage = Stage()
            let passage = FollowingDisplay.Passage { guest, loop in
                switch guest {
                case "refused": throw TestFailure("no")
                case "unknown": return nil
                default: return (MemoryChannel.pair(on: loop).0, "host-b")
                }
            } isKnown: {
                $0 == "web1"
            }
            func route(_ guest: String) async -> Result<String?, DisplayAbsence> {
                stage.absences = [.moved(to: "host-b:1")]
                let display = FollowingDisplay(guest: guest, local: stage, passage: passage)
                do throws(DisplayAbsence) { return .success(try await display.open(on: loop).host) } catch {
                    return .failure(error)
                }
            }
            #expect(await route("web1") == .success("host-b"))
            #expect(await route("unknown") == .failure(.moved(to: "host-b:1")))
            let refusal = DisplayAbsence.withheld(by: "host-b:1", "host-b:1 does not give the screen of the guest: no")
            #expect(await route("refused") == .failure(refusal))
            #expect(refusal.mayPass && !DisplayAbsence.moved(to: "x").mayPass)
            // A viewer is sent there when it was asked for too long.
            stage.absences = []
            let far = try await stage.add(8, 4, on: loop)
            let (viewer, agent) = MemoryChannel.pair(on: loop)
            let accepting = Task(executorPreference: loop) { try await WebSocketChannel.accept(over: agent) }
            let client = try await WebSocketChannel.connect(over: viewer, host: "x")
            let display = try await DisplayConnection.open(stage, on: loop)
            let session = DisplaySession(
                .init(try await accepting.value),
                display,
                stage,
                guest: "web1",
                visitor: "x",
                mayWrite: true,
                patience: .milliseconds(300)
            ) { true }
            let serving = Task(executorPreference: loop) { await session.serve() }
            let connected = try await DisplayClient.shakeHands(client)
            stage.absences = [DisplayAbsence](repeating: refusal, count: 10)
            far.close()
            try await connected.readToTheEnd()
            #expect(connected.closing == (4001, "host-b:1") && connected.names.last == "web1: \(refusal)")
            await serving.value
        }
    }

    @Test func aMessageThatIsCutEndsTheViewerAndAnythingElseIsNoEnd() async throws {
        let loop = EventLoop(name: "stage")
        defer { loop.stop() }
        try await loop.run {
            let stage = Stage()
            let (viewer, serving, far) = try await Self.session(stage, on: loop)
            try await far.write(Array(Self.update.prefix(100)))
            far.close()
            try await viewer.readToTheEnd()
            #expect(viewer.closing.code == 4002)
            await serving.value
            let (other, ending, strange) = try await Self.session(stage, on: loop)
            try await strange.write([150])
            try await other.readToTheEnd()
            #expect(other.closing.code == 4000 && other.closing.reason.contains("does not speak as it should"))
            await ending.value
        }
    }

    @Test func aSlowViewerGetsTheRestOfAPictureOfAGuestThatLeaves() async throws {
        let loop = EventLoop(name: "stage")
        defer { loop.stop() }
        try await loop.run {
            let stage = Stage()
            let far = try await stage.add(1024, 1024, on: loop)
            let reserve = DisplayReserve()
            let before = reserve.left
            let (client, session, serving) = try await Self.plainSession(stage, reserve: reserve, on: loop)
            try await far.write(
                [0, 0, 0, 1, 0, 0, 0, 0, 4, 0, 4, 0, 0, 0, 0, 0] + [UInt8](repeating: 7, count: 1 << 20)
            )
            await session.warn()
            // The display takes part of it only when the agent takes the rest.
            try await far.write([UInt8](repeating: 8, count: 3 << 20))
            let next = try await stage.add(1024, 1024, host: "host-b", on: loop)
            far.close()
            try await client.read("the rest of the picture") { $0.rectangles == 1 }
            #expect(client.picture.prefix(1 << 20).allSatisfy { $0 == 7 } && client.picture.last == 8)
            try await next.write([0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 5, 5, 5, 5])
            try await client.read("a picture of the other host") { $0.rectangles == 2 }
            #expect(client.picture.starts(with: [5, 5, 5, 5, 7]) && reserve.left == before)
            client.close()
            await serving.value
        }
    }

    @Test func aViewerThatTakesNothingForTooLongIsSentAway() async throws {
        let loop = EventLoop(name: "stage")
        defer { loop.stop() }
        try await loop.run {
            let stage = Stage()
            let far = try await stage.add(1024, 1024, on: loop)
            let (client, _, serving) = try await Self.plainSession(stage, silence: .milliseconds(200), on: loop)
            // The display is read from for as long as somebody looks.
            let sending = Task(executorPreference: loop) {
                try await far.write([0, 0, 0, 1, 0, 0, 0, 0, 4, 0, 4, 0, 0, 0, 0, 0])
                try await far.write([UInt8](repeating: 7, count: 4 << 20))
            }
            await serving.value
            await #expect(throws: (any Error).self) { try await sending.value }
            client.close()
        }
    }

    @Test func aFrameOfManyMegabytesIsPassedOnInPieces() async throws {
        let loop = EventLoop(name: "stage")
        defer { loop.stop() }
        try await loop.run {
            let stage = Stage()
            let far = try await stage.add(4096, 2048, on: loop)
            let (client, _, serving) = try await Self.plainSession(stage, on: loop)
            let sending = Task(executorPreference: loop) {
                try await far.write([0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 8, 0, 0, 0, 0, 0])
                for row in 0..<2048 { try await far.write([UInt8](repeating: UInt8(row & 255), count: 4096 * 4)) }
            }
            try await client.read("the frame") { $0.rectangles == 1 }
            #expect(client.picture.suffix(4) == [255, 255, 255, 255] && client.picture.count == 32 << 20)
            try await sending.value
            client.close()
            await serving.value
        }
    }
}
