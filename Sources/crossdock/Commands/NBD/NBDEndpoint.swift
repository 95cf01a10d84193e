import ArgumentParser
import IO
import NBD
import TLS

/// What every command that connects to an NBD server takes.
struct NBDClientSecurity: ParsableArguments {
    @OptionGroup var credentials: CredentialOptions

    @Option(
        help: ArgumentHelp(
            "The name that the server's certificate must be for, when it is not the host's.",
            valueName: "name"
        )
    )
    var tlsHostname: String?

    /// The address and what is wanted there.
    ///
    /// `nbds` requires TLS, with the URI's own credentials, those of --tls-creds, or those of the default directories. --tls-creds
    /// requires it of `nbd`, too.
    func options(_ uri: NBDURI, contexts: [String] = []) throws -> NBDClientOptions {
        var options = NBDClientOptions(export: uri.export, contexts: contexts)
        options.hostname = tlsHostname ?? uri.certificateName
        // A server may have an image to unlock or to fetch before it says how large it is.
        options.timeout = .seconds(60)
        if !uri.usesTLS, credentials.tlsCreds == nil {
            if uri.user != nil { throw ValidationError("The NBD URI '\(uri)' has a user, but its scheme is not nbds") }
            return options
        }
        if let file = uri.keyFile {
            options.credentials = try PSKCredentials(
                id: "uri",
                keyFile: file,
                endpoint: .client,
                username: uri.user ?? "qemu"
            )
        } else if let directory = uri.certificates {
            options.credentials = try X509Credentials(
                id: "uri",
                directory: directory,
                endpoint: .client,
                verifyPeer: uri.verifiesPeer
            )
        } else {
            options.credentials = try credentials.credentials(
                .client,
                from: credentials.store(),
                user: "the NBD client"
            )
        }
        return options
    }
}

/// Runs something that talks to one server on a loop of its own.
func onClientLoop<T: Sendable>(_ body: @escaping @Sendable (EventLoop) async throws -> T) async throws -> T {
    let loop = EventLoop(name: "nbd")
    defer { loop.stop() }
    return try await loop.run { try await body(loop) }
}
