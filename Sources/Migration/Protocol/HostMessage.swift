public import Emulator
internal import IO

/// What is said about a host, on a connection with the role `host`: it belongs to an evacuation, not to a migration.
///
/// Needs `Feature.evacuation`. Each question has a number of its own on its connection, and its answer repeats that, so that a
/// question that waits keeps no other one waiting. `docs/protocol.md` has the table.
public struct HostMessage: Sendable, Hashable {
    /// The number of the question.
    public var number: UInt32
    /// What is said.
    public var content: Content

    /// Makes a message.
    public init(_ number: UInt32, _ content: Content) {
        self.number = number
        self.content = content
    }

    /// What can be said.
    public enum Content: Sendable, Hashable {
        /// Source: what has this host to give? Without content. Destination, in answer: this.
        case host(HostState?)
        /// Source: keep this room for a guest. The same again, before its time is over, renews it.
        case reserve(Reserve)
        /// Destination, in answer: it is kept.
        case reserved(Reserved)
        /// Source: the room of this id is not needed any more. Destination, in answer: it is not kept.
        case unreserve(String)
        /// Source: the guest of this name would switch over. Destination, in answer: it is its turn.
        case turn(String)
        /// Source: the turn that was asked for with this number is over, or not wanted any more. Destination: it has ended, or was taken
        /// back.
        case turned
        /// Source: send back what came from here.
        case recall(Recall)
        /// Destination, in answer: what is done about each guest.
        case recalled([Recalled])
        /// Source: what is wrong with this host? Needs `Feature.examination`.
        case examine(Examine)
        /// Destination, in answer: this.
        case examined(Examined)
        /// Source: this is the list of your fleet. Needs `Feature.members`. Destination, in answer: it is taken; the content is the same.
        case members(Members)
        /// Source: here is a request for the next certificate, PEM. Needs `Feature.renewal`.
        case renew(String)
        /// Destination, in answer: here it is.
        case renewed(Renewed)
        /// Destination: no to the question of this number, in a sentence with the figures.
        case denied(String)
    }

    /// See `Content.reserve`.
    public struct Reserve: Sendable, Hashable, Codable {
        /// The guest's name.
        public var guest: String
        /// What the guest takes as policies count it: its memory, its processors, the sizes of its disks and files.
        public var usage: GuestUsage
        /// Bytes of the destination's file system that its copy needs at least: what is allocated of its disks.
        public var allocated: UInt64
        /// How many seconds the room is to be kept: the destination keeps it for an hour at most.
        public var seconds: UInt32

        /// Makes a question.
        public init(guest: String, usage: GuestUsage, allocated: UInt64, seconds: UInt32) {
            self.guest = guest
            self.usage = usage
            self.allocated = allocated
            self.seconds = seconds
        }
    }

    /// See `Content.reserved`.
    public struct Reserved: Sendable, Hashable, Codable {
        /// What OFFER names to use the room; the same as long as it is renewed.
        public var id: String
        /// For how many seconds it is kept from this answer on.
        public var seconds: UInt32

        /// Makes an answer.
        public init(id: String, seconds: UInt32) {
            self.id = id
            self.seconds = seconds
        }
    }

    /// See `Content.recall`.
    public struct Recall: Sendable, Hashable, Codable {
        /// The names of the guests; nil for all whose home is who asks.
        public var guests: [String]?
        /// Where the agent of who asks listens, `HOST:PORT`; its certificate has to be for that host, and of the identity that asks.
        public var address: String
        /// Whether nothing is to be moved, and only told what would be.
        public var isQuestion: Bool
        /// The bridges of who asks, by the bridges and taps of the guests where they are now; nil for none. Needs `Feature.networks`.
        public var networks: [String: String]?

        /// Makes a question.
        public init(guests: [String]?, address: String, isQuestion: Bool = false) {
            self.guests = guests
            self.address = address
            self.isQuestion = isQuestion
        }
    }

    /// See `Content.recalled`.
    public struct Recalled: Sendable, Hashable, Codable {
        /// The guest's name.
        public var guest: String
        /// The migration with which it comes; nil when it does not come, or only was asked about.
        public var migration: String?
        /// Why it does not come, a sentence; nil when it does, or would.
        public var reason: String?
        /// Whether it may come when it is asked for again, after another one has arrived.
        public var isLater: Bool
        /// Why it did not arrive when it was sent last, a sentence; nil when it was not sent, or nobody knows.
        public var lastFailure: String?

        /// Makes an answer.
        public init(
            guest: String,
            migration: String? = nil,
            reason: String? = nil,
            isLater: Bool = false,
            lastFailure: String? = nil
        ) {
            self.lastFailure = lastFailure
            self.guest = guest
            self.migration = migration
            self.reason = reason
            self.isLater = isLater
        }
    }

    /// See `Content.examine`.
    public struct Examine: Sendable, Hashable, Codable {
        /// Where the agent of who asks listens, `HOST:PORT`; it is tried when HOST is where the connection comes from. Nil to try nothing.
        public var address: String?
        /// Whether the rate of the disks is measured, which writes for a second.
        public var measuresDisk: Bool

        /// Makes a question.
        public init(address: String?, measuresDisk: Bool = false) {
            self.address = address
            self.measuresDisk = measuresDisk
        }
    }

    /// See `Content.examined`.
    public struct Examined: Sendable, Hashable, Codable {
        /// What the host finds about itself, and about the way to who asks; at most 200.
        public var findings: [Finding]
        /// Its clock, in milliseconds since 1970.
        public var clock: Int64
        /// The port of its NBD server.
        public var nbdPort: UInt16

        /// Makes an answer.
        public init(findings: [Finding], clock: Int64, nbdPort: UInt16) {
            self.findings = Array(findings.prefix(200))
            self.clock = clock
            self.nbdPort = nbdPort
        }
    }

    /// See `Content.members`.
    public struct Members: Sendable, Hashable, Codable {
        /// The list, JSON, byte for byte what was signed.
        public var list: String
        /// The signature of the fleet's authority, Base64.
        public var signature: String

        /// Makes a message.
        public init(list: String, signature: String) {
            self.list = list
            self.signature = signature
        }
    }

    /// See `Content.renewed`.
    public struct Renewed: Sendable, Hashable, Codable {
        /// The certificate, PEM.
        public var certificate: String
        /// The authority's certificate, PEM.
        public var authority: String

        /// Makes an answer.
        public init(certificate: String, authority: String) {
            self.certificate = certificate
            self.authority = authority
        }
    }

    /// The message's name on the wire.
    public var name: String {
        switch content {
        case .host: "HOST"
        case .reserve: "RESERVE"
        case .reserved: "RESERVED"
        case .unreserve: "UNRESERVE"
        case .turn: "TURN"
        case .turned: "TURNED"
        case .recall: "RECALL"
        case .recalled: "RECALLED"
        case .examine: "EXAMINE"
        case .examined: "EXAMINED"
        case .members: "MEMBERS"
        case .renew: "RENEW"
        case .renewed: "RENEWED"
        case .denied: "DENIED"
        }
    }
}

extension HostMessage: Encodable {
    private enum Key: String, CodingKey { case number, content }

    /// Decodes the body of a message.
    ///
    /// - Parameters:
    ///   - name: the message's name on the wire.
    ///   - body: its body.
    /// - Returns: nil for a name that is none of these.
    init?(_ name: String, from body: () throws -> any Decoder) throws {
        let read: (KeyedDecodingContainer<Key>) throws -> Content
        switch name {
        case "HOST": read = { .host(try $0.decodeIfPresent(HostState.self, forKey: .content)) }
        case "RESERVE": read = { .reserve(try $0.decode(Reserve.self, forKey: .content)) }
        case "RESERVED": read = { .reserved(try $0.decode(Reserved.self, forKey: .content)) }
        case "UNRESERVE": read = { .unreserve(try $0.decode(String.self, forKey: .content)) }
        case "TURN": read = { .turn(try $0.decode(String.self, forKey: .content)) }
        case "TURNED": read = { _ in .turned }
        case "RECALL": read = { .recall(try $0.decode(Recall.self, forKey: .content)) }
        case "RECALLED": read = { .recalled(try $0.decode([Recalled].self, forKey: .content)) }
        case "EXAMINE": read = { .examine(try $0.decode(Examine.self, forKey: .content)) }
        case "EXAMINED": read = { .examined(try $0.decode(Examined.self, forKey: .content)) }
        case "MEMBERS": read = { .members(try $0.decode(Members.self, forKey: .content)) }
        case "RENEW": read = { .renew(try $0.decode(String.self, forKey: .content)) }
        case "RENEWED": read = { .renewed(try $0.decode(Renewed.self, forKey: .content)) }
        case "DENIED":
            read = { .denied(try $0.decode(String.self, forKey: .content).shown(most: Message.mostSentence)) }
        default: return nil
        }
        let container = try body().container(keyedBy: Key.self)
        number = try container.decode(UInt32.self, forKey: .number)
        content = try read(container)
    }

    /// Encodes the body of a message: `{"number": N, "content": ...}`.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.container(keyedBy: Key.self)
        try container.encode(number, forKey: .number)
        switch content {
        case .host(let state): try container.encodeIfPresent(state, forKey: .content)
        case .reserve(let body): try container.encode(body, forKey: .content)
        case .reserved(let body): try container.encode(body, forKey: .content)
        case .unreserve(let text), .turn(let text), .renew(let text), .denied(let text):
            try container.encode(text, forKey: .content)
        case .turned: break
        case .recall(let body): try container.encode(body, forKey: .content)
        case .examine(let body): try container.encode(body, forKey: .content)
        case .examined(let body): try container.encode(body, forKey: .content)
        case .members(let body): try container.encode(body, forKey: .content)
        case .renewed(let body): try container.encode(body, forKey: .content)
        case .recalled(let body): try container.encode(body, forKey: .content)
        }
    }
}
