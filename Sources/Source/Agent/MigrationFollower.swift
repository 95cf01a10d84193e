internal import Emulator
internal import Glibc
internal import IO
public import Migration

/// A migration that is under way from this host, seen by somebody who has not started it: through its files.
public struct MigrationFollower: Sendable {
    /// The migration's id.
    public let migration: String
    /// The guest that it moves.
    public let guest: String
    /// Where to.
    public let destination: String
    private let files: MigrationFiles

    /// Finds a migration that a process of this host works on.
    ///
    /// - Parameters:
    ///   - name: its id, or the guest's name; nil for the only one that is under way.
    ///   - stateDirectory: this host's.
    /// - Throws: `MigrationError` when there is none, or more than one.
    public init(finding name: String?, stateDirectory: String) throws {
        let store = MigrationStore(stateDirectory: stateDirectory)
        let found = Self.underWay(store).filter { name == nil || $0.migration == name || $0.guest == name }
        guard let first = found.first else {
            let what = name.map { "of '\($0)' " } ?? ""
            throw MigrationError(.guest, "No migration \(what)is under way from this host; see 'crossdock status'")
        }
        guard found.count == 1 else {
            throw MigrationError(
                .guest,
                "Several migrations are under way from this host, name one: \(found.map(\.migration).joined(separator: ", "))"
            )
        }
        self = first
    }

    private init(migration: String, guest: String, destination: String, files: MigrationFiles) {
        (self.migration, self.guest, self.destination, self.files) = (migration, guest, destination, files)
    }

    private static func underWay(_ store: MigrationStore) -> [MigrationFollower] {
        store.ids().compactMap { id in
            let files = store.files(of: id)
            guard isAtWork(files), let order = try? SourceAgentOrder(reading: files.plan) else { return nil }
            return MigrationFollower(
                migration: id,
                guest: order.plan.guest,
                destination: order.plan.host,
                files: files
            )
        }
    }

    private static func isAtWork(_ files: MigrationFiles) -> Bool {
        [.agent, .recovery].contains { (role: MigrationFiles.Role) in files.running(role) != nil }
    }

    /// Asks the source agent for a roll-back. Without effect once the guest was released.
    public func cancel() { files.running(.agent)?.signal(SIGINT) }

    /// What has happened, and what happens, up to "finished"; it ends without that when nobody works on the migration any more.
    public func events() -> AsyncThrowingStream<MigrationEvent, any Error> {
        let (files, (stream, continuation)) = (files, AsyncThrowingStream<MigrationEvent, any Error>.makeStream())
        let task = Task.detached {
            var (taken, progress) = (0, [UInt8]())
            do {
                while !Task.isCancelled {
                    // Looked at before the files: what was written before the end is read.
                    let isAtWork = Self.isAtWork(files)
                    let bytes = try DurableFile.read(files.events) ?? []
                    let end = bytes.lastIndex(of: UInt8(ascii: "\n")).map { $0 + 1 } ?? 0
                    for line in bytes[min(taken, end)..<end].split(separator: UInt8(ascii: "\n")) {
                        guard let event = MigrationEvent(parsing: Array(line)) else { continue }
                        continuation.yield(event)
                        if event.event == "finished" { return continuation.finish() }
                    }
                    taken = end
                    if let now = try DurableFile.read(files.progress), now != progress {
                        progress = now
                        if let event = MigrationEvent(parsing: now) { continuation.yield(event) }
                    }
                    guard isAtWork else { return continuation.finish() }
                    try await Task.sleep(for: .milliseconds(200))
                }
                continuation.finish()
            } catch { continuation.finish(throwing: error) }
        }
        continuation.onTermination = { _ in task.cancel() }
        return stream
    }
}
