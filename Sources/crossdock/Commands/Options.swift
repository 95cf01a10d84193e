public import ArgumentParser
import Emulator
import FoundationEssentials
import Glibc
import IO
public import Migration
import TLS

/// What every command takes.
struct CommonOptions: ParsableArguments {
    @Option(help: "Where guests and migrations are recorded.")
    var stateDir: String = CommonOptions.defaultStateDirectory

    @Option(help: "What is logged: debug, info, warning or error.")
    var logLevel: Log.Level = .info

    static var defaultStateDirectory: String {
        if getuid() == 0 { return "/var/lib/crossdock" }
        let environment = ProcessInfo.processInfo.environment
        if let state = environment["XDG_STATE_HOME"], !state.isEmpty { return "\(state)/crossdock" }
        return "\(environment["HOME"] ?? "/tmp")/.local/state/crossdock"
    }

    var stateDirectory: String { DurableFile.resolve(stateDir, in: currentDirectory) }
    var log: Log { Log(level: logLevel) }
    var guests: GuestStore { GuestStore(stateDirectory: stateDirectory) }
    var migrations: MigrationStore { MigrationStore(stateDirectory: stateDirectory) }

    /// Sees to it that what cannot be read is not taken for something that is not there.
    ///
    /// - Throws: `FileError` that names the directory.
    func checkAccess() throws {
        for directory in [stateDirectory, migrations.directory, "\(stateDirectory)/guests"] {
            guard access(directory, R_OK | X_OK) != 0, errno == EACCES else { continue }
            throw FileError(
                "\(directory) cannot be read by this user: what is there is not known; ask as the user that the agent runs as"
            )
        }
    }
}

extension Log.Level: ExpressibleByArgument {
    /// The level of a name.
    public init?(argument: String) {
        guard let level = Self.allCases.first(where: { "\($0)" == argument }) else { return nil }
        self = level
    }
    /// The name, for the help.
    public var defaultValueDescription: String { "\(self)" }
    /// The names.
    public static var allValueStrings: [String] { allCases.map { "\($0)" } }
}

/// How the two agents know each other.
struct CredentialOptions: ParsableArguments {
    @Option(
        name: .customLong("object"),
        help: ArgumentHelp("An object, as QEMU writes it: tls-creds-x509,id=tls0,dir=DIR.", valueName: "object")
    )
    var objects: [String] = []

    @Option(
        help: ArgumentHelp(
            "The id of the TLS credentials; without it they are taken from /etc/pki/crossdock or /etc/pki/qemu.",
            valueName: "id"
        )
    )
    var tlsCreds: String?

    /// What the two options say.
    var selection: CredentialSelection { CredentialSelection(objects: objects, tlsCreds: tlsCreds) }

    /// The objects, made in their order: one may refer to those before it.
    func store() throws -> ObjectStore { try selection.store() }

    /// The credentials for one end, with their warnings told.
    func credentials(_ endpoint: TLSEndpoint, from store: ObjectStore, user: String) throws -> any TLSCredentials {
        try selection.credentials(endpoint, from: store, user: user) { printError("crossdock: warning: \($0)") }
    }
}

var currentDirectory: String {
    guard let path = getcwd(nil, 0) else { return "/" }
    defer { free(path) }
    return String(cString: path)
}
