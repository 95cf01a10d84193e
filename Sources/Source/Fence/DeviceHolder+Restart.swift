internal import Emulator
internal import IO
public import Migration

/// After a restart of the host.
extension DeviceHolder {
    /// Starts what holds the devices of guests that have left, wherever that does not live any more: before anything else uses
    /// them.
    ///
    /// - Parameters:
    ///   - migrations: the migrations of this host.
    ///   - program: this program.
    /// - Returns: what could not be done, a sentence each.
    public static func holdAgain(_ migrations: MigrationStore, program: String = program) -> [String] {
        var problems: [String] = []
        for id in migrations.ids() {
            do {
                guard let reading = try migrations.reading(of: id), try mustHold(id, reading, migrations) else {
                    continue
                }
                // A guest that has come back goes on with some of them, perhaps.
                let own = try ownDevices(of: reading.guest, id, migrations)
                let devices = SavedDisk.load(migrations.files(of: id)).flatMap(\.images)
                    .filter { $0.isDevice && ImageIdentity(of: $0.realPath).map(own.contains) != true }
                guard !devices.isEmpty else { continue }
                let holder = DeviceHolder(guest: reading.guest, files: migrations.files(of: id), program: program)
                try holder.hold(devices.map(\.path))
            } catch {
                problems.append("\(error)")
            }
        }
        return problems
    }

    /// The devices that are a guest's own, when a later migration has decided about it.
    private static func ownDevices(
        of guest: String,
        _ id: String,
        _ migrations: MigrationStore
    ) throws -> Set<ImageIdentity> {
        guard try migrations.isSuperseded(id, of: guest) else { return [] }
        let record = try GuestStore(stateDirectory: migrations.stateDirectory).load(guest)
        let paths = try record?.commandLine.paths() ?? []
        return Set(paths.compactMap { ImageIdentity(of: $0.path) })
    }

    /// Whether the devices of a migration are not for anybody else: the guest has left on them, and what it left behind is
    /// still kept.
    private static func mustHold(_ id: String, _ reading: JournalReading, _ migrations: MigrationStore) throws -> Bool {
        guard case .source(let standing) = reading.standing else { return false }
        // It comes back at this moment.
        if case .arriving = try migrations.startBar(of: reading.guest) { return false }
        switch standing {
        case .released, .overruled: return true
        case .confirmed: return FencedImages.areKept(id, migrations)
        case .open, .reclaimed, .taken, .rolledBack: return false
        }
    }
}
