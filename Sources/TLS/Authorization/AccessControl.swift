/// The check that a server makes of each peer, by the id of an authorisation: QEMU's `tls-authz`.
public struct AccessControl: Sendable {
    private let objects: ObjectStore
    /// The id of the authorisation; nil lets everybody pass who got through TLS.
    public let authorization: String?

    /// Makes a check against the objects of a process.
    public init(objects: ObjectStore, authorization: String?) {
        self.objects = objects
        self.authorization = authorization
    }

    /// Throws when the peer may not pass. An object that does not exist, or is no authorisation, denies.
    ///
    /// The object is looked up at each check, so that one that is removed and added again counts at once.
    public func check(_ peer: TLSPeer) throws {
        guard let authorization else { return }
        let authorizer = try objects.authorizer(authorization)
        // A list that allows by default must not let in who has no name to be denied by.
        guard !peer.identities.isEmpty, authorizer.allows(peer.identities) else {
            var message = "TLS authz check for \(peer.name) is denied by object '\(authorization)'"
            if let problem = (authorizer as? ListFileAuthorizer)?.problem { message += ", because: \(problem)" }
            throw CredentialError(message)
        }
    }
}
