internal import IO

/// The objects of a process by id: made from `--object` or over the control socket, used by `--tls-creds` and `--tls-authz`.
public final class ObjectStore: Sendable {
    /// Where a description comes from.
    public enum Origin: Sendable {
        /// The command line, which every user of the host can read.
        case commandLine
        /// The control socket, which only its owner can open.
        case control
    }

    /// An object of the store.
    public struct Listing: Sendable, Equatable {
        /// The id.
        public let id: String
        /// The type.
        public let type: String
        /// Who uses it, so that it cannot be removed: the ids of objects, or the part of the program.
        public let users: [String]
    }

    private struct Entry {
        var description: ObjectDescription
        /// What was made of it; credentials without an endpoint have one for each end that asked.
        var made: [String: any SecurityObject] = [:]
        var users: Set<String> = []
    }

    /// The types that can be made.
    public static let types = [
        "authz-list", "authz-list-file", "authz-simple", "secret", "secret_keyring", "tls-creds-anon", "tls-creds-psk",
        "tls-creds-x509",
    ]

    private let entries = Guarded<[String: Entry]>([:])

    /// Makes an empty store.
    public init() {}

    /// Makes an object and adds it.
    ///
    /// Everything that can be checked is checked now: files are read, certificates judged. Credentials without an `endpoint`
    /// are made for the end that asks first; QEMU takes them for a client's.
    ///
    /// - Throws: `CredentialError` or `CryptoError`; then nothing was added.
    public func add(_ description: ObjectDescription, from origin: Origin = .commandLine) throws {
        try checkNew(description.id)
        guard Self.types.contains(description.type) else {
            throw CredentialError(
                "Parameter 'qom-type' does not accept value '\(description.type)'; known are "
                    + Self.types.joined(separator: ", ")
            )
        }
        // Files are read without the lock: a pipe or a network file system may keep its reader waiting, and loops that judge a
        // peer need the lock.
        var entry = Entry(description: description)
        var passphrase: String?
        if description.type.hasPrefix("tls-creds-") {
            try Self.checkCredentialProperties(description)
            var reader = description.reader
            if let endpoint: TLSEndpoint = try reader.choice("endpoint") {
                let made = try makeCredentials(description, endpoint)
                entry.made[endpoint.rawValue] = made.credentials
                passphrase = made.passphrase
            }
        } else {
            entry.made[""] = try make(description, origin)
        }
        try entries.withLock { entries in
            guard entries[description.id] == nil else { throw Self.duplicate(description.id) }
            try Self.use(passphrase, by: description.id, &entries)
            entries[description.id] = entry
        }
    }

    private static func duplicate(_ id: String) -> CredentialError {
        CredentialError("attempt to add duplicate object '\(id)'")
    }

    private func checkNew(_ id: String) throws {
        if entries.withLock({ $0[id] != nil }) { throw Self.duplicate(id) }
    }

    /// Keeps the secret with a passphrase, which a reload needs again.
    private static func use(_ passphrase: String?, by id: String, _ entries: inout [String: Entry]) throws {
        guard let passphrase else { return }
        guard entries[passphrase] != nil else { throw CredentialError("No secret with id '\(passphrase)'") }
        entries[passphrase]?.users.insert("object '\(id)'")
    }

    /// Removes an object.
    ///
    /// - Throws: `CredentialError` when there is none, or when something uses it.
    public func remove(_ id: String) throws {
        try entries.withLock { entries in
            guard let entry = entries[id] else { throw CredentialError("object '\(id)' not found") }
            guard entry.users.isEmpty else {
                throw CredentialError(
                    "object '\(id)' is in use, can not be deleted: \(entry.users.sorted().joined(separator: ", ")) uses it"
                )
            }
            entries[id] = nil
            for key in entries.keys { entries[key]?.users.remove("object '\(id)'") }
        }
    }

    /// All the objects, by id.
    public var listings: [Listing] {
        entries.withLock { entries in
            entries.values
                .map { Listing(id: $0.description.id, type: $0.description.type, users: $0.users.sorted()) }
                .sorted { $0.id < $1.id }
        }
    }

    /// The secret with this id.
    public func secret(_ id: String) throws -> Secret {
        try entries.withLock { try Self.secret(id, $0) }
    }

    /// The authorisation with this id, in QEMU's words when there is none.
    public func authorizer(_ id: String) throws -> any Authorizer {
        try entries.withLock { entries in
            guard let entry = entries[id] else { throw CredentialError("Cannot find QAuthZ object ID \(id)") }
            guard let authorizer = entry.made[""] as? any Authorizer else {
                throw CredentialError("Object '\(id)' is not a QAuthZ subclass")
            }
            return authorizer
        }
    }

    /// Sees that there is an authorisation with the id that an option was given.
    ///
    /// - Throws: `CredentialError` that names the option, and how such an object is made.
    public func checkAuthorizer(_ id: String, of option: String) throws {
        do { _ = try authorizer(id) } catch let error as CredentialError {
            throw CredentialError(
                "\(option) \(id): \(error.message); make one with --object authz-list,id=\(id),... or another of the authz objects"
            )
        }
    }

    /// The credentials with this id for one end.
    ///
    /// - Parameters:
    ///   - id: the id.
    ///   - endpoint: the end; credentials whose `endpoint` names the other one are an error.
    ///   - user: the part of the program that uses them from now on, so that they cannot be removed.
    public func credentials(_ id: String, endpoint: TLSEndpoint, user: String? = nil) throws -> any TLSCredentials {
        let entry = try entries.withLock { entries in
            guard let entry = entries[id] else {
                let known = entries.values.filter { $0.description.type.hasPrefix("tls-creds-") }
                    .map(\.description.id).sorted().joined(separator: ", ")
                throw CredentialError(
                    "No TLS credentials with id '\(id)'"
                        + (known.isEmpty ? "; add --object tls-creds-x509,id=\(id),dir=DIR" : "; there are: \(known)")
                )
            }
            return entry
        }
        guard entry.description.type.hasPrefix("tls-creds-") else {
            throw CredentialError("Object with id '\(id)' is not TLS credentials, but a \(entry.description.type)")
        }
        var reader = entry.description.reader
        if let named: TLSEndpoint = try reader.choice("endpoint"), named != endpoint {
            throw CredentialError(
                "Expected TLS credentials for a \(endpoint.rawValue) endpoint; '\(id)' is for a \(named.rawValue)"
            )
        }
        var fresh: (credentials: any TLSCredentials, passphrase: String?)?
        if entry.made[endpoint.rawValue] == nil { fresh = try makeCredentials(entry.description, endpoint) }
        return try entries.withLock { entries in
            guard var current = entries[id] else { throw CredentialError("No TLS credentials with id '\(id)'") }
            if current.made[endpoint.rawValue] == nil, let fresh {
                try Self.use(fresh.passphrase, by: id, &entries)
                current.made[endpoint.rawValue] = fresh.credentials
            }
            if let user { current.users.insert(user) }
            entries[id] = current
            guard let made = current.made[endpoint.rawValue] as? any TLSCredentials else {
                throw CredentialError("No TLS credentials with id '\(id)'")
            }
            return made
        }
    }

    /// Loads the files of credentials again: of one object, or of all.
    ///
    /// - Returns: the ids that were reloaded, and the failures, each with what stays as it was.
    /// - Throws: `CredentialError` when the object does not exist or is no credentials.
    public func reload(_ id: String? = nil) throws -> (reloaded: [String], failures: [CredentialError]) {
        let credentials = try entries.withLock { entries -> [any TLSCredentials] in
            if let id {
                guard let entry = entries[id] else { throw CredentialError("object '\(id)' not found") }
                guard entry.description.type.hasPrefix("tls-creds-") else {
                    throw CredentialError("Object with id '\(id)' is not TLS credentials")
                }
            }
            return entries.values.filter { id == nil || $0.description.id == id }
                .flatMap { $0.made.values.compactMap { $0 as? any TLSCredentials } }
                .sorted { $0.id < $1.id }
        }
        var reloaded: [String] = []
        var failures: [CredentialError] = []
        for item in credentials {
            do {
                try item.reload()
                reloaded.append(item.id)
            } catch {
                failures.append(
                    CredentialError("Cannot reload '\(item.id)', the credentials loaded before stay in use: \(error)")
                )
            }
        }
        return (reloaded, failures)
    }

    /// Adds credentials that were made without a description, such as those of the default directory.
    public func adopt(_ credentials: any TLSCredentials, user: String) throws {
        try entries.withLock { entries in
            guard entries[credentials.id] == nil else {
                throw CredentialError("attempt to add duplicate object '\(credentials.id)'")
            }
            var entry = Entry(
                description: try ObjectDescription([
                    "qom-type": .text(credentials.type), "id": .text(credentials.id),
                    "endpoint": .text(credentials.endpoint.rawValue), "dir": .text(credentials.directory),
                ])
            )
            entry.made[credentials.endpoint.rawValue] = credentials
            entry.users = [user]
            entries[credentials.id] = entry
        }
    }

    private static func secret(_ id: String, _ entries: [String: Entry]) throws -> Secret {
        guard let entry = entries[id] else { throw CredentialError("No secret with id '\(id)'") }
        guard let secret = entry.made[""] as? Secret else {
            throw CredentialError("Object with id '\(id)' is not a secret")
        }
        return secret
    }

    private func make(
        _ description: ObjectDescription,
        _ origin: Origin
    ) throws -> any SecurityObject {
        var reader = description.reader
        let id = description.id
        switch description.type {
        case "authz-simple":
            let identity = try reader.required("identity")
            try reader.finish()
            return SimpleAuthorizer(id: id, identity: identity)
        case "authz-list":
            let rules = try AuthorizationRule.parse(reader.records("rules") ?? [])
            let policy: AuthorizationPolicy = try reader.choice("policy") ?? .deny
            try reader.finish()
            return ListAuthorizer(id: id, rules: rules, policy: policy)
        case "authz-list-file":
            let path = try reader.required("filename")
            let refresh = try reader.flag("refresh", default: true)
            try reader.finish()
            return try ListFileAuthorizer(id: id, path: path, refresh: refresh)
        default: return try makeSecret(description, origin)
        }
    }

    private func makeSecret(
        _ description: ObjectDescription,
        _ origin: Origin
    ) throws -> Secret {
        var reader = description.reader
        let id = description.id
        let format: Secret.Format = try reader.choice("format") ?? .raw
        let keyid = try reader.text("keyid")
        let iv = try reader.text("iv")
        _ = try reader.flag("loaded", default: true)
        let input: SecretBytes
        if description.type == "secret_keyring" {
            guard let serial = try reader.number("serial"), let serial = Int32(exactly: serial), serial != 0 else {
                throw CredentialError(
                    "'serial' parameter must be given: the serial number of a key of the kernel's keyring"
                )
            }
            try reader.finish()
            input = try SecretSource.keyring(serial)
        } else {
            let data = try reader.text("data")
            let file = try reader.text("file")
            let fd = try reader.number("fd")
            try reader.finish()
            switch (data, file, fd) {
            case (let data?, nil, nil):
                guard keyid != nil || origin == .control else {
                    throw CredentialError(
                        "Secret '\(id)' is given in clear as 'data', where every user of this host can read it; use file=, "
                            + "fd=, or encrypt it with 'crossdock secret encrypt' and name the key with keyid="
                    )
                }
                var bytes = Array(data.utf8)
                input = try SecretBytes(wiping: &bytes)
            case (nil, let file?, nil): input = try SecretSource.file(file)
            case (nil, nil, let fd?):
                guard origin == .commandLine else {
                    throw CredentialError(
                        "'fd' of secret '\(id)' is for the command line; a running agent inherits nothing"
                    )
                }
                guard let fd = Int32(exactly: fd), fd > 2 else {
                    throw CredentialError(
                        "'fd' of secret '\(id)' must be the number of an inherited descriptor above 2"
                    )
                }
                input = try SecretSource.descriptor(fd)
            case (nil, nil, nil): throw CredentialError("Either 'file' or 'data' must be provided")
            default: throw CredentialError("'file' and 'data' are mutually exclusive, and so is 'fd'")
            }
        }
        let master = try keyid.map { try secret($0) }
        // The key was used and is not kept; the object may go.
        return try Secret(id: id, input: input, format: format, master: master, iv: iv, type: description.type)
    }

    private static func checkCredentialProperties(_ description: ObjectDescription) throws {
        var reader = description.reader
        _ = try credentialProperties(&reader, description.type)
        try reader.finish()
    }

    private struct CredentialProperties {
        var endpoint: TLSEndpoint?
        var directory: String?
        var verifyPeer = true
        var priority: String?
        var sanityCheck = true
        var passwordid: String?
        var username: String?
    }

    private static func credentialProperties(
        _ reader: inout PropertyReader,
        _ type: String
    ) throws -> CredentialProperties {
        var properties = CredentialProperties()
        properties.endpoint = try reader.choice("endpoint")
        properties.directory = try reader.text("dir")
        properties.verifyPeer = try reader.flag("verify-peer", default: true)
        properties.priority = try reader.text("priority")
        _ = try reader.flag("loaded", default: true)
        if type == "tls-creds-x509" {
            properties.sanityCheck = try reader.flag("sanity-check", default: true)
            properties.passwordid = try reader.text("passwordid")
        }
        if type == "tls-creds-psk" { properties.username = try reader.text("username") }
        return properties
    }

    private func makeCredentials(
        _ description: ObjectDescription,
        _ endpoint: TLSEndpoint
    ) throws -> (credentials: any TLSCredentials, passphrase: String?) {
        var reader = description.reader
        let properties = try Self.credentialProperties(&reader, description.type)
        try reader.finish()
        let id = description.id
        if description.type == "tls-creds-anon" {
            let made = try AnonymousCredentials(
                id: id,
                endpoint: endpoint,
                directory: properties.directory ?? "",
                priority: properties.priority
            )
            return (made, nil)
        }
        guard let directory = properties.directory else {
            throw CredentialError("Missing 'dir' property value in object '\(id)'")
        }
        if description.type == "tls-creds-psk" {
            let made = try PSKCredentials(
                id: id,
                directory: directory,
                endpoint: endpoint,
                username: properties.username,
                priority: properties.priority
            )
            return (made, nil)
        }
        let passphrase = try properties.passwordid.map { try secret($0) }
        let made = try X509Credentials(
            id: id,
            directory: directory,
            endpoint: endpoint,
            verifyPeer: properties.verifyPeer,
            priority: properties.priority,
            sanityCheck: properties.sanityCheck,
            passphrase: passphrase
        )
        return (made, properties.passwordid)
    }
}
