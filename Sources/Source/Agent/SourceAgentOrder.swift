internal import Glibc
internal import IO
internal import Migration
public import TLS

/// What a command tells the source agent that it starts, and what recovery finds of it later.
public struct SourceAgentOrder: Sendable, Codable {
    /// What to do.
    public var plan: MigrationPlan
    /// The objects that make the credentials.
    public var objects: [String]
    /// The id of the credentials among them.
    public var tlsCreds: String?
    /// What relative paths among them begin from.
    public var directory: String

    /// Makes an order.
    public init(plan: MigrationPlan, credentials: CredentialSelection, directory: String) {
        self.plan = plan
        objects = credentials.objects
        tlsCreds = credentials.tlsCreds
        self.directory = directory
    }

    /// Reads an order from its file.
    ///
    /// - Throws: `MigrationError` when the file is none.
    public init(reading path: String) throws {
        guard let bytes = try DurableFile.read(path), let order = JSONText.decode(SourceAgentOrder.self, from: bytes)
        else { throw MigrationError(.guest, "\(path) is no plan of a migration") }
        self = order
    }

    /// Writes the order where the migration's processes find it. Returns its path.
    @discardableResult
    func save() throws -> String {
        let files = MigrationStore(stateDirectory: plan.stateDirectory).files(of: plan.id)
        try DurableFile.makeDirectory(files.directory)
        try DurableFile.write(try JSONText.encode(self), to: files.plan)
        return files.plan
    }

    /// Relative paths are relative to the process, so one order at a time is in its directory.
    private static let directoryLock = Guarded<Void>(())

    /// The credentials that the command named.
    public func credentials() throws -> any TLSCredentials {
        let selection = CredentialSelection(objects: objects, tlsCreds: tlsCreds)
        for object in try objects.map(ObjectDescription.init(parsing:)) where object.properties["fd"] != nil {
            throw CredentialError(
                "Secret '\(object.id)' is read from a descriptor, which the source agent, a process of its own, does not inherit; "
                    + "use file="
            )
        }
        let credentials = try Self.directoryLock.withLock { _ in
            guard chdir(directory) == 0 else { throw FileError.system("enter the directory \(directory)", errno) }
            return try selection.credentials(.client, from: selection.store(), user: "the source agent")
        }
        guard credentials.verifiesPeer else {
            throw CredentialError(
                "The credentials '\(credentials.id)' do not verify the destination: a guest is not sent to just anybody"
            )
        }
        return credentials
    }
}
