public import Emulator
internal import FoundationEssentials
internal import IO

/// The messages of the handshake protocol, version 1; `docs/protocol.md` has the states.
///
/// Every message but the first names its migration by the connection: a connection belongs to one migration from HELLO
/// on. Messages are idempotent, so that a conversation can go on over a new connection.
public enum Message: Sendable, Hashable {
    /// Source: who speaks, and what the connection is for.
    case hello(Hello)
    /// Destination: the version that both speak, and where it stands in this migration.
    case welcome(Welcome)
    /// Source: so many bytes follow as data frames. Destination, in answer: they have come.
    case probe(Int)
    /// Source: the values of the guest's secrets in base64, by id, before the offer that needs them.
    case secrets([String: String])
    /// Source: the guest.
    case offer(Offer)
    /// Destination: a blank copy of the guest waits for the blank copy of the source.
    case shadow(Shadow)
    /// Source: the rehearsal is over.
    case rehearsed(Rehearsed)
    /// Destination: files to be sent, by their index in the offer.
    case need([Int])
    /// Source: a file follows as data frames, as many bytes as the offer says.
    case file(Int)
    /// Destination: the exports are there and QEMU waits; or every reason why not.
    case ready(Ready)
    /// Source: the disks are in sync. Destination, in answer: their digests are up to date.
    case mirrored
    /// Destination, before it answers MIRRORED: how far it is. Needs `Feature.readBack`.
    case readBack(ReadBack)
    /// Source: memory is about to come. Destination, in answer: QEMU listens for it.
    case stream
    /// Source: the mirrors are closed, and this is what the disks have to be. Destination, in answer: the exports are closed
    /// and PREPARED is durable.
    case prepared(Prepared)
    /// Source: RELEASED is durable, the destination shall run the guest.
    case release(Release)
    /// Destination, in answer to RELEASE: it will never run the guest, durably.
    case refused(String)
    /// Destination: OWNER is durable and the guest runs.
    case owned(Owned)
    /// Source, after OWNED, without an answer: what the guest wrote to its console last. Needs `Feature.consoles`.
    case console(ConsoleTail)
    /// Source, after OWNED, without an answer: what it will show for the guest's consoles. Needs `Feature.consoleRelays`.
    case grant(ConsoleGranting)
    /// Source, on a connection with the role `console`: which one it wants.
    case open(ConsoleOpening)
    /// Destination, in answer: what follows is that console.
    case opened
    /// Source: OWNED was received. Destination, in answer: this migration is over.
    case done
    /// Either side: give up, before RELEASE only.
    case abort(String)
    /// Source: who took the guest for the source without the destination's word. Destination, in answer: that is known here,
    /// durably. Needs `Feature.overruling`.
    case overruled(String)
    /// Source: are you there?
    case ping
    /// Destination: yes.
    case pong
    /// Either side: about a host, on a connection with the role `host`. Needs `Feature.evacuation`.
    case host(HostMessage)

    /// See `hello`.
    public struct Hello: Sendable, Hashable, Codable {
        /// What a connection carries.
        public enum Role: String, Sendable, Codable {
            /// These messages.
            case control
            /// QEMU's migration stream, as it is, after `welcome`.
            case stream
            /// What is said about the host, for an evacuation. Needs `Feature.evacuation`.
            case host
            /// The digests of what the destination has of a disk, the one with the number `index` in the offer, as data frames after
            /// `welcome`. Needs `Feature.seeds`.
            case seed
            /// A guest's console, after `open` and `opened`. Needs `Feature.consoleRelays`.
            case console
        }
        /// The protocol versions that the source speaks.
        public var versions: [Int]
        /// What the connection is for.
        public var role: Role
        /// The migration's id; the evacuation's for the role `host`; any for `console`.
        public var migration: String
        /// Which of QEMU's connections a stream connection carries, in the order in which QEMU opened them; for `seed`, which disk.
        public var index: Int
        /// Which of the connections that share a stream this is; nil for one that carries it alone. Needs `Feature.lanes`.
        public var lane: Lane?
        /// What the source can do beyond the first version; see `Feature`.
        public var features: [String]?

        /// One of several connections that carry a stream in pieces.
        public struct Lane: Sendable, Hashable, Codable {
            /// Which sending of the memory this is; those of one migration differ.
            public var attempt: Int
            /// From 0 on. The first one is there before the others, and carries what QEMU answers.
            public var number: Int

            /// Describes a lane.
            public init(attempt: Int, number: Int) {
                self.attempt = attempt
                self.number = number
            }
        }

        /// Makes a greeting.
        public init(role: Role, migration: String, index: Int = 0, lane: Lane? = nil) {
            versions = [1]
            features = Feature.own
            self.role = role
            self.migration = migration
            self.index = index
            self.lane = lane
        }
    }

    /// See `welcome`.
    public struct Welcome: Sendable, Hashable, Codable {
        /// The version from here on.
        public var version: Int
        /// Where the destination stands.
        public var state: DestinationState
        /// By which check each reason was found, in their order; nil from an agent that does not say.
        public var checks: [String]?
        /// Where the NBD server listens, on the host that the source connected to.
        public var nbdPort: UInt16
        /// What the destination can do beyond the first version; see `Feature`.
        public var features: [String]?
        /// Who took the guest for the destination without the source's word; nil when nobody did.
        public var takenBy: String?

        /// Makes an answer.
        public init(version: Int = 1, state: DestinationState, nbdPort: UInt16 = 0, takenBy: String? = nil) {
            self.version = version
            self.state = state
            self.nbdPort = nbdPort
            self.takenBy = takenBy
            features = Feature.own
        }
    }

    /// See `offer`.
    public struct Offer: Sendable, Hashable, Codable {
        /// A disk to be copied.
        public struct Disk: Sendable, Hashable, Codable {
            /// Its name: "disk0".
            public var name: String
            /// How many bytes the mirror copies.
            public var size: UInt64
            /// How many bytes of it are allocated at the source: what the copy needs at least.
            public var allocated: UInt64
            /// As the command line writes it.
            public var path: String
            /// The format of the image that the destination makes: "raw", "qcow2".
            public var format: String
            /// The format of the image at the source.
            public var sourceFormat = "raw"
            /// The bytes of an encrypted container with its header, which is sent as a file; nil for other images.
            public var containerSize: UInt64?
            /// Whether it is an encrypted container.
            public var isContainer: Bool { containerSize != nil }
            /// The secret that opens the image, when it is made anew; nil when none is needed.
            public var keySecret: String?
            /// The images under it, the nearest first, without digests.
            public var backing: [File] = []
            /// The format of the nearest of them.
            public var backingFormat: String?
            /// The image of the destination's operator that the disk is begun with, by its path below the directory that the source may
            /// use; nil for none.
            public var seed: String?
            /// What the file with a container's header is called.
            public var headerName: String { "header:\(name)" }
            /// Makes a disk.
            public init(name: String, size: UInt64, allocated: UInt64, path: String, format: String = "raw") {
                self.name = name
                self.size = size
                self.allocated = allocated
                self.path = path
                self.format = format
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
        /// A network for which the destination makes a tap interface.
        public struct Network: Sendable, Hashable, Codable {
            /// The interface as the command line has it. The destination takes another name where that one is taken.
            public var tap: String
            /// The destination's bridge that it is to be in.
            public var bridge: String
            /// The source's bridge that it is in; nil for none.
            public var former: String?
            /// Makes a network.
            public init(tap: String, bridge: String, former: String? = nil) {
                self.tap = tap
                self.bridge = bridge
                self.former = former
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
        /// Whether only the rehearsal is wanted: nothing is made, and nothing is kept.
        public var isRehearsal = false
        /// What the blank copies need to know: the bytes of block nodes, drives and files by name or path.
        public var sizes: [String: UInt64] = [:]
        /// The guest's memory at its start, in bytes.
        public var memory: UInt64 = 0
        /// The name of the machine's memory object.
        public var memoryID: String?
        /// Whether `-cpu` names all that the guest's processor has, so that what it does not name must be off.
        public var hasFixedProcessor: Bool?
        /// What devices, and the "processor", are given that they have anyway, "DRIVER property" to the value: a QEMU that does not
        /// know the property can do without.
        public var standards: [String: String]?
        /// The room that was reserved for the guest; nil when none was.
        public var reservation: String?
        /// What its operator has said about where the guest goes.
        public var placement: GuestPlacement?
        /// The networks whose taps the destination makes; nil for none. Needs `Feature.networks`.
        public var networks: [Network]?
        /// Where the guest first came from, as far as the source knows; nil when it was at home there.
        public var home: GuestRecord.Origin?
        /// What is known of the guest beyond its command line.
        public var origin: GuestCommandLine.Origin {
            GuestCommandLine.Origin(
                hasFixedProcessor: hasFixedProcessor == true,
                standards: standards,
                emulatorVersion: emulatorVersion
            )
        }

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

    /// See `shadow`.
    public struct Shadow: Sendable, Hashable, Codable {
        /// What the blank copy is, as the guest would see it.
        public var fingerprint: MachineFingerprint
        /// The destination's QEMU.
        public var emulatorVersion: String
        /// How options of the command line were rewritten.
        public var changes: [String]
        /// What works but should be known.
        public var warnings: [String]
        /// Images under disks that are there, by their path and size only.
        public var backing: [String]
        /// The destination's clock, in milliseconds since 1970.
        public var clock: Int64
        /// Free bytes in the image directory.
        public var free: UInt64
        /// The destination's part of what proofs of lineage are bound to; nil when it wants none.
        public var seedNonce: String?

        /// Makes an answer.
        public init(
            fingerprint: MachineFingerprint,
            emulatorVersion: String,
            changes: [String],
            warnings: [String],
            backing: [String],
            clock: Int64,
            free: UInt64
        ) {
            self.fingerprint = fingerprint
            self.emulatorVersion = emulatorVersion
            self.changes = changes
            self.warnings = warnings
            self.backing = backing
            self.clock = clock
            self.free = free
        }
    }

    /// See `rehearsed`.
    public struct Rehearsed: Sendable, Hashable, Codable {
        /// The digests of the images that `Shadow.backing` names, by path.
        public var backing: [String: String]
        /// The source's part of what proofs of lineage are bound to; nil when it has none.
        public var seedNonce: String?
        /// By the name of a disk: proofs that the source knows its lineages; see `SeedExchange`.
        public var lineages: [String: [String]]?
        /// Makes a message.
        public init(backing: [String: String] = [:]) { self.backing = backing }
    }

    /// See `ready`.
    public struct Ready: Sendable, Hashable, Codable {
        /// Why not; empty when everything is in order.
        public var reasons: [String]
        /// By which check each reason was found, in their order; nil from an agent that does not say.
        public var checks: [String]?
        /// Where the NBD server listens, on the host that the source connected to.
        public var nbdPort: UInt16
        /// The exports by disk name.
        public var exports: [String: String]
        /// The disks whose backing image is here, so that only what is above it is copied.
        public var keepsBacking: [String]
        /// By the name of a disk: that it is begun with an image that is there. The proof that the destination knows its lineage; empty
        /// for the image that the source named.
        public var seeds: [String: String]?
        /// Where the guest's displays and the like listen there; nil when the destination does not tell.
        public var listeners: [GuestListener]?
        /// Makes an answer.
        public init(
            reasons: [String] = [],
            checks: [String]? = nil,
            nbdPort: UInt16 = 0,
            exports: [String: String] = [:],
            keepsBacking: [String] = [],
            seeds: [String: String] = [:],
            listeners: [GuestListener]? = nil
        ) {
            self.listeners = listeners
            self.seeds = seeds.isEmpty ? nil : seeds
            self.reasons = reasons
            self.checks = checks
            self.nbdPort = nbdPort
            self.exports = exports
            self.keepsBacking = keepsBacking
        }
    }

    /// See `readBack`.
    public struct ReadBack: Sendable, Hashable, Codable {
        /// How many bytes of the disks have been read back.
        public var done: UInt64
        /// How many have to be, as far as it is known now.
        public var total: UInt64
        /// Makes a message.
        public init(done: UInt64, total: UInt64) {
            self.done = done
            self.total = total
        }
    }

    /// See `prepared`.
    public struct Prepared: Sendable, Hashable, Codable {
        /// What each disk has to be, by its name; without a disk of which too little is known.
        public var proofs: [String: DiskProof]
        /// Whether all of each disk is to be read back, and RELEASE brings what to compare it with.
        public var isFull: Bool
        /// Makes a message.
        public init(proofs: [String: DiskProof] = [:], isFull: Bool = false) {
            self.proofs = proofs
            self.isFull = isFull
        }
    }

    /// See `release`.
    public struct Release: Sendable, Hashable, Codable {
        /// The digests of the source's images, read in full while the guest was paused; empty when that was not asked for.
        public var digests: [String: String]
        /// In which state the guest was when the migration stopped it; nil for running, and from a source that knows no other.
        public var runState: RunState?
        /// Whether the guest is off: its QEMU was only there for its move, and is to end. Needs `Feature.stoppedGuests`.
        public var isOff: Bool?
        /// By the name of a disk: its lineages, the latest last, for the way back.
        public var lineages: [String: [Lineage]]?
        /// Makes a message.
        public init(digests: [String: String] = [:], runState: RunState? = nil) {
            self.digests = digests
            self.runState = runState
        }
    }

    /// See `owned`.
    public struct Owned: Sendable, Hashable, Codable {
        /// The digests of the disks at the switchover, read back from the images.
        public var digests: [String: String]
        /// How many milliseconds before this answer the guest was resumed; nil when it was earlier than for this RELEASE.
        public var sinceResumed: Double?
        /// Makes an answer.
        public init(digests: [String: String], sinceResumed: Double? = nil) {
            self.digests = digests
            self.sinceResumed = sinceResumed
        }
    }

    /// The message's name on the wire.
    public var name: String {
        switch self {
        case .hello: "HELLO"
        case .welcome: "WELCOME"
        case .probe: "PROBE"
        case .secrets: "SECRETS"
        case .offer: "OFFER"
        case .shadow: "SHADOW"
        case .rehearsed: "REHEARSED"
        case .need: "NEED"
        case .file: "FILE"
        case .ready: "READY"
        case .mirrored: "MIRRORED"
        case .readBack: "READBACK"
        case .stream: "STREAM"
        case .prepared: "PREPARED"
        case .release: "RELEASE"
        case .refused: "REFUSED"
        case .owned: "OWNED"
        case .console: "CONSOLE"
        case .grant: "GRANT"
        case .open: "OPEN"
        case .opened: "OPENED"
        case .done: "DONE"
        case .abort: "ABORT"
        case .overruled: "OVERRULED"
        case .ping: "PING"
        case .pong: "PONG"
        case .host(let body): body.name
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
        case "PROBE": self = .probe(try container.decode(Int.self, forKey: .body))
        case "SECRETS": self = .secrets(try container.decode([String: String].self, forKey: .body))
        case "SHADOW": self = .shadow(try container.decode(Shadow.self, forKey: .body))
        case "REHEARSED": self = .rehearsed(try container.decode(Rehearsed.self, forKey: .body))
        case "OFFER": self = .offer(try container.decode(Offer.self, forKey: .body))
        case "NEED": self = .need(try container.decode([Int].self, forKey: .body))
        case "FILE": self = .file(try container.decode(Int.self, forKey: .body))
        case "READY": self = .ready(try container.decode(Ready.self, forKey: .body))
        case "MIRRORED": self = .mirrored
        case "READBACK": self = .readBack(try container.decode(ReadBack.self, forKey: .body))
        case "STREAM": self = .stream
        case "PREPARED": self = .prepared(try container.decode(Prepared.self, forKey: .body))
        case "RELEASE": self = .release(try container.decode(Release.self, forKey: .body))
        case "REFUSED": self = .refused(try Self.sentence(container))
        case "OWNED": self = .owned(try container.decode(Owned.self, forKey: .body))
        case "CONSOLE": self = .console(try container.decode(ConsoleTail.self, forKey: .body))
        case "GRANT": self = .grant(try container.decode(ConsoleGranting.self, forKey: .body))
        case "OPEN": self = .open(try container.decode(ConsoleOpening.self, forKey: .body))
        case "OPENED": self = .opened
        case "DONE": self = .done
        case "ABORT": self = .abort(try Self.sentence(container))
        case "OVERRULED": self = .overruled(try Self.sentence(container))
        case "PING": self = .ping
        case "PONG": self = .pong
        default:
            let body = { try container.superDecoder(forKey: .body) }
            if let message = try HostMessage(type, from: body) {
                self = .host(message)
                return
            }
            throw DecodingError.dataCorruptedError(forKey: .type, in: container, debugDescription: "unknown \(type)")
        }
    }

    /// A sentence of the other side's, which ends up before people and in journals: one line, and no longer than anybody reads.
    private static func sentence(_ container: KeyedDecodingContainer<Key>) throws -> String {
        try container.decode(String.self, forKey: .body).shown(most: mostSentence)
    }
    /// Bytes of a sentence that are taken.
    static let mostSentence = 4096

    /// Encodes `{"type": NAME, "body": ...}`.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.container(keyedBy: Key.self)
        try container.encode(name, forKey: .type)
        switch self {
        case .hello(let body): try container.encode(body, forKey: .body)
        case .welcome(let body): try container.encode(body, forKey: .body)
        case .readBack(let body): try container.encode(body, forKey: .body)
        case .probe(let body): try container.encode(body, forKey: .body)
        case .secrets(let body): try container.encode(body, forKey: .body)
        case .offer(let body): try container.encode(body, forKey: .body)
        case .shadow(let body): try container.encode(body, forKey: .body)
        case .rehearsed(let body): try container.encode(body, forKey: .body)
        case .need(let body): try container.encode(body, forKey: .body)
        case .file(let body): try container.encode(body, forKey: .body)
        case .ready(let body): try container.encode(body, forKey: .body)
        case .owned(let body): try container.encode(body, forKey: .body)
        case .console(let body): try container.encode(body, forKey: .body)
        case .grant(let body): try container.encode(body, forKey: .body)
        case .open(let body): try container.encode(body, forKey: .body)
        case .abort(let body), .refused(let body), .overruled(let body): try container.encode(body, forKey: .body)
        case .prepared(let body): try container.encode(body, forKey: .body)
        case .release(let body): try container.encode(body, forKey: .body)
        case .host(let body): try container.encode(body, forKey: .body)
        case .mirrored, .stream, .opened, .done, .ping, .pong: break
        }
    }
}
