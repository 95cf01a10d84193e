public import IO
public import Migration
internal import TLS

/// Opens a console on the host to which a guest has gone.
public typealias OpenRemoteConsole =
    @Sendable (_ departure: ConsoleDeparture, _ opening: ConsoleOpening, _ loop: EventLoop) async throws -> any Channel

/// The console of a guest that has gone to another host, as its agent passes it on: one connection for all readers here, as long as there are any.
/// Confined to its loop.
///
/// The other agent is believed in what the guest writes, and in nothing else: an offset that goes back, a frame that is none, or silence end the
/// connection.
final class ConsoleRelay: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// A connection that has lasted so long was a good one.
    private static let steady = Duration.seconds(10)
    /// How long after the guest has gone its new host may not know the end of what was written here.
    private static let grace = Duration.seconds(5)
    /// How long the other agent may say nothing; it says something every 20 s.
    private static let silence = Duration.seconds(60)
    /// How long after the guest has gone what is typed waits for its new host.
    private static let typeAhead = Duration.seconds(10)

    /// How long readers may take for what is before a gap.
    private static let gapPatience = Duration.seconds(1)

    let departure: ConsoleDeparture
    /// It lets go of this value when it ends it.
    private let console: GuestConsole
    private let loop: EventLoop
    private let log: LimitedLog
    private let mark: String
    /// How long a host that does not have or give the console is asked again.
    private let patience: Duration
    private let dial: OpenRemoteConsole
    private let began = ContinuousClock.now
    private var channel: (any Channel)?
    /// What was asked for with this connection.
    private var opening: ConsoleOpening?
    private var opened: ContinuousClock.Instant?
    /// What the other agent has said last; nil before it has.
    private(set) var standing: ConsoleStanding?
    /// Why the other agent says that no more comes, when that is long.
    private var parting: String?
    private var isRunning = false
    private var isOver = false
    private var isReopening = false
    /// Whether the other agent was asked to let this one write, and has done so.
    private var (hasAsked, hasPen) = (false, false)
    private let news = AsyncCondition()
    /// What was typed in this connection last, and how many bytes altogether.
    private var sent = (total: UInt64(0), latest: [UInt8]())

    init(
        _ departure: ConsoleDeparture,
        for console: GuestConsole,
        mark: String,
        patience: Duration,
        on loop: EventLoop,
        _ log: LimitedLog,
        _ dial: @escaping OpenRemoteConsole
    ) {
        (self.departure, self.console, self.mark, self.patience) = (departure, console, mark, patience)
        (self.loop, self.log, self.dial) = (loop, log, dial)
    }

    /// The host that has the guest.
    var host: String { standing?.host ?? departure.host }
    /// Whether the other agent passes the console on.
    var isLive: Bool { channel != nil && standing != nil }
    /// Whether the other agent lets nobody here write. One that was asked for a look has said nothing of that: it is asked again.
    var refusesWriting: Bool { standing?.mayWrite == false && opening?.view == false }
    /// Whether what is typed is kept for the other agent.
    var takesInput: Bool { isLive && hasPen || ContinuousClock.now - began < Self.typeAhead }

    /// What was typed in this connection and not taken by the other agent, as far as it is known.
    ///
    /// - Parameter taken: how many bytes were; nil when the other agent does not know this connection.
    func sent(after taken: UInt64?) -> [UInt8] {
        guard let taken, taken <= sent.total else { return [] }
        return sent.latest.suffix(Int(min(sent.total - taken, UInt64(sent.latest.count))))
    }

    /// Readers have come or gone, or somebody else here wants to write, or has typed.
    func wake() {
        news.signal()
        guard !isOver else { return }
        guard console.hasReaders else {
            channel?.abort(ChannelError(.closed, "Nobody reads"))
            return
        }
        if isRunning {
            // Another connection, when this one does not say or give what is needed now.
            guard let opening, channel != nil, !isReopening, wanted(opening) != opening else { return }
            isReopening = true
            channel?.abort(ChannelError(.closed, "Other readers have come"))
            return
        }
        isRunning = true
        Task(executorPreference: loop) {
            await self.run()
            self.isRunning = false
        }
    }

    /// Ends it.
    func end() {
        isOver = true
        channel?.abort(ChannelError(.closed, "The guest's console is elsewhere now"))
        news.signal()
    }

    private func run() async {
        var lost = ContinuousClock.now
        var pause = Duration.milliseconds(200)
        while !isOver, console.hasReaders {
            var why = "it has closed the connection"
            // Who was given no grant is refused again, however often it asks.
            var isFinal = false
            do { try await attempt() } catch let error as MigrationError {
                why = error.message
                isFinal = departure.grant == nil && error.code != .unreachable
            } catch { why = "the console on \(departure.host): \(error)" }
            if let opened, ContinuousClock.now - opened >= Self.steady {
                (lost, pause) = (.now, .milliseconds(200))
            }
            (channel, standing, opened, opening, hasAsked, hasPen) = (nil, nil, nil, nil, false, false)
            if isOver || !console.hasReaders { break }
            if isReopening {
                isReopening = false
                continue
            }
            console.explain("\(why.shown(most: 600)); trying again")
            guard !isFinal, ContinuousClock.now - lost < patience else {
                log(.warning, "web: console of guest '\(console.guest)': \(why.shown(most: 600))")
                console.giveUp(
                    departure.grant == nil
                        ? .closed(why.shown(wordsOf: ConsoleFrame.mostEnding)) : .moved(to: departure.host)
                )
                break
            }
            await loop.sleep(for: pause)
            pause = min(pause * 2, .seconds(5))
        }
    }

    /// What is to be asked for now, or is still right.
    private func wanted(_ present: ConsoleOpening? = nil) -> ConsoleOpening {
        let start = console.hasPast ? (offset: console.ring.next, ring: console.id) : console.wantedStart
        var wanted =
            present
            ?? ConsoleOpening(guest: departure.guest, kind: .serial, from: start?.offset, ring: start?.ring)
        // A right that nobody here has is not asked for; one that was is kept.
        wanted.view = present?.view != false && !console.hasWriters
        let before = present?.path.dropLast() ?? []
        wanted.path = before + console.path.subtracting(before).sorted() + [mark]
        wanted.hops = max(wanted.hops, console.hops + 1)
        return wanted
    }

    private func attempt() async throws {
        let wanted = wanted()
        guard wanted.hops <= ConsoleOpening.mostHops, wanted.path.count <= ConsoleOpening.mostMarks,
            !wanted.path.dropLast().contains(mark)
        else {
            throw MigrationError(.refused, "The console would be passed on by too many hosts")
        }
        let channel = try await dial(departure, wanted, loop)
        defer { channel.close() }
        guard !isOver, console.hasReaders else { return }
        (self.channel, opening, opened) = (channel, wanted, .now)
        (sent, parting) = ((0, []), nil)
        // Those who have come meanwhile.
        wake()
        let sending = Task(executorPreference: loop) { await self.send(channel) }
        do { try await receive(channel) } catch {
            self.channel = nil
            channel.abort(ChannelError(.closed, "\(error)"))
            news.signal()
            await sending.value
            throw error
        }
    }

    // MARK: what comes

    private func receive(_ channel: any Channel) async throws {
        let buffer = IOBuffer(capacity: ConsoleFrame.mostBytes)
        var parser = ConsoleFrame.Parser()
        while true {
            let count = try await channel.withDeadline(Self.silence, for: "The console") {
                try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
            }
            guard count > 0 else { throw ChannelError(.closed, "its agent has closed the connection") }
            parser.append(buffer.bytes(0..<count))
            while let frame = try parser.next() { try await take(frame) }
            // What comes must not keep the loop from those who read it.
            await Task.yield()
        }
    }

    private func take(_ frame: ConsoleFrame) async throws {
        switch frame {
        case .note(let bytes):
            guard let new = JSONText.decode(ConsoleStanding.self, from: bytes) else { return }
            if let ending = new.ending { parting = ending } else { try take(new) }
        case .output(let offset, let bytes):
            guard standing != nil else {
                throw ConsoleFrame.Parser.Violation(description: "output comes before a note")
            }
            if console.hasPast, offset > console.ring.next { await letReadersCatchUp() }
            guard console.receive(bytes, at: offset) else {
                throw ConsoleFrame.Parser.Violation(description: "an offset goes back, or is none: \(offset)")
            }
        case .input: throw ConsoleFrame.Parser.Violation(description: "an agent types nothing")
        case .end(let code, let reason):
            let words = (parting ?? reason).shown(wordsOf: ConsoleFrame.mostEnding / 2)
            throw MigrationError(
                .refused,
                code == 4001
                    ? "The guest has moved on from \(departure.host) to \(words)"
                    : "\(departure.host) has closed the console: \(words)"
            )
        }
    }

    /// What is before a gap is not kept: whoever is nearly there gets it first.
    private func letReadersCatchUp() async {
        let end = ContinuousClock.now + Self.gapPatience
        while !isOver, !console.isRead, ContinuousClock.now < end { await loop.sleep(for: .milliseconds(10)) }
    }

    private func take(_ new: ConsoleStanding) throws {
        var new = new
        new.host = new.host?.shown(most: 255)
        (new.reason, new.writer) = (new.reason?.shown(most: 400), new.writer?.shown(most: 255))
        new.trouble = new.trouble?.shown
        if new.ring != console.id {
            if console.hasPast, ContinuousClock.now - began < Self.grace {
                throw MigrationError(.failed, "\(departure.host) does not know yet what was written here")
            }
            guard console.begin(new.ring) else {
                throw ConsoleFrame.Parser.Violation(description: "a ring has no such name")
            }
        }
        let isFirst = standing == nil
        standing = new
        if hasAsked, hasPen, new.writes != true || new.mayWrite == false {
            // Another one there has taken it.
            (hasAsked, hasPen) = (false, false)
            console.loseWriter()
        } else if refusesWriting {
            console.loseWriter()
        } else if new.writes == true {
            hasPen = true
        }
        console.explain(nil, isNews: true, notice: new.notice?.shown(most: 400))
        if isFirst {
            log(.info, "web: reads the console of guest '\(console.guest)' from \(departure.host)")
        }
        news.signal()
    }

    // MARK: what goes

    private func send(_ channel: any Channel) async {
        let timer = PingTimer(loop) { [weak self] in self?.news.signal() }
        defer { timer.end() }
        do {
            while self.channel === channel, !isOver {
                if hasPen, hasAsked, case let bytes = console.takeInput(4096), !bytes.isEmpty {
                    sent.total += UInt64(bytes.count)
                    sent.latest = (sent.latest + bytes).suffix(WebLimits.consoleInput)
                    try await write(.input(bytes), to: channel)
                } else if console.isWritten != hasAsked, standing != nil {
                    hasAsked = console.isWritten
                    if !hasAsked { hasPen = false }
                    try await write(.note(try JSONText.encode(ConsoleWish(write: hasAsked))), to: channel)
                } else if timer.takeDue() {
                    try await write(.note([]), to: channel)
                } else {
                    await news.wait()
                }
            }
        } catch { channel.abort(ChannelError(.closed, "\(error)")) }
    }

    private func write(_ frame: ConsoleFrame, to channel: any Channel) async throws {
        try await channel.withDeadline(WebLimits.silence, for: "Typing to another host") {
            try await channel.write(frame.encoded)
        }
    }
}
