internal import IO

/// The images that a guest left behind on this host by one migration: `fenced.json`.
public struct FencedRecord: Sendable, Codable {
    /// The files, under their fenced names. None once they are deleted.
    public var paths: [String]
    /// When they may be deleted, in seconds since 1970; nil for never.
    public var deleteAfter: Int?
    /// The lineages of those that may be the beginning of what comes back, by their fenced names: those of whole raw images that the
    /// destination has confirmed, and whose digests were the same on both hosts. Secret.
    public var lineages: [String: Lineage]?

    /// Makes a record.
    public init(paths: [String], deleteAfter: Int?) {
        self.paths = paths
        self.deleteAfter = deleteAfter
    }

    /// The record of a migration; nil when there is none that can be read.
    public init?(of files: MigrationFiles) {
        guard let bytes = (try? DurableFile.read(files.fenced)) ?? nil,
            let record = JSONText.decode(FencedRecord.self, from: bytes)
        else { return nil }
        self = record
    }

    /// Writes it durably, readable for its owner only.
    ///
    /// - Throws: `FileError` that names the file.
    public func save(_ files: MigrationFiles) throws {
        try DurableFile.write(try JSONText.encode(self), to: files.fenced)
    }

    /// An image is no old copy any more.
    public mutating func remove(_ path: String) {
        paths.removeAll { $0 == path }
        lineages?[path] = nil
    }

    /// It is one again.
    public mutating func add(_ path: String, _ lineage: Lineage) {
        if !paths.contains(path) { paths.append(path) }
        lineages = (lineages ?? [:]).merging([path: lineage]) { $1 }
    }
}
