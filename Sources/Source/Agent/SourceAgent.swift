public import Emulator
internal import Glibc
internal import IO
public import Migration

/// A source agent that was started: a process of its own, which goes on whatever becomes of who started it.
public final class SourceAgent: Sendable {
    /// The migration's id.
    public let migration: String
    /// The agent.
    public let process: EmulatorProcess
    /// What happens, up to and with "finished", which brings the report. When the agent ends without a word its watchdog takes
    /// the migration up, and "finished" comes when that has ended.
    ///
    /// It throws `MigrationError` with `undecided` when there is no report.
    public let events: AsyncThrowingStream<MigrationEvent, any Error>

    /// Starts an agent in a session of its own. Its events come through a pipe that it does not depend on.
    public static func start(_ order: SourceAgentOrder) throws -> SourceAgent {
        let path = try order.save()
        let files = MigrationStore(stateDirectory: order.plan.stateDirectory).files(of: order.plan.id)
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { throw ChannelError.system("make a pipe", errno) }
        let (reading, writing) = (ends[0], ends[1])
        _ = fcntl(reading, F_SETFD, FD_CLOEXEC)
        defer { close(writing) }
        do {
            let program = DurableFile.resolve("/proc/self/exe", in: "/")
            let process = try EmulatorProcess.start(
                [program] + SourceProcess.agent(plan: path, events: writing).arguments,
                directory: order.directory,
                log: files.log(.agent),
                keep: [writing]
            )
            return SourceAgent(order, process, reading)
        } catch {
            close(reading)
            throw error
        }
    }

    private init(_ order: SourceAgentOrder, _ process: EmulatorProcess, _ events: Int32) {
        migration = order.plan.id
        self.process = process
        let (stream, continuation) = AsyncThrowingStream<MigrationEvent, any Error>.makeStream()
        self.events = stream
        let began = ContinuousClock.now
        Task.detached {
            do {
                if try await !Self.pass(events, to: continuation) {
                    continuation.yield(try await Self.lateReport(order.plan, began, continuation))
                }
                continuation.finish()
            } catch { continuation.finish(throwing: error) }
        }
    }

    /// Asks for a roll-back. Without effect once the guest was released.
    public func cancel() { process.signal(SIGINT) }

    /// Passes events on until the pipe ends. Returns whether the last one was there.
    private static func pass(
        _ pipe: Int32,
        to continuation: AsyncThrowingStream<MigrationEvent, any Error>.Continuation
    ) async throws -> Bool {
        let loop = EventLoop(name: "events")
        defer { loop.stop() }
        return try await loop.run {
            let channel = try DescriptorChannel(
                reading: pipe,
                // Nothing is written.
                writing: fcntl(pipe, F_DUPFD_CLOEXEC, 3),
                name: "the source agent",
                on: loop
            )
            defer { channel.close() }
            let lines = LineReader(channel, limit: 4 << 20)
            var hasReport = false
            while let line = try await lines.next() {
                guard let event = MigrationEvent(parsing: line) else { continue }
                if event.report != nil { hasReport = true }
                continuation.yield(event)
            }
            return hasReport
        }
    }

    /// The agent ended without a word: its watchdog takes the migration up, which may take as long as the other host is away.
    private static func lateReport(
        _ plan: MigrationPlan,
        _ began: ContinuousClock.Instant,
        _ continuation: AsyncThrowingStream<MigrationEvent, any Error>.Continuation
    ) async throws -> MigrationEvent {
        let files = MigrationStore(stateDirectory: plan.stateDirectory).files(of: plan.id)
        let end = ContinuousClock.now + .seconds(15)
        var hasBegun = false
        func event(_ name: String) -> MigrationEvent {
            let time = MigrationContext.milliseconds(ContinuousClock.now - began)
            return MigrationEvent(name, migration: plan.id, guest: plan.guest, ms: time)
        }
        while !DurableFile.exists(files.report) {
            let isRunning = files.running(.recovery) != nil
            if isRunning, !hasBegun {
                hasBegun = true
                var event = event("warning")
                event.message = "the source agent does not go on; its migration is being recovered"
                continuation.yield(event)
            }
            // Nothing was begun that would have to be decided, when there is no watchdog.
            if hasBegun ? !isRunning : ContinuousClock.now > end || !DurableFile.exists(files.log(.watchdog)) { break }
            try await Task.sleep(for: .milliseconds(50))
        }
        let saved = try DurableFile.read(files.report).flatMap { try? MigrationReport(parsing: $0) }
        var report = try saved ?? unreported(plan)
        // A recovery that did what it should is a success, the migration is none.
        if report.code == 0, report.outcome != .migrated { report.code = MigrationError.Code.failed.rawValue }
        var last = event("finished")
        last.report = report
        return last
    }

    /// What the journal says of a migration whose agent has ended without a report, and that nobody recovers.
    private static func unreported(_ plan: MigrationPlan) throws -> MigrationReport {
        let store = MigrationStore(stateDirectory: plan.stateDirectory)
        let words = EmulatorProcess.tail(of: store.files(of: plan.id).log(.agent))
        let ended = "The source agent ended without a report: \(words.isEmpty ? "it said nothing" : words)"
        guard let reading = try store.reading(of: plan.id), case .source(let standing) = reading.standing else {
            throw MigrationError(.failed, "\(ended). Nothing of the guest had been moved")
        }
        let recover = "'crossdock recover \(plan.id)'"
        switch standing {
        case .released:
            throw MigrationError(
                .undecided,
                "\(ended). The guest was released to \(reading.peer), which has not confirmed that it has it; \(recover) asks it"
            )
        case .open, .reclaimed, .taken:
            throw MigrationError(.failed, "\(ended). The guest belongs to this host; \(recover) brings it back")
        case .confirmed, .overruled, .rolledBack:
            var report = Recovery.report(reading, plan)
            report.reason = "\(ended). \(recover) removes what it may have left"
            return report
        }
    }
}
