internal import CLinux
internal import Glibc
internal import IO

/// A QEMU process that something else started, read from /proc.
public struct RunningEmulator: Sendable {
    /// The process.
    public let process: EmulatorProcess
    /// Its command line, as it was given.
    public let arguments: [String]
    /// The program file.
    public let executable: String
    /// Its working directory.
    public let directory: String
    /// The files that it has open, by descriptor.
    public let files: [Int32: String]

    /// Finds the QEMU behind a monitor's socket.
    ///
    /// The process that the kernel names as the socket's owner counts only if it is a QEMU that holds the socket:
    /// a service manager may have opened the socket for it. Otherwise every QEMU of this host is looked at.
    ///
    /// - Parameter socket: the path of the monitor's Unix socket.
    /// - Throws: `GuestError` when the socket or its QEMU cannot be found, or the process ends meanwhile.
    public static func find(monitor socket: String) throws -> RunningEmulator {
        var status = stat()
        guard stat(socket, &status) == 0 else {
            throw GuestError("There is no monitor at \(socket): \(String(cString: strerror(errno)))")
        }
        guard status.st_mode & S_IFMT == S_IFSOCK else {
            throw GuestError("\(socket) is no socket; give the path of QEMU's -qmp unix:PATH")
        }
        var candidates = pids()
        if let owner = owner(of: socket), let index = candidates.firstIndex(of: owner) {
            candidates.swapAt(0, index)
        }
        let sockets = socketInodes(ofFile: status.st_ino)
        var unreadable = 0
        for pid in candidates where isEmulator(pid) {
            guard let inodes = socketInodes(of: pid) else {
                unreadable += 1
                continue
            }
            if !inodes.isDisjoint(with: sockets) { return try RunningEmulator(pid: pid) }
        }
        throw GuestError(
            unreadable == 0
                ? "No QEMU on this host holds the monitor \(socket); is it still running?"
                : "No QEMU that this user may look at holds the monitor \(socket); run this as root or as the owner of the guest"
        )
    }

    /// Reads a process.
    ///
    /// - Throws: `GuestError` when it is no QEMU, or ends while it is read.
    public init(pid: Int32) throws {
        let gone = GuestError("Process \(pid) ended while it was looked at")
        guard let process = EmulatorProcess(pid: pid) else { throw gone }
        guard let words = try? DurableFile.read("/proc/\(pid)/cmdline"), !words.isEmpty,
            let executable = Self.link("/proc/\(pid)/exe"), let directory = Self.link("/proc/\(pid)/cwd")
        else {
            throw process.isRunning
                ? GuestError("Process \(pid) cannot be read; run this as its owner or as root") : gone
        }
        var arguments = words.split(separator: 0, omittingEmptySubsequences: false)
            .map { String(decoding: $0, as: UTF8.self) }
        // Each argument ends with a NUL, the last one too.
        if arguments.last == "" { arguments.removeLast() }
        let deleted = " (deleted)"
        self.executable = executable.hasSuffix(deleted) ? String(executable.dropLast(deleted.count)) : executable
        let name = arguments.first?.split(separator: "/").last.map(String.init) ?? ""
        if !Self.isEmulatorName(name), !arguments.isEmpty { arguments[0] = self.executable }
        guard
            Self.isEmulatorName(self.executable.split(separator: "/").last.map(String.init) ?? "")
                || Self.isEmulatorName(name)
        else { throw GuestError("Process \(pid) is \(self.executable), not QEMU") }
        var files: [Int32: String] = [:]
        for entry in DurableFile.list("/proc/\(pid)/fd") {
            if let number = Int32(entry) { files[number] = Self.link("/proc/\(pid)/fd/\(entry)") }
        }
        guard process.isRunning else { throw gone }
        self.process = process
        self.arguments = arguments
        self.directory = directory
        self.files = files
    }

    /// The tap interfaces that it has open.
    var tapInterfaces: [String] { files.filter { $0.value == "/dev/net/tun" }.keys.compactMap(tapInterface) }

    /// The network interface behind a descriptor of a tap device; nil when it is none.
    public func tapInterface(_ descriptor: Int32) -> String? {
        guard let bytes = (try? DurableFile.read("/proc/\(process.pid)/fdinfo/\(descriptor)")) ?? nil else {
            return nil
        }
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") where line.hasPrefix("iff:") {
            return line.dropFirst(4).trimmed
        }
        return nil
    }

    /// What `-name` calls the guest; nil without one.
    public var guestName: String? {
        guard let options = try? GuestOption.parse(arguments.dropFirst()),
            let option = options.last(where: { $0.name == "name" })
        else { return nil }
        if let name = option.value("guest") { return name }
        return option.argument.map { String($0.prefix { $0 != "," }) }
    }

    /// The Unix sockets of its QMP monitors, as its command line has them.
    public var monitors: [String] {
        guard let options = try? GuestOption.parse(arguments.dropFirst()) else { return [] }
        var paths: [String] = []
        for option in GuestCommandLine.monitorForms(options) {
            let isControl =
                ["qmp", "qmp-pretty"].contains(option.name) || option.name == "mon" && option.value("mode") == "control"
            guard isControl else { continue }
            if let id = GuestCommandLine.monitorDevice(option) {
                let device = options.first { $0.name == "chardev" && $0.value("id") == id }
                if let path = device?.value("path") { paths.append(path) }
            } else if let argument = option.argument, argument.hasPrefix("unix:") {
                paths.append(String(argument.dropFirst(5).prefix { $0 != "," }))
            }
        }
        return paths.map(resolve)
    }

    /// Where a path of the command line leads, absolute.
    ///
    /// QEMU leaves its working directory when it is told to run in the background, so that relative paths do not start
    /// there any more; the open files tell then.
    public func resolve(_ path: String) -> String {
        if path.hasPrefix("/") { return path }
        let here = DurableFile.resolve(path, in: directory)
        let open = Set(files.values)
        if open.contains(here) || DurableFile.exists(here) { return here }
        var tail = path
        while tail.hasPrefix("./") { tail = String(tail.dropFirst(2)) }
        let found = open.filter { $0.hasSuffix("/\(tail)") }
        return found.count == 1 ? found.first ?? here : here
    }

    // MARK: /proc

    static func isEmulatorName(_ name: String) -> Bool {
        name.hasPrefix("qemu-system-") || ["qemu-kvm", "kvm", "qemu"].contains(name)
    }

    /// Whether a process runs a QEMU, as far as this one may look.
    public static func isEmulator(_ pid: Int32) -> Bool {
        guard let path = link("/proc/\(pid)/exe") else { return false }
        return isEmulatorName(path.split(separator: "/").last.map { String($0.prefix { $0 != " " }) } ?? "")
    }

    private static func pids() -> [Int32] { DurableFile.list("/proc").compactMap { Int32($0) }.sorted() }

    private static func link(_ path: String) -> String? {
        var buffer = [CChar](repeating: 0, count: Int(PATH_MAX) + 1)
        let count = readlink(path, &buffer, buffer.count - 1)
        guard count > 0 else { return nil }
        return String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Who listens on a socket, in the kernel's words.
    private static func owner(of socket: String) -> Int32? {
        let descriptor = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        defer { close(descriptor) }
        guard xd_unix_connect(descriptor, socket) == 0 else { return nil }
        var pid: pid_t = 0
        var user: uid_t = 0
        return xd_peer_credentials(descriptor, &pid, &user) == 0 && pid > 0 ? pid : nil
    }

    /// The sockets, listening and accepted, that are bound to a file.
    private static func socketInodes(ofFile inode: UInt) -> Set<UInt64> {
        var found = [UInt64](repeating: 0, count: 1024)
        let count = xd_unix_sockets_of_file(UInt64(inode), &found, Int32(found.count))
        return Set(found.prefix(max(Int(count), 0)))
    }

    static func socketInodes(of pid: Int32) -> Set<UInt64>? {
        var found: Set<UInt64> = []
        guard access("/proc/\(pid)/fd", R_OK) == 0 else { return nil }
        for entry in DurableFile.list("/proc/\(pid)/fd") {
            guard let target = link("/proc/\(pid)/fd/\(entry)"), target.hasPrefix("socket:["),
                let inode = UInt64(target.dropFirst(8).dropLast())
            else { continue }
            found.insert(inode)
        }
        return found
    }
}
