import Source
import Testing

struct SourceProcessTests {
    static let processes: [SourceProcess] = [
        .agent(plan: "/var/lib/crossdock/migrations/1-a/plan.json", events: 7),
        .agent(plan: "plan with spaces", events: nil),
        .watchdog(plan: "/plan.json", parent: 4711, pipe: 5, monitor: 12),
    ]

    @Test(arguments: processes)
    func whatIsBuiltIsRead(_ process: SourceProcess) {
        let words = process.arguments
        #expect(words.first == process.command.rawValue)
        #expect(SourceProcess(process.command, parsing: Array(words.dropFirst())) == process)
    }

    @Test(arguments: [
        [], ["--plan"], ["--events", "7"], ["--plan", "p", "--events", "seven"], ["--plan", "p", "--what", "7"],
    ])
    func otherArgumentsOfAnAgentAreNone(_ words: [String]) {
        #expect(SourceProcess(.agent, parsing: words) == nil)
    }

    @Test func aWatchdogNeedsAllThatItInherits() {
        let words = SourceProcess.watchdog(plan: "p", parent: 1, pipe: 2, monitor: 3).arguments.dropFirst()
        #expect(SourceProcess(.watchdog, parsing: Array(words.dropLast(2))) == nil)
    }
}
