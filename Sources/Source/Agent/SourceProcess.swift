/// A process that a source starts for itself: which one, and what it is told on its command line.
public enum SourceProcess: Sendable, Hashable {
    /// The source agent.
    ///
    /// - Parameters:
    ///   - plan: the file with its order.
    ///   - events: the descriptor that its events go to; nil when nobody listens.
    case agent(plan: String, events: Int32?)
    /// The watchdog of a source agent.
    ///
    /// - Parameters:
    ///   - plan: the file with the agent's order.
    ///   - parent: the agent.
    ///   - pipe: the descriptor that the agent's beats come from.
    ///   - monitor: the descriptor of the agent's conversation with QEMU.
    case watchdog(plan: String, parent: Int32, pipe: Int32, monitor: Int32)

    /// The commands of the two.
    public enum Command: String, Sendable {
        /// The source agent's.
        case agent = "source-agent"
        /// Its watchdog's.
        case watchdog = "source-watchdog"
    }

    private enum Option: String {
        case plan = "--plan"
        case events = "--events"
        case parent = "--parent"
        case pipe = "--pipe"
        case monitor = "--monitor"
    }

    /// Which command it is.
    public var command: Command {
        switch self {
        case .agent: .agent
        case .watchdog: .watchdog
        }
    }

    /// The arguments after the program.
    public var arguments: [String] {
        var words = [command.rawValue]
        func add(_ option: Option, _ value: String) { words += [option.rawValue, value] }
        switch self {
        case .agent(let plan, let events):
            add(.plan, plan)
            if let events { add(.events, "\(events)") }
        case .watchdog(let plan, let parent, let pipe, let monitor):
            add(.plan, plan)
            add(.parent, "\(parent)")
            add(.pipe, "\(pipe)")
            add(.monitor, "\(monitor)")
        }
        return words
    }

    /// Reads the arguments that follow the command's name; nil when they are not such.
    public init?(_ command: Command, parsing words: [String]) {
        var values: [Option: String] = [:]
        guard words.count.isMultiple(of: 2) else { return nil }
        for index in stride(from: 0, to: words.count, by: 2) {
            guard let option = Option(rawValue: words[index]) else { return nil }
            values[option] = words[index + 1]
        }
        func number(_ option: Option) -> Int32? { values[option].flatMap { Int32($0) } }
        guard let plan = values[.plan] else { return nil }
        switch command {
        case .agent:
            guard values[.events] == nil || number(.events) != nil else { return nil }
            self = .agent(plan: plan, events: number(.events))
        case .watchdog:
            guard let parent = number(.parent), let pipe = number(.pipe), let monitor = number(.monitor) else {
                return nil
            }
            self = .watchdog(plan: plan, parent: parent, pipe: pipe, monitor: monitor)
        }
    }
}
