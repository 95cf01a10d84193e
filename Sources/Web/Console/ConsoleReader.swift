internal import IO

/// Who reads a console, and may write there: what the guest writes goes out as fast as it is taken, and what comes too late for the ring is
/// left out. Confined to its loop.
final class ConsoleReader: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Why a reader is sent away, with a code of the websocket's.
    struct Ending: Sendable, Hashable {
        var code: UInt16
        var reason: String

        /// The operator has taken the console back, or the agent ends.
        static func closed(_ reason: String) -> Ending { Ending(code: 4000, reason: reason) }
        /// The guest has moved to a host.
        static func moved(to host: String) -> Ending { Ending(code: 4001, reason: host) }
    }

    /// Who it is, for others.
    let name: String
    let mayWrite: Bool
    /// Whom it counts for.
    let visitor: String
    /// Whether it still has the right to read.
    let mayStay: () -> Bool
    /// The identity of another host's agent; nil for who reads here.
    let agent: String?
    /// The agents that pass this on to it; none for who reads here.
    let path: [String]
    /// How many of them there are in a row.
    let hops: Int
    private let line: any ConsoleLine
    private var channel: any Channel { line.channel }
    private let console: GuestConsole
    /// Where it wants to begin.
    let start: (offset: UInt64?, ring: String?)
    private let silence: Duration
    /// How many bytes it has typed that were taken.
    var taken: UInt64 = 0
    /// The offset of what comes next.
    private(set) var position: UInt64 = 0
    private var notices: [String] = []
    private var hasNews = true
    private var ending: Ending?
    private let news = AsyncCondition()
    private(set) var isOver = false

    init(
        _ line: any ConsoleLine,
        _ console: GuestConsole,
        name: String,
        visitor: String,
        mayWrite: Bool,
        agent: String? = nil,
        path: [String] = [],
        hops: Int = 0,
        start: (offset: UInt64?, ring: String?),
        silence: Duration = WebLimits.silence,
        mayStay: @escaping () -> Bool
    ) {
        (self.line, self.console, self.name, self.visitor, self.path) = (line, console, name, visitor, path)
        (self.mayWrite, self.start, self.silence, self.mayStay) = (mayWrite, start, silence, mayStay)
        (self.agent, self.hops) = (agent, hops)
    }

    /// The guest has written something.
    func wake() { news.signal() }

    /// Something of the console has changed.
    func tell(_ notice: String? = nil) {
        if let notice, notices.count < 4, notices.last != notice { notices.append(notice) }
        hasNews = true
        news.signal()
    }

    /// The offsets of the ring have changed.
    func restart() {
        position = console.start(nil, of: nil)
        tell()
    }

    /// Ends it: with an ending once it has all that was written, and at once without one.
    func end(_ ending: Ending?) {
        guard !isOver else { return }
        if let ending {
            self.ending = self.ending ?? ending
        } else {
            isOver = true
            channel.abort(ChannelError(.closed, "The session is over"))
        }
        console.wakeWriters()
        news.signal()
    }

    /// Serves until the reader goes, is too slow, or is sent away.
    func serve() async {
        console.recognize(start)
        position = console.start(start.offset, of: start.ring)
        console.add(self)
        let reading = Task(executorPreference: channel.loop) { await self.read() }
        await write()
        isOver = true
        console.remove(self)
        console.wakeWriters()
        channel.abort(ChannelError(.closed, "The reader is served no more"))
        await reading.value
        channel.close()
    }

    private func read() async {
        let buffer = IOBuffer(capacity: 16 << 10)
        var parser = ConsoleFrame.Parser()
        do {
            while !isOver {
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                if count == 0 { break }
                parser.append(buffer.bytes(0..<count))
                while let frame = try parser.next() { try await take(frame) }
            }
        } catch {}
        isOver = true
        news.signal()
    }

    private func take(_ frame: ConsoleFrame) async throws {
        switch frame {
        case .note(let bytes):
            guard let wish = JSONText.decode(ConsoleWish.self, from: bytes) else { return }
            console.wish(wish, of: self)
        case .input(let bytes): await console.type(bytes, from: self)
        case .output, .end: throw ConsoleFrame.Parser.Violation(description: "a reader only types")
        }
    }

    private func write() async {
        let timer = PingTimer(channel.loop) { [weak self] in self?.news.signal() }
        defer { timer.end() }
        do {
            while !isOver {
                if timer.takeDue() {
                    try await bounded { try await self.line.ping() }
                }
                if hasNews {
                    hasNews = false
                    var standing = console.standing(for: self)
                    standing.notice = notices.isEmpty ? nil : notices.joined(separator: "; ")
                    notices = []
                    try await send(.note(try JSONText.encode(standing)))
                    continue
                }
                let piece = console.ring.read(from: position, most: ConsoleFrame.mostBytes)
                if !piece.bytes.isEmpty {
                    position = piece.offset + UInt64(piece.bytes.count)
                    try await send(.output(offset: piece.offset, piece.bytes))
                } else if let ending {
                    if ending.reason.utf8.count > line.mostReason {
                        var last = console.standing(for: self)
                        last.ending = ending.reason.shown(wordsOf: ConsoleFrame.mostEnding)
                        try await send(.note(try JSONText.encode(last)))
                    }
                    return try await bounded { try await self.line.finish(ending) }
                } else if !isOver {
                    await news.wait()
                }
            }
        } catch {}
    }

    private func send(_ frame: ConsoleFrame) async throws {
        let bytes = frame.encoded
        try await bounded { try await self.channel.write(bytes) }
    }

    /// A reader that takes nothing for so long is gone; one that comes back goes on at its offset.
    private func bounded(_ body: () async throws -> Void) async throws {
        try await channel.withDeadline(silence, for: "Sending to a reader", body)
    }
}
