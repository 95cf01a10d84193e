import Glibc
import TestSupport

/// Makes certificates, good and bad ones, with openssl and certtool.
struct CertificateForge: Sendable {
    let directory: TestDirectory

    init() throws { directory = try TestDirectory() }

    /// What to put into a certificate.
    struct Recipe {
        var subject = "host"
        /// The name of the certificate that signs; nil for one that signs itself.
        var issuer: String?
        /// Lines of an OpenSSL extension section.
        var extensions: [String] = []

        static let authority = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
        static let server = [
            "basicConstraints=CA:FALSE", "keyUsage=critical,digitalSignature", "extendedKeyUsage=serverAuth",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ]
        static let client = [
            "basicConstraints=CA:FALSE", "keyUsage=critical,digitalSignature", "extendedKeyUsage=clientAuth",
        ]
    }

    func path(_ name: String) -> String { directory.file(name) }

    @discardableResult
    func run(_ arguments: [String]) async throws -> ToolResult {
        let result = try await Tool.run(arguments)
        guard result.code == 0 else { throw TestFailure("\(arguments.joined(separator: " ")): \(result.all)") }
        return result
    }

    func write(_ text: String, to path: String) throws {
        guard let file = fopen(path, "w") else { throw TestFailure("cannot write \(path)") }
        fputs(text, file)
        fclose(file)
    }

    func read(_ path: String) throws -> String {
        guard let file = fopen(path, "r") else { throw TestFailure("cannot read \(path)") }
        defer { fclose(file) }
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        let count = fread(&bytes, 1, bytes.count, file)
        return String(decoding: bytes.prefix(count), as: UTF8.self)
    }

    /// Makes `NAME.pem` and `NAME.key` with openssl.
    func make(_ name: String, _ recipe: Recipe) async throws {
        try await run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path("\(name).key")])
        let request = path("\(name).csr")
        try await run([
            "openssl", "req", "-new", "-key", path("\(name).key"), "-subj", "/CN=\(recipe.subject)", "-out", request,
        ])
        try write((["[x]"] + recipe.extensions).joined(separator: "\n") + "\n", to: path("\(name).ext"))
        var command = [
            "openssl", "x509", "-req", "-in", request, "-days", "365", "-out", path("\(name).pem"), "-extfile",
            path("\(name).ext"), "-extensions", "x", "-set_serial",
            "0x\(String(UInt32.random(in: 1...UInt32.max), radix: 16))",
        ]
        if let issuer = recipe.issuer {
            command += ["-CA", path("\(issuer).pem"), "-CAkey", path("\(issuer).key")]
        } else {
            command += ["-signkey", path("\(name).key")]
        }
        try await run(command)
    }

    /// Makes `NAME.pem` and `NAME.key` with certtool, from a template that sets dates.
    func make(_ name: String, template: [String], issuer: String?) async throws {
        try await run(["certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", path("\(name).key")])
        try write(template.joined(separator: "\n") + "\n", to: path("\(name).cfg"))
        var command = [
            "certtool", "--load-privkey", path("\(name).key"), "--template", path("\(name).cfg"), "--outfile",
            path("\(name).pem"),
        ]
        if let issuer {
            command += [
                "--generate-certificate", "--load-ca-certificate", path("\(issuer).pem"), "--load-ca-privkey",
                path("\(issuer).key"),
            ]
        } else {
            command += ["--generate-self-signed"]
        }
        try await run(command)
    }

    /// Makes a credential directory of certificates that were made before.
    ///
    /// - Parameters:
    ///   - name: the directory.
    ///   - authorities: the certificates of `ca-cert.pem`, in their order.
    ///   - end: "server" or "client".
    ///   - chain: the certificates of the end's file, its own first.
    func credentials(_ name: String, authorities: [String], end: String, chain: [String]) throws -> String {
        let target = directory.directory(name)
        try write(authorities.map { try read(path("\($0).pem")) }.joined(), to: "\(target)/ca-cert.pem")
        if let own = chain.first {
            try write(chain.map { try read(path("\($0).pem")) }.joined(), to: "\(target)/\(end)-cert.pem")
            try write(try read(path("\(own).key")), to: "\(target)/\(end)-key.pem")
            chmod("\(target)/\(end)-key.pem", 0o600)
        }
        return target
    }
}
