internal import Emulator
internal import IO
internal import Migration

/// The consoles that this host's agent holds for its guests: those that an operator has given to it. Confined to its loop; the state directory is
/// read by threads of the pool.
final class ConsoleDesk: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// What the pool works with. One look at a time: nobody else has it meanwhile.
    private final class Workshop: @unchecked Sendable {
        var roll: ConsoleRoll

        init(stateDirectory: String) { roll = ConsoleRoll(stateDirectory: stateDirectory) }
    }

    /// Between two looks.
    private static let period = Duration.seconds(1)
    /// Between two looks at whether readers may stay.
    private static let inspection = 5
    /// How long a console of a guest that is elsewhere is kept without a reader.
    private static let idleness = Duration.seconds(60)
    /// How long the serial socket of a guest that is about to come is waited for.
    private static let expectation = Duration.seconds(1)

    private let loop: EventLoop
    private let pool: BlockingPool
    private let log: Log
    private let openings: LimitedLog
    private let home: String
    private let workshop: Workshop
    private let stateDirectory: String
    private let lock = AsyncLock()
    private var consoles: [String: GuestConsole] = [:]
    /// Those of guests that other hosts have and that somebody here has asked for by the host's name.
    private var abroad: [String: GuestConsole] = [:]
    /// Where guests have gone whose consoles were given to the agent.
    private var left: [String: (host: String, departure: ConsoleDeparture?)] = [:]
    /// Opens consoles on other hosts; nil for an agent that passes none on.
    private let dial: OpenRemoteConsole?
    private let troubles: TroubleWatch
    /// How long a host is asked again that does not pass one on.
    private let patience: Duration
    /// What this agent calls itself before others.
    private let mark = GuestConsole.makeMark()
    private var readers: [ObjectIdentifier: ConsoleReader] = [:]
    private var timer: LoopTimer?
    private var looks = 0
    private var isOver = false

    init(
        _ host: WebHost,
        on loop: EventLoop,
        _ pool: BlockingPool,
        _ log: Log,
        openings: LimitedLog,
        _ troubles: TroubleWatch
    ) {
        (self.openings, self.troubles) = (openings, troubles)
        (self.loop, self.pool, self.log) = (loop, pool, log)
        (home, dial, patience) = (host.name, host.openConsole, host.consolePatience)
        stateDirectory = host.stateDirectory
        workshop = Workshop(stateDirectory: host.stateDirectory)
    }

    /// Begins to hold what is to be held.
    func start() {
        Task(executorPreference: loop) {
            await self.look()
            await self.explainTroubles()
            self.looks += 1
            if self.looks.isMultiple(of: Self.inspection) {
                for console in Array(self.consoles.values) + Array(self.abroad.values) { console.inspect() }
            }
            guard !self.isOver else { return }
            self.timer = self.loop.schedule(after: Self.period) { [weak self] in self?.start() }
        }
    }

    /// Looks at once at what is to be held.
    func look() async {
        await lock.acquire()
        defer { lock.release() }
        guard !isOver else { return }
        let workshop = workshop
        let entries = await pool.value { workshop.roll.look() }
        guard !isOver else { return }
        forgetAbroad()
        left = [:]
        for (guest, entry) in entries {
            switch entry {
            case .left(let host, let departure):
                left[guest] = (host, departure)
                guard let departure, let dial else { continue }
                consoles[guest]?.dropStandby()
                consoles[guest]?.follow(departure, dial)
            case .arriving(let place, let departure):
                let console = made(guest)
                if let departure, let dial { console.follow(departure, dial) }
                console.expect(place)
            case .held(let place): made(guest).settle(place)
            }
        }
        for (guest, console) in consoles {
            switch entries[guest] {
            case .held?, .arriving?: continue
            case .left(_, _?)? where dial != nil:
                if console.hasReaders || ContinuousClock.now - console.idleSince < Self.idleness { continue }
            default: break
            }
            consoles[guest] = nil
            console.end(left[guest].map { .moved(to: $0.host) } ?? .closed("the agent holds this console no more"))
            log(.info, "web: lets go of the console of guest '\(guest)'")
        }
    }

    /// Tells readers why their guests stand still.
    private func explainTroubles() async {
        for (guest, console) in consoles where console.hasReaders {
            console.explain(trouble: await troubles.trouble(of: guest))
        }
    }

    private func forgetAbroad() { for (key, console) in abroad where !console.hasReaders { forget(key, console) } }

    private func made(_ guest: String) -> GuestConsole {
        if let console = consoles[guest] { return console }
        let console = GuestConsole(guest, mark: mark, home: home, patience: patience, on: loop, log, openings: openings)
        consoles[guest] = console
        return console
    }

    /// Begins to hold the console of a guest that is about to come here, before it writes.
    func expect(_ guest: String) async {
        await look()
        let end = ContinuousClock.now + Self.expectation
        while let console = consoles[guest], !console.isExpected, ContinuousClock.now < end {
            await loop.sleep(for: .milliseconds(5))
        }
    }

    /// The console of a guest.
    ///
    /// - Throws: `HTTPFailure` that says why there is none.
    func console(of guest: String) async throws(HTTPFailure) -> GuestConsole {
        await look()
        if let console = consoles[guest], console.isShown {
            console.explain(trouble: await troubles.trouble(of: guest))
            return console
        }
        if let (host, departure) = left[guest] {
            guard let departure, let dial else {
                throw HTTPFailure(status: 404, reason: "Guest '\(guest)' has moved to \(host)")
            }
            let console = made(guest)
            console.follow(departure, dial)
            return console
        }
        let store = GuestStore(stateDirectory: stateDirectory)
        let isKnown = await pool.value { DurableFile.list(store.directory).contains(guest) }
        throw HTTPFailure(
            status: 404,
            reason: isKnown
                ? "The agent holds no console of guest '\(guest)'; 'crossdock guest set \(guest) --console serial0' gives it the first one"
                : "This host has no guest '\(guest.shown(most: 60))'; 'crossdock guest list' names those that it has, and 'crossdock console "
                    + "GUEST --host HOST' reads one of another host"
        )
    }

    /// The console of a guest that another host has, whose operator has to have named this one's identity.
    ///
    /// - Throws: `HTTPFailure` that says why there is none.
    func console(of guest: String, at address: String) throws(HTTPFailure) -> GuestConsole {
        guard let dial, (try? GuestStore.validate(guest)) != nil,
            case .inet(let host, let port)? = try? SocketAddress(parsing: address, defaultPort: MessageConnection.port),
            !host.isEmpty
        else { throw HTTPFailure(status: 400, reason: "'\(address.shown(most: 100))' is no HOST or HOST:PORT") }
        forgetAbroad()
        let key = "\(guest) \(host) \(port)"
        if let console = abroad[key] { return console }
        guard abroad.count < WebLimits.consolesAbroad else {
            throw HTTPFailure(
                status: 503,
                reason: "\(WebLimits.consolesAbroad) consoles of other hosts are read; that is the limit"
            )
        }
        let console = GuestConsole(guest, mark: mark, home: home, patience: patience, on: loop, log, openings: openings)
        abroad[key] = console
        console.follow(ConsoleDeparture(guest: guest, host: host, port: port), dial)
        return console
    }

    private func forget(_ key: String, _ console: GuestConsole) {
        guard ContinuousClock.now - console.idleSince >= Self.idleness else { return }
        abroad[key] = nil
        console.end(.closed("nobody reads"))
    }

    /// The console that another host's agent wants; nil when there is none for it.
    func console(for opening: ConsoleOpening) async -> GuestConsole? {
        guard !opening.path.contains(mark), let console = try? await console(of: opening.guest) else { return nil }
        return console.isRemote && opening.hops >= ConsoleOpening.mostHops ? nil : console
    }

    /// How to have a display of a guest that has gone: where it is, and what to ask there. Nil when that is not known, or too far.
    func passage(of opening: ConsoleOpening) async -> (departure: ConsoleDeparture, opening: ConsoleOpening)? {
        guard !opening.path.contains(mark), opening.hops < ConsoleOpening.mostHops,
            opening.path.count < ConsoleOpening.mostMarks
        else { return nil }
        let (guest, directory) = (opening.guest, stateDirectory)
        let departure = await pool.value { () -> ConsoleDeparture? in
            // One that is here again has nothing elsewhere.
            guard let record = (try? GuestStore(stateDirectory: directory).load(guest)) ?? nil,
                record.released != nil || DurableFile.exists(GuestStore(stateDirectory: directory).arrivals(of: guest))
            else { return nil }
            return (try? ConsoleDeparture.read(guest, stateDirectory: directory)) ?? nil
        }
        guard let departure else { return nil }
        var onward = opening
        onward.path.append(mark)
        onward.hops += 1
        return (departure, onward)
    }

    /// How the consoles stand that are held.
    func standings() async -> [ConsoleStanding] {
        await look()
        return consoles.values.filter(\.isShown).map(\.standing).sorted { $0.guest < $1.guest }
    }

    /// See `GuestConsole.takeTail`; nil when the console is not held.
    func takeTail(of guest: String, for heir: String) -> ConsoleTail? { consoles[guest]?.takeTail(for: heir) }

    /// See `GuestConsole.beStill`.
    func beStill(_ still: Bool, _ guest: String) { consoles[guest]?.beStill(still) }

    /// A guest has come from a host whose agent held its console.
    func follow(_ tail: ConsoleTail, of guest: String) async {
        await look()
        consoles[guest]?.follow(tail)
    }

    /// How many read.
    var count: Int { readers.count }
    /// How many of them somebody has.
    func count(of visitor: String) -> Int { readers.values.count { $0.visitor == visitor } }

    /// Serves a reader until it goes.
    func serve(_ reader: ConsoleReader) async {
        readers[ObjectIdentifier(reader)] = reader
        await reader.serve()
        readers[ObjectIdentifier(reader)] = nil
    }

    /// Lets go of all consoles.
    func stop() {
        isOver = true
        timer?.cancel()
        for console in Array(consoles.values) + Array(abroad.values) { console.end(.closed("the agent ends")) }
        (consoles, abroad) = ([:], [:])
    }
}
