internal import Glibc
internal import IO
public import Migration

/// An old image that is kept on this host although its guest belongs to another one, or may do so.
public struct KeptImage: Sendable, Hashable, Codable {
    /// The guest.
    public var guest: String
    /// Where it went.
    public var destination: String
    /// The migration.
    public var migration: String
    /// The image, under its fenced name.
    public var path: String
    /// The bytes that it takes.
    public var bytes: UInt64
    /// Whether the destination has said that the guest is there. One that has not may still give the guest back.
    public var isConfirmed: Bool
    /// When it may be deleted, in seconds since 1970; nil for never by itself.
    public var until: Int?

    private enum CodingKeys: String, CodingKey {
        case guest, destination, migration, path, bytes, until
        case isConfirmed = "confirmed"
    }
}

extension FencedImages {
    /// The old images that are kept, the oldest migration first.
    ///
    /// - Parameter guest: of this guest only; of all when nil.
    public static func kept(_ migrations: MigrationStore, of guest: String? = nil) -> [KeptImage] {
        migrations.ids().flatMap { id -> [KeptImage] in
            guard let reading = (try? migrations.reading(of: id)) ?? nil, guest == nil || reading.guest == guest,
                case .source(let standing) = reading.standing, !standing.mayRunHere
            else { return [] }
            let record = record(of: id, migrations.files(of: id))
            return record.paths.compactMap { path in
                var status = stat()
                guard lstat(path, &status) == 0 else { return nil }
                return KeptImage(
                    guest: reading.guest,
                    destination: reading.peer,
                    migration: id,
                    path: path,
                    bytes: UInt64(max(0, status.st_blocks)) * 512,
                    isConfirmed: standing != .released,
                    until: record.deleteAfter
                )
            }
        }
    }
}
