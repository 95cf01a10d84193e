internal import IO

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
        /// A directory or a file of the host with credentials, which must be there under the same path.
        case directory
        /// An image under a disk: part of the disk's contents.
        case backing
    }

    /// A path in the command line.
    public struct PathReference: Sendable, Hashable {
        /// What it is for.
        public let kind: PathKind
        /// As it is written.
        public let path: String
        /// The option it belongs to, for messages.
        public let option: String
        /// The format that the command line says that it has; nil when QEMU would guess it.
        public let format: String?

        init(kind: PathKind, path: String, option: String, format: String? = nil) {
            self.kind = kind
            self.path = path
            self.option = option
            self.format = format
        }
    }

    /// Where something of the command line is on this host, and what it is here.
    public struct Placement: Sendable, Hashable {
        /// The path.
        public var path: String
        /// The image's format here; nil to leave what the command line says.
        public var format: String?
        /// Whether that is another format than the one that the command line means.
        public var changesFormat = false
        /// The size that the guest sees, when the device is larger.
        public var size: UInt64?
        /// Whether the image has no backing file here, although it had one.
        public var isFlattened = false
        /// Whether the path is a block device.
        public var isDevice = false

        /// Makes a placement.
        public init(path: String, format: String? = nil) {
            self.path = path
            self.format = format
        }
    }

    /// A command line for this host, and how it differs.
    public struct Relocation: Sendable {
        /// The program and its arguments.
        public var arguments: [String]
        /// What was changed, an option a line.
        public var changes: [String]
        /// Secrets that are not in the command line and must be given to QEMU.
        public var secrets: [String]
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

    init(program: String, options: [GuestOption], directory: String) {
        self.init(arguments: [program] + GuestOption.words(options), directory: directory)
    }

    /// The program.
    public var program: String { arguments.first ?? "" }

    func options() throws -> [GuestOption] {
        guard !arguments.isEmpty else { throw GuestError("The guest's command line is empty") }
        return try GuestOption.parse(arguments.dropFirst())
    }

    /// Every path in the command line.
    public func paths() throws -> [PathReference] {
        var found: [PathReference] = []
        _ = try relocated(isAtHome: true) { reference in
            found.append(reference)
            return Placement(path: reference.path)
        }
        return found
    }

    /// The command line with the machine type that a running guest really has, since names such as `pc` and `q35` mean
    /// the newest version of the QEMU that reads them.
    public func pinned(machine type: String) throws -> GuestCommandLine {
        var found = false
        var options = try options().map { option in
            guard option.name == "machine" || option.name == "M" else { return option }
            var parts = KeyValue.split(option.argument ?? "")
            if let index = parts.firstIndex(where: { $0.hasPrefix("type=") }) {
                parts[index] = "type=\(type)"
                found = true
            } else if let first = parts.first, !first.contains("=") {
                parts[0] = type
                found = true
            }
            return GuestOption(option.name, parts.map(KeyValue.escape).joined(separator: ","))
        }
        if !found { options.append(GuestOption("machine", type)) }
        return GuestCommandLine(program: program, options: options, directory: directory)
    }

    /// Whether an option is given.
    public func has(_ option: String) -> Bool { ((try? options()) ?? []).contains { $0.name == option } }

    /// Whether an option holds a secret that anybody can read.
    private static func isClearSecret(_ option: GuestOption) -> Bool {
        guard option.name == "object",
            let settings = try? BlockOptions(parsing: option.argument ?? "", implied: "qom-type")
        else { return false }
        return settings["qom-type"] == "secret" && settings.has("data") && !settings.has("keyid")
    }

    /// The ids of the secrets whose values are in the command line in clear.
    public var clearSecrets: [String] {
        ((try? options()) ?? []).filter(Self.isClearSecret).map { $0.value("id") ?? "" }
    }

    /// The command line without the values of such secrets, for a file or a screen.
    public var withoutClearSecrets: GuestCommandLine {
        guard !clearSecrets.isEmpty, let options = try? options() else { return self }
        let hidden = options.map { option in
            Self.isClearSecret(option) ? GuestOption("object", "secret,id=\(option.value("id") ?? "")") : option
        }
        return GuestCommandLine(program: program, options: hidden, directory: directory)
    }
}
