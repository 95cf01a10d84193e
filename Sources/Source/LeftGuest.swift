internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// What a guest that belongs to another host for good has left on this one.
public struct LeftGuest: Sendable {
    private let name: String
    private let guests: GuestStore
    private let migrations: MigrationStore
    private let stateDirectory: String
    private let lock: FileLock

    /// Takes such a guest up, and keeps others from it meanwhile.
    ///
    /// - Parameters:
    ///   - name: the guest.
    ///   - stateDirectory: this host's.
    /// - Throws: `GuestError` when it may belong to this host, is not known, or still has a QEMU here; `MigrationError.busy` when
    ///   somebody moves it.
    public init(_ name: String, stateDirectory: String) throws {
        self.name = name
        self.stateDirectory = stateDirectory
        guests = GuestStore(stateDirectory: stateDirectory)
        migrations = MigrationStore(stateDirectory: stateDirectory)
        let record = try guests.load(name)
        guard let lock = try migrations.lock(guest: name) else {
            throw MigrationError(.busy, "Guest '\(name)' is being migrated; see 'crossdock status'")
        }
        self.lock = lock
        guard let bar = try migrations.startBar(of: name) else {
            guard let record else { throw guests.unknown(name) }
            let remedy =
                record.process?.isRunning == true ? "It runs here" : "'crossdock guest remove \(name)' removes it"
            throw GuestError("Guest '\(name)' belongs to this host; nothing of it is forgotten. \(remedy)")
        }
        guard bar.isDecided else { throw GuestError(bar.sentence(guest: name)) }
        if let process = record?.process, process.isRunning {
            throw GuestError(
                "A QEMU of guest '\(name)' is still on this host, as process \(process.pid); end it with 'crossdock guest stop \(name)'"
            )
        }
    }

    /// Deletes its old images, lets its devices go, and forgets its record. The journals stay: they say where it went.
    ///
    /// - Returns: the deleted paths, and what could not be done or is left to the operator, a sentence each.
    /// - Throws: `JournalError` when a journal cannot be understood.
    public func forget() throws -> (deleted: [String], remarks: [String]) {
        var (deleted, remarks) = ([String](), [String]())
        for id in migrations.ids() {
            guard let reading = try migrations.reading(of: id), reading.guest == name else { continue }
            switch reading.standing {
            case .source(.confirmed), .source(.overruled):
                let files = migrations.files(of: id)
                if DurableFile.exists(files.process(.holder)) {
                    remarks += DeviceHolder(guest: name, files: files).end()
                }
                let old = FencedImages.delete(id, files)
                deleted += old.deleted
                remarks += old.problems
            case .destination(.overruled):
                remarks += images().map { "It had the image \($0) on this host; delete it by hand" }
            default: continue
            }
        }
        guests.remove(name)
        ConsoleDeparture.remove(name, stateDirectory: stateDirectory)
        return (deleted, remarks)
    }

    /// The images that the guest's description names and that are there.
    private func images() -> [String] {
        guard let record = (try? guests.load(name)) ?? nil, let paths = try? record.commandLine.paths() else {
            return []
        }
        return paths.filter { $0.kind == .disk }.map(\.path).filter(DurableFile.exists)
    }
}
