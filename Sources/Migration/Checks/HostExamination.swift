internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import TLS

/// What one host says of itself: the checks of `crossdock doctor` that need nobody else. Each host examines itself, with the same table.
///
/// Blocks: run it on the pool.
public struct HostExamination: Sendable {
    /// The state directory.
    public var stateDirectory: String
    /// Where images are made.
    public var imageDirectory: String
    /// The directory of the host's certificates; nil when it has others than `tls-creds-x509`, or none.
    public var credentials: String?
    /// Whether the rate of the image directory's file system is measured, for a second.
    public var measuresDisk = false
    /// The directory of the kernel's devices; another one in tests.
    public var devices = "/dev"
    /// Where the kernel tells of its memory; another directory in tests.
    public var processes = "/proc"
    /// The host's name; another one in tests.
    public var hostname = Self.ownName

    /// Names what is examined.
    public init(stateDirectory: String, imageDirectory: String? = nil, credentials: String? = nil) {
        self.stateDirectory = stateDirectory
        self.imageDirectory = imageDirectory ?? "\(stateDirectory)/images"
        self.credentials = credentials
    }

    /// The checks, in the order in which they are shown.
    private static let table: [@Sendable (HostExamination) -> [Finding]] = [
        { $0.programs() }, { $0.name() }, { $0.certificates() }, { $0.space() }, { $0.diskRate() }, { $0.memory() },
        { $0.confinement() }, { $0.kernel() }, { $0.clock() }, { $0.leftovers() }, { $0.agent() },
    ]

    /// What the checks find, with this host's values in `Finding.here`.
    public func findings() -> [Finding] { Self.table.flatMap { $0(self) } }

    /// Whether the destination agent of a state directory takes connections on its control socket.
    public static func isServing(stateDirectory: String) -> Bool {
        StaleSocket.isAlive("\(stateDirectory)/control.sock")
    }

    /// The name that the kernel knows.
    public static var ownName: String {
        var buffer = [CChar](repeating: 0, count: 256)
        gethostname(&buffer, 255)
        return String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// The address of this host from which another one is reached; nil when there is no way. Nothing is sent.
    ///
    /// - Parameter address: the other host's, a literal one.
    public static func address(towards address: String) -> String? {
        var hints = addrinfo()
        hints.ai_socktype = Int32(SOCK_DGRAM.rawValue)
        hints.ai_flags = AI_NUMERICHOST
        var found: UnsafeMutablePointer<addrinfo>?
        guard getaddrinfo(address, "9", &hints, &found) == 0, let found else { return nil }
        defer { freeaddrinfo(found) }
        let descriptor = socket(found.pointee.ai_family, Int32(SOCK_DGRAM.rawValue), 0)
        guard descriptor >= 0 else { return nil }
        defer { close(descriptor) }
        var own = sockaddr_storage()
        var size = socklen_t(MemoryLayout<sockaddr_storage>.size)
        var text = [CChar](repeating: 0, count: 64)
        guard connect(descriptor, found.pointee.ai_addr, found.pointee.ai_addrlen) == 0,
            withUnsafeMutableBytes(
                of: &own,
                { bytes in
                    let pointer = bytes.baseAddress!.assumingMemoryBound(to: sockaddr.self)
                    return getsockname(descriptor, pointer, &size) == 0
                        && getnameinfo(pointer, size, &text, socklen_t(text.count), nil, 0, NI_NUMERICHOST) == 0
                }
            )
        else { return nil }
        return String(decoding: text.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self)
    }

    // MARK: programs, names, certificates

    private func programs() -> [Finding] {
        let names = ["qemu-system-x86_64", "qemu-img", "qemu-storage-daemon"]
        let missing = names.filter { EmulatorProcess.find($0) == nil }
        guard missing.isEmpty else {
            return [
                Finding(
                    .programs,
                    .fail,
                    here: "missing",
                    message: "\(missing.joined(separator: ", ")) \(missing.count == 1 ? "is" : "are") not in PATH",
                    remedy: "apt-get install qemu-system-x86 qemu-utils qemu-system-common"
                )
            ]
        }
        let filter = EmulatorProcess.find("nft") != nil
        return [
            Finding(
                .programs,
                filter ? .ok : .warn,
                here: EmulatorProcess.find(names[0]) ?? "",
                message: filter
                    ? nil
                    : "nft is not in PATH: guests that connect to others by themselves are refused when they come here",
                remedy: filter ? nil : "apt-get install nftables"
            )
        ]
    }

    private func name() -> [Finding] {
        let isLocal = hostname.isEmpty || hostname == "localhost" || hostname.hasPrefix("localhost.")
        return [
            Finding(
                .name,
                isLocal ? .warn : .ok,
                here: hostname,
                message: isLocal
                    ? "The host has no name of its own: guests that leave do not find their way home" : nil,
                remedy: isLocal ? "hostnamectl hostname NAME" : nil
            )
        ]
    }

    private func certificates() -> [Finding] {
        guard let credentials else { return [] }
        guard DurableFile.exists("\(credentials)/ca-cert.pem") else {
            return [
                Finding(
                    .certificate,
                    .fail,
                    here: "none",
                    message: "This host has no certificates in \(credentials)",
                    remedy: "crossdock pair [USER@]HOST"
                )
            ]
        }
        let directory = CredentialDirectory(checking: credentials)
        var findings: [Finding] = []
        for own in directory.findings where own.field != "permissions" {
            let isError = own.severity == .error
            findings.append(
                Finding(
                    .certificate,
                    isError ? .fail : .warn,
                    here: credentials,
                    message: own.message,
                    remedy: "crossdock pki check \(credentials)"
                )
            )
        }
        let missing = TLSEndpoint.allCases.filter { !directory.endpoints.contains($0) }
        if !missing.isEmpty, directory.isGood {
            findings.append(
                Finding(
                    .certificate,
                    .warn,
                    here: credentials,
                    message: "\(credentials) has no certificate for a \(missing[0].rawValue)",
                    remedy: "crossdock pki check \(credentials)"
                )
            )
        }
        for key in openKeys(credentials) {
            findings.append(
                Finding(
                    .certificate,
                    .warn,
                    here: key,
                    message: "Others than its owner can read the private key \(key)",
                    remedy: "crossdock doctor --fix"
                )
            )
        }
        guard findings.isEmpty else { return findings }
        let last = directory.entries.filter { $0.file != "ca-cert.pem" }.map(\.lastDay).min() ?? ""
        return [Finding(.certificate, .ok, here: "until \(last)")]
    }

    /// Private keys that others can read.
    func openKeys(_ directory: String) -> [String] {
        DurableFile.list(directory).filter { $0.hasSuffix("-key.pem") }.map { "\(directory)/\($0)" }.filter { path in
            var status = stat()
            return stat(path, &status) == 0 && status.st_mode & 0o077 != 0
        }
    }

    private func agent() -> [Finding] {
        let socket = "\(stateDirectory)/control.sock"
        guard DurableFile.exists(socket) else {
            return [
                Finding(
                    .agent,
                    .warn,
                    here: "does not run",
                    message:
                        "No destination agent runs for \(stateDirectory): guests can leave this host, and none can come",
                    remedy: "systemctl enable --now crossdock-destination"
                )
            ]
        }
        let cordon: String?
        do { cordon = try Cordon.read(stateDirectory: stateDirectory)?.sentence } catch { cordon = "\(error)" }
        return [
            Finding(
                .agent,
                cordon == nil ? .ok : .warn,
                here: cordon == nil ? "runs" : "cordoned",
                message: cordon.map { "The host takes no new guests, it is \($0)" },
                remedy: cordon == nil ? nil : "crossdock uncordon"
            )
        ]
    }
}
