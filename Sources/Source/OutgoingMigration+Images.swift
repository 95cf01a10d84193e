internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// The images that the guest leaves: who else has them, and how they are taken out of reach and given back.
extension OutgoingMigration {
    /// Everything that would make the fence fail, or harm another user of an image, is found before the first byte moves.
    func checkImages(_ record: GuestRecord) async throws {
        let fence = ImageFence(
            of: mirrors.disks.flatMap(\.files).map { FencedImage($0) },
            process: record.process,
            guest: plan.guest,
            migration: plan.id,
            in: context.migrations
        )
        self.fence = fence
        let guests = context.guests
        let (problems, users) = await BlockingPool.shared.value {
            (fence.check(), fence.users(guests, patience: .seconds(2)))
        }
        for sentence in fence.warnings() + (users.note.map { [$0] } ?? []) { context.warn(sentence) }
        let reasons = problems + users.obstacles
        guard reasons.isEmpty else {
            throw MigrationError(
                .guest,
                "Guest '\(plan.guest)' cannot be migrated: \(reasons.joined(separator: "; "))",
                obstacles: reasons.map { Obstacle(.files, $0) }
            )
        }
    }

    /// Who else has opened an image since; nil when nobody has.
    func others() async -> String? {
        guard let fence else { return nil }
        let guests = context.guests
        // The guest is paused meanwhile, and the deadline is not far.
        let patience = Duration.milliseconds(plan.blackoutDeadline / 10)
        let users = await BlockingPool.shared.value { fence.users(guests, patience: patience) }
        guard !users.obstacles.isEmpty else { return nil }
        return "Guest '\(plan.guest)' cannot be released: \(users.obstacles.joined(separator: "; "))"
    }

    /// Where an image, or a file with the data of one, is now.
    func whereabouts(of path: String) -> String {
        guard let fence, let image = fence.images.first(where: { $0.path == path }) else { return path }
        let fenced = fence.path(of: image)
        return DurableFile.exists(fenced) ? fenced : path
    }

    /// A release that is recovered may find its images with their old names: the host fell before that was durable.
    func fenceAgain() async {
        guard let fence else { return }
        do { try await BlockingPool.shared.run { try fence.raise() } } catch {
            context.warn("Guest '\(plan.guest)' is released, and its images must not be used here any more: \(error)")
        }
    }

    /// Gives the images their names back and has QEMU go on, in this order: it opens them by their names again when it resumes
    /// the guest.
    ///
    /// - Returns: why QEMU must not go on yet: something else has an image's name.
    func liftFence() async -> String? {
        if let fence {
            let problems = await BlockingPool.shared.value { fence.lift() }
            if !problems.isEmpty { return problems.joined(separator: "; ") }
        }
        do { try record?.process?.thaw() } catch { return "\(error)" }
        return nil
    }

    /// Notes for people and for the deletion of the old images; the journal has decided already, so that this need not
    /// happen while the guest is paused.
    func rememberRelease() {
        if var record {
            record.isOff = nil
            record.released = .init(migration: plan.id, destination: plan.host)
            try? context.guests.save(record)
            self.record = record
        }
        if let fence {
            try? FencedImages.remember(fence, migration: plan.id, keep: plan.keepSource, context.migrations)
        }
    }

    /// Ends the QEMU that has nothing to run any more. It stands still, and is never to make another step.
    func endEmulator() async {
        monitor?.onDisconnect = nil
        monitor?.close()
        if let process = record?.process, process.isRunning {
            process.signal(SIGKILL)
            await process.terminate(grace: .zero)
        }
        fence?.withdrawUser()
        if let record { context.guests.removeTaps(of: record) }
        if let record, record.adopted == nil {
            for name in ["qmp.sock", "status.sock"] { unlink("\(context.guests.directory(of: record.name))/\(name)") }
        }
    }

    // MARK: what the guest was doing

    private struct GuestNote: Codable {
        var runState: RunState
    }

    /// Durable: a host that falls after RELEASED has to say it in RELEASE.
    static func note(_ state: RunState, _ files: MigrationFiles) throws {
        try DurableFile.write(try JSONText.encode(GuestNote(runState: state)), to: files.guest)
    }

    /// What the guest of a migration was doing last, apart from the migration; `running` when nothing was noted.
    static func noted(_ files: MigrationFiles) -> RunState {
        guard let bytes = (try? DurableFile.read(files.guest)) ?? nil,
            let note = JSONText.decode(GuestNote.self, from: bytes)
        else { return .running }
        return note.runState
    }
}
