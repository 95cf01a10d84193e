internal import IO

/// What a viewer and the displays of a guest say to each other: the viewer's one conversation goes on while the guest is restarted or moves, and with
/// it its display becomes another one. What happens goes in, what is to be done comes out; it does nothing itself.
struct DisplayConversation: Sendable {
    /// How it stands between the two.
    enum Phase: Sendable, Hashable {
        /// What either says reaches the other.
        case live
        /// The guest is about to be paused: what is typed waits until then, and the guest holds nothing down.
        case leaving(since: ContinuousClock.Instant)
        /// There is no display: the viewer keeps the last picture.
        case away
        /// Nothing is passed on any more.
        case over
    }

    /// Why a viewer is sent away, with a code of the websocket's.
    struct Ending: Sendable, Hashable {
        var code: UInt16
        var reason: String

        /// There is no display any more, or the agent ends.
        static func closed(_ reason: String) -> Ending { Ending(code: 4000, reason: reason) }
        /// The guest has moved to a host to which nothing leads from here.
        static func moved(to host: String) -> Ending { Ending(code: 4001, reason: host) }
        /// What the viewer has cannot be gone on with; it may begin anew at once.
        static func cut(_ reason: String) -> Ending { Ending(code: 4002, reason: reason) }
    }

    /// What is to be done, in this order.
    enum Action: Sendable, Hashable {
        case toGuest([UInt8])
        case toViewer([UInt8])
        case end(Ending)
    }

    /// The most keys that wait for the guest to be there, and how long each may: as long as a pause may last when nothing else is said.
    static let mostKeys = 64
    /// See `mostKeys`.
    static let keyLife = Duration.seconds(10)
    /// How long what is typed waits after it was said that a pause is near, when none comes.
    static let reserve = Duration.seconds(2)

    private let guest: String
    private let mayWrite: Bool
    private(set) var phase = Phase.live
    private var parser: RFBServerParser
    private var encodings: [RFBEncoding] = []
    /// The size of the screen that the viewer knows.
    private var size: RFBRectangle
    private var held = HeldInput()
    private var waiting: [(message: RFBClientMessage, since: ContinuousClock.Instant)] = []
    /// The whole picture that the viewer wants of a guest that is about to leave: it might be gone before all of it is said.
    private var asked: RFBClientMessage?
    /// Why there is no display.
    private var sign: String?
    /// Why the guest stands still until somebody does something.
    private var trouble: String?
    /// What the viewer was told of the two.
    private var told: String?

    /// Begins with a display.
    ///
    /// - Parameters:
    ///   - guest: its name, which is that of the desktop.
    ///   - screen: what the display says of itself.
    ///   - mayWrite: whether the viewer may do more than look.
    init(guest: String, screen: ServerInit, mayWrite: Bool) {
        (self.guest, self.mayWrite) = (guest, mayWrite)
        size = RFBRectangle(width: screen.width, height: screen.height)
        parser = RFBServerParser(size: size, format: screen.format)
    }

    /// What the viewer is told in the end of the handshake.
    var greeting: ServerInit {
        ServerInit(width: size.width, height: size.height, format: parser.format, name: guest)
    }

    // MARK: the viewer

    /// The viewer says something.
    mutating func take(_ message: RFBClientMessage, at now: ContinuousClock.Instant) -> [Action] {
        if case .over = phase { return [] }
        switch message {
        case .setPixelFormat(let format): parser.format = format
        case .setEncodings(let wanted):
            encodings = wanted
            return tellGuest([.setEncodings(relayed)])
        case .key, .extendedKey, .pointer:
            guard mayWrite else { return [] }
            held.press(message)
            if phase != .live {
                hold(message, at: now)
                return []
            }
        case .cutText, .setDesktopSize, .power:
            // What is not typed is not worth to be waited with.
            guard mayWrite, phase == .live else { return [] }
        case .updateRequest(let isIncremental, _):
            if isLeaving, !isIncremental {
                asked = message
                return []
            }
        }
        return tellGuest([message])
    }

    /// Whether the guest is about to leave.
    var isLeaving: Bool { if case .leaving = phase { true } else { false } }

    /// The display has a name of the agent's.
    private var relayed: [RFBEncoding] { encodings.filter { $0.isRelayed && $0 != .desktopName } }

    /// Nothing while there is no display: what the viewer wants of the picture is told to the next one.
    private mutating func tellGuest(_ messages: [RFBClientMessage]) -> [Action] {
        if phase == .away || messages.isEmpty { return [] }
        for message in messages { held.tell(message) }
        return [.toGuest(messages.flatMap(\.bytes))]
    }

    private mutating func hold(_ message: RFBClientMessage, at now: ContinuousClock.Instant) {
        let isDown: Bool
        switch message {
        case .key(let down, _), .extendedKey(let down, _, _): isDown = down
        // Where the pointer was in between is of no use, and a click would hit something else.
        default: return
        }
        // What was let go of has room as well as what was pressed.
        if waiting.count < (isDown ? Self.mostKeys : 2 * Self.mostKeys) { waiting.append((message, now)) }
    }

    private mutating func takeWaiting(at now: ContinuousClock.Instant) -> [RFBClientMessage] {
        defer { waiting = [] }
        return waiting.filter { now - $0.since <= Self.keyLife }.map(\.message)
    }

    private mutating func takeAsked() -> [RFBClientMessage] {
        defer { asked = nil }
        return asked.map { [$0] } ?? []
    }

    // MARK: the guest

    /// The display says something, of which some bytes may be changed; all of it goes to the viewer.
    ///
    /// - Throws: `RFBFailure.violation`.
    mutating func relay(_ bytes: UnsafeMutableRawBufferPointer) throws(RFBFailure) {
        try parser.parse(bytes)
        size = parser.size
    }

    /// The guest is about to be paused, to go on elsewhere.
    mutating func warn(at now: ContinuousClock.Instant) -> [Action] {
        guard phase == .live else { return [] }
        phase = .leaving(since: now)
        let messages = held.release()
        return messages.isEmpty ? [] : [.toGuest(messages.flatMap(\.bytes))]
    }

    /// Time has gone by: a guest that is there still is typed to again.
    mutating func tick(at now: ContinuousClock.Instant) -> [Action] {
        guard case .leaving(let since) = phase, now - since >= Self.reserve else { return [] }
        phase = .live
        // The modifiers come back that were let go of.
        return tellGuest(takeAsked() + held.takeUp() + takeWaiting(at: now))
    }

    /// The connection to the display has ended.
    mutating func lose() -> [Action] {
        switch phase {
        case .over, .away: return []
        case .live, .leaving: break
        }
        guard parser.isAtBoundary else {
            return end(.cut("the guest's display has ended in the middle of a message"))
        }
        phase = .away
        return []
    }

    /// There is no display yet.
    mutating func wait(for absence: DisplayAbsence) -> [Action] {
        guard phase == .away else { return [] }
        switch absence {
        case .moved(let host): return end(.moved(to: host))
        case .never(let reason): return end(.closed(reason))
        case .waiting(let reason), .withheld(_, let reason):
            sign = reason
            return news()
        }
    }

    /// There is a display again: it is told what the viewer wants, and the viewer what it has to know.
    ///
    /// - Parameters:
    ///   - screen: what it says of itself.
    ///   - hasMoved: whether the guest has gone there as it was; otherwise it was started anew.
    ///   - now: the time.
    mutating func connect(_ screen: ServerInit, hasMoved: Bool, at now: ContinuousClock.Instant) -> [Action] {
        guard phase == .away else { return [] }
        let new = RFBRectangle(width: screen.width, height: screen.height)
        var actions: [Action] = []
        if new != size {
            guard let resizing = resizing(to: new) else {
                return end(.cut("the screen has another size, which the viewer cannot take up"))
            }
            actions.append(.toViewer(resizing))
        }
        // The viewer has this format, whether it has ever named it or was told of it by the first display.
        let format = parser.format
        (parser, size, phase) = (RFBServerParser(size: new, format: format), new, .live)
        asked = nil
        var messages: [RFBClientMessage] = [
            .setPixelFormat(format), .setEncodings(relayed), .updateRequest(isIncremental: false, new),
        ]
        if hasMoved {
            messages += held.takeUp() + takeWaiting(at: now)
        } else {
            // A key that its firmware does not expect can leave a guest without a keyboard.
            held.forget()
            waiting = []
        }
        sign = nil
        return tellGuest(messages) + actions + news()
    }

    /// The guest stands still until somebody does something, or, for nil, goes on; the viewer is told by `news`.
    mutating func explain(_ trouble: String?) { self.trouble = trouble }

    /// The viewer has gone: what it held down is let go of.
    mutating func part() -> [Action] {
        defer { phase = .over }
        guard phase == .live else { return [] }
        let messages = held.release()
        return messages.isEmpty ? [] : [.toGuest(messages.flatMap(\.bytes))]
    }

    /// Ends it.
    mutating func end(_ ending: Ending) -> [Action] {
        if phase == .over { return [] }
        let parting = part()
        return parting + [.end(ending)]
    }

    // MARK: words to the viewer

    /// What the viewer has not been told yet of why the picture stands still: nothing as long as the display is in the middle of a message. Whoever asks
    /// passes it on before anything else that the display says.
    mutating func news() -> [Action] {
        let wanted = sign ?? trouble
        guard wanted != told, encodings.contains(.desktopName), phase == .away || parser.isAtBoundary, phase != .over
        else { return [] }
        told = wanted
        return name(wanted.map { "\(guest): \($0)" } ?? guest)
    }

    /// An update with a name.
    private func name(_ text: String) -> [Action] {
        let name = Array(text.shown(most: 200).utf8)
        return [.toViewer(Self.update(RFBRectangle(width: 0, height: 0), .desktopName, UInt32(name.count).rfb + name))]
    }

    /// An update with a size; nil for a viewer that cannot take one up.
    private func resizing(to size: RFBRectangle) -> [UInt8]? {
        if encodings.contains(.extendedDesktopSize) {
            return Self.update(size, .extendedDesktopSize, [1, 0, 0, 0] + UInt32(0).rfb + size.bytes + UInt32(0).rfb)
        }
        return encodings.contains(.desktopSize) ? Self.update(size, .desktopSize, []) : nil
    }

    private static func update(_ area: RFBRectangle, _ encoding: RFBEncoding, _ body: [UInt8]) -> [UInt8] {
        [0, 0, 0, 1] + area.bytes + encoding.rawValue.rfb + body
    }
}
