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

    private func find(_ endpoint: TLSEndpoint, from store: ObjectStore, user: String) throws -> any TLSCredentials {
        if let tlsCreds { return try store.credentials(tlsCreds, endpoint: endpoint, user: user) }
        let directories = ["/etc/pki/crossdock", "/etc/pki/qemu"]
        guard let directory = directories.first(where: { DurableFile.exists("\($0)/ca-cert.pem") }) else {
            throw CredentialError(
                "There are no TLS credentials: neither /etc/pki/crossdock nor /etc/pki/qemu has a ca-cert.pem; make them "
                    + "with 'crossdock pki', or name a directory with --object tls-creds-x509,id=tls0,dir=DIR --tls-creds tls0"
            )
        }
        let credentials = try X509Credentials(id: "default", directory: directory, endpoint: endpoint)
        try store.adopt(credentials, user: user)
        return credentials
    }
}
