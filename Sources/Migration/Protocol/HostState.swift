/// What a host has to give, as its destination agent says it to one identity: for who plans where guests go. The agent alone decides,
/// by `HostMessage.Content.reserve`.
public struct HostState: Sendable, Hashable, Codable {
    /// Bytes of memory of the host.
    public var memory: UInt64
    /// Bytes of memory that the kernel says are available (`MemAvailable` of `/proc/meminfo`).
    public var freeMemory: UInt64
    /// Bytes of that which are promised: reserved, or of guests that are here or on their way and have not taken all of theirs.
    public var promisedMemory: UInt64
    /// Free bytes of the file system of the image directory.
    public var freeDisk: UInt64
    /// Bytes of that which are reserved, or will be written for guests on their way.
    public var promisedDisk: UInt64
    /// Processors that are online.
    public var processors: UInt64
    /// Guests that run on the host.
    public var guests: UInt64
    /// Guests that are on their way to it.
    public var incoming: UInt64
    /// How many may be on their way at once (`--most-incoming`); nil for no limit.
    public var mostIncoming: UInt64?
    /// Why the host takes nobody, a sentence; nil when it is not cordoned.
    public var cordon: String?
    /// What the policy leaves to who asks.
    public var allowance: Allowance
    /// Of the guests here whose home is with who asks: how many are of each group that is kept apart; nil from agents that do not tell.
    public var groups: [String: Int]?
    /// Which host it is; see `HostMark`. Nil from agents that do not tell.
    public var mark: String?
    /// Its clock, in milliseconds since 1970. Nil from agents that do not tell.
    public var clock: Int64?

    /// What one identity's guests may take in addition to what they have; nil for no limit.
    public struct Allowance: Sendable, Hashable, Codable {
        /// Bytes of memory.
        public var memory: UInt64?
        /// Processors.
        public var processors: UInt64?
        /// Bytes of disks and files, by their sizes.
        public var disk: UInt64?
        /// Guests.
        public var guests: UInt64?

        /// No limits.
        public init() {}
    }

    /// What can still be promised of the memory.
    public var unpromisedMemory: UInt64 { freeMemory - min(promisedMemory, freeMemory) }
    /// What can still be promised of the disk.
    public var unpromisedDisk: UInt64 { freeDisk - min(promisedDisk, freeDisk) }

    /// Makes a description.
    public init(
        memory: UInt64,
        freeMemory: UInt64,
        promisedMemory: UInt64,
        freeDisk: UInt64,
        promisedDisk: UInt64,
        processors: UInt64,
        guests: UInt64,
        incoming: UInt64,
        mostIncoming: UInt64? = nil,
        cordon: String? = nil,
        allowance: Allowance = Allowance(),
        groups: [String: Int]? = nil,
        mark: String? = nil,
        clock: Int64? = nil
    ) {
        self.memory = memory
        self.freeMemory = freeMemory
        self.promisedMemory = promisedMemory
        self.freeDisk = freeDisk
        self.promisedDisk = promisedDisk
        self.processors = processors
        self.guests = guests
        self.incoming = incoming
        self.mostIncoming = mostIncoming
        self.cordon = cordon
        self.allowance = allowance
        self.groups = groups
        self.mark = mark
        self.clock = clock
    }
}
