import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// The mistakes of `docs/mistakes.md`, made with the built program: each says what the table says, and ends with the code that is
/// documented.
@Suite(.serialized, .timeLimit(.minutes(5)))
struct MistakesEndToEnd {
    /// A mistake: its words in the table, the exit code, and how it is made.
    struct Mistake: Sendable, CustomTestStringConvertible {
        let title: String
        let code: Int32
        let make: @Sendable (Lab) async throws -> ToolResult
        /// Whether the destination's log is what answers.
        let isLogged: Bool

        init(
            _ title: String,
            _ code: Int32,
            isLogged: Bool = false,
            _ make: @escaping @Sendable (Lab) async throws -> ToolResult
        ) {
            (self.title, self.code, self.isLogged, self.make) = (title, code, isLogged, make)
        }

        var testDescription: String { title }
    }

    // MARK: the table

    /// The rows of the table: the mistake, and the pieces of what is said.
    private static func table() throws -> [String: [String]] {
        let text = String(decoding: try DurableFile.read("\(Lab.repository)/docs/mistakes.md") ?? [], as: UTF8.self)
        var rows: [String: [String]] = [:]
        for line in text.split(separator: "\n") where line.hasPrefix("| ") {
            let cells = line.split(separator: "|").map { String($0.trimmed) }
            guard cells.count == 3, cells[0] != "Mistake" else { continue }
            // What is between backquotes is said, but for the parts that depend on the case: ….
            let said = cells[1].split(separator: "`", omittingEmptySubsequences: false).enumerated()
                .filter { !$0.offset.isMultiple(of: 2) }
            rows[cells[0]] = said.flatMap { $0.element.split(separator: "…").map { String($0.trimmed) } }
        }
        return rows
    }

    @Test func eachMistakeOfTheTableIsMadeHere() throws {
        #expect(Set(try Self.table().keys) == Set(Self.mistakes.map(\.title)))
        #expect(Self.mistakes.count >= 25)
    }

    @Test(arguments: mistakes)
    func aMistakeIsAnsweredWithItsRemedy(_ mistake: Mistake) async throws {
        let pieces = try #require(try Self.table()[mistake.title])
        #expect(!pieces.isEmpty)
        let lab = try Lab()
        let result = try await mistake.make(lab)
        #expect(result.code == mistake.code, "\(result.all)")
        let answer = mistake.isLogged ? lab.destinationErrors() : result.all
        for piece in pieces { #expect(answer.contains(piece), "'\(piece)' is not in: \(answer)") }
    }

    // MARK: making them

    private static func guest(_ lab: Lab) async throws {
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
    }

    /// Moves the guest of a lab to an agent of it.
    private static func migrate(_ lab: Lab, more: [String] = []) async throws -> ToolResult {
        try await guest(lab)
        try await lab.startDestination()
        return try await lab.migrate(more: more)
    }

    /// What is refused before anybody looks for a guest or a host.
    private static func usage(_ words: String...) -> @Sendable (Lab) async throws -> ToolResult {
        { try await $0.crossdock(words) }
    }

    private static func policy(_ lines: String) -> @Sendable (Lab) async throws -> ToolResult {
        { lab in
            let file = lab.directory.file("policy")
            try DurableFile.write(Array(lines.utf8), to: file)
            return try await destination(lab, ["--policy", file])
        }
    }

    private static func destination(_ lab: Lab, _ more: [String]) async throws -> ToolResult {
        try await lab.crossdock(
            ["destination", "--state-dir", lab.state("b"), "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0"]
                + lab.credentials() + ["--guest-network", "host"] + more
        )
    }

    private static func start(_ lab: Lab, _ name: String, _ words: [String]) async throws -> ToolResult {
        try await lab.crossdock(["guest", "start", name, "--state-dir", lab.state("a"), "--"] + words)
    }

    private static let machine = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults"]

    static let mistakes: [Mistake] = [
        // Hosts
        Mistake("A host that does not exist", 11) { lab in
            try await guest(lab)
            return try await lab.migrate(host: "no-such-host.invalid", port: 10808)
        },
        Mistake("A host on which no agent runs", 11) { lab in
            try await guest(lab)
            return try await lab.migrate(port: 1)
        },
        Mistake("A user before the host, as with ssh", 64, usage("migrate", "web1", "root@host-b")),
        Mistake("A URL in place of the host", 64, usage("migrate", "web1", "tcp://host-b:10808")),
        Mistake("A name in place of the port", 64, usage("migrate", "web1", "host-b:nbd")),
        Mistake("The port of the disks", 11) { lab in
            try await guest(lab)
            try await lab.startDestination()
            return try await lab.migrate(port: lab.nbdPort)
        },
        Mistake("Host and guest the wrong way round", 64, usage("migrate", "host-b", "web/1")),
        // Credentials
        Mistake("A name that the certificate does not have", 12) { lab in
            try await guest(lab)
            let other = try lab.pki.issue("other", hosts: ["host-b.example", "192.0.2.7"])
            try await lab.startDestination(credentials: lab.credentials(other))
            return try await lab.migrate()
        },
        Mistake("The same, in the destination's log", 12, isLogged: true) { lab in
            try await guest(lab)
            let other = try lab.pki.issue("other", hosts: ["host-b.example"])
            try await lab.startDestination(credentials: lab.credentials(other))
            let result = try await lab.migrate()
            let agent = try #require(lab.destination)
            try await agent.wait(for: "its log") { agent.errors.contains("refused us") }
            return result
        },
        Mistake("Certificates of two authorities", 12) { lab in
            try await guest(lab)
            try await lab.startDestination()
            let other = try TestPKI()
            defer { withExtendedLifetime(other) {} }
            return try await lab.migrate(credentials: lab.credentials(other.directory))
        },
        Mistake("A directory without credentials", 12) { lab in
            try await guest(lab)
            return try await lab.migrate(port: 1, credentials: lab.credentials("/nowhere"))
        },
        Mistake("An id that no object has", 12) { lab in
            try await guest(lab)
            let object = lab.credentials().prefix(2)
            return try await lab.migrate(port: 1, credentials: object + ["--tls-creds", "tls1"])
        },
        Mistake("A property that the object does not have", 12) { lab in
            try await guest(lab)
            let words = ["--object", "tls-creds-x509,id=tls0,directory=/etc/pki", "--tls-creds", "tls0"]
            return try await lab.migrate(port: 1, credentials: words)
        },
        Mistake("An authority in a directory that has one", 12) { lab in
            try await lab.crossdock(["pki", "init", lab.pki.root.file("ca")])
        },
        Mistake("A host's directory in place of the authority's", 12) { lab in
            try await lab.crossdock(["pki", "issue", lab.pki.directory, lab.directory.file("new"), "host-b"])
        },
        // Guests
        Mistake("A guest that is not known", 10) { lab in
            try await guest(lab)
            return try await lab.crossdock(["guest", "show", "web2", "--state-dir", lab.state("a")])
        },
        Mistake("Another user's guest", 1) { lab in
            try await guest(lab)
            // Where that user may not even look.
            chmod(lab.state("a"), 0o700)
            return try await Tool.run(
                ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", Lab.crossdock]
                    + lab.migrateCommand(port: 1)
            )
        },
        Mistake("A guest whose image is not there", 10) { lab in
            let result = try await start(
                lab,
                "web1",
                machine + ["-drive", "file=\(lab.directory.file("none.raw")),format=raw"]
            )
            // What never ran is no guest.
            #expect(lab.guests("a").names() == [])
            return result
        },
        Mistake("A QEMU that is not installed", 10) { lab in
            try await start(lab, "web1", ["qemu-system-none", "-m", "64"])
        },
        Mistake("A guest that runs already", 10) { lab in
            try await guest(lab)
            return try await start(lab, "web1", machine)
        },
        Mistake("A guest's name with a slash", 10) { lab in try await start(lab, "web/1", machine) },
        Mistake("'guest forget' for a guest that is at home here", 10) { lab in
            try await guest(lab)
            return try await lab.crossdock(["guest", "forget", "web1", "--state-dir", lab.state("a")])
        },
        Mistake("A QEMU command line without '--'", 64) { lab in
            try await lab.crossdock(["guest", "start", "web1"] + machine + ["-hda", "disk.raw"])
        },
        Mistake("'guest prune' with a name that nobody has", 10) { lab in
            try await guest(lab)
            return try await lab.crossdock(["guest", "prune", "web2", "--state-dir", lab.state("a")])
        },
        Mistake("A host that moves a guest to itself", 13) { lab in
            try await guest(lab)
            try await lab.startDestination("a")
            return try await lab.migrate(port: lab.controlPort(of: "a"))
        },
        Mistake("'export' of a guest that has moved", 10) { lab in
            let moved = try await migrate(lab)
            #expect(moved.code == 0, "\(moved.all)")
            return try await lab.crossdock(["export", "web1", "--state-dir", lab.state("a")] + lab.credentials())
        },
        // Figures
        Mistake("A time without its unit", 64, usage("migrate", "web1", "host-b", "--keep-source", "7")),
        Mistake(
            "A pause with a unit that it does not have",
            64,
            usage("migrate", "web1", "host-b", "--downtime-limit", "1h")
        ),
        Mistake("A rate in bits", 64, usage("migrate", "web1", "host-b", "--bandwidth", "50mbit")),
        Mistake("Less memory than a copy needs", 64, usage("migrate", "web1", "host-b", "--mirror-memory", "1M")),
        Mistake("A level that the log does not have", 64, usage("migrate", "web1", "host-b", "--log-level", "verbose")),
        Mistake("A report in a directory that is not there", 1) { lab in
            try await migrate(lab, more: ["--report", "/nowhere/report.json"])
        },
        // Commands
        Mistake("A command with a letter missing", 64, usage("migrte", "web1", "host-b")),
        Mistake("A command of a command that it does not have", 64, usage("guest", "lst")),
        Mistake("An NBD address without slashes", 1, usage("nbd", "info", "nbd:/host-b/web1")),
        // The destination
        Mistake("An image directory that is not there", 1) { lab in
            try await destination(lab, ["--image-dir", lab.directory.file("missing")])
        },
        Mistake("An image directory that is not mounted", 1) { lab in
            let (images, table) = (lab.directory.directory("images"), lab.directory.file("fstab"))
            try DurableFile.write(Array("/dev/sdz1 \(images) ext4 defaults 0 2\n".utf8), to: table)
            try await lab.mount("mount --bind \(table) /etc/fstab")
            return try await destination(lab, ["--image-dir", images])
        },
        Mistake("A port that another program has", 15) { lab in
            let port = try await lab.startDestination("c")
            return try await lab.crossdock(
                [
                    "destination", "--state-dir", lab.state("b"), "--listen", "127.0.0.1:\(port)", "--guest-network",
                    "host",
                ]
                    + lab.credentials()
            )
        },
        Mistake("A limit without its unit", 10, policy("most-memory = 64\n")),
        Mistake("A limit that lets nobody in", 10, policy("most-guests = 0\n")),
        Mistake("A limit that is said twice", 10, policy("most-disk = 1T\n# later\nmost-disk = 2T\n")),
        Mistake("A port in a rule about addresses", 10, policy("allow-listen = 192.0.2.1:5900\n")),
        Mistake("A tap interface that is another user's", 13) { lab in
            try await lab.network("ip tuntap add tap7 mode tap user 1234")
            try await lab.startIdleGuest(
                disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)],
                more: [
                    "-device", "virtio-net-pci,netdev=n0,rombar=0", "-netdev",
                    "tap,id=n0,ifname=tap7,script=no,downscript=no",
                ]
            )
            try await lab.startDestination()
            return try await lab.migrate(more: ["--dry-run"])
        },
    ]

    // MARK: what is no mistake any more

    @Test func anExportTakesAFreePortWhereAnAgentHasTheUsualOne() async throws {
        let lab = try Lab()
        try await lab.network("true")
        try await Self.guest(lab)
        try await lab.startDestination(ports: (0, 10809))
        let export = try ChildProcess(
            lab.prefix + [Lab.crossdock, "export", "web1", "--state-dir", lab.state("a")] + lab.credentials()
        )
        try await export.wait(for: "an export") { export.output.contains("listening on") }
        #expect(export.errors.contains("port 10809 is taken"), "\(export.errors)")
        #expect(!export.output.contains(":10809"), "\(export.output)")
        export.signal(SIGTERM)
        #expect(try await export.finish().code == 0)
    }

    @Test func aPriorityMayBeBelowZero() async throws {
        let lab = try Lab()
        try await Self.guest(lab)
        let set = try await lab.crossdock(["guest", "set", "web1", "--priority", "-5", "--state-dir", lab.state("a")])
        #expect(set.code == 0, "\(set.all)")
        #expect(try lab.guests("a").load("web1")?.placement?.priority == -5)
    }

    @Test func timesAndSizesAreTakenInTheirUnitsAndTheHelpShowsThem() async throws {
        let lab = try Lab()
        try await Self.guest(lab)
        let units = [
            "--downtime-limit", "400ms", "--blackout-deadline", "10s", "--mirror-memory", "32M", "--bandwidth", "50M",
        ]
        // The port is a host's without an agent: what comes before is right.
        let result = try await lab.migrate(port: 1, more: units + ["--keep-source", "2d", "--patience", "90s"])
        #expect(result.code == MigrationError.Code.unreachable.rawValue, "\(result.all)")
        let help = try await lab.crossdock(["migrate", "--help"])
        // Its lines are broken.
        let text = help.output.split(whereSeparator: \.isWhitespace).joined(separator: " ")
        for words in ["(default: info)", "(default: 512M)", "(default: 7d)", "(default: 300)"] {
            #expect(text.contains(words), "\(words): \(text)")
        }
    }

    @Test func aGuestThatDoesNotStartStaysAsItWasKnown() async throws {
        let lab = try Lab()
        try await Self.guest(lab)
        let known = try lab.guests("a").load("web1")?.commandLine
        #expect(try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")]).code == 0)
        #expect(try await Self.start(lab, "web1", Self.machine + ["-drive", "file=/nowhere"]).code == 10)
        #expect(try lab.guests("a").load("web1")?.commandLine == known)
        #expect(try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")]).code == 0)
    }
}

extension Substring {
    fileprivate var trimmed: Substring {
        var text = self
        while text.first == " " { text.removeFirst() }
        while text.last == " " { text.removeLast() }
        return text
    }
}
