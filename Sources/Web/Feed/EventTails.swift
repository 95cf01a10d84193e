internal import CLinux
internal import Glibc
internal import IO
internal import Migration

/// The events of migrations from this host as their agents write them, read on from where the last look has ended. Blocks; used by one
/// thread at a time.
struct EventTails {
    /// A line for viewers.
    struct Line: Sendable {
        var guest: String
        /// With its end.
        var bytes: [UInt8]
    }

    private struct Tail {
        var offset: Int64 = 0
        var progress: FileStamp?
        var isLast = false
    }

    /// The most bytes that one look takes of one file.
    private static let most = 256 << 10

    private var tails: [String: Tail] = [:]
    private var seen: Set<String>?

    /// What has happened since the last look, in its order for each migration. The first look takes nothing of what was there.
    ///
    /// - Parameters:
    ///   - ids: all migrations.
    ///   - underWay: those that a process works on.
    ///   - store: where they are.
    mutating func look(_ ids: [String], underWay: Set<String>, _ store: MigrationStore) -> [Line] {
        for id in ids where seen.map({ !$0.contains(id) }) ?? underWay.contains(id) {
            // One that began since the last look has said nothing yet that anybody has seen.
            let offset = seen == nil ? FileStamp(store.files(of: id).events)?.length ?? 0 : 0
            tails[id] = Tail(offset: offset)
        }
        seen = Set(ids)
        // One that was taken up again by a recovery.
        for id in underWay where tails[id] == nil {
            tails[id] = Tail(offset: FileStamp(store.files(of: id).events)?.length ?? 0)
        }
        var lines: [Line] = []
        for id in tails.keys.sorted() {
            guard var tail = tails[id] else { continue }
            let files = store.files(of: id)
            for line in Self.read(files.events, &tail.offset) { add(line, to: &lines) }
            let progress = FileStamp(files.progress)
            if progress != tail.progress, let bytes = (try? DurableFile.read(files.progress, limit: 1 << 20)) ?? nil {
                add(bytes.prefix { $0 != UInt8(ascii: "\n") }, to: &lines)
            }
            tail.progress = progress
            // The agent has a last word when its guest has moved already, and what was written before its end is read once more.
            if underWay.contains(id) || files.running(.agent) != nil {
                tail.isLast = false
            } else if tail.isLast || FileStamp(files.directory) == nil {
                tails[id] = nil
                continue
            } else {
                tail.isLast = true
            }
            tails[id] = tail
        }
        return lines
    }

    private func add(_ line: some Collection<UInt8>, to lines: inout [Line]) {
        let text = Array(line)
        guard let event = MigrationEvent(parsing: text), let names = try? JSONText.encode(Names(event)) else { return }
        // {"guest":...,"migration":...} with the event as it was written.
        let bytes = names.dropLast() + Array(",\"event\":".utf8) + text + Array("}\n".utf8)
        lines.append(Line(guest: event.guest, bytes: Array(bytes)))
    }

    private struct Names: Encodable {
        var guest: String
        var migration: String

        init(_ event: MigrationEvent) { (guest, migration) = (event.guest, event.migration) }
    }

    /// The whole lines from an offset on, which moves behind them.
    private static func read(_ path: String, _ offset: inout Int64) -> [ArraySlice<UInt8>] {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return [] }
        defer { close(descriptor) }
        var bytes = [UInt8](repeating: 0, count: most)
        let count = bytes.withUnsafeMutableBytes { pread(descriptor, $0.baseAddress, $0.count, off_t(offset)) }
        guard count > 0 else { return [] }
        guard let end = bytes[..<count].lastIndex(of: UInt8(ascii: "\n")) else {
            // A line that is longer than all that is taken is none.
            if count == most { offset += Int64(count) }
            return []
        }
        offset += Int64(end) + 1
        return bytes[..<end].split(separator: UInt8(ascii: "\n"))
    }
}
