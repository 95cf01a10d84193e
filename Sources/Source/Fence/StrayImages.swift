internal import Emulator
internal import IO
public import Migration

/// Images of a guest that belongs to this host and that still bear the name of a release, since something else has theirs.
public enum StrayImages {
    /// Why a guest must not be started: it would start from what has taken an image's name. A sentence each.
    public static func obstacles(of guest: String, _ migrations: MigrationStore) -> [String] {
        migrations.ids().flatMap { id -> [String] in
            guard let reading = (try? migrations.reading(of: id)) ?? nil, reading.guest == guest,
                case .source(let standing) = reading.standing, standing.mayRunHere,
                (try? migrations.isSuperseded(id, of: guest)) == false
            else { return [] }
            return SavedDisk.load(migrations.files(of: id)).flatMap(\.images).compactMap { image in
                let fenced = image.fencedPath(id)
                guard !image.isDevice, DurableFile.exists(fenced) else { return nil }
                return
                    "The image \(image.path) of guest '\(guest)' is still called \(fenced); move away what has its name, if anything "
                    + "has, then 'crossdock recover \(id)', or rename it by hand"
            }
        }
    }
}
