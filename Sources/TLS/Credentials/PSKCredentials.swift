internal import CGnuTLS
internal import CLinux
internal import Glibc
internal import IO

/// Pre-shared keys in a directory's `keys.psk`, one `user:hexkey` a line, as psktool writes it. QEMU's `tls-creds-psk`.
public final class PSKCredentials: TLSCredentials {
    /// What was loaded at one time; sessions keep the one they began with.
    final class Loaded: @unchecked Sendable {
        // Unchecked: read-only once it is loaded.
        fileprivate let keys: [[UInt8]: SecretBytes]
        fileprivate var server: gnutls_psk_server_credentials_t?
        fileprivate var client: gnutls_psk_client_credentials_t?
        fileprivate var warnings: [String] = []

        fileprivate init(keys: [[UInt8]: SecretBytes]) { self.keys = keys }

        deinit {
            if let server { gnutls_psk_free_server_credentials(server) }
            if let client { gnutls_psk_free_client_credentials(client) }
        }

        /// Gives GnuTLS the key of a user; a random one for a stranger, so that users cannot be guessed one by one.
        func key(of user: gnutls_datum_t, into datum: UnsafeMutablePointer<gnutls_datum_t>) -> Int32 {
            // Every byte counts: a name that goes on behind a zero byte is another name.
            let key = keys[Array(UnsafeBufferPointer(start: user.data, count: Int(user.size)))]
            let count = key?.count ?? 32
            guard let memory = xd_gnutls_malloc(count) else { return -1 }
            if let key {
                key.withBytes { _ = memcpy(memory, $0.baseAddress!, count) }
            } else {
                gnutls_rnd(GNUTLS_RND_NONCE, memory, count)
            }
            datum.pointee = gnutls_datum_t(data: memory.assumingMemoryBound(to: UInt8.self), size: UInt32(count))
            return 0
        }
    }

    /// The object's id.
    public let id: String
    /// The type.
    public let type = "tls-creds-psk"
    /// The end they are for.
    public let endpoint: TLSEndpoint
    /// The directory they were loaded from, or the file.
    public var directory: String {
        switch place {
        case .directory(let path), .file(let path): path
        case .memory: ""
        }
    }
    private let place: Place
    /// A peer without the key cannot finish the handshake.
    public let verifiesPeer = true
    /// The GnuTLS priority string.
    public let priority: String
    /// Keys, not certificates, identify the peers.
    public let usesCertificates = false
    private let user: String
    private let current: Reloadable<Loaded>

    /// Loads a directory.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - directory: QEMU's `dir`.
    ///   - endpoint: which end.
    ///   - username: whose key a client uses; "qemu" when it is not given. Not allowed for a server.
    ///   - priority: a GnuTLS priority string instead of the default one; the key exchanges with keys are appended.
    /// - Throws: `CredentialError`.
    public convenience init(
        id: String,
        directory: String,
        endpoint: TLSEndpoint,
        username: String? = nil,
        priority: String? = nil
    ) throws {
        try self.init(id, .directory(directory), endpoint, username, priority)
    }

    /// Loads a file of keys, wherever it is.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - keyFile: the file, in psktool's form.
    ///   - endpoint: which end.
    ///   - username: whose key a client uses; "qemu" when it is not given. Not allowed for a server.
    /// - Throws: `CredentialError`.
    public convenience init(id: String, keyFile: String, endpoint: TLSEndpoint, username: String? = nil) throws {
        try self.init(id, .file(keyFile), endpoint, username, nil)
    }

    /// Uses one key that is in no file; every session has ephemeral keys as well.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - key: the key.
    ///   - user: whose it is.
    ///   - endpoint: which end.
    /// - Throws: `CredentialError`.
    public init(id: String, key: SecretBytes, user: String, endpoint: TLSEndpoint) throws {
        self.id = id
        self.endpoint = endpoint
        place = .memory(key)
        priority = TLSPriority.ephemeralPSK
        self.user = user
        current = Reloadable(try Self.load(place, endpoint, user))
    }

    /// Where the keys are.
    private enum Place {
        case directory(String)
        case file(String)
        case memory(SecretBytes)

        func path() throws -> String {
            switch self {
            case .directory(let directory): try CredentialFile.require(directory, "keys.psk")
            case .file(let path): path
            case .memory: "memory"
            }
        }
    }

    private init(
        _ id: String,
        _ place: Place,
        _ endpoint: TLSEndpoint,
        _ username: String?,
        _ priority: String?
    ) throws {
        if endpoint == .server, username != nil {
            throw CredentialError("username should not be set when endpoint=server")
        }
        self.id = id
        self.endpoint = endpoint
        self.place = place
        self.priority = priority.map { $0 + TLSPriority.pskSuffix } ?? TLSPriority.psk
        user = username ?? "qemu"
        current = Reloadable(try Self.load(place, endpoint, user))
    }

    /// See `TLSCredentials.reload()`.
    public func reload() throws {
        try current.reload { try Self.load(place, endpoint, user) }
    }

    /// See `TLSCredentials.warnings`.
    public var warnings: [String] { current.value.warnings }

    private static func load(_ place: Place, _ endpoint: TLSEndpoint, _ user: String) throws -> Loaded {
        let path = try place.path()
        let loaded: Loaded
        if case .memory(let key) = place {
            loaded = Loaded(keys: [Array(user.utf8): key])
        } else {
            loaded = Loaded(keys: try parse(CredentialFile.secretContents(path), path))
        }
        if case .memory = place {
            // Nobody sees it but this process.
        } else if let exposure = CredentialFile.exposure(path) {
            loaded.warnings.append(exposure)
        }
        switch endpoint {
        case .server:
            try GnuTLS.check(gnutls_psk_allocate_server_credentials(&loaded.server), "Cannot allocate credentials")
            gnutls_psk_set_server_credentials_function2(loaded.server) { session, user, datum in
                // The session's pointer is its TLSSession, which keeps what it was attached to.
                guard let user, let datum, let pointer = gnutls_session_get_ptr(session) else { return -1 }
                let owner = Unmanaged<TLSSession>.fromOpaque(pointer).takeUnretainedValue()
                return (owner.attachment as? Loaded)?.key(of: user.pointee, into: datum) ?? -1
            }
        case .client:
            guard let key = loaded.keys[Array(user.utf8)] else {
                throw CredentialError(
                    "Username \(user) not found in PSK file \(path)"
                        + (user == "qemu" ? "; name another one with username=" : "")
                )
            }
            try GnuTLS.check(gnutls_psk_allocate_client_credentials(&loaded.client), "Cannot allocate credentials")
            let code = key.withBytes { bytes in
                var datum = gnutls_datum_t(
                    data: UnsafeMutableRawPointer(mutating: bytes.baseAddress!).assumingMemoryBound(to: UInt8.self),
                    size: UInt32(bytes.count)
                )
                return gnutls_psk_set_client_credentials(loaded.client, user, &datum, GNUTLS_PSK_KEY_RAW)
            }
            try GnuTLS.check(code, "The key of user '\(user)' in '\(path)' is unusable")
        }
        return loaded
    }

    /// Reads the lines. A name that begins with `#` and goes on in hexadecimal is psktool's form of a binary name; any other
    /// line that begins with `#` is a comment.
    private static func parse(_ file: SecretBytes, _ path: String) throws -> [[UInt8]: SecretBytes] {
        try file.withBytes { text in
            var keys: [[UInt8]: SecretBytes] = [:]
            for (index, line) in text.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
                .enumerated()
            {
                let line = line.last == UInt8(ascii: "\r") ? line.dropLast() : line
                if line.isEmpty { continue }
                guard let colon = line.lastIndex(of: UInt8(ascii: ":")) else {
                    if line.first == UInt8(ascii: "#") { continue }
                    throw CredentialError("Cannot read PSK file \(path): line \(index + 1) is not user:hexkey")
                }
                var name = Array(line[line.startIndex..<colon])
                if name.first == UInt8(ascii: "#") {
                    guard let decoded = hexBytes(name.dropFirst()) else { continue }
                    name = decoded
                }
                guard !name.isEmpty else {
                    throw CredentialError("Cannot read PSK file \(path): line \(index + 1) has no user")
                }
                guard var key = hexBytes(line[(colon + 1)...]), !key.isEmpty else {
                    throw CredentialError(
                        "Cannot read PSK file \(path): the key in line \(index + 1) is not hexadecimal; "
                            + "make one with psktool"
                    )
                }
                // GnuTLS takes the first line of a user.
                let secret = try SecretBytes(wiping: &key)
                if keys[name] == nil { keys[name] = secret }
            }
            if keys.isEmpty { throw CredentialError("Cannot read PSK file \(path): it holds no key") }
            return keys
        }
    }

    /// A user's name as text: as it is when it is text, otherwise in psktool's form for others, `#` and hexadecimal digits.
    static func text(of name: [UInt8]) -> String {
        if let text = String(validating: name, as: UTF8.self), name.first != UInt8(ascii: "#"), !name.contains(0) {
            return text
        }
        return "#\(name.hex)"
    }

    private static func hexBytes(_ digits: some Collection<UInt8>) -> [UInt8]? {
        guard digits.count % 2 == 0 else { return nil }
        var result: [UInt8] = []
        result.reserveCapacity(digits.count / 2)
        var high: UInt8?
        for digit in digits {
            let value: UInt8
            switch digit {
            case 48...57: value = digit - 48
            case 65...70: value = digit - 55
            case 97...102: value = digit - 87
            default: return nil
            }
            if let first = high {
                result.append(first << 4 | value)
                high = nil
            } else {
                high = value
            }
        }
        return result
    }

    /// See `TLSCredentials.attach(to:)`.
    public func attach(to session: OpaquePointer) throws -> AnyObject {
        let loaded = current.value
        let handle =
            loaded.server.map { UnsafeMutableRawPointer($0) } ?? loaded.client.map { UnsafeMutableRawPointer($0) }
        try GnuTLS.check(
            gnutls_credentials_set(session, GNUTLS_CRD_PSK, handle),
            "Cannot use the credentials '\(id)'"
        )
        return loaded
    }
}
