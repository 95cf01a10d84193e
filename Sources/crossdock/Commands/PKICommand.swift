import ArgumentParser
import Emulator
import IO
import TLS

struct PKICommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pki",
        abstract: "Makes and checks certificates in QEMU's directory layout.",
        subcommands: [Init.self, Issue.self, Check.self]
    )

    struct Init: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Makes a certificate authority in a new directory.")
        @Argument(help: "The directory; it will hold ca-cert.pem and ca-key.pem.")
        var directory: String

        func run() async throws {
            try await failing {
                try DurableFile.makeDirectory(directory)
                try CertificateAuthority(name: "Crossdock CA").save(to: directory)
                output("Made \(directory)/ca-cert.pem and \(directory)/ca-key.pem. Keep the key to yourself.\n")
            }
        }
    }

    struct Issue: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Issues a host's certificates for both ends.",
            discussion: "Copy the new directory to the host as /etc/pki/crossdock."
        )
        @Argument(help: "The authority's directory.")
        var authority: String
        @Argument(help: "The new directory for the host.")
        var directory: String
        @Argument(help: "The host's name, as others write it; further names and addresses may follow.")
        var hosts: [String]

        func run() async throws {
            try await failing {
                guard let name = hosts.first else { throw ValidationError("A host needs a name") }
                let authority = try CertificateAuthority(loading: authority)
                try DurableFile.makeDirectory(directory)
                try authority.issue(.init(name: name, hosts: hosts), to: directory)
                output("Made \(directory) for \(hosts.joined(separator: ", ")).\n")
            }
        }
    }

    struct Check: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Checks a credential directory as an agent does when it loads it.",
            discussion: "Exit codes: 0 all is well, warnings included; 12 the credentials cannot be used."
        )
        @Argument(help: "The directory: a host's, or an authority's.")
        var directory: String
        @Option(help: ArgumentHelp("The file with the passphrase of encrypted private keys.", valueName: "file"))
        var passphrase: String?
        @Flag(help: "Print JSON.")
        var json = false

        func run() async throws {
            let checked = try await failing { () -> CredentialDirectory in
                var secret: Secret?
                if let passphrase {
                    let store = ObjectStore()
                    try store.add(
                        ObjectDescription(parsing: "secret,id=passphrase,file=\(KeyValue.escape(passphrase))")
                    )
                    secret = try store.secret("passphrase")
                }
                return CredentialDirectory(checking: directory, passphrase: secret)
            }
            if json { printJSON(checked) } else { printTable(checked) }
            if !checked.isGood { throw ExitCode(12) }
        }

        private func printTable(_ checked: CredentialDirectory) {
            let rows = checked.entries.map { entry -> [String] in
                let own = checked.findings.filter { $0.file == "\(checked.path)/\(entry.file)" }
                let result = own.contains { $0.severity == .error } ? "error" : own.isEmpty ? "ok" : "warning"
                return [
                    entry.file, entry.subject, entry.issuer, entry.names.joined(separator: " "), entry.lastDay, result,
                ]
            }
            if !rows.isEmpty {
                output(Table.render(["FILE", "SUBJECT", "ISSUER", "NAMES", "VALID UNTIL", "RESULT"], rows))
            }
            for finding in checked.findings {
                output("\(finding.severity.rawValue): \(finding.field): \(finding.message)\n")
            }
        }

        private func printJSON(_ checked: CredentialDirectory) {
            let certificates = checked.entries.map { entry -> JSONValue in
                [
                    "file": .string(entry.file), "subject": .string(entry.subject), "issuer": .string(entry.issuer),
                    "names": .array(entry.names.map { .string($0) }), "not-before": .integer(Int64(entry.notBefore)),
                    "not-after": .integer(Int64(entry.notAfter)),
                ]
            }
            let findings = checked.findings.map { finding -> JSONValue in
                [
                    "severity": .string(finding.severity.rawValue), "file": .string(finding.file),
                    "field": .string(finding.field), "message": .string(finding.message),
                ]
            }
            let value: JSONValue = [
                "directory": .string(checked.path), "good": .bool(checked.isGood),
                "certificates": .array(certificates), "findings": .array(findings),
            ]
            output(value.text + "\n")
        }
    }
}
