internal import FoundationEssentials
internal import Glibc

/// Asks the operator: at the terminal, or by the program that `SSH_ASKPASS` names, under the conditions under which `ssh` uses it.
public struct OperatorQuestion: Sendable {
    /// Whether nobody can be asked.
    public let isBatch: Bool

    /// Makes one.
    public init(isBatch: Bool) { self.isBatch = isBatch }

    /// Asks, and waits for the answer. Blocks.
    ///
    /// - Parameters:
    ///   - text: the question.
    ///   - isSecret: whether the answer is not shown.
    /// - Returns: the answer without its line's end; nil when nobody is there.
    public func ask(_ text: String, isSecret: Bool) -> String? {
        guard !isBatch else { return nil }
        let environment = ProcessInfo.processInfo.environment
        let program = environment["SSH_ASKPASS"].flatMap { $0.isEmpty ? nil : $0 }
        let demand = environment["SSH_ASKPASS_REQUIRE"]
        let hasDisplay = environment["DISPLAY"] != nil || environment["WAYLAND_DISPLAY"] != nil
        if let program, demand == "force" || demand == "prefer" && hasDisplay { return Self.run(program, text) }
        let terminal = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY)
        guard terminal >= 0 else {
            guard let program, hasDisplay, demand != "never" else { return nil }
            return Self.run(program, text)
        }
        defer { close(terminal) }
        return Self.ask(text, isSecret, at: terminal)
    }

    private static func run(_ program: String, _ text: String) -> String? {
        guard let run = try? ProgramRun.run([program, text]), run.code == 0 else { return nil }
        return String(decoding: run.output.prefix { $0 != 10 && $0 != 13 }, as: UTF8.self)
    }

    private static func ask(_ text: String, _ isSecret: Bool, at terminal: Int32) -> String? {
        var before = termios()
        let isTerminal = tcgetattr(terminal, &before) == 0
        if isSecret, isTerminal {
            var quiet = before
            // An interruption must not leave a terminal behind that shows nothing, so its key is read like any other.
            quiet.c_lflag &= ~tcflag_t(ECHO | ICANON | ISIG)
            tcsetattr(terminal, TCSAFLUSH, &quiet)
        }
        defer {
            if isSecret, isTerminal {
                tcsetattr(terminal, TCSAFLUSH, &before)
                _ = write(terminal, "\n", 1)
            }
        }
        let bytes = Array(text.utf8)
        guard write(terminal, bytes, bytes.count) == bytes.count else { return nil }
        var answer: [UInt8] = []
        var byte: UInt8 = 0
        while answer.count < 4096 {
            let count = read(terminal, &byte, 1)
            if count < 0, errno == EINTR { continue }
            guard count == 1 else { return nil }
            switch byte {
            case 10, 13: return String(decoding: answer, as: UTF8.self)
            case 3 where isSecret, 4 where isSecret: return nil
            case 21 where isSecret: answer = []
            case 8 where isSecret, 127 where isSecret: _ = answer.popLast()
            default: answer.append(byte)
            }
        }
        return nil
    }
}
