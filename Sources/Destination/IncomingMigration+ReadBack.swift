internal import IO
internal import Migration

extension IncomingMigration {
    private static let interval = Duration.milliseconds(500)

    /// Reads back all that was copied, and tells the source how far that is.
    func readBack() async throws {
        guard let disks else { return }
        let teller =
            conversation.features.contains(.readBack)
            ? Task(executorPreference: agent.loop) { await self.tellReadBack(disks) } : nil
        defer { teller?.cancel() }
        try await disks.readCopied()
    }

    private func tellReadBack(_ disks: IncomingDisks) async {
        var most: UInt64 = 0
        while !Task.isCancelled {
            let rest = disks.images.staleBytes
            // The guest goes on writing, so that there may be more to do than there was.
            most = max(most, rest)
            if most > 0 { await conversation.tell(.readBack(.init(done: most - rest, total: most))) }
            await agent.loop.sleep(for: Self.interval)
        }
    }
}
