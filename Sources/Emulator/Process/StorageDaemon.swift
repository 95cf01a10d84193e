internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import TLS

/// QEMU's storage daemon behind a private Unix socket: whatever image format QEMU knows, as an NBD export. It ends with this
/// process.
public final class StorageDaemon: Sendable {
    /// What it opens, and how.
    public struct Image: Sendable {
        /// The file or device; with `isDescription` a whole block node in QEMU's `--blockdev` syntax.
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
        /// Persistent dirty bitmaps to offer.
        public var bitmaps: [String] = []

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
    private let directory: String
    private let pid: pid_t

    private init(socket: String, directory: String, pid: pid_t) {
        self.socket = socket
        self.directory = directory
        self.pid = pid
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

    private static func arguments(_ image: Image, _ socket: String) -> [String] {
        let access = image.isReadOnly ? "on" : "off"
        var arguments: [String] = []
        if image.isDescription {
            arguments += ["--blockdev", "\(image.path),node-name=\(export),read-only=\(access)"]
        } else {
            let cache =
                "cache.direct=\(image.isDirect ? "on" : "off"),cache.no-flush=\(image.ignoresFlush ? "on" : "off")"
            let discard = "discard=\(image.discards ? "unmap" : "ignore")"
            arguments += [
                "--blockdev",
                "driver=\(image.format ?? "raw"),node-name=\(export),read-only=\(access),\(discard),\(cache),"
                    + "detect-zeroes=\(image.detectZeroes),file.driver=file,file.filename=\(KeyValue.escape(image.path)),file.\(discard)",
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
        let parent = ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp"
        var template = Array("\(parent)/crossdock-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw ChannelError.system("make a directory under \(parent)", errno) }
        let directory = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        let socket = "\(directory)/nbd.sock"
        let log = "\(directory)/log"
        let input = open("/dev/null", O_RDONLY | O_CLOEXEC)
        let output = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        var argv = ([program] + arguments(image, socket)).map { strdup($0) } + [nil]
        defer {
            close(input)
            close(output)
            for pointer in argv { free(pointer) }
        }
        let pid = xd_spawn_bound(&argv, environ, nil, input, output, output)
        guard pid > 0 else {
            let number = errno
            remove(directory)
            throw GuestError(
                "Cannot start \(program), which opens images that are not raw: \(String(cString: strerror(number)))"
            )
        }
        let daemon = StorageDaemon(socket: socket, directory: directory, pid: pid)
        let end = ContinuousClock.now + .seconds(30)
        while !isListening(socket) {
            var status: Int32 = 0
            let ended = xd_wait_nohang(pid, &status) == pid
            if ended || ContinuousClock.now > end {
                if !ended { daemon.kill() }
                let words = ((try? DurableFile.read(log)) ?? nil).map { String(decoding: $0, as: UTF8.self) } ?? ""
                remove(directory)
                let reason = words.split(separator: "\n").last.map { " It says: \($0)" } ?? ""
                throw GuestError("\(program) cannot serve \(image.path).\(reason)")
            }
            usleep(5_000)
        }
        return daemon
    }

    private static func isListening(_ socket: String) -> Bool {
        let probe = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        defer { close(probe) }
        return xd_unix_connect(probe, socket) == 0
    }

    private func kill() {
        Glibc.kill(pid, SIGKILL)
        var status: Int32 = 0
        while waitpid(pid, &status, 0) < 0, errno == EINTR {}
    }

    private static func remove(_ directory: String) {
        for name in ["nbd.sock", "log"] { unlink("\(directory)/\(name)") }
        rmdir(directory)
    }

    /// Ends the daemon, which closes its image in order.
    public func stop() async {
        let (pid, directory) = (pid, directory)
        _ = await BlockingPool.shared.value {
            Glibc.kill(pid, SIGTERM)
            var status: Int32 = 0
            let end = ContinuousClock.now + .seconds(10)
            while xd_wait_nohang(pid, &status) == 0 {
                if ContinuousClock.now > end { Glibc.kill(pid, SIGKILL) }
                usleep(5_000)
            }
            Self.remove(directory)
        }
    }
}
