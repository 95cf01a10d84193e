internal import Glibc
internal import IO

/// Which credentials a program was told to use: descriptions of objects, and the id of the credentials among them.
public struct CredentialSelection: Sendable, Codable, Hashable {
    /// The objects as QEMU writes them, in their order.
    public var objects: [String]
    /// The id of the credentials; nil for those of `/etc/pki`.
    public var tlsCreds: String?

    /// Names credentials.
    public init(objects: [String] = [], tlsCreds: String? = nil) {
        self.objects = objects
        self.tlsCreds = tlsCreds
    }

    /// The objects, made in their order: one may refer to those before it.
    public func store() throws -> ObjectStore {
        let store = ObjectStore()
        for object in objects { try store.add(ObjectDescription(parsing: object)) }
        return store
    }

    /// The credentials for one end.
    ///
    /// - Parameters:
    ///   - endpoint: the end.
    ///   - store: the objects.
    ///   - user: who uses them, for who wants to remove them.
    ///   - warn: is told what works but should be known.
    /// - Throws: `CredentialError`.
    public func credentials(
        _ endpoint: TLSEndpoint,
        from store: ObjectStore,
        user: String,
        warn: (String) -> Void = { _ in }
    ) throws -> any TLSCredentials {
        let credentials = try find(endpoint, from: store, user: user)
        for warning in credentials.warnings { warn(warning) }
        return credentials
    }

    /// Where the credentials of QEMU, libvirt and others are, of an authority that they share.
    private static let sharedDirectory = "/etc/pki/qemu"

    /// Where the credentials of a host for Crossdock are.
    public static let ownDirectory = "/etc/pki/crossdock"

    /// The directory whose credentials are taken when none are named.
    private static var defaultDirectory: String? {
        [ownDirectory, sharedDirectory].first { DurableFile.exists("\($0)/ca-cert.pem") }
    }

    /// The directory of the certificates, for those who look at them; nil when they are none of `tls-creds-x509`, or not there.
    public var directory: String? {
        guard let tlsCreds else { return Self.defaultDirectory }
        let described = objects.compactMap { try? ObjectDescription(parsing: $0) }
        let credentials = described.first { $0.id == tlsCreds && $0.type == "tls-creds-x509" }
        guard case .text(let path)? = credentials?.properties["dir"] else { return nil }
        return path
    }

    /// Checks that whoever may connect was chosen: every certificate of the authority counts unless an authorisation says otherwise.
    ///
    /// - Parameters:
    ///   - authorization: the id of an authz object; nil for none.
    ///   - allowsAll: whether somebody has said that all shall count.
    ///   - warn: is told what works but should be known.
    /// - Throws: `CredentialError` for credentials that were not named and are of an authority that other services share.
    public func checkAuthority(authorization: String?, allowsAll: Bool, warn: (String) -> Void) throws {
        if authorization != nil || allowsAll { return }
        guard tlsCreds == nil else {
            return warn(
                "every peer that the credentials '\(tlsCreds ?? "")' verify may migrate guests to this host; name those who may with "
                    + "--tls-authz, or say --allow-all-of-authority"
            )
        }
        guard Self.defaultDirectory == Self.sharedDirectory else { return }
        throw CredentialError(
            "The credentials in \(Self.sharedDirectory) are of an authority that also vouches for other services, and each of its "
                + "certificates could start guests on this host; name the sources with --tls-authz, or say --allow-all-of-authority"
        )
    }

    private func find(_ endpoint: TLSEndpoint, from store: ObjectStore, user: String) throws -> any TLSCredentials {
        if let tlsCreds { return try store.credentials(tlsCreds, endpoint: endpoint, user: user) }
        guard let directory = Self.defaultDirectory else {
            for directory in ["/etc/pki/crossdock", Self.sharedDirectory] {
                guard access("\(directory)/ca-cert.pem", R_OK) != 0, errno == EACCES else { continue }
                throw CredentialError(
                    "The credentials in \(directory) cannot be read by this user; run this as their owner, or name a directory with "
                        + "--object tls-creds-x509,id=tls0,dir=DIR --tls-creds tls0"
                )
            }
            throw CredentialError(
                "There are no TLS credentials: neither /etc/pki/crossdock nor /etc/pki/qemu has a ca-cert.pem; make them "
                    + "with 'crossdock pair' or 'crossdock pki', or name a directory with --object tls-creds-x509,id=tls0,dir=DIR --tls-creds tls0"
            )
        }
        let credentials = try X509Credentials(id: "default", directory: directory, endpoint: endpoint)
        try store.adopt(credentials, user: user)
        return credentials
    }
}
