internal import Glibc
internal import IO

/// The users that a host gives to guests that come from elsewhere, one each: a range of numbers that belongs to nobody else.
///
/// The last number that was given is kept durably, and the next one is taken from behind it, so that a number comes back only
/// after all the others. One is left out while a process runs as it or a file of a guest belongs to it.
public final class GuestUsers: Sendable {
    /// Numbers that neither systemd nor Debian gives to anybody.
    public static let defaultRange: ClosedRange<UInt32> = 1_900_000_000...1_900_009_999

    private struct Saved: Codable {
        var last: UInt32
    }

    private let range: ClosedRange<UInt32>
    private let file: String
    /// The directories in whose directories guests' files are.
    private let places: [String]
    private let lock = Guarded(())

    /// Takes up a range.
    ///
    /// - Parameters:
    ///   - range: the numbers.
    ///   - file: where the last one is kept.
    ///   - places: the directories with a directory for each guest.
    public init(_ range: ClosedRange<UInt32>, file: String, places: [String]) {
        self.range = range
        self.file = file
        self.places = places
    }

    /// Takes the next free user. Blocks.
    ///
    /// - Throws: `GuestError` when all are in use, `FileError` when it cannot be noted.
    public func take() throws -> UInt32 {
        try lock.withLock { _ in
            let known = try DurableFile.read(file).flatMap { JSONText.decode(Saved.self, from: $0)?.last }
            let used = owners().union(Self.runningUsers())
            var candidate = known.map { range.contains($0) ? $0 : range.upperBound } ?? range.upperBound
            for _ in 0..<range.count {
                candidate = candidate == range.upperBound ? range.lowerBound : candidate + 1
                guard !used.contains(candidate), !Self.hasName(candidate) else { continue }
                try DurableFile.write(JSONText.encode(Saved(last: candidate)), to: file)
                return candidate
            }
            throw GuestError(
                "All users from \(range.lowerBound) to \(range.upperBound) have guests, files or names on this host; give a larger range "
                    + "with --guest-users"
            )
        }
    }

    /// The owners of everything that guests have here, two levels below the places; devices behind links among it.
    private func owners() -> Set<UInt32> {
        var found: Set<UInt32> = []
        func look(_ path: String, _ depth: Int) {
            var status = stat()
            guard lstat(path, &status) == 0 else { return }
            found.insert(status.st_uid)
            if status.st_mode & S_IFMT == S_IFDIR {
                if depth > 0 { for name in DurableFile.list(path) { look("\(path)/\(name)", depth - 1) } }
            } else if stat(path, &status) == 0 {
                found.insert(status.st_uid)
                if status.st_mode & S_IFMT == S_IFBLK { found.formUnion(GuestDevice.users(of: path)) }
            }
        }
        for place in places { look(place, 3) }
        return found
    }

    private static func runningUsers() -> Set<UInt32> {
        var found: Set<UInt32> = []
        for pid in DurableFile.list("/proc") where pid.utf8.first.map({ $0 >= 48 && $0 <= 57 }) ?? false {
            var status = stat()
            if stat("/proc/\(pid)", &status) == 0 { found.insert(status.st_uid) }
        }
        return found
    }

    private static func hasName(_ user: UInt32) -> Bool {
        var entry = passwd()
        var found: UnsafeMutablePointer<passwd>?
        var buffer = [CChar](repeating: 0, count: 16 << 10)
        return getpwuid_r(user, &entry, &buffer, buffer.count, &found) == 0 && found != nil
    }
}
