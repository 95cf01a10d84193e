public import TLS

/// A certificate authority and host directories for tests.
public struct TestPKI: Sendable {
    /// The directory with one subdirectory for each host.
    public let root: TestDirectory

    /// Makes an authority and the directory `host`, good for localhost and the loopback addresses.
    public init() throws {
        root = try TestDirectory()
        let authority = try CertificateAuthority(name: "Crossdock test CA")
        try authority.save(to: root.directory("ca"))
        try issue("host", hosts: ["localhost", "127.0.0.1", "::1"])
    }

    /// The directory of the good host.
    public var directory: String { root.file("host") }

    /// Issues another directory.
    @discardableResult
    public func issue(_ name: String, hosts: [String], starts: Int = -3600, ends: Int = 86400) throws -> String {
        let authority = try CertificateAuthority(loading: root.file("ca"))
        let directory = root.directory(name)
        try authority.issue(.init(name: name, hosts: hosts, starts: starts, ends: ends), to: directory)
        return directory
    }

    /// Credentials from a directory, the good host's by default.
    public func credentials(
        _ endpoint: TLSEndpoint,
        directory: String? = nil,
        sanityCheck: Bool = false
    ) throws -> X509Credentials {
        try X509Credentials(
            id: "tls0",
            directory: directory ?? self.directory,
            endpoint: endpoint,
            sanityCheck: sanityCheck
        )
    }
}
