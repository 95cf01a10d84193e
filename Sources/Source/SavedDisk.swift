internal import Emulator
internal import IO
internal import Migration
internal import TLS

/// What a migration's recovery knows of a disk.
struct SavedDisk: Codable {
    var path: String
    var format: String
    var size: UInt64
    var isSealed: Bool
    /// Which file it is; earlier versions did not say.
    var image: FencedImage?
    /// The file with its data; nil when the image has that in itself.
    var data: FencedImage?
    /// Its lineages, which RELEASE tells; earlier versions had none.
    var lineages: [Lineage]?

    /// Notes the disks of a migration.
    static func save(_ disks: [SourceDisk], _ files: MigrationFiles) throws {
        let saved = disks.map {
            SavedDisk(
                path: $0.path,
                format: $0.format,
                size: $0.offer.size,
                isSealed: $0.secret != nil,
                image: FencedImage($0.path),
                data: $0.dataPath.map { FencedImage($0) },
                lineages: $0.lineages
            )
        }
        try DurableFile.write(try JSONText.encode(saved), to: files.disks)
    }

    /// The files that the guest leaves.
    var images: [FencedImage] { [image ?? FencedImage(legacy: path)] + (data.map { [$0] } ?? []) }

    /// The disks of a migration whose agent has died.
    static func load(_ files: MigrationFiles) -> [SavedDisk] {
        guard let bytes = (try? DurableFile.read(files.disks)) ?? nil else { return [] }
        return JSONText.decode([SavedDisk].self, from: bytes) ?? []
    }
}
