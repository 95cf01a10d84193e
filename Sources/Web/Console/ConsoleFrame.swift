internal import IO

/// A piece of the stream between an agent and who reads a console, in both directions: a byte that says what it is, the length in three bytes,
/// the most significant first, and as many bytes. Where messages of the websocket begin and end means nothing.
public enum ConsoleFrame: Sendable, Hashable {
    /// JSON: what the agent says of the console, and what a reader wants.
    case note([UInt8])
    /// What the guest has written: the offset of the first byte, in eight bytes, and the bytes.
    case output(offset: UInt64, [UInt8])
    /// What is typed.
    case input([UInt8])
    /// Between agents only: why no more comes, with the code that a websocket would be closed with, in two bytes, and the reason.
    case end(code: UInt16, reason: String)

    /// The most bytes of output or input in a frame.
    public static let mostBytes = 64 << 10
    /// The most bytes of a note.
    public static let mostNote = 4096
    /// The most bytes of a reason.
    public static let mostReason = 255
    /// The most bytes of the reason in the last note.
    public static let mostEnding = 1024

    private var kind: UInt8 {
        switch self {
        case .note: 0
        case .output: 1
        case .input: 2
        case .end: 3
        }
    }

    /// The bytes of a frame.
    public var encoded: [UInt8] {
        let body: [UInt8] =
            switch self {
            case .note(let bytes), .input(let bytes): bytes
            case .output(let offset, let bytes): withUnsafeBytes(of: offset.bigEndian) { Array($0) } + bytes
            case .end(let code, let reason):
                withUnsafeBytes(of: code.bigEndian) { Array($0) } + reason.shown(wordsOf: Self.mostReason).utf8
            }
        let count = UInt32(body.count)
        return [
            kind, UInt8(truncatingIfNeeded: count >> 16), UInt8(truncatingIfNeeded: count >> 8),
            UInt8(truncatingIfNeeded: count),
        ]
            + body
    }

    /// What a stream of frames brings. A value.
    public struct Parser: Sendable {
        /// That the other end does not speak as it should.
        public struct Violation: Error, Hashable, CustomStringConvertible {
            /// What is wrong.
            public let description: String
        }

        private var queued: [UInt8] = []
        private var taken = 0

        /// Makes a parser at the beginning of a stream.
        public init() {}

        /// Adds what has come.
        public mutating func append(_ bytes: some Collection<UInt8>) {
            if taken > 0 {
                queued.removeFirst(taken)
                taken = 0
            }
            queued.append(contentsOf: bytes)
        }

        /// The next whole frame; nil when more has to come first.
        public mutating func next() throws(Violation) -> ConsoleFrame? {
            let rest = queued[taken...]
            guard rest.count >= 4 else { return nil }
            let head = Array(rest.prefix(4))
            let count = Int(head[1]) << 16 | Int(head[2]) << 8 | Int(head[3])
            let limit: Int
            switch head[0] {
            case 0: limit = ConsoleFrame.mostNote
            case 1: limit = ConsoleFrame.mostBytes + 8
            case 2: limit = ConsoleFrame.mostBytes
            case 3: limit = ConsoleFrame.mostReason + 2
            default: throw Violation(description: "there is no frame of kind \(head[0])")
            }
            guard count <= limit else { throw Violation(description: "a frame of kind \(head[0]) has \(count) bytes") }
            if head[0] == 1, count < 8 { throw Violation(description: "output has no offset") }
            if head[0] == 3, count < 2 { throw Violation(description: "an end has no code") }
            guard rest.count >= 4 + count else { return nil }
            let body = Array(rest.dropFirst(4).prefix(count))
            taken += 4 + count
            switch head[0] {
            case 0: return .note(body)
            case 1:
                let offset = body.prefix(8).reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
                return .output(offset: offset, Array(body.dropFirst(8)))
            case 3:
                let code = body.prefix(2).reduce(UInt16(0)) { $0 << 8 | UInt16($1) }
                return .end(code: code, reason: String(decoding: body.dropFirst(2), as: UTF8.self))
            default: return .input(body)
            }
        }
    }
}

/// What an agent says of a guest's console: at first, and whenever it has changed.
public struct ConsoleStanding: Sendable, Hashable, Codable {
    /// The guest.
    public var guest: String
    /// Tells this ring from others, such as that of an agent before: offsets of another one mean nothing here.
    public var ring: String
    /// The offset of the oldest byte that is kept.
    public var oldest: UInt64
    /// The offset of the next byte.
    public var next: UInt64
    /// Whether the agent has the guest's serial socket now.
    public var connected: Bool
    /// Why it does not.
    public var reason: String?
    /// The host that has the guest, when that is another one: its console is passed on from there.
    public var host: String?
    /// How many read.
    public var readers: Int
    /// Who writes; nil for nobody.
    public var writer: String?
    /// Whether the reader that this goes to may write, and whether it is the one who does.
    public var mayWrite: Bool?
    /// See `mayWrite`.
    public var writes: Bool?
    /// Why the guest stands still until somebody does something; nil when nothing is known of that.
    public var trouble: GuestTrouble?
    /// What has happened, in a sentence.
    public var notice: String?
    /// In the last note, which comes when the end has no room for it: why no more comes.
    public var ending: String?

    private enum CodingKeys: String, CodingKey {
        case guest, ring, oldest, next, connected, reason, host, readers, writer, writes, trouble, notice, ending
        case mayWrite = "may_write"
    }
}

/// What a reader of a console wants.
public struct ConsoleWish: Sendable, Hashable, Codable {
    /// To write, instead of whoever does, or to write no more.
    public var write: Bool

    /// Makes a wish.
    public init(write: Bool) { self.write = write }
}
