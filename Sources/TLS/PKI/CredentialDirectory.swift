internal import CGnuTLS
internal import Glibc

/// What is in a credential directory, for people and for monitoring.
public struct CredentialDirectory: Sendable {
    /// One certificate of the directory.
    public struct Entry: Sendable, Equatable {
        /// The file's name.
        public let file: String
        /// The distinguished name.
        public let subject: String
        /// The issuer's distinguished name.
        public let issuer: String
        /// The subject alternative names, each with its kind.
        public let names: [String]
        /// When it starts to be valid, in seconds since 1970.
        public let notBefore: Int
        /// When it ends to be valid, in seconds since 1970.
        public let notAfter: Int
        /// The day on which it ends to be valid: 2027-01-31.
        public let lastDay: String
    }

    /// The directory.
    public let path: String
    /// The certificates of all files, in the order of the files.
    public let entries: [Entry]
    /// The ends that the directory has certificates for.
    public let endpoints: [TLSEndpoint]
    /// Everything that is wrong, errors and warnings.
    public let findings: [CertificateFinding]

    /// Whether credentials can be loaded from it.
    public var isGood: Bool { !findings.contains { $0.severity == .error } }

    /// Reads and checks a directory.
    ///
    /// - Parameters:
    ///   - path: the directory.
    ///   - passphrase: what the private keys are encrypted with.
    public init(checking path: String, passphrase: Secret? = nil) {
        self.path = path
        var entries: [Entry] = []
        var findings: [CertificateFinding] = []
        var endpoints: [TLSEndpoint] = []
        func collect(_ name: String, _ kind: String) -> Bool {
            let file = "\(path)/\(name)"
            do {
                guard let found = try CredentialFile.find(path, name) else { return false }
                let list = try Certificate.list(CredentialFile.contents(found), what: "\(kind) certificate \(file)")
                entries += list.map { certificate in
                    Entry(
                        file: name,
                        subject: certificate.subject,
                        issuer: certificate.issuer,
                        names: certificate.alternativeNames,
                        notBefore: certificate.notBefore,
                        notAfter: certificate.notAfter,
                        lastDay: CertificateCheck.date(certificate.notAfter)
                    )
                }
                return true
            } catch {
                findings.append(.init(severity: .error, file: file, field: "file", message: "\(error)"))
                return true
            }
        }
        if !collect("ca-cert.pem", "CA") {
            findings.append(
                .init(
                    severity: .error,
                    file: "\(path)/ca-cert.pem",
                    field: "file",
                    message: "Unable to access credentials \(path)/ca-cert.pem: No such file or directory; copy the "
                        + "authority's certificate there"
                )
            )
        }
        for endpoint in TLSEndpoint.allCases {
            var isThere = false
            for suffix in CredentialFile.identitySuffixes {
                guard collect("\(endpoint.rawValue)-cert\(suffix).pem", endpoint.rawValue) else {
                    if suffix.isEmpty { continue }
                    break
                }
                isThere = true
            }
            if isThere { endpoints.append(endpoint) }
        }
        if findings.isEmpty {
            // Without any certificate of its own a directory is good for a client that proves nothing.
            for endpoint in endpoints.isEmpty ? [.client] : endpoints {
                for finding in X509Credentials.check(directory: path, endpoint: endpoint, passphrase: passphrase)
                where !findings.contains(finding) { findings.append(finding) }
            }
        }
        self.entries = entries
        self.endpoints = endpoints
        self.findings = findings
    }
}
