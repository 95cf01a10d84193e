import ArgumentParser
import Emulator
import Glibc
import IO
import Migration
import Web

/// The console of a guest, in this terminal.
struct ConsoleCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "console",
        abstract: "Opens the serial console of a guest that the destination agent of this host holds, or its screen.",
        discussion: """
            The agent holds it once 'crossdock guest set GUEST --console serial0' has said so. Ctrl-] ends the command. Many may read; who \
            began last writes, and the one before is told. It stays when the guest moves to another host, whose agent passes its \
            console on. The terminal is as it was before, however this ends.

            With --vnc, a viewer of VNC on this host finds the guest's screen at the address that is printed, until the command is ended; \
            the guest needs a VNC server on a Unix socket or on loopback. With --browser, a URL is printed that opens the page's console once.
            """
    )
    @OptionGroup var common: CommonOptions
    @Argument(help: "The guest's name.")
    var guest: String
    @Flag(help: "The serial console, which is what there is without this, too.")
    var serial = false
    @Flag(help: "The screen, for a viewer of VNC on this host.")
    var vnc = false
    @Flag(help: "Print a URL that opens the console once in a browser anywhere; the agent has to run with --web.")
    var browser = false
    @Option(
        help: ArgumentHelp(
            "Where a viewer finds the screen: unix:PATH, or HOST:PORT of loopback, to which every user of this host can connect; "
                + "without it a Unix socket in a directory of its own.",
            valueName: "address"
        )
    )
    var listen: String?
    @Flag(help: "Read, and write nothing.")
    var viewOnly = false
    @Option(
        help: ArgumentHelp(
            "From which byte on what the guest has written before is shown, 0 for all that is kept (1 MiB); the last 64 KiB without it.",
            valueName: "offset"
        )
    )
    var from: UInt64?

    @Option(
        help: ArgumentHelp(
            "The host that has the guest, asked by this host's agent: its operator has to have named this host (--allow-console). A guest that "
                + "has gone from here is found without.",
            valueName: "host[:port]"
        )
    )
    var host: String?

    /// The socket at which each agent has the consoles of its guests.
    static func socket(stateDirectory: String) -> String { "\(stateDirectory)/console.sock" }

    func validate() throws {
        if let host {
            guard case .inet(let name, _)? = try? SocketAddress(parsing: host, defaultPort: MessageConnection.port),
                !name.isEmpty,
                host.utf8.allSatisfy({ $0 > 32 && $0 < 127 && !"&=?#%+/".utf8.contains($0) })
            else { throw ValidationError("'\(host)' of --host is no HOST or HOST:PORT") }
        }
        guard from.map({ $0 <= ConsoleRing.mostOffset }) ?? true else { throw ValidationError("--from is no offset") }
        guard [serial, vnc, browser].count(where: \.self) < 2 else {
            throw ValidationError("--serial, --vnc and --browser exclude each other")
        }
        guard !vnc || from == nil, !browser || from == nil else {
            throw ValidationError("--from is for serial consoles")
        }
        guard host == nil || !vnc && !browser else {
            throw ValidationError("--host is for serial consoles: give the command on the host that has the guest")
        }
        guard vnc || listen == nil else { throw ValidationError("--listen is for --vnc") }
        _ = try address()
    }

    private func address() throws -> SocketAddress? {
        guard let listen else { return nil }
        let address: SocketAddress
        do { address = try SocketAddress(parsing: listen, defaultPort: 5900) } catch {
            throw ValidationError("\(error)")
        }
        switch address {
        case .unix: return address
        case .inet(let host, let port) where ["", "localhost"].contains(host):
            return .inet(host: "127.0.0.1", port: port)
        case .inet(let host, _) where host == "::1" || host.hasPrefix("127."): return address
        default:
            throw ValidationError("--listen takes unix:PATH, or an address of loopback: RFB has no TLS of its own here")
        }
    }

    func run() async throws {
        try await failing {
            try GuestStore.validate(guest)
            if browser { return try await printURL() }
            let loop = EventLoop(name: "console")
            defer { loop.stop() }
            if vnc { return try await show(on: loop) }
            let session = ConsoleSession(
                guest: guest,
                socket: Self.socket(stateDirectory: common.stateDirectory),
                from: from,
                host: host,
                isViewOnly: viewOnly,
                on: loop
            )
            SignalWatcher.start([SIGINT, SIGTERM, SIGHUP, SIGQUIT]) { number in
                loop.execute { session.end(.signal(number)) }
            }
            let ending = try await loop.run { try await session.run() }
            printError("crossdock: \(ending.sentence(guest: guest))")
            if let code = ending.code { throw ExitCode(code) }
        }
    }

    private func printURL() async throws {
        let url = try await WebTicketCommand.ask(common.stateDirectory, guest: guest, viewOnly: viewOnly, seconds: 60)
        // Between the host and the secret.
        let parts = url.split(separator: "#", maxSplits: 1)
        output("\(parts.first ?? "")console/\(guest)#\(parts.last ?? "")\n")
    }

    private func show(on loop: EventLoop) async throws {
        let relay = DisplayRelay(
            guest: guest,
            socket: Self.socket(stateDirectory: common.stateDirectory),
            isViewOnly: viewOnly,
            on: loop
        )
        SignalWatcher.start([SIGINT, SIGTERM, SIGHUP, SIGQUIT]) { number in
            loop.execute { relay.end(number) }
        }
        let address = try address()
        let number = try await loop.run { try await relay.run(at: address) }
        throw ExitCode(128 + number)
    }
}
