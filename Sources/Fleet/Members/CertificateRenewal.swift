internal import TLS

/// The next certificate of a member: what its own host asks for, and what the authority's host issues.
public struct CertificateRenewal: Sendable {
    private let files: FleetFiles

    /// Names the host's files.
    public init(_ files: FleetFiles) { self.files = files }

    /// A certificate that ends within so many seconds is renewed.
    public static let margin = 30 * 86400

    /// Who belongs to the fleet of this host, and where it has its authority.
    ///
    /// - Throws: `FleetError` for a host of no fleet.
    public func list() throws -> FleetList {
        guard let authority = try files.trustedAuthority(), let signed = try files.signedList() else {
            throw FleetError("This host belongs to no fleet; 'crossdock pair' on another one makes it a member")
        }
        return try signed.verified(by: authority)
    }

    /// Issues the next certificate of a member, for the names that the list has of it, whatever its request says. Blocks.
    ///
    /// - Parameters:
    ///   - identity: who asks, and has proved to be it.
    ///   - request: its request, PEM.
    /// - Returns: the certificate and its authority's, PEM.
    /// - Throws: `FleetError` for who is no member, `CredentialError` for what is no request.
    public func issue(to identity: String, _ request: String) throws -> (certificate: String, authority: String) {
        guard let member = try list().members.first(where: { $0.identity == identity }) else {
            throw FleetError("'\(identity)' is no member of this fleet")
        }
        let authority = try CertificateAuthority(loading: files.authority)
        let certificate = try authority.issue(for: request, .init(name: member.name, hosts: member.hosts))
        return (certificate, try authority.pem)
    }
}
