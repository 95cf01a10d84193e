internal import IO
internal import Migration

/// The report of a migration, where `crossdock status` finds it.
enum MigrationReportFile {
    /// Saves the report. Returns a warning when it could not be saved.
    static func save(_ report: MigrationReport, _ migrations: MigrationStore) throws -> String? {
        do {
            // A migration without a journal never began: nothing of it is kept.
            guard DurableFile.exists(migrations.journal(of: report.migration)) else { return nil }
            try DurableFile.write(Array(report.json.utf8), to: migrations.files(of: report.migration).report)
            return nil
        } catch { return "The report could not be saved: \(error)" }
    }
}
