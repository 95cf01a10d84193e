/// The objects of a process by id: made from `--object`, used by `--tls-creds`.
public struct ObjectStore: Sendable {
    private var descriptions: [String: ObjectDescription] = [:]

    /// Makes an empty store.
    public init() {}

    /// Adds an object.
    ///
    /// - Throws: `CredentialError` when the id is taken or the type is unknown.
    public mutating func add(_ description: ObjectDescription) throws {
        guard descriptions[description.id] == nil else {
            throw CredentialError("Two objects have the id '\(description.id)'")
        }
        switch description.type {
        case "tls-creds-x509", "tls-creds-psk": descriptions[description.id] = description
        default:
            throw CredentialError(
                "Object type '\(description.type)' is not known; known are tls-creds-x509 and tls-creds-psk"
            )
        }
    }

    /// Loads the credentials with this id for one end.
    ///
    /// An object whose `endpoint` is not given serves the end that asks; one that names the other end is an error.
    public func credentials(_ id: String, endpoint: TLSEndpoint) throws -> any TLSCredentials {
        guard let object = descriptions[id] else {
            let known = descriptions.keys.sorted().joined(separator: ", ")
            throw CredentialError(
                "No TLS credentials with id '\(id)'"
                    + (known.isEmpty ? "; add --object tls-creds-x509,id=\(id),dir=DIR" : "; there are: \(known)")
            )
        }
        var properties = object.properties
        if let named = properties.removeValue(forKey: "endpoint") {
            guard let named = TLSEndpoint(rawValue: named) else {
                throw CredentialError("In object '\(id)', endpoint=\(named) is neither server nor client")
            }
            guard named == endpoint else {
                throw CredentialError(
                    "Expected TLS credentials for a \(endpoint.rawValue) endpoint; '\(id)' is for a "
                        + "\(named.rawValue)"
                )
            }
        }
        guard let directory = properties.removeValue(forKey: "dir") else {
            throw CredentialError("Missing 'dir' property value in object '\(id)'")
        }
        let priority = properties.removeValue(forKey: "priority")
        if object.type == "tls-creds-psk" {
            let username = properties.removeValue(forKey: "username")
            try rejectUnknown(properties, id)
            return try PSKCredentials(
                id: id,
                directory: directory,
                endpoint: endpoint,
                username: username,
                priority: priority.map { $0 + ":+ECDHE-PSK:+DHE-PSK:+PSK" }
            )
        }
        let verify = try object.flag("verify-peer", default: true)
        let sanity = try object.flag("sanity-check", default: true)
        properties["verify-peer"] = nil
        properties["sanity-check"] = nil
        try rejectUnknown(properties, id)
        return try X509Credentials(
            id: id,
            directory: directory,
            endpoint: endpoint,
            verifyPeer: verify,
            priority: priority,
            sanityCheck: sanity
        )
    }

    private func rejectUnknown(_ properties: [String: String], _ id: String) throws {
        if let key = properties.keys.sorted().first {
            throw CredentialError("Object '\(id)' has no property '\(key)'")
        }
    }
}
