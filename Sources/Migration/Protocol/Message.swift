public import Emulator
internal import FoundationEssentials

/// The messages of the handshake protocol, version 1; `docs/protocol.md` has the states.
///
/// Every message but the first names its migration by the connection: a connection belongs to one migration from HELLO
/// on. Messages are idempotent, so that a conversation can go on over a new connection.
public enum Message: Sendable, Hashable {
    /// Source: who speaks, and what the connection is for.
    case hello(Hello)
    /// Destination: the version that both speak, and where it stands in this migration.
    case welcome(Welcome)
    /// Source: the guest.
    case offer(Offer)
    /// Destination: files to be sent, by their index in the offer.
    case need([Int])
    /// Source: a file follows as data frames, as many bytes as the offer says.
    case file(Int)
    /// Destination: the exports are there and QEMU waits; or every reason why not.
    case ready(Ready)
    /// Source: the disks are in sync. Destination, in answer: their digests are up to date.
    case mirrored
    /// Source: memory is about to come. Destination, in answer: QEMU listens for it.
    case stream
    /// Source: the mirrors are closed. Destination, in answer: the exports are closed and PREPARED is durable.
    case prepared
    /// Source: RELEASED is durable, the destination shall run the guest.
    case release
    /// Destination: OWNER is durable and the guest runs.
    case owned(Owned)
    /// Source: OWNED was received. Destination, in answer: this migration is over.
    case done
    /// Either side: give up, before RELEASE only.
    case abort(String)
    /// Source: are you there?
    case ping
    /// Destination: yes.
    case pong

    /// See `hello`.
    public struct Hello: Sendable, Hashable, Codable {
        /// What a connection carries.
        public enum Role: String, Sendable, Codable {
            /// These messages.
            case control
            /// QEMU's migration stream, as it is, after `welcome`.
            case stream
        }
        /// The protocol versions that the source speaks.
        public var versions: [Int]
        /// What the connection is for.
        public var role: Role
        /// The migration's id.
        public var migration: String
        /// Which of QEMU's connections a stream connection carries, in the order in which QEMU opened them.
        public var index: Int

        /// Makes a greeting.
        public init(role: Role, migration: String, index: Int = 0) {
            versions = [1]
            self.role = role
            self.migration = migration
            self.index = index
        }
    }

    /// See `welcome`.
    public struct Welcome: Sendable, Hashable, Codable {
        /// The version from here on.
        public var version: Int
        /// Where the destination stands: "new", "offered", "prepared", "owner", "done".
        public var state: String

        /// Makes an answer.
        public init(version: Int = 1, state: String) {
            self.version = version
            self.state = state
        }
    }

    /// See `offer`.
    public struct Offer: Sendable, Hashable, Codable {
        /// A disk to be copied.
        public struct Disk: Sendable, Hashable, Codable {
            /// Its name: "disk0".
            public var name: String
            /// How many bytes.
            public var size: UInt64
            /// How many bytes of it are allocated at the source: what the copy needs at least.
            public var allocated: UInt64
            /// As the command line writes it.
            public var path: String
            /// Makes a disk.
            public init(name: String, size: UInt64, allocated: UInt64, path: String) {
                self.name = name
                self.size = size
                self.allocated = allocated
                self.path = path
            }
        }
        /// A file that the guest reads.
        public struct File: Sendable, Hashable, Codable {
            /// As the command line writes it.
            public var path: String
            /// How many bytes.
            public var size: UInt64
            /// Its digest in hexadecimal, taken in chunks as a disk's is.
            public var digest: String
            /// Makes a file.
            public init(path: String, size: UInt64, digest: String) {
                self.path = path
                self.size = size
                self.digest = digest
            }
        }
        /// The guest's name.
        public var guest: String
        /// Its QEMU command line.
        public var commandLine: GuestCommandLine
        /// The machine type with its version.
        public var machine: String
        /// The source's QEMU.
        public var emulatorVersion: String
        /// The disks.
        public var disks: [Disk]
        /// The files.
        public var files: [File]
        /// Whether the guest has a UUID that QEMU shall compare.
        public var hasUUID: Bool

        /// Makes an offer.
        public init(
            guest: String,
            commandLine: GuestCommandLine,
            machine: String,
            emulatorVersion: String,
            disks: [Disk],
            files: [File],
            hasUUID: Bool
        ) {
            self.guest = guest
            self.commandLine = commandLine
            self.machine = machine
            self.emulatorVersion = emulatorVersion
            self.disks = disks
            self.files = files
            self.hasUUID = hasUUID
        }
    }

    /// See `ready`.
    public struct Ready: Sendable, Hashable, Codable {
        /// Why not; empty when everything is in order.
        public var reasons: [String]
        /// Where the NBD server listens, on the host that the source connected to.
        public var nbdPort: UInt16
        /// The exports by disk name.
        public var exports: [String: String]
        /// Makes an answer.
        public init(reasons: [String] = [], nbdPort: UInt16 = 0, exports: [String: String] = [:]) {
            self.reasons = reasons
            self.nbdPort = nbdPort
            self.exports = exports
        }
    }

    /// See `owned`.
    public struct Owned: Sendable, Hashable, Codable {
        /// The digests of the disks at the switchover, read back from the images.
        public var digests: [String: String]
        /// Makes an answer.
        public init(digests: [String: String]) { self.digests = digests }
    }

    /// The message's name on the wire.
    public var name: String {
        switch self {
        case .hello: "HELLO"
        case .welcome: "WELCOME"
        case .offer: "OFFER"
        case .need: "NEED"
        case .file: "FILE"
        case .ready: "READY"
        case .mirrored: "MIRRORED"
        case .stream: "STREAM"
        case .prepared: "PREPARED"
        case .release: "RELEASE"
        case .owned: "OWNED"
        case .done: "DONE"
        case .abort: "ABORT"
        case .ping: "PING"
        case .pong: "PONG"
        }
    }
}

extension Message: Codable {
    private enum Key: String, CodingKey { case type, body }

    /// Decodes `{"type": NAME, "body": ...}`.
    public init(from decoder: any Decoder) throws {
        let container = try decoder.container(keyedBy: Key.self)
        let type = try container.decode(String.self, forKey: .type)
        switch type {
        case "HELLO": self = .hello(try container.decode(Hello.self, forKey: .body))
        case "WELCOME": self = .welcome(try container.decode(Welcome.self, forKey: .body))
        case "OFFER": self = .offer(try container.decode(Offer.self, forKey: .body))
        case "NEED": self = .need(try container.decode([Int].self, forKey: .body))
        case "FILE": self = .file(try container.decode(Int.self, forKey: .body))
        case "READY": self = .ready(try container.decode(Ready.self, forKey: .body))
        case "MIRRORED": self = .mirrored
        case "STREAM": self = .stream
        case "PREPARED": self = .prepared
        case "RELEASE": self = .release
        case "OWNED": self = .owned(try container.decode(Owned.self, forKey: .body))
        case "DONE": self = .done
        case "ABORT": self = .abort(try container.decode(String.self, forKey: .body))
        case "PING": self = .ping
        case "PONG": self = .pong
        default:
            throw DecodingError.dataCorruptedError(forKey: .type, in: container, debugDescription: "unknown \(type)")
        }
    }

    /// Encodes `{"type": NAME, "body": ...}`.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.container(keyedBy: Key.self)
        try container.encode(name, forKey: .type)
        switch self {
        case .hello(let body): try container.encode(body, forKey: .body)
        case .welcome(let body): try container.encode(body, forKey: .body)
        case .offer(let body): try container.encode(body, forKey: .body)
        case .need(let body): try container.encode(body, forKey: .body)
        case .file(let body): try container.encode(body, forKey: .body)
        case .ready(let body): try container.encode(body, forKey: .body)
        case .owned(let body): try container.encode(body, forKey: .body)
        case .abort(let body): try container.encode(body, forKey: .body)
        case .mirrored, .stream, .prepared, .release, .done, .ping, .pong: break
        }
    }
}
