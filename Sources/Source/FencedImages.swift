internal import Emulator
internal import Glibc
internal import IO
public import Migration

/// The images that guests left behind, kept for a time and then deleted.
public enum FencedImages {
    /// Notes what is behind a fence, and for how many seconds it is kept.
    static func remember(_ fence: ImageFence, migration: String, keep: Int, _ migrations: MigrationStore) throws {
        let files = migrations.files(of: migration)
        try FencedRecord(paths: fence.fencedFiles, deleteAfter: time(nil) + keep).save(files)
    }

    /// Notes that an image may be the beginning of what comes back: it was compared with what its destination has.
    static func offer(_ path: String, as lineage: Lineage, _ files: MigrationFiles) {
        guard var record = FencedRecord(of: files), record.paths.contains(path) else { return }
        record.add(path, lineage)
        try? record.save(files)
    }

    static func keepForever(_ migration: String, _ migrations: MigrationStore) {
        let files = migrations.files(of: migration)
        guard var record = FencedRecord(of: files) else { return }
        record.deleteAfter = nil
        record.lineages = nil
        try? record.save(files)
    }

    /// Whether the images of a guest that has left are still kept.
    static func areKept(_ id: String, _ migrations: MigrationStore, now: Int? = nil) -> Bool {
        // Without a record nobody has had the time to write one.
        guard let record = FencedRecord(of: migrations.files(of: id)), let limit = record.deleteAfter else {
            return true
        }
        return limit > now ?? time(nil)
    }

    /// Deletes the images whose time is over, of migrations that the destination has confirmed, and lets devices go.
    ///
    /// - Parameters:
    ///   - migrations: those of this host.
    ///   - guest: of this guest only; of all when nil.
    ///   - only: of this migration only; of all when nil.
    ///   - now: the time, in seconds since 1970, by which theirs is over; the real one when nil.
    /// - Returns: the deleted paths.
    @discardableResult
    public static func purge(
        _ migrations: MigrationStore,
        of guest: String? = nil,
        only: String? = nil,
        now: Int? = nil
    )
        -> [String]
    {
        let now = now ?? time(nil)
        var deleted: [String] = []
        for id in only.map({ [$0] }) ?? migrations.ids() {
            guard var record = FencedRecord(of: migrations.files(of: id)), let limit = record.deleteAfter, limit <= now,
                let reading = (try? migrations.reading(of: id)) ?? nil, reading.standing == .source(.confirmed),
                guest == nil || reading.guest == guest
            else { continue }
            let files = migrations.files(of: id)
            if DurableFile.exists(files.process(.holder)) {
                DeviceHolder(guest: reading.guest, files: files).end()
            }
            guard !record.paths.isEmpty else { continue }
            for path in record.paths where path.hasSuffix(".released-\(id)") {
                if unlink(path) == 0 { deleted.append(path) }
            }
            forget(&record, migrations.files(of: id))
        }
        return deleted
    }

    /// Deletes the images of one migration before their time, also those of one that nobody has written a record of.
    ///
    /// - Returns: the deleted paths, and what could not be deleted, a sentence each.
    static func delete(_ id: String, _ files: MigrationFiles) -> (deleted: [String], problems: [String]) {
        var record = record(of: id, files)
        var (deleted, problems) = ([String](), [String]())
        for path in record.paths where path.hasSuffix(".released-\(id)") {
            if unlink(path) == 0 {
                deleted.append(path)
            } else if errno != ENOENT {
                problems.append("Cannot delete the image \(path): \(String(cString: strerror(errno)))")
            }
        }
        record.deleteAfter = 0
        if problems.isEmpty { forget(&record, files) }
        return (deleted, problems)
    }

    /// What a migration has left here. The record is written once the destination has confirmed; until then its saved disks say it.
    static func record(of id: String, _ files: MigrationFiles) -> FencedRecord {
        FencedRecord(of: files)
            ?? FencedRecord(
                paths: SavedDisk.load(files).filter { $0.image != nil }.flatMap(\.images).filter { !$0.isDevice }.map {
                    $0.fencedPath(id)
                },
                deleteAfter: nil
            )
    }

    /// The record stays: it says that the time is over.
    private static func forget(_ record: inout FencedRecord, _ files: MigrationFiles) {
        record.paths = []
        record.lineages = nil
        try? record.save(files)
    }
}
