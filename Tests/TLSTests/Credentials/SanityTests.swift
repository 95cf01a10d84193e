import Glibc
import IO
import TLS
import TestSupport
import Testing

/// One row of the matrix: an extension section of our certificate, and what loading it says.
struct LeafCase: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let end: TLSEndpoint
    let extensions: [String]
    /// A part of the error; nil for a certificate that loads.
    let error: String?
    /// A part of a warning.
    var warning: String?

    init(
        _ description: String,
        _ end: TLSEndpoint,
        _ extensions: [String],
        error: String? = nil,
        warning: String? = nil
    ) {
        testDescription = "\(end.rawValue): \(description)"
        self.end = end
        self.extensions = extensions
        self.error = error
        self.warning = warning
    }

    static let all: [LeafCase] = TLSEndpoint.allCases.flatMap { end in
        let own = end == .server ? "serverAuth" : "clientAuth"
        let other = end == .server ? "clientAuth" : "serverAuth"
        let purpose = "purpose does not allow use with a TLS \(end.rawValue)"
        return [
            LeafCase("no usage and no purpose", end, ["basicConstraints=CA:FALSE"]),
            LeafCase("no extensions at all", end, ["subjectKeyIdentifier=hash"]),
            LeafCase(
                "signing, signature and encipherment, critical",
                end,
                ["keyUsage=critical,keyCertSign,digitalSignature,keyEncipherment"]
            ),
            LeafCase("signature without encipherment, critical", end, ["keyUsage=critical,digitalSignature"]),
            LeafCase(
                "usage for signing only, not critical",
                end,
                ["keyUsage=keyCertSign"],
                warning: "does not permit digital signature"
            ),
            LeafCase(
                "usage for signing only, critical",
                end,
                ["keyUsage=critical,keyCertSign"],
                error: "usage does not permit digital signature"
            ),
            LeafCase("own purpose, critical", end, ["extendedKeyUsage=critical,\(own)"]),
            LeafCase("own purpose, not critical", end, ["extendedKeyUsage=\(own)"]),
            LeafCase("both purposes, critical", end, ["extendedKeyUsage=critical,\(own),\(other)"]),
            LeafCase("both purposes, not critical", end, ["extendedKeyUsage=\(own),\(other)"]),
            LeafCase("any purpose, critical", end, ["extendedKeyUsage=critical,anyExtendedKeyUsage"]),
            LeafCase("other purpose, not critical", end, ["extendedKeyUsage=\(other)"], warning: purpose),
            LeafCase("other purpose, critical", end, ["extendedKeyUsage=critical,\(other)"], error: purpose),
            LeafCase(
                "a CA's certificate",
                end,
                CertificateForge.Recipe.authority,
                error: "basic constraints show a CA, but we need one for a \(end.rawValue)"
            ),
        ]
    }
}

/// One row of the matrix: an authority's extension section, and what loading it says.
struct AuthorityCase: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let extensions: [String]
    let error: String?
    var warning: String?

    static let all = [
        AuthorityCase(
            testDescription: "CA without usage",
            extensions: ["basicConstraints=critical,CA:TRUE"],
            error: nil
        ),
        AuthorityCase(
            testDescription: "CA with usage",
            extensions: ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"],
            error: nil
        ),
        AuthorityCase(
            testDescription: "basic constraints not critical",
            extensions: ["basicConstraints=CA:TRUE"],
            error: nil
        ),
        AuthorityCase(
            testDescription: "wrong usage, critical",
            extensions: ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,digitalSignature"],
            error: "usage does not permit certificate signing"
        ),
        AuthorityCase(
            testDescription: "CA:FALSE",
            extensions: ["basicConstraints=critical,CA:FALSE"],
            error: "basic constraints do not show a CA"
        ),
        AuthorityCase(
            testDescription: "no basic constraints",
            extensions: ["subjectKeyIdentifier=hash"],
            error: "missing basic constraints for a CA"
        ),
    ]
}

@Suite(.timeLimit(.minutes(2)))
struct SanityTests {
    let forge: CertificateForge

    init() async throws {
        forge = try CertificateForge()
        try await forge.make("ca", .init(subject: "authority", extensions: CertificateForge.Recipe.authority))
    }

    func load(_ directory: String, _ end: TLSEndpoint) throws -> X509Credentials {
        try X509Credentials(id: "tls0", directory: directory, endpoint: end)
    }

    func failure(_ directory: String, _ end: TLSEndpoint) -> String {
        let error = #expect(throws: CredentialError.self) { try load(directory, end) }
        return error?.message ?? ""
    }

    @Test(arguments: LeafCase.all)
    func ourOwnCertificateIsJudgedByItsUsageAndPurpose(_ item: LeafCase) async throws {
        try await forge.make("own", .init(issuer: "ca", extensions: item.extensions))
        let end = item.end.rawValue
        let directory = try forge.credentials("d", authorities: ["ca"], end: end, chain: ["own"])
        if let error = item.error {
            let message = failure(directory, item.end)
            #expect(message.contains(error), "\(message)")
            #expect(message.contains("\(directory)/\(end)-cert.pem"))
            // The check can be switched off; the peer judges then.
            _ = try X509Credentials(id: "t", directory: directory, endpoint: item.end, sanityCheck: false)
        } else {
            let warnings = try load(directory, item.end).warnings
            #expect(warnings.count == (item.warning == nil ? 0 : 1), "\(warnings)")
            if let warning = item.warning { #expect(warnings.first?.contains(warning) == true) }
        }
    }

    @Test(arguments: AuthorityCase.all)
    func theAuthorityIsJudgedByItsConstraintsAndUsage(_ item: AuthorityCase) async throws {
        try await forge.make("odd", .init(subject: "odd authority", extensions: item.extensions))
        try await forge.make("own", .init(issuer: "odd", extensions: CertificateForge.Recipe.server))
        let directory = try forge.credentials("d", authorities: ["odd"], end: "server", chain: ["own"])
        if let error = item.error {
            let message = failure(directory, .server)
            #expect(message.contains(error), "\(message)")
            #expect(message.contains("\(directory)/ca-cert.pem"))
        } else {
            #expect(try load(directory, .server).warnings.isEmpty)
        }
    }

    @Test func timesOfOurOwnCertificateAreJudged() async throws {
        for (name, dates, expected) in [
            (
                "old", ["activation_date = \"2019-01-01 00:00:00\"", "expiration_date = \"2020-01-01 00:00:00\""],
                "has expired on 2020-01-01; issue a new one"
            ),
            (
                "new", ["activation_date = \"2090-01-01 00:00:00\"", "expiration_date = \"2091-01-01 00:00:00\""],
                "is not yet active before 2090-01-01; check this host's clock"
            ),
        ] {
            for end in TLSEndpoint.allCases {
                let use = end == .server ? "tls_www_server" : "tls_www_client"
                try await forge.make(
                    name,
                    template: ["cn = \"host\"", "signing_key", use] + dates,
                    issuer: "ca"
                )
                let directory = try forge.credentials(
                    "\(name)-\(end.rawValue)",
                    authorities: ["ca"],
                    end: end.rawValue,
                    chain: [name]
                )
                let message = failure(directory, end)
                #expect(message.contains("The \(end.rawValue) certificate \(directory)"), "\(message)")
                #expect(message.contains(expected), "\(message)")
            }
        }
    }

    @Test func timesOfTheAuthorityAreJudgedOnlyOnTheChain() async throws {
        try await forge.make(
            "expired",
            template: [
                "cn = \"expired authority\"", "ca", "cert_signing_key", "activation_date = \"2019-01-01 00:00:00\"",
                "expiration_date = \"2020-01-01 00:00:00\"",
            ],
            issuer: nil
        )
        try await forge.make("good", .init(issuer: "ca", extensions: CertificateForge.Recipe.server))
        try await forge.make("bad", .init(issuer: "expired", extensions: CertificateForge.Recipe.server))
        let unrelated = try forge.credentials("u", authorities: ["expired", "ca"], end: "server", chain: ["good"])
        let warnings = try load(unrelated, .server).warnings
        #expect(warnings.count == 1)
        #expect(warnings.first?.contains("has expired on 2020-01-01") == true)
        #expect(warnings.first?.contains("not needed by our own certificate") == true)
        let related = try forge.credentials("r", authorities: ["ca", "expired"], end: "server", chain: ["bad"])
        let message = failure(related, .server)
        #expect(message.contains("The CA certificate \(related)/ca-cert.pem has expired"))
    }

    @Test func anAuthorityThatWasRenewedUnderTheSameNameAndKeyIsFound() async throws {
        let template = ["cn = \"renewed\"", "ca", "cert_signing_key"]
        let old = ["activation_date = \"2019-01-01 00:00:00\"", "expiration_date = \"2020-01-01 00:00:00\""]
        try await forge.make("renewed", template: template + ["expiration_days = 300"], issuer: nil)
        try forge.write((template + old).joined(separator: "\n") + "\n", to: forge.path("old.cfg"))
        try await forge.run([
            "certtool", "--generate-self-signed", "--load-privkey", forge.path("renewed.key"), "--template",
            forge.path("old.cfg"), "--outfile", forge.path("old.pem"),
        ])
        try await forge.make("own", .init(issuer: "renewed", extensions: CertificateForge.Recipe.server))
        let directory = try forge.credentials("d", authorities: ["old", "renewed"], end: "server", chain: ["own"])
        _ = try load(directory, .server)
    }

    @Test func aCertificateThatExpiresWithinThirtyDaysWarns() async throws {
        try await forge.make(
            "soon",
            template: ["cn = \"host\"", "signing_key", "tls_www_server", "expiration_days = 12"],
            issuer: "ca"
        )
        let directory = try forge.credentials("d", authorities: ["ca"], end: "server", chain: ["soon"])
        let warnings = try load(directory, .server).warnings
        #expect(warnings.count == 1)
        #expect(warnings.first?.contains("expires in 1") == true)
    }

    @Test func aChainOfThreeLevelsIsFollowedWhereverItsIntermediatesAre() async throws {
        try await forge.make(
            "middle",
            .init(subject: "middle", issuer: "ca", extensions: CertificateForge.Recipe.authority)
        )
        try await forge.make(
            "low",
            .init(subject: "low", issuer: "middle", extensions: CertificateForge.Recipe.authority)
        )
        try await forge.make("own", .init(issuer: "low", extensions: CertificateForge.Recipe.server))
        let inOwn = try forge.credentials("a", authorities: ["ca"], end: "server", chain: ["own", "low", "middle"])
        _ = try load(inOwn, .server)
        let inAuthorities = try forge.credentials(
            "b",
            authorities: ["ca", "middle", "low"],
            end: "server",
            chain: ["own"]
        )
        _ = try load(inAuthorities, .server)
        let mixed = try forge.credentials("c", authorities: ["ca", "middle"], end: "server", chain: ["own", "low"])
        _ = try load(mixed, .server)
        let broken = try forge.credentials("d", authorities: ["ca"], end: "server", chain: ["own", "low"])
        let message = failure(broken, .server)
        #expect(message.contains("failed validation against \(broken)/ca-cert.pem"), "\(message)")
        #expect(message.contains("'CN=low' was issued by 'CN=middle', which is not there"), "\(message)")
    }

    @Test func aBadIntermediateIsNamedByItsFile() async throws {
        try await forge.make(
            "middle",
            .init(subject: "middle", issuer: "ca", extensions: ["basicConstraints=critical,CA:FALSE"])
        )
        try await forge.make("own", .init(issuer: "middle", extensions: CertificateForge.Recipe.server))
        let directory = try forge.credentials("d", authorities: ["ca"], end: "server", chain: ["own", "middle"])
        let message = failure(directory, .server)
        #expect(message.contains("\(directory)/server-cert.pem basic constraints do not show a CA"), "\(message)")
    }

    @Test func aCertificateOfAnotherAuthorityIsRefused() async throws {
        try await forge.make("ca2", .init(subject: "authority", extensions: CertificateForge.Recipe.authority))
        try await forge.make("own", .init(issuer: "ca2", extensions: CertificateForge.Recipe.server))
        let directory = try forge.credentials("d", authorities: ["ca"], end: "server", chain: ["own"])
        #expect(
            failure(directory, .server).contains("Our own certificate \(directory)/server-cert.pem failed validation")
        )
    }

    @Test func aClientWithoutACertificateNeedsOneGoodAuthority() async throws {
        let directory = try forge.credentials("d", authorities: ["ca"], end: "client", chain: [])
        _ = try load(directory, .client)
        #expect(failure(directory, .server).contains("\(directory)/server-cert.pem: No such file or directory"))
    }

    @Test func aRevokedCertificateOfOurOwnIsRefusedAtLoad() async throws {
        try await forge.make("own", .init(issuer: "ca", extensions: CertificateForge.Recipe.server))
        let directory = try forge.credentials("d", authorities: ["ca"], end: "server", chain: ["own"])
        try await revoke("own", into: directory)
        #expect(failure(directory, .server).contains("has been revoked"))
    }

    func revoke(_ name: String?, into directory: String) async throws {
        try forge.write("crl_next_update = 30\ncrl_number = 1\n", to: forge.path("crl.cfg"))
        var command = [
            "certtool", "--generate-crl", "--load-ca-privkey", forge.path("ca.key"), "--load-ca-certificate",
            forge.path("ca.pem"), "--template", forge.path("crl.cfg"), "--outfile", "\(directory)/ca-crl.pem",
        ]
        if let name { command += ["--load-certificate", forge.path("\(name).pem")] }
        try await forge.run(command)
    }

    @Test(arguments: TLSEndpoint.allCases)
    func aRevokedPeerIsRefusedByEitherEnd(_ end: TLSEndpoint) async throws {
        try await forge.make(
            "server",
            .init(subject: "server", issuer: "ca", extensions: CertificateForge.Recipe.server)
        )
        try await forge.make(
            "client",
            .init(subject: "client", issuer: "ca", extensions: CertificateForge.Recipe.client)
        )
        let server = try forge.credentials("s", authorities: ["ca"], end: "server", chain: ["server"])
        let client = try forge.credentials("c", authorities: ["ca"], end: "client", chain: ["client"])
        let before = try await handshake(load(client, .client), load(server, .server), hostname: "localhost")
        #expect(before.client == nil && before.server == nil)
        // The end that has the list refuses the other one's certificate.
        try await revoke(end == .client ? "server" : "client", into: end == .client ? client : server)
        let result = try await handshake(load(client, .client), load(server, .server), hostname: "localhost")
        let error = end == .client ? result.client : result.server
        #expect("\(error!)".contains("it has been revoked"), "\(error!)")
    }

    // MARK: Files

    func goodServer() async throws -> String {
        try await forge.make("own", .init(issuer: "ca", extensions: CertificateForge.Recipe.server))
        return try forge.credentials("d", authorities: ["ca"], end: "server", chain: ["own"])
    }

    @Test func aWorldReadableKeyWarnsAndNamesTheCommand() async throws {
        let directory = try await goodServer()
        chmod("\(directory)/server-key.pem", 0o644)
        #expect(try load(directory, .server).warnings.first?.contains("chmod 600 \(directory)/server-key.pem") == true)
    }

    @Test(arguments: ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
    func directoriesFIFOsEmptyAndBrokenFilesAreClearErrors(_ name: String) async throws {
        let directory = try await goodServer()
        let path = "\(directory)/\(name)"
        let good = try forge.read(path)
        unlink(path)
        #expect(
            failure(directory, .server).contains(
                name == "ca-cert.pem" ? "\(path): No such file" : "without corresponding"
            )
        )
        mkdir(path, 0o700)
        #expect(failure(directory, .server).contains("\(path): it is not a plain file"))
        rmdir(path)
        mkfifo(path, 0o600)
        #expect(failure(directory, .server).contains("\(path): it is not a plain file"))
        unlink(path)
        for content in [
            "", "\u{0}\u{1}\u{2}", String(good.prefix(good.count / 2)), "-----BEGIN CERTIFICATE-----\nAAAA\n",
        ] {
            try forge.write(content, to: path)
            #expect(failure(directory, .server).contains(path))
        }
        try forge.write(good, to: path)
        _ = try load(directory, .server)
        truncate(path, 2 << 20)
        #expect(failure(directory, .server).contains(path))
    }

    @Test func everyFlippedBitOfACertificateIsAnErrorOrACertificateThatFailsItsChain() async throws {
        let directory = try await goodServer()
        let path = "\(directory)/server-cert.pem"
        var bytes = Array(try forge.read(path).utf8)
        var refused = 0
        for index in stride(from: 30, to: bytes.count - 30, by: 7) {
            bytes[index] ^= 1 << UInt8(index % 7)
            try forge.write(String(decoding: bytes, as: UTF8.self), to: path)
            do {
                _ = try load(directory, .server)
            } catch let error as CredentialError {
                refused += 1
                #expect(error.message.contains(directory))
            }
            bytes[index] ^= 1 << UInt8(index % 7)
        }
        // All but flips in line ends, or that Base64 does not see.
        #expect(refused > (bytes.count - 60) / 7 * 9 / 10)
    }

    @Test func aKeyOfAnotherCertificateIsToldApart() async throws {
        let directory = try await goodServer()
        try forge.write(try forge.read(forge.path("ca.key")), to: "\(directory)/server-key.pem")
        #expect(failure(directory, .server).contains("the key does not belong to the certificate"))
    }

    @Test(arguments: [["-aes256"], ["-aes128", "-traditional"]])
    func encryptedKeysOpenWithTheirPassphrase(_ options: [String]) async throws {
        let directory = try await goodServer()
        let traditional = options.contains("-traditional")
        let cipher = options[0]
        var command =
            traditional ? ["openssl", "ec"] : ["openssl", "pkcs8", "-topk8", "-v2", String(cipher.dropFirst())]
        if traditional { command.append(cipher) }
        command += [
            "-in", forge.path("own.key"), "-out", "\(directory)/server-key.pem", "-passout", "pass:let me in",
        ]
        try await forge.run(command)
        func load(_ passphrase: String?) throws {
            var bytes = Array((passphrase ?? "").utf8)
            let secret = try passphrase.map { _ in Secret(id: "sec0", bytes: try SecretBytes(wiping: &bytes)) }
            _ = try X509Credentials(id: "tls0", directory: directory, endpoint: .server, passphrase: secret)
        }
        try load("let me in")
        try load("let me in\n")
        try load("let me in\r\n")
        for wrong in ["let me out", "", "let me in ", "let me in\n\n"] {
            let error = #expect(throws: CredentialError.self) { try load(wrong) }
            #expect(error?.message.contains("the passphrase in secret 'sec0' does not open the key") == true)
            #expect(error?.message.contains("let me") == false)
        }
        let error = #expect(throws: CredentialError.self) { try load(nil) }
        #expect(error?.message.contains("the key is encrypted") == true)
        #expect(error?.message.contains("passwordid=") == true)
    }

    @Test func severalIdentitiesServePeersOfDifferentKinds() async throws {
        let directory = try await goodServer()
        try await forge.run([
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=rsa authority", "-days", "300",
            "-keyout",
            forge.path("rsaca.key"), "-out", forge.path("rsaca.pem"), "-addext", "keyUsage=critical,keyCertSign",
        ])
        try await forge.make(
            "second",
            .init(subject: "second", issuer: "rsaca", extensions: CertificateForge.Recipe.server)
        )
        try forge.write(try forge.read(forge.path("second.pem")), to: "\(directory)/server-cert-0.pem")
        let failed = failure(directory, .server)
        #expect(failed.contains("server-cert-0.pem' without corresponding key"), "\(failed)")
        try forge.write(try forge.read(forge.path("second.key")), to: "\(directory)/server-key-0.pem")
        #expect(failure(directory, .server).contains("server-cert-0.pem failed validation"))
        try forge.write(
            try forge.read(forge.path("ca.pem")) + forge.read(forge.path("rsaca.pem")),
            to: "\(directory)/ca-cert.pem"
        )
        _ = try load(directory, .server)
    }

    // MARK: Reload

    @Test func reloadSwapsForNewSessionsAndRollsBackWhenTheNewFilesAreBad() async throws {
        try await forge.make("first", .init(subject: "first", issuer: "ca", extensions: CertificateForge.Recipe.server))
        try await forge.make(
            "second",
            .init(subject: "second", issuer: "ca", extensions: CertificateForge.Recipe.server)
        )
        try await forge.make(
            "client",
            .init(subject: "client", issuer: "ca", extensions: CertificateForge.Recipe.client)
        )
        let directory = try forge.credentials("d", authorities: ["ca"], end: "server", chain: ["first"])
        let clientDirectory = try forge.credentials("c", authorities: ["ca"], end: "client", chain: ["client"])
        let server = try load(directory, .server)
        let client = try load(clientDirectory, .client)
        func name() async throws -> String? {
            let result = try await handshake(client, server, hostname: "localhost")
            #expect(result.client == nil && result.server == nil)
            return result.peers.first?.distinguishedName
        }
        #expect(try await name() == "CN=first")
        // Half-way through a renewal the key does not fit: nothing changes.
        try forge.write(try forge.read(forge.path("second.pem")), to: "\(directory)/server-cert.pem")
        #expect(throws: CredentialError.self) { try server.reload() }
        #expect(try await name() == "CN=first")
        try forge.write(try forge.read(forge.path("second.key")), to: "\(directory)/server-key.pem")
        try server.reload()
        #expect(try await name() == "CN=second")
    }
}
