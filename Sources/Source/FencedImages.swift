internal import Emulator
internal import Glibc
internal import IO
public import Migration

/// The images that guests left behind, kept for a time and then deleted.
public enum FencedImages {
    private struct Record: Codable {
        /// The files, under their fenced names. None once they are deleted.
        var paths: [String]
        /// When, in seconds since 1970; nil for never.
        var deleteAfter: Int?
    }

    private static func read(_ id: String, _ migrations: MigrationStore) -> Record? {
        guard let bytes = (try? DurableFile.read(migrations.files(of: id).fenced)) ?? nil else { return nil }
        return JSONText.decode(Record.self, from: bytes)
    }

    private static func write(_ record: Record, _ id: String, _ migrations: MigrationStore) throws {
        try DurableFile.write(try JSONText.encode(record), to: migrations.files(of: id).fenced)
    }

    /// Notes what is behind a fence, and for how many seconds it is kept.
    static func remember(_ fence: ImageFence, migration: String, keep: Int, _ migrations: MigrationStore) throws {
        try write(Record(paths: fence.fencedFiles, deleteAfter: time(nil) + keep), migration, migrations)
    }

    static func keepForever(_ migration: String, _ migrations: MigrationStore) {
        guard var record = read(migration, migrations) else { return }
        record.deleteAfter = nil
        try? write(record, migration, migrations)
    }

    /// Whether the images of a guest that has left are still kept.
    static func areKept(_ id: String, _ migrations: MigrationStore, now: Int? = nil) -> Bool {
        // Without a record nobody has had the time to write one.
        guard let record = read(id, migrations), let limit = record.deleteAfter else { return true }
        return limit > now ?? time(nil)
    }

    /// Deletes the images whose time is over, of migrations that the destination has confirmed, and lets devices go.
    ///
    /// - Returns: the deleted paths.
    @discardableResult
    public static func purge(_ migrations: MigrationStore, now: Int? = nil) -> [String] {
        let now = now ?? time(nil)
        var deleted: [String] = []
        for id in migrations.ids() {
            guard var record = read(id, migrations), let limit = record.deleteAfter, limit <= now,
                let reading = (try? migrations.reading(of: id)) ?? nil, reading.standing == .source(.confirmed)
            else { continue }
            let files = migrations.files(of: id)
            if DurableFile.exists(files.process(.holder)) {
                DeviceHolder(guest: reading.guest, files: files).end()
            }
            guard !record.paths.isEmpty else { continue }
            for path in record.paths where path.hasSuffix(".released-\(id)") {
                if unlink(path) == 0 { deleted.append(path) }
            }
            forget(&record, id, migrations)
        }
        return deleted
    }

    /// Deletes the images of one migration before their time, also those of one that nobody has written a record of.
    ///
    /// - Returns: the deleted paths, and what could not be deleted, a sentence each.
    static func delete(
        _ id: String,
        _ files: MigrationFiles,
        _ migrations: MigrationStore
    ) -> (deleted: [String], problems: [String]) {
        var record =
            read(id, migrations)
            ?? Record(
                paths: SavedDisk.load(files).compactMap { $0.image }.filter { !$0.isDevice }.map { $0.fencedPath(id) }
            )
        var (deleted, problems) = ([String](), [String]())
        for path in record.paths where path.hasSuffix(".released-\(id)") {
            if unlink(path) == 0 {
                deleted.append(path)
            } else if errno != ENOENT {
                problems.append("Cannot delete the image \(path): \(String(cString: strerror(errno)))")
            }
        }
        record.deleteAfter = 0
        if problems.isEmpty { forget(&record, id, migrations) }
        return (deleted, problems)
    }

    /// The record stays: it says that the time is over.
    private static func forget(_ record: inout Record, _ id: String, _ migrations: MigrationStore) {
        record.paths = []
        try? write(record, id, migrations)
    }
}
