internal import Emulator
internal import Glibc
internal import IO
public import Migration

/// The images that guests left behind, kept for a time and then deleted.
public enum FencedImages {
    private struct Record: Codable {
        var paths: [String]
        var deleteAfter: Int?
    }

    private static func file(_ id: String, _ migrations: MigrationStore) -> String {
        migrations.files(of: id).fenced
    }

    static func remember(_ paths: [String], migration: String, keep: Int, _ migrations: MigrationStore) throws {
        let record = Record(paths: paths, deleteAfter: time(nil) + keep)
        try DurableFile.write(try JSONText.encode(record), to: file(migration, migrations))
    }

    static func keepForever(_ migration: String, _ migrations: MigrationStore) {
        guard let bytes = try? DurableFile.read(file(migration, migrations)),
            var record = JSONText.decode(Record.self, from: bytes)
        else { return }
        record.deleteAfter = nil
        guard let data = try? JSONText.encode(record) else { return }
        try? DurableFile.write(Array(data), to: file(migration, migrations))
    }

    /// Deletes the images whose time is over, of migrations that the destination has confirmed.
    ///
    /// - Returns: the deleted paths.
    @discardableResult
    public static func purge(_ migrations: MigrationStore, now: Int? = nil) -> [String] {
        let now = now ?? time(nil)
        var deleted: [String] = []
        for id in migrations.ids() {
            guard let bytes = try? DurableFile.read(file(id, migrations)),
                let record = JSONText.decode(Record.self, from: bytes),
                let limit = record.deleteAfter, limit <= now,
                let reading = (try? migrations.reading(of: id)) ?? nil, reading.standing == .source(.confirmed)
            else { continue }
            for path in record.paths where path.hasSuffix(".released-\(id)") {
                if unlink(path) == 0 { deleted.append(path) }
            }
            unlink(file(id, migrations))
        }
        return deleted
    }
}

enum MigrationReportFile {
    /// Saves the report where `crossdock status` finds it. Returns a warning when it could not be saved.
    static func save(_ report: MigrationReport, _ migrations: MigrationStore) throws -> String? {
        do {
            // A migration without a journal never began: nothing of it is kept.
            guard DurableFile.exists(migrations.journal(of: report.migration)) else { return nil }
            try DurableFile.write(Array(report.json.utf8), to: migrations.files(of: report.migration).report)
            return nil
        } catch { return "The report could not be saved: \(error)" }
    }
}
