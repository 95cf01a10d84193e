import ArgumentParser
import IO
import TLS

struct PKICommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pki",
        abstract: "Makes certificates in QEMU's directory layout.",
        subcommands: [Init.self, Issue.self]
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
}
