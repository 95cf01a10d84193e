internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import Synchronization
internal import TLS

extension SourceProcess {
    /// Does the work of the process that these arguments belong to.
    ///
    /// - Parameter say: is told every sentence for people.
    /// - Returns: the exit code.
    public func run(say: @escaping @Sendable (String) -> Void) async throws -> Int32 {
        switch self {
        case .agent(let plan, let events):
            return try await Self.carryOut(try SourceAgentOrder(reading: plan), events: events ?? -1)
        case .watchdog(let plan, let parent, let pipe, let monitor):
            return try await Self.lookAfter(
                try SourceAgentOrder(reading: plan),
                parent: parent,
                pipe: pipe,
                monitor: monitor,
                say: say
            )
        }
    }

    /// The source agent: one process for one migration.
    private static func carryOut(_ order: SourceAgentOrder, events pipe: Int32) async throws -> Int32 {
        let migration = Guarded<OutgoingMigration?>(nil)
        let wasCancelled = Atomic<Bool>(false)
        SignalWatcher.start([SIGINT, SIGTERM, SIGHUP]) { number in
            if number == SIGHUP { return }
            wasCancelled.store(true, ordering: .relaxed)
            migration.withLock { $0?.cancel() }
        }
        DescriptorBudget.raise()
        let plan = order.plan
        let store = MigrationStore(stateDirectory: plan.stateDirectory)
        let files = store.files(of: plan.id)
        files.enter(.agent)
        defer { files.leave(.agent) }
        let emit = outlet(to: files, and: pipe)
        defer { unlink(files.progress) }
        var report = MigrationReport(migration: plan.id, guest: plan.guest, destination: "\(plan.address)")
        do {
            let outgoing = OutgoingMigration(
                plan: plan,
                credentials: try order.credentials(),
                loop: EventLoop(name: "control"),
                dataLoops: EventLoopGroup(name: "data"),
                emit: emit
            )
            migration.withLock { $0 = outgoing }
            if wasCancelled.load(ordering: .relaxed) { outgoing.cancel() }
            report = try await outgoing.start()
        } catch {
            report.reason = "\(error)"
            report.code = (error is CredentialError ? MigrationError.Code.security : .failed).rawValue
            var event = MigrationEvent("finished", migration: plan.id, guest: plan.guest, ms: 0)
            event.report = report
            emit(event)
        }
        if !DurableFile.exists(files.journal) { DurableFile.remove(files.directory) }
        return report.code
    }

    /// Where events go: the migration's files, and the pipe of who watches now.
    private static func outlet(to files: MigrationFiles, and pipe: Int32) -> @Sendable (MigrationEvent) -> Void {
        let file = open(files.events, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        let progress = open(files.progress, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        // Whoever watches may be suspended: the migration must not wait for it. What does not fit is in the files.
        if pipe >= 0 { _ = fcntl(pipe, F_SETFL, O_NONBLOCK) }
        return { event in
            let line = Array(event.line.utf8)
            line.withUnsafeBytes { bytes in
                // Progress is for who watches now, and who looks in between; the file of events keeps what happened.
                if event.event == "progress" {
                    // A reader that finds a mixture of two takes it for none.
                    _ = pwrite(progress, bytes.baseAddress, bytes.count, 0)
                    _ = ftruncate(progress, off_t(bytes.count))
                } else {
                    _ = write(file, bytes.baseAddress, bytes.count)
                }
                if pipe >= 0 { _ = write(pipe, bytes.baseAddress, bytes.count) }
            }
        }
    }
}
