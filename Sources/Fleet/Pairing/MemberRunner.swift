internal import IO

/// Has a host carry out orders: this one, another one over SSH, or one that joins with a token. Blocks: run it on the pool.
struct MemberRunner: Sendable {
    /// How the host is called in sentences.
    let name: String
    /// Crossdock's program on this host.
    private let program: String
    /// The connection; nil for this host.
    let connection: SSHConnection?
    /// The connection of a host that joins; nil for others.
    private let link: JoinLink?
    /// Put before the program there: nothing for root, `sudo -n` for others.
    private let privilege: String

    /// This host.
    init(here program: String) {
        name = "this host"
        self.program = program
        connection = nil
        link = nil
        privilege = ""
    }

    /// Another host.
    init(_ name: String, over connection: SSHConnection, privilege: String) {
        self.name = name
        program = "crossdock"
        self.connection = connection
        self.privilege = privilege
        link = nil
    }

    /// A host that joins.
    init(_ name: String, over link: JoinLink) {
        self.name = name
        program = "crossdock"
        connection = nil
        self.link = link
        privilege = ""
    }

    /// A command of the host's shell, as root.
    func asRoot(_ command: String) -> String { privilege + command }

    /// Carries an order out.
    ///
    /// - Throws: `FleetError` with the host's reason.
    func carryOut(_ order: MemberOrder) throws -> MemberAnswer {
        if let link {
            let answer = try link.carryOut(order)
            if let failure = answer.failure { throw FleetError("On \(name): \(failure.shown(most: 1000))") }
            return answer
        }
        let input = try JSONText.encode(order)
        let run =
            try connection?.run("\(privilege)\(program) pair-member", input: input)
            ?? ProgramRun.run([program, "pair-member"], input: input)
        guard let answer = JSONText.decode(MemberAnswer.self, from: run.output) else {
            throw FleetError(
                "\(name) did not understand: \(run.words.isEmpty ? "crossdock ended with \(run.code)" : run.words)"
            )
        }
        if let failure = answer.failure { throw FleetError("On \(name): \(failure.shown(most: 1000))") }
        return answer
    }
}
