internal import IO
internal import Migration
public import TLS

/// What `crossdock evacuate` was asked to do.
public struct EvacuationOrder: Sendable, Codable {
    /// A host that guests may go to.
    public struct Target: Sendable, Hashable, Codable {
        /// Its name or address; its certificate must be for it.
        public var host: String
        /// Its control port.
        public var port: UInt16

        /// Names a target.
        public init(host: String, port: UInt16) {
            self.host = host
            self.port = port
        }

        /// Reads `HOST[:PORT]`.
        ///
        /// - Throws: `MigrationError` or `ChannelError` for what is none.
        public init(parsing text: String) throws {
            let address = try SocketAddress(parsing: text, defaultPort: MessageConnection.port)
            guard case .inet(let host, let port) = address, !host.isEmpty else {
                throw MigrationError(.unreachable, "'\(text)' is no host; write HOST or HOST:PORT")
            }
            self.init(host: host, port: port)
        }
    }

    /// Which guests are taken, or left out.
    public enum Selector: Sendable, Hashable, Codable {
        /// The guest of this name.
        case guest(String)
        /// The guests with this label.
        case label(key: String, value: String)
    }

    /// Which guest goes first.
    public enum Sequence: String, Sendable, Codable, CaseIterable {
        /// The one with the most memory and disk.
        case largest
        /// The one with the least.
        case smallest
        /// The one with the highest `--priority`.
        case priority
    }

    /// What follows when a guest could not be moved.
    public enum Failure: String, Sendable, Codable, CaseIterable {
        /// The others are moved.
        case `continue`
        /// No other guest is begun.
        case stop
    }

    /// Where they may go, the preferred ones first.
    public var targets: [Target]
    /// Only these guests; all when empty.
    public var only: [Selector] = []
    /// Not these: they count as if they were not there.
    public var except: [Selector] = []
    /// These stay, whatever becomes of them.
    public var leave: [String] = []
    /// Whether QEMUs that are no guests of this host count as if they were not there.
    public var knownOnly = false
    /// Whether guests that are set to `stop` may be stopped and moved so.
    public var mayStop = false
    /// How long such a guest may take to shut down, in seconds.
    public var stopPatience = 120
    /// Whether those that can move are moved although others cannot.
    public var startsAnyway = false
    /// Whether a group that is to be kept apart may meet on a host when there is no other way.
    public var ignoresAffinity = false
    /// How many disks are copied at once: guests, not disks of one guest.
    public var parallelCopies = 1
    /// When no guest is begun any more, and what has not switched over is given up: seconds since 1970; nil for never.
    public var deadline: Int?
    /// Which guest goes first.
    public var sequence = Sequence.largest
    /// What follows when one could not be moved.
    public var onFailure = Failure.continue
    /// What every migration gets: its guest, its target and its id are filled in.
    public var migration: MigrationPlan
    /// The objects that make the credentials.
    public var objects: [String]
    /// The id of the credentials among them.
    public var tlsCreds: String?
    /// What relative paths among them begin from.
    public var directory: String

    /// Makes an order.
    public init(
        targets: [Target],
        migration: MigrationPlan,
        credentials: CredentialSelection,
        directory: String
    ) {
        self.targets = targets
        self.migration = migration
        objects = credentials.objects
        tlsCreds = credentials.tlsCreds
        self.directory = directory
    }

    /// The order for the source agent that moves one guest.
    func agent(_ guest: String, to target: Target, migration id: String, _ change: (inout MigrationPlan) -> Void)
        -> SourceAgentOrder
    {
        var plan = migration
        (plan.id, plan.guest, plan.host, plan.port) = (id, guest, target.host, target.port)
        change(&plan)
        return SourceAgentOrder(
            plan: plan,
            credentials: CredentialSelection(objects: objects, tlsCreds: tlsCreds),
            directory: directory
        )
    }
}

extension EvacuationOrder.Target: CustomStringConvertible {
    /// As an operator writes it.
    public var description: String {
        port == MessageConnection.port ? host : host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
    }
}
