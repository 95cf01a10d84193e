import ArgumentParser
import FoundationEssentials
import IO
import NBD

struct NBDConformCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "conform",
        abstract: "Judges an NBD server by the specification, one line a case.",
        discussion: """
            Plays a client that is sometimes correct and sometimes hostile. Ends with 0 when the server failed no case, with 1 otherwise.

              crossdock nbd conform nbds://localhost/web1
              crossdock nbd conform --destructive nbd+unix:///?socket=/tmp/scratch.sock

            --destructive runs the cases that write, too: they destroy the first mebibyte of the export.
            """
    )

    @OptionGroup var security: NBDClientSecurity

    @Flag(help: "Run the cases that write; they destroy the first mebibyte of the export.")
    var destructive = false
    @Flag(help: "Run the cases that wait for the server's deadlines; they take up to a minute each.")
    var slow = false
    @Option(help: ArgumentHelp("Only the cases whose name begins so.", valueName: "prefix"))
    var only: String?
    @Flag(help: "Print one JSON object for each case.")
    var json = false
    @Option(
        help: ArgumentHelp(
            "Be a server that does one thing wrong, for one client on --socket: a name from --list-cases.",
            valueName: "name"
        )
    )
    var play: String?
    @Option(name: [.customShort("k"), .long], help: ArgumentHelp("Where --play listens.", valueName: "path"))
    var socket: String?
    @Flag(help: "List the cases and their rules.")
    var listCases = false
    @Argument(help: "The NBD URI of an export.")
    var uri: String?

    func validate() throws {
        if let play {
            guard Misbehaviour(rawValue: play) != nil else {
                throw ValidationError("There is no '\(play)'; see --list-cases.")
            }
            guard socket != nil, uri == nil else { throw ValidationError("--play takes --socket and no URI.") }
            return
        }
        guard listCases || uri != nil else { throw ValidationError("Give the NBD URI of an export.") }
    }

    func run() async throws {
        if listCases {
            for one in Conformance.cases { output("\(one.name)  \(one.rule)  [\(one.section)]\n") }
            for one in Misbehaviour.allCases {
                output("\(one.rawValue)  for clients, which \(Self.words(one.expectation))\n")
            }
            return
        }
        if let play, let socket, let fault = Misbehaviour(rawValue: play) {
            try await failing {
                try await onClientLoop { loop in
                    let listener = try await Listener.listen(on: .unix(path: socket), loop: loop)
                    defer { listener.close() }
                    output("crossdock nbd conform: playing \(play) on \(socket)\n")
                    try? await MisbehavingServer(fault).serve(try await listener.accept())
                }
            }
            return
        }
        let failures = try await failing {
            let uri = try NBDURI(parsing: uri ?? "")
            let options = try security.options(uri)
            let target = ConformanceTarget(
                address: uri.address,
                export: uri.export,
                credentials: options.credentials,
                hostname: options.hostname,
                mayWrite: destructive,
                isPatient: slow
            )
            return try await onClientLoop { [json, only] loop in
                var counts: [ConformanceVerdict.Outcome: Int] = [:]
                try await Conformance.run(
                    against: target,
                    where: { only.map($0.hasPrefix) ?? true },
                    on: loop
                ) { verdict in
                    counts[verdict.outcome, default: 0] += 1
                    output(json ? Self.json(verdict) : Self.line(verdict))
                }
                if !json {
                    output(
                        "\(counts[.pass] ?? 0) passed, \(counts[.fail] ?? 0) failed, \(counts[.skip] ?? 0) do not apply\n"
                    )
                }
                return counts[.fail] ?? 0
            }
        }
        if failures > 0 { throw ExitCode(1) }
    }

    private static func words(_ expectation: Misbehaviour.Expectation) -> String {
        switch expectation {
        case .fails: "must give the connection up"
        case .carriesOn: "must carry on"
        case .requestFails: "must report an error"
        }
    }

    private static func line(_ verdict: ConformanceVerdict) -> String {
        let one = verdict.conformanceCase
        let detail = verdict.detail.isEmpty ? "" : ": \(verdict.detail)"
        return "\(verdict.outcome.rawValue)  \(one.name)\(detail)  [\(one.section)]\n"
    }

    private struct Line: Encodable {
        let name: String
        let section: String
        let rule: String
        let outcome: String
        let detail: String
    }

    private static func json(_ verdict: ConformanceVerdict) -> String {
        let one = verdict.conformanceCase
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        let line = Line(
            name: one.name,
            section: one.section,
            rule: one.rule,
            outcome: verdict.outcome.rawValue,
            detail: verdict.detail
        )
        return ((try? encoder.encode(line)).map { String(decoding: $0, as: UTF8.self) } ?? "") + "\n"
    }
}
