import ArgumentParser
import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import Source
import TLS

/// What every command takes.
struct CommonOptions: ParsableArguments {
    @Option(help: "Where guests and migrations are recorded.")
    var stateDir: String = CommonOptions.defaultStateDirectory

    @Option(
        help: ArgumentHelp(
            "What is logged: debug, info, warning or error.",
            default: Log.Level.info,
            valueName: "level"
        ),
        transform: Log.Level.parse
    )
    var logLevel: Log.Level = .info

    /// The state directory of the host's own agent.
    static let hostStateDirectory = "/var/lib/crossdock"

    static var defaultStateDirectory: String {
        if getuid() == 0 { return hostStateDirectory }
        let environment = ProcessInfo.processInfo.environment
        if let state = environment["XDG_STATE_HOME"], !state.isEmpty { return "\(state)/crossdock" }
        return "\(environment["HOME"] ?? "/tmp")/.local/state/crossdock"
    }

    var stateDirectory: String { DurableFile.resolve(stateDir, in: currentDirectory) }
    /// Where what a command shows is, for people: another directory than the host's is not the whole host.
    /// Whether this host has an agent of its own that works with other guests than these.
    var isBesideHostState: Bool {
        stateDirectory != Self.hostStateDirectory && DurableFile.exists("\(Self.hostStateDirectory)/guests")
    }

    var place: String { stateDirectory == Self.hostStateDirectory ? "on this host" : "in \(stateDirectory)" }
    var log: Log { Log(level: logLevel) }
    var guests: GuestStore { GuestStore(stateDirectory: stateDirectory) }
    var migrations: MigrationStore { MigrationStore(stateDirectory: stateDirectory) }

    /// Sees to it that what cannot be read is not taken for something that is not there.
    ///
    /// - Parameter forWriting: whether something is to be recorded, too.
    /// - Throws: `FileError` that names the directory.
    func checkAccess(forWriting: Bool = false) throws {
        if forWriting { try checkPlace() }
        for directory in [stateDirectory, migrations.directory, "\(stateDirectory)/guests"] {
            guard access(directory, R_OK | X_OK) != 0, errno == EACCES else { continue }
            throw FileError(
                "\(directory) cannot be read by this user: what is there is not known; ask as the user that the agent runs as"
            )
        }
    }
}

extension CommonOptions {
    /// Sees whether the state directory, or the first of the directories above it that is there, can be written.
    private func checkPlace() throws {
        var place = stateDirectory
        while !DurableFile.exists(place), let slash = place.lastIndex(of: "/"), access(place, F_OK) != 0,
            errno != EACCES
        {
            place = slash == place.startIndex ? "/" : String(place[..<slash])
        }
        guard access(place, W_OK | X_OK) != 0 else { return }
        throw FileError(
            "Nothing can be recorded in the state directory \(stateDirectory): \(place): \(String(cString: strerror(errno))); give the "
                + "command as the user whose guests they are, which is root as a rule, or name a directory of this user's with --state-dir"
        )
    }
}

extension Log.Level {
    /// The level of a name.
    ///
    /// - Throws: `ValidationError` with the names.
    @Sendable static func parse(_ text: String) throws -> Log.Level {
        guard let level = allCases.first(where: { $0.description == text }) else {
            throw ValidationError("it takes \(allCases.map(\.description).joined(separator: ", "))")
        }
        return level
    }
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

extension EvacuationOrder.Target {
    /// Reads `HOST[:PORT]` from a command line.
    ///
    /// - Throws: `ValidationError`.
    init(argument: String) throws {
        do { try self.init(parsing: argument) } catch { throw ValidationError("\(error)") }
    }
}

/// Who gives the commands.
var operatorName: String {
    getpwuid(getuid()).flatMap { $0.pointee.pw_name }.map { String(cString: $0) } ?? "user \(getuid())"
}

var currentDirectory: String {
    guard let path = getcwd(nil, 0) else { return "/" }
    defer { free(path) }
    return String(cString: path)
}
