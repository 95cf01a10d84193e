public import Emulator
internal import Glibc
internal import IO
public import Migration

/// A guest as another host offers it, and where all of it would be on this one.
///
/// Every path that the offer names leads to a place that is made for the guest; nothing here opens a file or starts a program.
public struct OfferedGuest: Sendable {
    /// The offer.
    public let offer: Message.Offer
    /// The guest's own directory for images and files.
    public let imageDirectory: String
    /// Where what QEMU makes for it goes.
    public let runDirectory: String
    private let disks: [String: Message.Offer.Disk]
    private let files: [String: Message.Offer.File]
    private let allowed: AllowedDirectories

    /// Takes an offer.
    ///
    /// - Parameters:
    ///   - offer: what came.
    ///   - images: where guests have their directories.
    ///   - run: where what QEMU makes goes.
    ///   - allowed: where the guest may name directories of this host.
    public init(_ offer: Message.Offer, images: String, run: String, allowed: AllowedDirectories) {
        self.offer = offer
        imageDirectory = "\(images)/\(offer.guest)"
        runDirectory = run
        self.allowed = allowed
        disks = Dictionary(offer.disks.map { ($0.path, $0) }) { first, _ in first }
        files = Dictionary(offer.files.map { ($0.path, $0) }) { first, _ in first }
    }

    /// The directory that holds files of guests, among the guest's images.
    static let fileDirectory = ".files"

    // MARK: what may come

    /// Whether the offer is one that can be judged at all: its numbers within bounds, its texts what they look like.
    ///
    /// - Throws: `GuestError` that names what is wrong.
    public func judge() throws {
        try GuestStore.validate(offer.guest)
        let names = Set(offer.disks.map(\.name))
        guard !offer.commandLine.arguments.isEmpty, offer.commandLine.arguments.count < 4096, offer.disks.count <= 64,
            names.count == offer.disks.count, names.allSatisfy(MigrationStore.isID),
            offer.disks.allSatisfy(Self.isPlausible), offer.disks.reduce(0, { $0 + $1.size }) <= 1 << 50,
            offer.sizes.count < 4096, offer.sizes.values.allSatisfy({ $0 <= 1 << 50 }), offer.memory <= 1 << 46,
            Set(offer.files.map(\.path)).count == offer.files.count,
            offer.files.allSatisfy({ $0.digest.utf8.count == 64 && $0.digest.allSatisfy(\.isHexDigit) }),
            offer.files.allSatisfy({ !$0.path.hasPrefix("header:") || $0.size <= 64 << 20 })
        else { throw GuestError("The offer is malformed") }
        let line = offer.commandLine.arguments.reduce(0) { $0 + $1.utf8.count + 1 }
        guard line <= PeerLimits.commandLineBytes else {
            throw GuestError(
                "The limit of \(PeerLimits.commandLineBytes >> 10) KiB of a command line is exceeded: it has \(line) bytes"
            )
        }
        guard offer.files.count <= PeerLimits.files else {
            throw GuestError(
                "The limit of \(PeerLimits.files) files of a guest is exceeded: it has \(offer.files.count)"
            )
        }
        try judgeTexts()
        try judgeNetworks()
        try offer.placement?.judge()
        guard offer.home?.isPlausible ?? true, (offer.reservation?.utf8.count ?? 0) <= 64 else {
            throw GuestError("The offer is malformed: its origin or its reservation is none")
        }
        // The blank copy is made with it. Machines have memory of different sizes when nothing is said, all below this.
        guard offer.memory <= (try offer.commandLine.memory()).addingSaturated(1 << 30) else {
            throw GuestError("The offer is malformed: it has more memory than its command line")
        }
        if let id = offer.memoryID, !PeerText.isIdentifier(id) {
            throw GuestError("The offer is malformed: its memory has no id")
        }
        for disk in offer.disks {
            if let id = disk.keySecret, !PeerText.isIdentifier(id) {
                throw GuestError("The offer is malformed: the secret of \(disk.name) has no id")
            }
            guard Self.lastComponent(disk.path) != Self.fileDirectory else {
                throw GuestError("The disk \(disk.path) has a name that is taken on the destination; rename it")
            }
        }
    }

    /// Each network that is mapped is one tap of the command line, and has names that nothing reads otherwise.
    private func judgeNetworks() throws {
        guard let networks = offer.networks else { return }
        guard networks.count <= PeerLimits.networks else {
            throw GuestError(
                "The limit of \(PeerLimits.networks) networks that are made for a guest is exceeded: it has \(networks.count)"
            )
        }
        let taps = try offer.commandLine.taps()
        for network in networks {
            guard taps.count(where: { $0 == network.tap }) == 1,
                ([network.tap, network.bridge] + (network.former.map { [$0] } ?? [])).allSatisfy(PeerText.isInterface)
            else { throw GuestError("The offer is malformed: its networks are none of its command line") }
        }
        guard Set(networks.map(\.tap)).count == networks.count else {
            throw GuestError("The offer is malformed: a network is mapped twice")
        }
    }

    private func judgeTexts() throws {
        var texts = [offer.machine, offer.emulatorVersion, offer.commandLine.directory]
        texts += offer.commandLine.arguments
        for disk in offer.disks {
            texts +=
                [disk.path, disk.format, disk.sourceFormat, disk.seed ?? ""]
                + disk.backing.flatMap { [$0.path, $0.digest] }
        }
        texts += offer.files.map(\.path) + offer.sizes.keys
        for (key, value) in offer.standards ?? [:] { texts += [key, value] }
        guard texts.allSatisfy(PeerText.isPlain) else {
            throw GuestError("The offer is malformed: there are control characters in it")
        }
    }

    /// What a disk of an offer may be. Its format decides which program opens the image, so only known ones count.
    private static func isPlausible(_ disk: Message.Offer.Disk) -> Bool {
        guard disk.size > 0, disk.size <= 1 << 50, disk.allocated <= disk.size, ImageFormat.isCarried(disk.format),
            disk.backing.count <= 256, disk.backing.allSatisfy({ $0.path.hasPrefix("/") && $0.size <= 1 << 50 }),
            disk.backing.isEmpty || ImageFormat.isCarried(disk.backingFormat ?? "")
        else { return false }
        // A header makes an image what it is; only a sealed container may come with one.
        guard let container = disk.containerSize else { return disk.format != "luks" }
        return disk.format == "luks" && disk.keySecret != nil && container >= disk.size
            && container <= disk.size + (1 << 30)
    }

    // MARK: where it would be

    static func lastComponent(_ path: String) -> String {
        let name = path.split(separator: "/").last.map(String.init) ?? ""
        return name.isEmpty || name == "." || name == ".." || name.utf8.count > 200 ? "unnamed" : name
    }

    /// The image keeps the name that it has on the source; its directory is the guest's own.
    func imagePath(_ disk: Message.Offer.Disk) -> String { "\(imageDirectory)/\(Self.lastComponent(disk.path))" }

    /// Where a disk is here, and how the command line speaks of it.
    func placement(
        _ reference: GuestCommandLine.PathReference,
        keepsBacking: Set<String>,
        deviceSize: (String) -> UInt64?
    ) throws -> GuestCommandLine.Placement {
        guard let disk = disks[reference.path] else {
            throw GuestError("The disk \(reference.path) of \(reference.option) is not in the offer")
        }
        let path = imagePath(disk)
        var placement = GuestCommandLine.Placement(path: path, format: disk.format)
        placement.changesFormat = disk.format != disk.sourceFormat
        placement.isFlattened = !keepsBacking.contains(disk.name)
        if let size = deviceSize(path) {
            placement.isDevice = true
            if size != disk.size { placement.size = disk.size }
        }
        return placement
    }

    /// A directory with credentials of this host.
    func directory(_ reference: GuestCommandLine.PathReference) throws -> GuestCommandLine.Placement {
        guard allowed.contain(reference.path) else {
            throw GuestError(
                "The directory \(reference.path) of \(reference.option) is in "
                    + AllowedDirectories.advice(reference.path, isDirectory: true)
            )
        }
        return .init(path: reference.path)
    }

    /// Where what QEMU makes goes: each name once.
    func output(_ path: String, _ names: inout OutputNames) -> String {
        names.name(of: path).map { "\(runDirectory)/\($0)" } ?? path
    }

    /// The command line of the blank copy, before its insides are taken out, and what has to be known for that.
    ///
    /// - Parameters:
    ///   - facts: the QEMU of this host; when nil, options stay in the form that they have.
    ///   - deviceSize: the bytes of a block device at a path; nil when there is none.
    /// - Throws: `GuestError` naming what cannot be on this host.
    public func rehearsal(
        for facts: EmulatorFacts?,
        deviceSize: (String) -> UInt64? = { _ in nil }
    ) throws -> (GuestCommandLine.Relocation, GuestCommandLine.ShadowMaterial) {
        var sizes = offer.sizes
        var outputs = OutputNames()
        let relocation = try offer.commandLine.relocated(for: facts, origin: offer.origin) { reference in
            let placement: GuestCommandLine.Placement
            switch reference.kind {
            case .disk: placement = try self.placement(reference, keepsBacking: [], deviceSize: deviceSize)
            case .file:
                guard let file = files[reference.path] else {
                    throw GuestError("The file \(reference.path) of \(reference.option) is not in the offer")
                }
                placement = .init(path: "\(imageDirectory)/\(Self.fileDirectory)/\(file.digest)")
            case .output: placement = .init(path: output(reference.path, &outputs))
            case .directory: placement = try directory(reference)
            // The blank copy has every disk in one image.
            case .backing: throw GuestError("The image \(reference.path) is not under a disk of the offer")
            }
            if let size = offer.sizes[reference.path] { sizes[placement.path] = size }
            return placement
        }
        return (relocation, .init(sizes: sizes, memory: offer.memory, memoryID: offer.memoryID))
    }

    /// The command line on this host, for the guest itself.
    ///
    /// - Parameters:
    ///   - facts: the QEMU of this host.
    ///   - found: where the files are.
    ///   - keepsBacking: the disks whose backing images are here.
    ///   - deviceSize: the bytes of a block device at a path; nil when there is none.
    /// - Throws: `GuestError` naming what cannot be on this host.
    func relocation(
        for facts: EmulatorFacts,
        files found: [String: String],
        keepsBacking: Set<String>,
        deviceSize: (String) -> UInt64?
    ) throws -> GuestCommandLine.Relocation {
        var outputs = OutputNames()
        // What is under a disk is what was compared, and nothing else.
        let backing = Set(offer.disks.filter { keepsBacking.contains($0.name) }.flatMap(\.backing).map(\.path))
        return try offer.commandLine.relocated(for: facts, origin: offer.origin) { reference in
            switch reference.kind {
            case .disk: return try placement(reference, keepsBacking: keepsBacking, deviceSize: deviceSize)
            case .file:
                guard let path = found[reference.path] else {
                    throw GuestError("The file \(reference.path) of \(reference.option) is not in the offer")
                }
                return .init(path: path, format: try ImageHeader.format(of: path, reference))
            case .output: return .init(path: output(reference.path, &outputs))
            case .directory: return try directory(reference)
            case .backing:
                guard backing.contains(reference.path) else {
                    throw GuestError("The image \(reference.path) is not under a disk of the offer")
                }
                return .init(path: reference.path)
            }
        }
    }
}
