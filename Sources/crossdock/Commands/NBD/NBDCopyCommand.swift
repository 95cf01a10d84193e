import ArgumentParser
import CLinux
import FoundationEssentials
import Glibc
import IO
import NBD
import TLS

struct NBDCopyCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "copy",
        abstract: "Copies disks between files, devices and NBD servers: nbdcopy's job.",
        discussion: """
            SOURCE and TARGET are NBD URIs, files, devices, or '-' for standard input and output; one of them may be a pipe, TARGET also \
            'null:'. A file is \
            made, or replaced. Holes stay holes.

              crossdock nbd copy disk.raw nbds://host/web1
              crossdock nbd copy --resume web1.state --verify nbds://host/web1 web1.raw

            With --resume the copy records how far it got, and goes on there when the same command is given again. A lost connection \
            is made again for --reconnect seconds. --verify reads both ends afterwards and compares them.

            With --seed the target has much of the source already, an older copy of it perhaps: it is read, and only what differs is \
            written.

            With --bitmap only what has changed is copied, into a target that has the rest: an increment. The source says what that \
            is, by its metadata context qemu:dirty-bitmap:NAME.
            """
    )

    @OptionGroup var security: NBDClientSecurity

    @Option(
        name: [.customShort("C", allowingJoined: true), .long],
        help: "Connections to each server; by default as many as keep the way there busy."
    )
    var connections: Int?
    @Option(
        name: [.customShort("R", allowingJoined: true), .long],
        help: "Requests under way on each connection; by default as many as keep it busy."
    )
    var requests: Int?
    @Option(
        help: ArgumentHelp("The longest request.", default: ByteCount(512 << 10), valueName: "size"),
        transform: ByteCount.parse
    )
    var requestSize = ByteCount(512 << 10)
    @Option(
        name: [.customShort("S", allowingJoined: true), .long],
        help: ArgumentHelp(
            "Find zeroes in the data in blocks of this size; 0 for not at all.",
            default: ByteCount(4096),
            valueName: "size"
        ),
        transform: ByteCount.parse
    )
    var sparse = ByteCount(4096)
    @Flag(name: [.long, .customLong("target-is-zero")], help: "The target is known to read as zeroes.")
    var destinationIsZero = false
    @Flag(help: "Allocate zeroes at the target.")
    var allocated = false
    @Flag(name: .customLong("no-extents"), help: "Do not ask the source for its holes.")
    var noExtents = false
    @Flag(
        name: .customLong("flush"),
        help: "Taken for the sake of scripts; the target is always made durable at the end."
    )
    var flush = false
    @Flag(
        name: [.customShort("p"), .long],
        help: "Show how far it is; --progress=FD writes it as N/100 to a descriptor, for programs."
    )
    var progress = false
    @Option(help: .hidden)
    var progressFD: Int32?
    @Option(
        help: ArgumentHelp(
            "The most bytes that are under way on each connection, as nbdcopy has it: --requests times --request-size otherwise.",
            valueName: "size"
        ),
        transform: ByteCount.parse
    )
    var queueSize: ByteCount?
    @Option(name: [.customShort("T", allowingJoined: true), .long], help: .hidden)
    var threads: Int?
    @Flag(help: .hidden)
    var synchronous = false
    @Flag(name: [.customShort("v"), .long], help: .hidden)
    var verbose = false
    @Flag(name: [.customShort("V")], help: .hidden)
    var showsVersion = false
    @Option(help: ArgumentHelp("The most bytes a second.", valueName: "size"), transform: ByteCount.parse)
    var bandwidth: ByteCount?
    @Option(help: ArgumentHelp("Record the progress here, and go on from it.", valueName: "file"))
    var resume: String?
    @Option(help: ArgumentHelp("Copy only what this dirty bitmap of the source marks.", valueName: "name"))
    var bitmap: String?
    @Flag(help: "The target has an older copy: read it, and write only what differs.")
    var seed = false
    @Flag(help: "Compare both ends afterwards.")
    var verify = false
    @Option(help: "Seconds to try to make a lost connection again.")
    var reconnect = 30
    @Flag(help: "Print what was done as JSON.")
    var json = false
    @Argument(help: "What is copied.")
    var source: String
    @Argument(help: "Where to.")
    var target: String

    func validate() throws {
        guard (1...64).contains(connections ?? 1) else {
            throw ValidationError("--connections is a number from 1 to 64.")
        }
        guard (1...1024).contains(requests ?? 1) else {
            throw ValidationError("--requests is a number from 1 to 1024.")
        }
        let size = requestSize.value
        guard size & (size &- 1) == 0, (4096...(32 << 20)).contains(size) else {
            throw ValidationError("--request-size is a power of two from 4K to 32M.")
        }
        let step = sparse.value
        guard step == 0 || step & (step - 1) == 0 && (512...size).contains(step) else {
            throw ValidationError("--sparse is 0, or a power of two from 512 to the request size.")
        }
        if showsVersion { throw CleanExit.message(Crossdock.configuration.version) }
        if let queueSize, requests != nil || queueSize.value < size {
            throw ValidationError("--queue-size is at least the request size, and excludes --requests.")
        }
        guard (0...86400).contains(reconnect) else { throw ValidationError("--reconnect is a number from 0 to 86400.") }
        guard bandwidth?.value != 0 else { throw ValidationError("--bandwidth is at least 1.") }
        if bitmap != nil, !NBDURI.isURI(source) || Self.isStream(target) || resume != nil || destinationIsZero {
            throw ValidationError(
                "--bitmap needs an NBD source and a target with the earlier contents, and no --resume."
            )
        }
        if seed,
            bitmap != nil || destinationIsZero || target == "null:" || Self.isStream(source) || Self.isStream(target)
        {
            throw ValidationError(
                "--seed needs a disk as the target, with earlier contents, and neither --bitmap nor --target-is-zero."
            )
        }
        if Self.isStream(source) || Self.isStream(target) {
            guard resume == nil, !verify else {
                throw ValidationError("A stream can be neither resumed nor verified.")
            }
        }
    }

    func run() async throws {
        try await failing {
            let loops = EventLoopGroup(name: "copy")
            let start = ContinuousClock.now
            if Self.isStream(source) || Self.isStream(target) {
                try await stream(loops)
                return
            }
            let from = try await openSource(loops)
            let size = from.backEnd.size
            var options = copyOptions()
            try checkResume()
            let old = try resume.flatMap { try CopyJournal.load($0) }
            if let old { try old.check(against: try journal(size, from.backEnd), path: resume ?? "") }
            if let context = changes {
                guard from.backEnd.traits.contexts.contains(context) else {
                    let offered = from.backEnd.traits.contexts.filter { $0 != MetaContext.allocation }
                    throw ChannelError(
                        .system,
                        "The source does not offer the dirty bitmap '\(bitmap ?? "")'"
                            + (offered.isEmpty
                                ? "; see 'crossdock nbd info --list'"
                                : "; it offers \(offered.joined(separator: ", "))")
                    )
                }
                options.changes = context
            }
            let to = try await openTarget(loops, size: size, isResumed: old != nil || bitmap != nil || seed)
            if to.isBlank { options.targetIsZero = true }
            var record = try resume.map { _ in try journal(size, from.backEnd) }
            if let old {
                options.position = old.position
                record?.position = old.position
                if !json { printError("crossdock: going on at \(old.position) of \(size) bytes") }
            }
            if resume != nil {
                options.checkpoint = max(16 << 20, size / 256)
            } else if to.loops != nil {
                options.checkpoint = max(256 << 20, size / 16)
            }
            let loopsOfWork = to.loops ?? from.loops ?? loops.loops
            options.requests = window(from, to, loops)
            let copy = try DiskCopy(from: from.backEnd, to: to.backEnd, options)
            let meter = ProgressMeter(copy, size: size, isOn: progress, descriptor: progressFD)
            do {
                defer { meter.end() }
                try await copy.run(on: loopsOfWork) { [record, resume] position in
                    guard let resume, var record else { return }
                    record.position = position
                    try record.save(to: resume)
                }
            }
            // Before the comparison: a copy that turns out to be different is not to be gone on with.
            if let resume { unlink(resume) }
            try await report(copy, size, .now - start, loopsOfWork)
            await to.backEnd.close()
            await from.backEnd.close()
        }
    }

    /// How many requests are under way in all.
    private func window(_ from: End, _ to: End, _ loops: EventLoopGroup) -> Int {
        let remotes = [from, to].compactMap { $0.backEnd as? ClientBackEnd }
        let requests = requests ?? queueSize.map { Int($0.value / requestSize.value) }
        return remotes.map { (requests ?? $0.window(requestSize: Int(requestSize.value))) * $0.connectionCount }.max()
            ?? (requests ?? 2) * loops.loops.count
    }

    private func copyOptions() -> DiskCopy.Options {
        var options = DiskCopy.Options()
        options.requestSize = Int(requestSize.value)
        options.sparse = Int(sparse.value)
        options.targetIsZero = destinationIsZero
        options.allocates = allocated
        options.comparesTarget = seed
        options.usesExtents = !noExtents
        options.bandwidth = bandwidth?.value
        return options
    }

    private func report(_ copy: DiskCopy, _ size: UInt64, _ time: Duration, _ loops: [EventLoop]) async throws {
        var difference: UInt64?
        if verify { difference = try await copy.verify(on: loops) }
        let summary = copy.summary
        if json {
            let fields = [
                "\"size\": \(size)", "\"read\": \(summary.read)", "\"written\": \(summary.written)",
                "\"zeroes\": \(summary.zeroes)", "\"present\": \(summary.present)",
                "\"milliseconds\": \(time / .milliseconds(1))",
                "\"verified\": \(verify ? (difference == nil ? "true" : "false") : "null")",
            ]
            output("{\(fields.joined(separator: ", "))}\n")
        }
        if let difference {
            throw ChannelError(.system, "The copy differs from the source at byte \(difference)")
        }
        if verify, !json { printError("crossdock: both ends are the same") }
    }

    // MARK: The two ends

    private struct End {
        let backEnd: any BackEnd
        /// The loops of its connections.
        var loops: [EventLoop]?
        /// Whether it was made just now.
        var isBlank = false
    }

    private func remote(_ text: String, _ loops: EventLoopGroup) async throws -> End {
        let uri = try NBDURI(parsing: text)
        var options = try security.options(uri)
        options.replyTimeout = .seconds(60)
        if let context = changes, text == source { options.contexts = [MetaContext.allocation, context] }
        let export = try await ClientBackEnd.open(
            uri.address,
            options,
            connections: connections,
            loops: loops,
            persistence: reconnect > 0 ? .init(reconnect: .seconds(reconnect)) : .init()
        )
        return End(backEnd: export, loops: export.loops)
    }

    /// The context of --bitmap.
    private var changes: String? { bitmap.map { MetaContext.dirtyBitmapPrefix + $0 } }

    private func openSource(_ loops: EventLoopGroup) async throws -> End {
        if NBDURI.isURI(source) { return try await remote(source, loops) }
        return End(backEnd: try RawFile(path: source, readOnly: true))
    }

    private func openTarget(_ loops: EventLoopGroup, size: UInt64, isResumed: Bool) async throws -> End {
        if target == "null:" { return End(backEnd: NullDisk(size: size)) }
        if NBDURI.isURI(target) { return try await remote(target, loops) }
        var isBlank = false
        var status = stat()
        let exists = stat(target, &status) == 0
        if exists, let mine = Self.identity(target), mine == Self.identity(source), !NBDURI.isURI(source) {
            throw FileError("The source and the target are the same file")
        }
        if !exists || status.st_mode & S_IFMT == S_IFREG {
            let fd = Glibc.open(target, O_RDWR | O_CLOEXEC | (isResumed ? 0 : O_CREAT), 0o666)
            guard fd >= 0 else { throw FileError.system("make \(target)", errno) }
            defer { close(fd) }
            // Whoever uses the file must not lose it: the lock comes before the first change.
            let probe = try RawFile(path: target, readOnly: false)
            try probe.lock()
            defer { probe.unlock() }
            if isResumed {
                guard fstat(fd, &status) == 0, status.st_size == off_t(size) else {
                    throw FileError(
                        bitmap == nil && !seed
                            ? "\(target) is not what the copy left there; remove \(resume ?? "") to begin anew"
                            : "\(target) is not an earlier copy of the source: it does not have \(size) bytes"
                    )
                }
            } else {
                guard ftruncate(fd, 0) == 0, ftruncate(fd, off_t(size)) == 0 else {
                    throw FileError.system("make \(target) \(size) bytes long", errno)
                }
                isBlank = true
            }
        }
        let file = try RawFile(path: target, readOnly: false)
        try file.lock()
        return End(backEnd: file, isBlank: isBlank)
    }

    /// What a file is, whatever its name; nil when there is none.
    private static func identity(_ path: String) -> String? {
        var status = stat()
        guard stat(path, &status) == 0 else { return nil }
        return status.st_mode & S_IFMT == S_IFBLK ? "device \(status.st_rdev)" : "\(status.st_dev) \(status.st_ino)"
    }

    /// The name of a file that may not exist yet, without symbolic links.
    private static func canonical(_ path: String) -> String {
        let absolute = path.hasPrefix("/") ? path : "\(currentDirectory)/\(path)"
        let slash = absolute.lastIndex(of: "/") ?? absolute.startIndex
        let parent = DurableFile.resolve(slash == absolute.startIndex ? "/" : String(absolute[..<slash]), in: "/")
        return "\(parent == "/" ? "" : parent)/\(absolute[absolute.index(after: slash)...])"
    }

    private func checkResume() throws {
        guard let resume else { return }
        for end in [source, target] where !NBDURI.isURI(end) {
            let isSame = Self.identity(end).map { $0 == Self.identity(resume) } ?? false
            guard !isSame, Self.canonical(end) != Self.canonical(resume) else {
                throw FileError("The file for --resume must not be the source or the target")
            }
        }
    }

    /// The record of this copy, at its beginning.
    private func journal(_ size: UInt64, _ from: any BackEnd) throws -> CopyJournal {
        func name(_ text: String) -> String { NBDURI.isURI(text) || text == "null:" ? text : Self.canonical(text) }
        // A server that tells what an export shows tells when it shows something else: another snapshot.
        var stamp = (from as? ClientBackEnd)?.info.summary ?? ""
        var status = stat()
        if !NBDURI.isURI(source), stat(source, &status) == 0, status.st_mode & S_IFMT == S_IFREG {
            stamp = "\(status.st_ino) \(status.st_mtim.tv_sec).\(status.st_mtim.tv_nsec)"
        }
        return CopyJournal(
            source: name(source),
            target: name(target),
            size: size,
            stamp: stamp,
            targetStamp: NBDURI.isURI(target) ? "" : Self.identity(target) ?? ""
        )
    }

    // MARK: Streams

    /// Whether an end can be read or written in order only: standard input or output, a pipe, a terminal, `/dev/null`.
    private static func isStream(_ end: String) -> Bool {
        if end == "-" { return true }
        var status = stat()
        guard !NBDURI.isURI(end), end != "null:", stat(end, &status) == 0 else { return false }
        return [S_IFIFO, S_IFCHR].contains(status.st_mode & S_IFMT)
    }

    private static func openStream(_ end: String, _ flags: Int32, standard: Int32) throws -> Int32 {
        if end == "-" { return standard }
        let descriptor = Glibc.open(end, flags | O_CLOEXEC)
        guard descriptor >= 0 else { throw FileError.system("open \(end)", errno) }
        return descriptor
    }

    /// Copies from a stream to a disk, or from a disk to a stream.
    private func stream(_ loops: EventLoopGroup) async throws {
        guard !(Self.isStream(source) && Self.isStream(target)) else {
            throw ValidationError("One of the ends must be a disk")
        }
        let piece = Int(requestSize.value)
        if Self.isStream(source) {
            guard NBDURI.isURI(target) || target == "null:" else {
                throw ValidationError("A stream is copied to an NBD server; for a file a shell's '>' does the same")
            }
            let descriptor = try Self.openStream(source, O_RDONLY, standard: 0)
            let to = target == "null:" ? End(backEnd: NullDisk(size: .max)) : try await remote(target, loops)
            let loop = to.loops?.first ?? loops.loops[0]
            try await loop.run { try await DiskStream(piece: piece).fill(to.backEnd, from: descriptor) }
            await to.backEnd.close()
        } else {
            let from = try await openSource(loops)
            let loop = from.loops?.first ?? loops.loops[0]
            let descriptor = try Self.openStream(target, O_WRONLY, standard: 1)
            try await loop.run { try await DiskStream(piece: piece).pour(from.backEnd, into: descriptor) }
            await from.backEnd.close()
        }
    }
}
