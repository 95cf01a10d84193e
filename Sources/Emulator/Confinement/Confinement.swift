/// What one program may reach, as a value: files and directories with rights, ports, limits and a user.
///
/// It is applied in the child between fork and exec. What is not named here cannot be opened, whatever the user may do; rules
/// belong to files and cannot grow later, so what comes later needs a directory that is named, or a descriptor.
public struct Confinement: Sendable, Hashable {
    /// What may be done with a file, or with everything below a directory (`LANDLOCK_ACCESS_FS_*` of landlock(7)).
    public struct Rights: OptionSet, Sendable, Hashable {
        /// Landlock's bits.
        public let rawValue: UInt64
        /// Takes Landlock's bits.
        public init(rawValue: UInt64) { self.rawValue = rawValue }

        /// To run it.
        public static let execute = Rights(rawValue: 1 << 0)
        /// To open it for writing.
        public static let write = Rights(rawValue: 1 << 1)
        /// To open it for reading.
        public static let read = Rights(rawValue: 1 << 2)
        /// To list a directory.
        public static let list = Rights(rawValue: 1 << 3)
        /// To remove a file.
        public static let removeFile = Rights(rawValue: 1 << 5)
        /// To make or to rename a file.
        public static let makeFile = Rights(rawValue: 1 << 8)
        /// To make a Unix socket.
        public static let makeSocket = Rights(rawValue: 1 << 9)
        /// To shorten or to empty it.
        public static let truncate = Rights(rawValue: 1 << 14)
        /// To control a device (ioctl).
        public static let control = Rights(rawValue: 1 << 15)

        /// What a directory has that holds programs' parts.
        public static let reading: Rights = [.read, .list]
        /// What an image has.
        public static let image: Rights = [.read, .write, .truncate]
        /// What a device has.
        public static let device: Rights = [.read, .write, .control]
        /// What a directory has in which files come and go.
        public static let directory: Rights = [.read, .list, .write, .truncate, .makeFile, .makeSocket, .removeFile]
    }

    /// Rights of one file or directory.
    public struct Rule: Sendable, Hashable {
        /// The file or directory, in the names of whoever starts the program.
        public var path: String
        /// What may be done with it. What only a directory can have is ignored for a file.
        public var rights: Rights
        /// Whether it may be missing.
        public var isOptional: Bool

        /// Makes a rule.
        public init(_ path: String, _ rights: Rights, isOptional: Bool = false) {
            self.path = path
            self.rights = rights
            self.isOptional = isOptional
        }
    }

    /// The files.
    public var rules: [Rule]
    /// The TCP ports on which it may listen.
    public var ports: Set<UInt16> = []
    /// Whether it has no network at all, where the one that starts it may arrange that.
    public var isWithoutNetwork = false
    /// The user and group that it becomes; nil to stay who started it.
    public var user: UInt32?
    /// Further groups, of devices that it has; only with `user`.
    public var groups: [UInt32] = []
    /// Directories, with the files in them, and files that are given to the user before the program starts.
    public var ownFiles: [String] = []
    /// Directories of this program's own, from which the user may pass to what it was given.
    public var roots: [String] = []
    /// The most bytes that it may lock in memory (RLIMIT_MEMLOCK); nil to keep what there is. The kernel counts the rings of
    /// io_uring, for each user.
    public var lockedBytes: UInt64?

    /// The most descriptors that it may have open (RLIMIT_NOFILE), where whoever starts it may have so many.
    static let descriptors: UInt64 = 65_536

    /// Makes a confinement.
    public init(_ rules: [Rule]) { self.rules = rules }

    /// What every confined program gets of the environment: nothing that loads libraries or names files.
    static let environment: [String] = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8",
    ]

    /// What a user of its own may lock in memory: io_uring takes 64 KiB for each disk, and a little more.
    static let lockedBytes: UInt64 = 64 << 20

    /// Makes the program another user's, and gives that user its files.
    mutating func become(_ policy: ConfinementPolicy, owning files: [String]) {
        guard let user = policy.user else { return }
        self.user = user
        ownFiles = files
        roots = policy.roots
        lockedBytes = lockedBytes ?? Self.lockedBytes
        groups = HandOver.groups(of: rules.filter { $0.rights.contains(.control) }.map(\.path))
    }

    /// What every program needs: image locks are silently off without /dev/null.
    static let common: [Rule] = [
        Rule("/dev/null", [.read, .write]),
        Rule("/dev/zero", .read, isOptional: true),
        Rule("/dev/urandom", .read, isOptional: true),
        Rule("/dev/random", .read, isOptional: true),
        Rule("/etc/ld.so.cache", .read, isOptional: true),
        Rule("/etc/localtime", .read, isOptional: true),
        Rule("/usr/share/zoneinfo", .reading, isOptional: true),
    ]
}
