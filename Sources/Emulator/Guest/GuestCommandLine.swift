internal import FoundationEssentials
internal import IO
internal import TLS

/// A guest cannot be described or moved; the sentence names the option.
public struct GuestError: Error, Sendable, CustomStringConvertible {
    /// The sentence.
    public let message: String
    /// Makes an error.
    @inline(never)
    public init(_ message: String) { self.message = message }
    /// The sentence.
    public var description: String { message }
}

/// A QEMU command line: the description of a guest.
///
/// Only the parts that belong to one host are understood; everything else passes unchanged. What a path in the command
/// line is for decides what happens to it on another host.
public struct GuestCommandLine: Sendable, Hashable, Codable {
    /// What a path is for.
    public enum PathKind: String, Sendable, Hashable, Codable {
        /// A disk that the guest writes: copied by the mirror.
        case disk
        /// A file that the guest only reads, such as a kernel or an ISO image: found by its digest or copied.
        case file
        /// Something that QEMU makes: a log, a socket.
        case output
    }

    /// A path in the command line.
    public struct PathReference: Sendable, Hashable {
        /// What it is for.
        public let kind: PathKind
        /// As it is written.
        public let path: String
        /// The option it belongs to, for messages.
        public let option: String
    }

    /// The program and its arguments.
    public var arguments: [String]
    /// The directory that relative paths start from.
    public var directory: String

    /// Makes a description.
    public init(arguments: [String], directory: String) {
        self.arguments = arguments
        self.directory = directory
    }

    /// The options without an argument of `qemu-system-*`.
    private static let flags: Set<String> = [
        "S", "s", "nodefaults", "no-user-config", "nographic", "enable-kvm", "no-reboot", "no-shutdown", "daemonize",
        "snapshot", "usb", "no-acpi", "no-hpet", "mem-prealloc", "only-migratable", "preconfig", "singlestep",
        "full-screen", "no-quit", "curses", "alt-grab", "ctrl-grab", "portrait", "win2k-hack", "no-fd-bootchk",
        "enable-fips", "xen-attach", "xen-domid-restrict", "old-param", "semihosting", "h", "help", "version",
        "enable-sync-profile", "sdl", "show-cursor",
    ]
    /// What cannot be moved, with the reason.
    private static let refused: [String: String] = [
        "incoming": "the guest itself waits for a migration",
        "snapshot": "its writes go to temporary files",
        "loadvm": "it starts from an internal snapshot",
        "readconfig": "its options are in another file",
        "virtfs": "a shared directory has no counterpart on the other host",
        "fsdev": "a shared directory has no counterpart on the other host",
        "mem-path": "its memory is in a file",
        "hdachs": "it is obsolete",
        "vga-fd": "it passes a descriptor",
        "add-fd": "it passes a descriptor",
        "xen-domid": "Xen guests are not supported",
        "chroot": "the other host has another directory tree",
    ]

    /// Goes over the options: `visit` gets each option's name without dashes and its argument, and returns what takes
    /// its place, or nil to drop both.
    private func map(_ visit: (String, String?) throws -> (String, String?)?) throws -> [String] {
        var result = [arguments[0]]
        var index = 1
        while index < arguments.count {
            let word = arguments[index]
            index += 1
            guard word.hasPrefix("-"), word.count > 1 else {
                throw GuestError(
                    "In the guest's command line, '\(word)' is not an option; name the disk with -drive or -blockdev"
                )
            }
            let name = String(word.drop { $0 == "-" })
            var argument: String?
            if !Self.flags.contains(name) {
                guard index < arguments.count else { throw GuestError("The option \(word) has no argument") }
                argument = arguments[index]
                index += 1
            }
            if let (newName, newArgument) = try visit(name, argument) {
                result.append("-\(newName)")
                if let newArgument { result.append(newArgument) }
            }
        }
        return result
    }

    /// Rewrites each path of the command line.
    ///
    /// - Parameter rewrite: gets a path and its kind and returns the path on this host.
    /// - Returns: the command line with `-daemonize`, `-pidfile` and `-S` removed, since the agent supervises QEMU.
    /// - Throws: `GuestError` naming an option that cannot be moved; also what `rewrite` throws.
    public func rewritten(_ rewrite: (PathReference) throws -> String) throws -> [String] {
        try map { name, argument in
            if let reason = Self.refused[name] { throw GuestError("A guest with -\(name) cannot be moved: \(reason)") }
            func path(_ kind: PathKind, _ text: String) throws -> String {
                try rewrite(PathReference(kind: kind, path: text, option: "-\(name)"))
            }
            switch name {
            case "daemonize", "pidfile", "S": return nil
            case "kernel", "initrd", "dtb", "bios", "option-rom", "cdrom", "shim":
                return (name, try path(.file, argument ?? ""))
            case "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash":
                return (name, try path(.disk, argument ?? ""))
            case "D": return (name, try path(.output, argument ?? ""))
            case "drive": return (name, try Self.drive(argument ?? "", path))
            case "blockdev": return (name, try Self.blockdev(argument ?? "", path))
            case "serial", "monitor", "qmp", "qmp-pretty", "parallel", "debugcon", "gdb":
                return (name, try Self.characterDevice(argument ?? "", path))
            case "chardev": return (name, try Self.chardev(argument ?? "", path))
            case "object":
                if let argument, argument.hasPrefix("memory-backend-file") || argument.hasPrefix("secret") {
                    throw GuestError(
                        "A guest with -object \(argument.prefix { $0 != "," }) cannot be moved: it depends on a file or a secret of "
                            + "this host"
                    )
                }
                return (name, argument)
            case "netdev", "nic", "net":
                if let argument, KeyValue.split(argument).contains(where: Self.isScript) {
                    throw GuestError("A guest with -\(name) \(argument) cannot be moved: it runs a script of this host")
                }
                if let argument, argument.hasPrefix("vhost-user") || argument.contains("fd=") {
                    throw GuestError("A guest with -\(name) \(argument) cannot be moved: it depends on this host")
                }
                return (name, argument)
            case "device":
                if let argument, argument.hasPrefix("vfio-") || argument.hasPrefix("vhost-user-") {
                    throw GuestError("A guest with -device \(argument) cannot be moved: it depends on this host")
                }
                return (name, argument)
            default: return (name, argument)
            }
        }
    }

    /// Whether a property makes QEMU run a program.
    private static func isScript(_ property: String) -> Bool {
        ["script=", "downscript=", "helper="].contains { property.hasPrefix($0) } && !property.hasSuffix("=no")
    }

    private typealias Rewrite = (PathKind, String) throws -> String

    private static func drive(_ argument: String, _ rewrite: Rewrite) throws -> String {
        var parts = KeyValue.split(argument)
        let isFile =
            parts.contains("media=cdrom")
            || parts.contains { ["readonly=on", "readonly", "read-only=on"].contains($0) }
        for (index, part) in parts.enumerated() {
            for key in ["file", "file.filename"] where part.hasPrefix("\(key)=") {
                let value = String(part.dropFirst(key.count + 1))
                if value.isEmpty || isNetwork(value) { continue }
                parts[index] = "\(key)=\(try rewrite(isFile ? .file : .disk, value))"
            }
        }
        return parts.map(KeyValue.escape).joined(separator: ",")
    }

    private static func isNetwork(_ value: String) -> Bool {
        ["nbd:", "nbd+unix:", "iscsi:", "http:", "https:", "rbd:", "ssh:", "json:", "fat:", "host_device:"]
            .contains { value.hasPrefix($0) }
    }

    private static func blockdev(_ argument: String, _ rewrite: Rewrite) throws -> String {
        if argument.hasPrefix("{") {
            guard let value = try? JSONValue(parsing: Array(argument.utf8)) else {
                throw GuestError("-blockdev '\(argument)' is not JSON")
            }
            return try blockdev(value, readOnly: false, rewrite).text
        }
        var parts = KeyValue.split(argument)
        let isFile = parts.contains { ["read-only=on", "file.read-only=on"].contains($0) }
        for (index, part) in parts.enumerated() {
            for key in ["filename", "file.filename"] where part.hasPrefix("\(key)=") {
                let value = String(part.dropFirst(key.count + 1))
                parts[index] = "\(key)=\(try rewrite(isFile ? .file : .disk, value))"
            }
        }
        return parts.map(KeyValue.escape).joined(separator: ",")
    }

    private static func blockdev(_ value: JSONValue, readOnly: Bool, _ rewrite: Rewrite) throws -> JSONValue {
        guard case .object(var members) = value else { return value }
        let readOnly = readOnly || members["read-only"]?.bool == true
        for (key, member) in members {
            if key == "filename", let path = member.string {
                members[key] = .string(try rewrite(readOnly ? .file : .disk, path))
            } else {
                members[key] = try blockdev(member, readOnly: readOnly, rewrite)
            }
        }
        return .object(members)
    }

    /// `file:PATH`, `unix:PATH,...`, `pipe:PATH`; other forms have no path.
    private static func characterDevice(_ argument: String, _ rewrite: Rewrite) throws -> String {
        let prefix = argument.hasPrefix("mon:") ? "mon:" : ""
        let rest = argument.dropFirst(prefix.count)
        for scheme in ["file:", "unix:", "pipe:"] where rest.hasPrefix(scheme) {
            let body = rest.dropFirst(scheme.count)
            let comma = scheme == "unix:" ? body.firstIndex(of: ",") ?? body.endIndex : body.endIndex
            return "\(prefix)\(scheme)\(try rewrite(.output, String(body[..<comma])))\(body[comma...])"
        }
        return argument
    }

    private static func chardev(_ argument: String, _ rewrite: Rewrite) throws -> String {
        var parts = KeyValue.split(argument)
        guard ["file", "socket", "pipe"].contains(parts[0]) else { return argument }
        for (index, part) in parts.enumerated() where part.hasPrefix("path=") || part.hasPrefix("logfile=") {
            let equals = part.firstIndex(of: "=")!
            let value = String(part[part.index(after: equals)...])
            parts[index] = "\(part[..<equals])=\(try rewrite(.output, value))"
        }
        return parts.map(KeyValue.escape).joined(separator: ",")
    }

    /// Every path in the command line.
    public func paths() throws -> [PathReference] {
        var found: [PathReference] = []
        _ = try rewritten { reference in
            found.append(reference)
            return reference.path
        }
        return found
    }

    /// The command line with the machine type that a running guest really has, since names such as `pc` and `q35` mean
    /// the newest version of the QEMU that reads them.
    public func pinned(machine type: String) throws -> GuestCommandLine {
        var found = false
        var arguments = try map { name, argument in
            guard name == "machine" || name == "M" else { return (name, argument) }
            var parts = KeyValue.split(argument ?? "")
            if let index = parts.firstIndex(where: { $0.hasPrefix("type=") }) {
                parts[index] = "type=\(type)"
                found = true
            } else if let first = parts.first, !first.contains("=") {
                parts[0] = type
                found = true
            }
            return (name, parts.map(KeyValue.escape).joined(separator: ","))
        }
        if !found { arguments += ["-machine", type] }
        return GuestCommandLine(arguments: arguments, directory: directory)
    }

    /// Whether an option is given.
    public func has(_ option: String) -> Bool { arguments.contains("-\(option)") || arguments.contains("--\(option)") }
}
