internal import Emulator
internal import IO
internal import Migration

/// The guests of a state directory, read again only where a record has changed. Blocks; used by one thread at a time.
///
/// No guest's lock is taken, not even for a moment: a migration that finds it taken does not begin.
struct GuestRoll {
    /// A guest whose record could be read.
    struct Guest: Sendable {
        var record: GuestRecord
        /// What its command line and its arrival say that it takes.
        var memory: UInt64?
        var processors: UInt64?
        var disk: UInt64?
        /// Whether its command line names a screen that the agent can show.
        var hasDisplay = false
        var isRunning = false
        var isFrozen = false
        fileprivate var stamp: FileStamp
    }

    private let store: GuestStore
    private(set) var guests: [String: Guest] = [:]
    /// Why the record of a guest cannot be read, by its name.
    private(set) var damaged: [String: String] = [:]
    private var unreadable: [String: FileStamp] = [:]

    init(_ store: GuestStore) { self.store = store }

    /// Looks again.
    ///
    /// - Parameter isThorough: whether the processes of all guests are looked at; of new and changed ones they always are.
    mutating func look(isThorough: Bool) {
        let names = DurableFile.list(store.directory)
        let there = Set(names)
        for name in guests.keys where !there.contains(name) { guests[name] = nil }
        for name in damaged.keys where !there.contains(name) { (damaged[name], unreadable[name]) = (nil, nil) }
        for name in names {
            guard let stamp = FileStamp("\(store.directory(of: name))/guest.json") else {
                (guests[name], damaged[name], unreadable[name]) = (nil, nil, nil)
                continue
            }
            if guests[name]?.stamp == stamp {
                if isThorough { look(at: name) }
            } else if unreadable[name] != stamp {
                read(name, stamp)
            }
        }
    }

    private mutating func read(_ name: String, _ stamp: FileStamp) {
        (damaged[name], unreadable[name]) = (nil, nil)
        do {
            guard let record = try store.load(name) else { return guests[name] = nil }
            let line = record.commandLine
            guests[name] = Guest(
                record: record,
                memory: record.arrival?.usage.memory ?? (try? line.memory()),
                processors: record.arrival?.usage.processors ?? (try? line.processors()),
                disk: record.arrival?.usage.disk,
                hasDisplay: (try? line.display()) != nil,
                stamp: stamp
            )
            look(at: name)
        } catch { (guests[name], damaged[name], unreadable[name]) = (nil, "\(error)", stamp) }
    }

    private mutating func look(at name: String) {
        let process = guests[name]?.record.process
        let isRunning = process?.isRunning == true
        guests[name]?.isRunning = isRunning
        guests[name]?.isFrozen = isRunning && process?.isFrozen == true
    }
}
