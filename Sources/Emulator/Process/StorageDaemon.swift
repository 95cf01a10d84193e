internal import CLinux
internal import Glibc
internal import IO
public import TLS

/// QEMU's storage daemon behind a private Unix socket: whatever image format QEMU knows, as an NBD export. It ends with this
/// process.
public final class StorageDaemon: Sendable {
    /// What it opens, and how.
    public struct Image: Sendable {
        /// The file or device; with `isDescription` a whole block node in QEMU's `--blockdev` syntax, or as `json:{...}`.
        public var path: String
        /// The format, in QEMU's word; nil only with `isDescription`.
        public var format: String?
        /// Whether `path` is a description.
        public var isDescription = false
        /// Whether writes are refused.
        public var isReadOnly = false
        /// Bypass the page cache.
        public var isDirect = false
        /// Do nothing for a flush.
        public var ignoresFlush = false
        /// Make each write durable before its reply.
        public var writesThrough = false
        /// Whether discards reach the image.
        public var discards = true
        /// QEMU's `detect-zeroes`: off, on or unmap.
        public var detectZeroes = "off"
        /// The passphrase of an encrypted image.
        public var secret: SecretBytes?
        /// Persistent dirty bitmaps to offer.
        public var bitmaps: [String] = []
        /// How the daemon is confined to the image; not at all when nil. Only with a path.
        public var policy: ConfinementPolicy?
        /// Where the file with the image's data is, whatever the image says; nil to do as it says. Only with a path.
        public var dataFile: String?
        /// What is under the image, and may be read then.
        public var backing: [String] = []

        /// Describes an image.
        public init(path: String, format: String?) {
            self.path = path
            self.format = format
        }
    }

    /// The name of its export.
    public static let export = "disk"
    /// Its socket.
    public let socket: String
    private let process: BoundProcess

    private init(socket: String, process: BoundProcess) {
        self.socket = socket
        self.process = process
    }

    /// Starts a daemon and returns when it serves.
    ///
    /// - Parameters:
    ///   - image: what it opens.
    ///   - program: the daemon.
    /// - Throws: `GuestError` with the daemon's own words when it cannot open the image, or is not installed.
    public static func start(_ image: Image, program: String = "qemu-storage-daemon") async throws -> StorageDaemon {
        // The pool's threads stay for as long as the process, which is what the daemon's life hangs on.
        try await BlockingPool.shared.run { try startNow(image, program) }
    }

    private static func arguments(_ image: Image, _ socket: String) throws -> [String] {
        let access = image.isReadOnly ? "on" : "off"
        var arguments: [String] = []
        if image.isDescription, image.path.hasPrefix("json:") {
            var node = try JSONValue(parsing: Array(image.path.dropFirst("json:".count).utf8)).object
            node["node-name"] = .string(export)
            node["read-only"] = .bool(image.isReadOnly)
            arguments += ["--blockdev", JSONValue.object(node).text]
        } else if image.isDescription {
            arguments += ["--blockdev", "\(image.path),node-name=\(export),read-only=\(access)"]
        } else {
            let cache =
                "cache.direct=\(image.isDirect ? "on" : "off"),cache.no-flush=\(image.ignoresFlush ? "on" : "off")"
            let discard = "discard=\(image.discards ? "unmap" : "ignore")"
            let sealing =
                image.secret == nil
                ? "" : image.format == "luks" ? ",key-secret=key" : ",encrypt.format=luks,encrypt.key-secret=key"
            arguments += [
                "--blockdev",
                "driver=\(image.format ?? "raw"),node-name=\(export),read-only=\(access),\(discard),\(cache),"
                    + "detect-zeroes=\(image.detectZeroes),file.driver=file,file.filename=\(KeyValue.escape(image.path)),file.\(discard)\(sealing)"
                    + (image.dataFile.map { ",data-file.driver=file,data-file.filename=\(KeyValue.escape($0))" } ?? ""),
            ]
        }
        arguments += ["--nbd-server", "addr.type=unix,addr.path=\(KeyValue.escape(socket)),max-connections=0"]
        var offered =
            "type=nbd,id=\(export),node-name=\(export),name=\(export),writable=\(image.isReadOnly ? "off" : "on")"
        offered += ",allocation-depth=on,writethrough=\(image.writesThrough ? "on" : "off")"
        for (index, bitmap) in image.bitmaps.enumerated() { offered += ",bitmaps.\(index)=\(KeyValue.escape(bitmap))" }
        return arguments + ["--export", offered]
    }

    private static func startNow(_ image: Image, _ program: String) throws -> StorageDaemon {
        try ImageInspection.check(image)
        let directory = try BoundProcess.makeDirectory()
        let socket = "\(directory)/nbd.sock"
        let key = try image.secret.map { try MasterKey(sealing: ["key": $0]) }
        let process: BoundProcess
        do {
            let files =
                [Confinement.Rule(image.path, image.isReadOnly ? .read : .image.union(.control))]
                + image.backing.map { .init($0, .read) }
            process = try BoundProcess(
                [program] + (key?.arguments(file: "/dev/stdin", option: "--object") ?? []) + arguments(image, socket),
                directory: directory,
                input: key?.descriptor,
                confinement: try image.policy?.tool(program, directory: directory, files: files)
            )
        } catch {
            DurableFile.remove(directory)
            throw error
        }
        let end = ContinuousClock.now + .seconds(30)
        while !isListening(socket) {
            let ended = process.hasEnded()
            if ended || ContinuousClock.now > end {
                let reason = process.lastWords.map { " It says: \($0)" } ?? ""
                if ended { process.clear() } else { process.kill() }
                throw GuestError("\(program) cannot serve \(image.path).\(reason)")
            }
            usleep(2_000)
        }
        return StorageDaemon(socket: socket, process: process)
    }

    private static func isListening(_ socket: String) -> Bool {
        let probe = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        defer { close(probe) }
        return xd_unix_connect(probe, socket) == 0
    }

    /// Ends the daemon, which closes its image in order.
    public func stop() async { await process.stop() }
}
