internal import IO

/// Who looks at the screen of a guest, and may use its keyboard: one viewer, with a connection of its own to the guest's display, and another one
/// whenever the guest is restarted or has moved. Confined to its loop.
///
/// The guest's QEMU never waits for a viewer: it sends what was asked for, and a slow viewer asks less often. Of what comes nothing is kept but a
/// piece, and, of a guest that is about to leave, the rest of a picture that a slow viewer has begun to take.
final class DisplaySession: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// How a viewer is spoken to.
    struct Viewer {
        /// What carries RFB.
        var channel: any Channel
        /// Asks whether the viewer is there; nil where nothing can.
        var ping: (() async throws -> Void)?
        /// Ends it with a word.
        var finish: (DisplayConversation.Ending) async throws -> Void
        /// What is left of the handshake.
        var handshake = RFBServerHandshake()
        /// Whether it has begun.
        var isGreeted = false

        /// A viewer in a browser, or behind a command.
        init(_ channel: WebSocketChannel) {
            self.channel = channel
            ping = { try await channel.ping() }
            finish = { try await channel.finishWriting(code: $0.code, reason: $0.reason) }
        }

        /// A viewer that speaks RFB and nothing else; of whom a part of the handshake may be behind it.
        init(plain channel: any Channel, _ handshake: RFBServerHandshake? = nil) {
            self.channel = channel
            if let handshake { (self.handshake, isGreeted) = (handshake, true) }
            finish = { _ in try await channel.finishWriting() }
        }
    }

    /// Between two attempts to find the display again: at first, and at most.
    private static let pauses = (shortest: Duration.milliseconds(200), longest: Duration.seconds(1))
    /// How long a host is asked again that has the guest and does not give its screen.
    static let patience = Duration.seconds(60)
    /// How long a viewer may take for its handshake.
    private static let handshake = Duration.seconds(10)
    /// How long QEMU may take nothing that is typed: longer than any pause.
    private static let stillness = Duration.seconds(30)
    /// The same for the last that is told.
    private static let parting = Duration.seconds(1)

    /// The guest.
    let guest: String
    /// Whom it counts for.
    let visitor: String
    /// Whether it still has the right to look.
    let mayStay: () -> Bool
    private let viewer: Viewer
    private let source: any DisplaySource
    private let silence: Duration
    private let loop: EventLoop
    private var conversation: DisplayConversation
    private var display: DisplayConnection?
    private let backlog: DisplayBacklog
    /// The host of the latest one.
    private var host: String?
    private let guestTurn = AsyncLock()
    /// Since when there is no display, and how long the next attempt is waited with.
    private var search = (since: ContinuousClock.now, pause: DisplaySession.pauses.shortest)
    private let patience: Duration
    private var ending: DisplayConversation.Ending?
    private var isOver = false
    private var timer: LoopTimer?

    /// - Parameters:
    ///   - viewer: who looks; it has said nothing yet.
    ///   - display: where the guest's screen is now.
    ///   - source: where it will be.
    ///   - guest: its name.
    ///   - visitor: whom it counts for.
    ///   - mayWrite: whether it may do more than look.
    ///   - reserve: memory for what a guest that leaves has begun to say.
    ///   - silence: how long it may take nothing.
    ///   - patience: how long a host is asked again that does not give the screen.
    ///   - mayStay: whether it still has the right to look.
    init(
        _ viewer: Viewer,
        _ display: DisplayConnection,
        _ source: any DisplaySource,
        guest: String,
        visitor: String,
        mayWrite: Bool,
        reserve: DisplayReserve = DisplayReserve(),
        silence: Duration = WebLimits.silence,
        patience: Duration = DisplaySession.patience,
        mayStay: @escaping () -> Bool
    ) {
        (self.viewer, self.display, self.source) = (viewer, display, source)
        (self.guest, self.visitor, self.silence, self.mayStay) = (guest, visitor, silence, mayStay)
        host = display.host
        backlog = DisplayBacklog(reserve)
        self.patience = patience
        loop = viewer.channel.loop
        conversation = DisplayConversation(guest: guest, screen: display.screen, mayWrite: mayWrite)
    }

    /// Ends it: with a word, or at once without one.
    func end(_ ending: DisplayConversation.Ending?) {
        guard !isOver else { return }
        if let ending {
            self.ending = self.ending ?? ending
        } else {
            isOver = true
            viewer.channel.abort(ChannelError(.closed, "The session is over"))
        }
        leave()
    }

    /// Lets go of what is held down, and then of the display.
    private func leave() {
        Task(executorPreference: loop) {
            await self.perform(self.conversation.part(), within: Self.parting)
            self.display?.channel.abort(ChannelError(.closed, "The viewer is served no more"))
            self.backlog.changed.signal()
        }
    }

    /// The guest is about to be paused, to go on elsewhere. Returns when it holds nothing down any more.
    func warn() async {
        let actions = conversation.warn(at: .now)
        // There is room now for all that the display has begun to say.
        backlog.changed.signal()
        await perform(actions)
        timer?.cancel()
        timer = loop.schedule(after: DisplayConversation.reserve) { [weak self] in
            guard let self, !isOver else { return }
            Task(executorPreference: loop) { await self.perform(self.conversation.tick(at: .now)) }
        }
    }

    /// The guest stands still until somebody does something, or, for nil, goes on.
    func explain(_ trouble: GuestTrouble?) {
        conversation.explain(trouble?.title)
        announce()
    }

    /// Tells the viewer why the picture stands still, between two messages of the display: nothing may come in between.
    private func announce() {
        guard !isEnding else { return }
        for case .toViewer(let bytes) in conversation.news() { bytes.withUnsafeBytes { backlog.append($0) } }
    }

    /// Serves until the viewer goes, is too slow, or is sent away.
    func serve() async {
        defer { display?.channel.close() }
        let said: [UInt8]
        do { said = try await welcome() } catch {
            viewer.channel.abort(ChannelError(.closed, "The viewer did not finish its handshake: \(error)"))
            return viewer.channel.close()
        }
        let pings = PingTimer(loop) { [weak self] in
            guard let self, let ping = viewer.ping else { return }
            Task(executorPreference: loop) { try? await ping() }
        }
        let reading = Task(executorPreference: loop) { await self.read(after: said) }
        let writing = Task(executorPreference: loop) {
            guard await !self.backlog.write(to: self.viewer.channel, within: self.silence, until: { self.isOver })
            else { return }
            self.isOver = true
            self.leave()
        }
        await show()
        backlog.close()
        await writing.value
        pings.end()
        timer?.cancel()
        if let ending, !isOver {
            try? await bounded { try await self.viewer.finish(ending) }
            // A socket that is closed before all was read from it forgets what is still on its way to the viewer.
            let limit = loop.schedule(after: WebLimits.farewell) { [viewer] in
                viewer.channel.abort(ChannelError(.closed, "The viewer does not go"))
            }
            await reading.value
            limit.cancel()
        }
        isOver = true
        viewer.channel.abort(ChannelError(.closed, "The viewer is served no more"))
        await reading.value
        viewer.channel.close()
    }

    // MARK: the viewer's side

    /// Performs the handshake with the viewer. Returns what it has said behind it.
    private func welcome() async throws -> [UInt8] {
        var handshake = viewer.handshake
        let channel = viewer.channel
        return try await channel.withDeadline(Self.handshake, for: "The handshake of a viewer") {
            if !viewer.isGreeted { try await channel.write(handshake.greeting) }
            let buffer = IOBuffer(capacity: 4096)
            while true {
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                guard count > 0 else { throw ChannelError(.closed, "The viewer has gone") }
                for action in try handshake.receive(buffer.bytes(0..<count)) {
                    switch action {
                    case .send(let bytes): try await channel.write(bytes)
                    case .startTLS: throw RFBFailure.violation("there is no TLS inside here")
                    case .finish:
                        try await channel.write(conversation.greeting.bytes)
                        return handshake.takeRest()
                    }
                }
            }
        }
    }

    private func read(after said: [UInt8]) async {
        let buffer = IOBuffer(capacity: 16 << 10)
        var parser = RFBClientMessage.Parser()
        parser.append(said)
        do {
            while !isOver {
                while let message = try parser.next() { await perform(conversation.take(message, at: .now)) }
                announce()
                let count = try await viewer.channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                if count == 0 { break }
                parser.append(buffer.bytes(0..<count))
            }
        } catch let failure as RFBFailure {
            return end(.closed("the viewer does not speak as it should: \(failure)"))
        } catch {}
        isOver = true
        leave()
    }

    /// A viewer that takes nothing for so long is gone.
    private func bounded(_ body: () async throws -> Void) async throws {
        try await viewer.channel.withDeadline(silence, for: "Sending to a viewer", body)
    }

    // MARK: the guest's side

    private var isEnding: Bool { isOver || ending != nil }

    /// Shows what the displays say, one after the other.
    private func show() async {
        let buffer = IOBuffer(capacity: DisplayBacklog.piece)
        while !isEnding {
            if let display {
                do { try await show(display, by: buffer) } catch let failure as RFBFailure {
                    end(.closed("the guest's display does not speak as it should: \(failure)"))
                } catch {}
                display.channel.close()
                self.display = nil
                search = (.now, Self.pauses.shortest)
                if !isEnding { await perform(conversation.lose()) }
            } else {
                await find()
            }
        }
    }

    /// Shows what a display says until it ends.
    private func show(_ display: DisplayConnection, by buffer: IOBuffer) async throws {
        var count = min(display.rest.count, buffer.capacity)
        buffer.mutable(0..<count).copyBytes(from: display.rest.prefix(count))
        while !isEnding {
            if count > 0 {
                try conversation.relay(buffer.mutable(0..<count))
                backlog.append(buffer.bytes(0..<count))
                announce()
            }
            guard await backlog.room({ conversation.isLeaving }, until: { isEnding }) else { return }
            count = try await display.channel.readSome(into: buffer.mutable(0..<buffer.capacity))
            if count == 0 { return }
        }
    }

    /// Looks for the display where it is now, once.
    private func find() async {
        do {
            let found = try await DisplayConnection.open(source, on: loop)
            guard !isEnding else { return found.channel.close() }
            display = found
            // What has ended here and begins here is a guest that was started again; of what other hosts have that is not known.
            let hasMoved = found.host != nil || host != nil
            host = found.host
            await perform(conversation.connect(found.screen, hasMoved: hasMoved, at: .now))
        } catch {
            var absence = error
            if case .withheld(let host, _) = error, ContinuousClock.now - search.since > patience {
                absence = .moved(to: host)
            }
            await perform(conversation.wait(for: absence))
            guard !isEnding else { return }
            await loop.sleep(for: search.pause)
            search.pause = min(search.pause * 2, Self.pauses.longest)
        }
    }

    /// What is told to the guest goes first, so that what the viewer says meanwhile comes behind it.
    private func perform(_ actions: [DisplayConversation.Action], within limit: Duration = DisplaySession.stillness)
        async
    {
        var told: [UInt8] = []
        for case .toGuest(let bytes) in actions { told += bytes }
        if !told.isEmpty { await tell(told, within: limit) }
        for action in actions {
            switch action {
            case .toGuest: break
            case .toViewer(let bytes): bytes.withUnsafeBytes { backlog.append($0) }
            case .end(let ending): end(ending)
            }
        }
    }

    private func tell(_ bytes: [UInt8], within limit: Duration) async {
        await guestTurn.acquire()
        defer { guestTurn.release() }
        guard let channel = display?.channel else { return }
        // Whoever reads from it sees its end.
        try? await channel.withDeadline(limit, for: "Typing to the guest's display") {
            try await channel.write(bytes)
        }
    }
}
