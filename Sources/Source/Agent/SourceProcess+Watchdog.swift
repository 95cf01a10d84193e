internal import IO
internal import Migration

extension SourceProcess {
    /// The watchdog: resumes a guest whose source agent dies or stands still, and recovers its migration.
    static func lookAfter(
        _ order: SourceAgentOrder,
        parent: Int32,
        pipe: Int32,
        monitor: Int32,
        say: @escaping @Sendable (String) -> Void
    ) async throws -> Int32 {
        let plan = order.plan
        let loop = EventLoop(name: "watchdog")
        defer { loop.stop() }
        let verdict = await SwitchoverWatchdog.watch(plan, parent: parent, pipe: pipe, monitor: monitor, on: loop)
        guard case .died(let why) = verdict else { return 0 }
        if let why { say(why) }
        let recovery = Recovery(stateDirectory: plan.stateDirectory, say: say)
        let report = try await recovery.recover(plan.id, because: why)
        recovery.migrations.files(of: plan.id).leave(.agent)
        return report.code
    }
}
