public import ArgumentParser
import Emulator
import FoundationEssentials
import Glibc
import IO
public import NBD
import TLS

/// Whether clients use TLS.
enum TLSRequirement: String, ExpressibleByArgument, CaseIterable {
    case required, optional

    var mode: TLSMode { self == .required ? .required : .perExport }
}

/// Whom a server lets in.
struct NBDServerSecurity: ParsableArguments {
    @OptionGroup var credentials: CredentialOptions

    @Option(help: ArgumentHelp("The id of an authz object that each client must pass.", valueName: "id"))
    var tlsAuthz: String?

    @Option(
        help: ArgumentHelp(
            "With --tls-creds: 'required' of every client, or 'optional', where an --export with tls=on is only there within TLS.",
            valueName: "mode"
        )
    )
    var tls: TLSRequirement = .required

    func validate() throws {
        if credentials.tlsCreds == nil, tlsAuthz != nil { throw ValidationError("--tls-authz needs --tls-creds.") }
    }

    /// The credentials; without --tls-creds the server speaks clear text, as qemu-nbd does.
    func serverCredentials(from store: ObjectStore) throws -> (any TLSCredentials)? {
        guard credentials.tlsCreds != nil else { return nil }
        return try credentials.credentials(.server, from: store, user: "the NBD server")
    }
}

/// Where a server listens.
struct NBDListenOptions: ParsableArguments {
    @Option(name: [.customShort("p", allowingJoined: true), .long], help: "The TCP port; 0 lets the system choose.")
    var port: UInt16 = NBDWire.port
    @Option(
        name: [.customShort("b", allowingJoined: true), .long],
        help: ArgumentHelp(
            "The address to listen on; every address when it is not given. vsock:CID:PORT works, too.",
            valueName: "address"
        )
    )
    var bind: String?
    @Option(
        name: [.customShort("k", allowingJoined: true), .long],
        help: ArgumentHelp("Listen on a Unix socket instead.", valueName: "path")
    )
    var socket: String?
    @Flag(help: "Serve one client on standard input and output.")
    var stdio = false

    func listen(on loop: EventLoop) async throws -> NetworkListener {
        try await loop.run { [self] in
            if let inherited = try NetworkListener.inherited(loop: loop) {
                guard bind == nil, socket == nil else {
                    throw ValidationError(
                        "This process was given sockets to listen on (LISTEN_FDS); --bind and --socket cannot be used with them"
                    )
                }
                return inherited
            }
            return try await NetworkListener.listen(on: [try address()], loop: loop)
        }
    }

    private func address() throws -> SocketAddress {
        if let socket { return .unix(path: DurableFile.resolve(socket, in: currentDirectory)) }
        guard let bind else { return .inet(host: "", port: port) }
        if bind.hasPrefix("vsock:") { return try SocketAddress(parsing: bind, defaultPort: port) }
        return .inet(host: bind, port: port)
    }
}

/// What a server serves.
struct NBDImageOptions: ParsableArguments {
    enum Cache: String, ExpressibleByArgument, CaseIterable {
        case none, writeback, writethrough, directsync, unsafe

        var isDirect: Bool { self == .none || self == .directsync }
        var writesThrough: Bool { self == .writethrough || self == .directsync }
        var ignoresFlush: Bool { self == .unsafe }
    }
    enum AIO: String, ExpressibleByArgument, CaseIterable { case threads, native, io_uring }
    enum Discard: String, ExpressibleByArgument, CaseIterable {
        case ignore, unmap, off, on

        var reaches: Bool { self == .unmap || self == .on }
    }

    @Option(
        name: [.customShort("x", allowingJoined: true), .long],
        help: "The export's name; empty when it is not given."
    )
    var exportName: String?
    @Option(name: [.customShort("D", allowingJoined: true), .long], help: "What the export is, for people.")
    var description: String?
    @Option(
        name: .customLong("export"),
        help: ArgumentHelp(
            "One of several exports: name=NAME,file=FILE and, when wanted, format=, description=, read-only=on, authz=ID, "
                + "read-only-authz=ID, tls=on, offset=BYTES, size=BYTES.",
            valueName: "export"
        )
    )
    var exports: [String] = []
    @Option(
        help: ArgumentHelp("Serve a disk in memory that is gone when the server ends.", valueName: "size"),
        transform: ByteCount.parse
    )
    var memory: ByteCount?
    @Option(
        name: [.customShort("f", allowingJoined: true), .long],
        help: "The image's format: raw, qcow2, vmdk and whatever QEMU knows."
    )
    var format: String?
    @Flag(help: "The image is given as a block node in QEMU's --blockdev syntax.")
    var imageOpts = false
    @Flag(name: [.customShort("r"), .long], help: "Refuse writes.")
    var readOnly = false
    @Option(
        name: [.customShort("o", allowingJoined: true), .long],
        help: "Where in the image the export begins.",
        transform: ByteCount.parse
    )
    var offset = ByteCount(0)
    @Flag(name: [.customShort("n"), .long], help: "The same as --cache none.")
    var nocache = false
    @Option(help: "How the image is cached: writeback, writethrough, none, directsync or unsafe.")
    var cache: Cache = .writeback
    @Option(help: "Taken for the sake of scripts; how the server does its I/O is its own choice.")
    var aio: AIO = .threads
    @Option(help: "Whether TRIM and WRITE_ZEROES free space: unmap or ignore.")
    var discard: Discard = .unmap
    @Option(help: "What to do with zeroes in writes: off, on or unmap.")
    var detectZeroes: RawFile.Options.ZeroDetection = .off
    @Flag(
        name: [.customShort("A"), .long],
        help: "Offer the allocation depth: from which image of a chain each part comes."
    )
    var allocationDepth = false
    @Option(
        name: [.customShort("B", allowingJoined: true), .long],
        help: ArgumentHelp("Offer a persistent dirty bitmap of the image.", valueName: "name")
    )
    var bitmap: [String] = []

    func validate() throws {
        let changesCache = nocache || cache != .writeback || discard != .unmap || detectZeroes != .off
        if imageOpts, changesCache {
            throw ValidationError("With --image-opts, the cache and discard options belong into the description.")
        }
        if memory != nil, nocache || cache != .writeback || offset.value != 0 {
            throw ValidationError("--memory takes neither cache options nor an offset.")
        }
    }

    /// The exports, and the processes behind some of them.
    struct Served {
        var exports: [Export] = []
        var daemons: [StorageDaemon] = []
    }

    func open(
        file: String?,
        objects: ObjectStore,
        isExclusive: Bool,
        loops: EventLoopGroup
    ) async throws -> Served {
        var served = Served()
        var wanted: [ExportOptions] = []
        if exports.isEmpty {
            wanted = [ExportOptions(name: exportName ?? "", file: file, format: format, summary: description ?? "")]
        } else {
            wanted = try exports.map { try ExportOptions(parsing: $0) }
        }
        do {
            for var one in wanted {
                guard !served.exports.contains(where: { $0.name == one.name }) else {
                    throw ValidationError("There are two exports of the name '\(one.name)'")
                }
                one.isReadOnly = one.isReadOnly || readOnly
                if exports.isEmpty { one.offset = offset.value }
                let backEnd = try await backEnd(one, loops, &served)
                let export = Export(
                    name: one.name,
                    summary: one.summary,
                    backEnd: backEnd,
                    requiresTLS: one.requiresTLS,
                    isHidden: false,
                    isExclusive: isExclusive,
                    authorize: try one.authorization(objects)
                )
                served.exports.append(export)
            }
        } catch {
            for daemon in served.daemons { await daemon.stop() }
            throw error
        }
        return served
    }

    private func backEnd(
        _ one: ExportOptions,
        _ loops: EventLoopGroup,
        _ served: inout Served
    ) async throws -> any BackEnd {
        if let memory {
            return try RawFile(memory: memory.value, readOnly: one.isReadOnly, offersDepth: allocationDepth)
        }
        guard let file = one.file else { throw ValidationError("The export '\(one.name)' has no file") }
        if NBDURI.isURI(file) { return try await relay(NBDURI(parsing: file), one, loops) }
        // As large as QEMU makes it.
        if file == "null-co://" || file == "null-aio://" { return NullDisk(size: 1 << 30) }
        let mode = nocache ? .none : cache
        let imageOpts = imageOpts || file.hasPrefix("json:")
        let format = imageOpts ? nil : try one.format ?? Self.format(of: file)
        if format == "raw", bitmap.isEmpty {
            var options = RawFile.Options()
            options.isReadOnly = one.isReadOnly
            options.isDirect = mode.isDirect
            options.writesThrough = mode.writesThrough
            options.ignoresFlush = mode.ignoresFlush
            options.ignoresDiscard = !discard.reaches
            options.zeroDetection = detectZeroes
            options.offersDepth = allocationDepth
            options.offset = one.offset
            options.length = one.size
            let raw = try RawFile(path: file, options)
            if !one.isReadOnly { try raw.lock(letsReadersLook: true) }
            return raw
        }
        guard one.offset == 0, one.size == nil else {
            throw ValidationError("An offset and a size are only for raw images; '\(file)' is \(format ?? "described")")
        }
        var image = StorageDaemon.Image(path: file, format: format)
        image.isDescription = imageOpts
        image.isReadOnly = one.isReadOnly
        image.isDirect = mode.isDirect
        image.ignoresFlush = mode.ignoresFlush
        image.writesThrough = mode.writesThrough
        image.discards = discard.reaches
        image.detectZeroes = detectZeroes.rawValue
        image.bitmaps = bitmap
        let daemon = try await StorageDaemon.start(image)
        served.daemons.append(daemon)
        let contexts =
            [MetaContext.allocation] + (allocationDepth ? [MetaContext.allocationDepth] : [])
            + bitmap.map { MetaContext.dirtyBitmapPrefix + $0 }
        return try await ClientBackEnd.open(
            .unix(path: daemon.socket),
            NBDClientOptions(export: StorageDaemon.export, contexts: contexts),
            connections: loops.loops.count,
            loops: loops
        )
    }

    /// The export of another server.
    private func relay(_ uri: NBDURI, _ one: ExportOptions, _ loops: EventLoopGroup) async throws -> any BackEnd {
        guard format ?? "raw" == "raw", one.offset == 0, one.size == nil else {
            throw ValidationError("The export of another server is served as it is: raw, and all of it")
        }
        let options = try NBDClientSecurity.parse([]).options(uri, contexts: [MetaContext.allocation])
        return try await ClientBackEnd.open(uri.address, options, connections: loops.loops.count, loops: loops)
    }

    /// The format of an image whose format nobody said.
    ///
    /// The contents alone do not decide: whoever could write to a raw disk could make it look like an image that refers to
    /// other files of this host.
    private static func format(of path: String) throws -> String {
        let magics: [(String, [UInt8])] = [
            ("qcow2", [0x51, 0x46, 0x49, 0xfb]), ("vmdk", Array("KDMV".utf8)), ("vhdx", Array("vhdxfile".utf8)),
            ("vpc", Array("conectix".utf8)), ("luks", Array("LUKS".utf8) + [0xba, 0xbe]), ("qed", Array("QED\0".utf8)),
        ]
        let fd = Glibc.open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard fd >= 0 else { throw FileError.system("open \(path)", errno) }
        defer { close(fd) }
        var head = [UInt8](repeating: 0, count: 8)
        let count = pread(fd, &head, 8, 0)
        guard let (format, _) = magics.first(where: { count >= $0.1.count && head.starts(with: $0.1) }) else {
            return "raw"
        }
        if path.hasSuffix(".\(format)") { return format }
        throw FileError(
            "\(path) begins like a \(format) image, but its name does not say so; choose with --format \(format) or --format raw"
        )
    }
}

extension RawFile.Options.ZeroDetection: ExpressibleByArgument {}
