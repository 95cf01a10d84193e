internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// The QEMU of one incoming guest: started to wait, replaced when its stream broke, looked at, and let go.
final class IncomingGuest: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    /// What was found when the guest should have been there.
    enum Look {
        /// QEMU has all of it, and is in this state.
        case loaded(RunState)
        /// It must not run here.
        case flawed(String)
    }

    let name: String
    /// What is known of it; nil before a QEMU was started.
    private(set) var record: GuestRecord?
    /// How it stood when the migration stopped it, if that is how it shall stand here; nil for a guest that shall run.
    var standsAs: RunState?
    /// Whether it is off, and its QEMU ends when it belongs to this host.
    var isOff = false
    /// Is told, in QEMU's words, when QEMU ends, and whether that is what a broken stream makes of it.
    var onEnd: ((String, Bool) -> Void)?
    /// Why QEMU ended last, in its words, when that is nothing that a broken stream makes of it.
    private var lastRefusal: String?
    private let store: GuestStore
    private let loop: EventLoop
    private let log: (Log.Level, String) -> Void
    private let hasUUID: Bool
    private var monitor: QMPClient?
    /// The other monitors, which serve one client each: as long as these are connected nobody else is heard.
    private var held: [SocketChannel] = []
    /// The values of the guest's secrets; never on a disk.
    private var secrets: [String: SecretBytes] = [:]
    /// Whether QEMU was told to take a stream: it takes one only once.
    private var hasListened = false
    /// Whether QEMU has said that the guest ran, before it belonged to this host.
    private var ranTooEarly = false
    /// How often QEMU ended here for a reason that is not known to be a broken stream.
    private var unexplainedEnds = 0
    private(set) var resumedAt: ContinuousClock.Instant?

    init(
        _ name: String,
        hasUUID: Bool,
        _ store: GuestStore,
        on loop: EventLoop,
        log: @escaping (Log.Level, String) -> Void
    ) {
        self.name = name
        self.hasUUID = hasUUID
        self.store = store
        self.loop = loop
        self.log = log
    }

    /// Where QEMU takes the stream.
    private var incomingSocket: String { "\(store.arrivals(of: name))/incoming.sock" }
    /// Where a stream goes to; nil when none is due.
    var streamSocket: String? { monitor != nil && hasListened ? incomingSocket : nil }
    var isRunning: Bool { record?.process?.isRunning == true }
    private var words: String { EmulatorProcess.tail(of: store.log(of: name)) }

    /// Where its displays and the like listen; nil when that is not known.
    private(set) var listeners: [GuestListener]?

    func keep(_ secrets: [String: SecretBytes]) { self.secrets = secrets }
    func forgetSecrets() { secrets = [:] }
    /// Notes the lineages of its disks by the paths of their images; `admit` makes that durable.
    func keep(lineages: [String: [String]]) {
        if !lineages.isEmpty { record?.lineages = lineages }
    }

    // MARK: Starting

    /// Starts a QEMU that waits.
    func start(_ record: GuestRecord) async throws {
        self.record = record
        let (store, name) = (store, name)
        try await BlockingPool.shared.run { try store.keepOutputs(of: name) }
        let monitor = try await startEmulator()
        // Unix sockets have other places here, and nobody else can have taken them.
        listeners = await monitor.listeners().filter(\.isOnNetwork)
    }

    private func startEmulator() async throws -> QMPClient {
        guard var record else { throw GuestError("The record of the guest is gone") }
        var needed: [String: SecretBytes] = [:]
        for id in record.secrets ?? [] {
            guard let secret = secrets[id] else { throw GuestError("The secret '\(id)' of the guest did not come") }
            needed[id] = secret
        }
        hasListened = false
        ranTooEarly = false
        let monitor = try await store.start(
            &record,
            extra: ["-S", "-incoming", "defer"],
            key: needed.isEmpty ? nil : try MasterKey(sealing: needed),
            isArriving: true,
            on: loop
        )
        self.record = record
        take(monitor)
        if let process = record.process, let reason = await GuestScope.place(name, process) { log(.warning, reason) }
        try await holdMonitors(record)
        var capabilities = ["events", "return-path", "late-block-activate"]
        if hasUUID { capabilities.append("validate-uuid") }
        try await monitor.setCapabilities(capabilities, to: true)
        return monitor
    }

    private func take(_ monitor: QMPClient) {
        self.monitor = monitor
        monitor.onDisconnect = { [weak self, weak monitor] in
            guard let self, self.monitor === monitor else { return }
            self.emulatorEnded()
        }
        monitor.onEvent = { [weak self] event in
            if event.name == "RESUME" { self?.ranTooEarly = true }
        }
    }

    /// Connects to all monitors, so that none of them hears another client.
    private func holdMonitors(_ record: GuestRecord) async throws {
        letMonitorsGo()
        for path in store.monitorsOnArrival(of: record) {
            let channel = try await SocketChannel.connect(to: .unix(path: path), on: loop)
            held.append(channel)
            // What QEMU says there is for nobody.
            Task(executorPreference: loop) { while try await !channel.read(exactly: 1).isEmpty {} }
        }
    }

    private func letMonitorsGo() {
        for channel in held { channel.close() }
        held = []
    }

    // MARK: The stream

    /// Has QEMU wait for the memory; one that ends meanwhile is replaced.
    func listen() async throws {
        var attempts = 0
        while true {
            do {
                let monitor = try await freshEmulator()
                unlink(incomingSocket)
                hasListened = true
                return try await monitor.migrateIncoming(socket: incomingSocket)
            } catch let error where monitor?.isConnected != true {
                attempts += 1
                guard attempts < 3 else { throw error }
                log(.warning, "QEMU ended before the memory came: \(error)")
            }
        }
    }

    /// A QEMU that can take the stream: the one that waits, or another one in the place of one that took a part of it.
    private func freshEmulator() async throws -> QMPClient {
        if let monitor, monitor.isConnected, !hasListened { return monitor }
        letMonitorsGo()
        closeMonitor()
        await record?.process?.terminate(grace: .seconds(1))
        lastRefusal = nil
        log(.info, "a new QEMU waits for the memory of guest '\(name)'")
        return try await startEmulator()
    }

    /// What QEMU has against the stream that it took last, also where it has said so and not ended yet; nil when it said nothing of the kind.
    var refusal: String? {
        if let lastRefusal { return lastRefusal }
        let words = words
        return hasListened && words.contains("load of migration failed") && !Self.isOfCut(words)
            ? Self.ended(words) : nil
    }

    /// Whether a QEMU ends with such words whose stream was cut: with EIO, or with the flags of a page that it read beyond the end; one that
    /// was killed says nothing.
    private static func isOfCut(_ words: String) -> Bool {
        words.isEmpty || words.contains("Input/output error") || words.contains("migration flags: 0x0")
    }

    private static func ended(_ words: String) -> String {
        "QEMU on the destination ended: \(words.isEmpty ? "it said nothing" : words)"
    }

    private func emulatorEnded() {
        let words = words
        let reason = Self.ended(words)
        log(.warning, reason)
        let isCut = Self.isOfCut(words)
        // A stream that was damaged looks like one of another machine, but only once.
        if !isCut {
            unexplainedEnds += 1
            lastRefusal = reason
        }
        onEnd?(reason, isCut || unexplainedEnds < 2)
    }

    // MARK: Taking up

    /// Goes on with a QEMU that an earlier agent has started.
    func takeUp(hasListened: Bool) throws {
        record = try store.load(name)
        // Whether it has taken a part of a stream is not known.
        self.hasListened = hasListened
    }

    /// Connects to a QEMU of an earlier agent, as far as it is there.
    func tryToConnect() async {
        guard isRunning else { return }
        _ = try? await connect()
    }

    private func connect() async throws -> QMPClient {
        if let monitor, monitor.isConnected { return monitor }
        // An earlier agent was connected, or the connection broke; QEMU has outlived it.
        guard let record else { throw GuestError("The record of the guest is gone") }
        let arriving = store.arrivalMonitor(of: name)
        let isArriving = DurableFile.exists(arriving)
        let monitor = try await QMPClient.connect(to: isArriving ? arriving : store.agentMonitor(of: record), on: loop)
        take(monitor)
        if isArriving { try await holdMonitors(record) }
        return monitor
    }

    // MARK: The guest

    /// Whether QEMU has the guest, in one of the states that it may be in.
    func look(for states: Set<RunState>) async throws -> Look {
        guard let process = record?.process, process.isRunning else {
            return .flawed("QEMU of the guest has ended on the destination")
        }
        do {
            return try await loaded(try await connect(), states)
        } catch let error where !process.isRunning {
            let words = words
            return .flawed("QEMU of the guest has ended on the destination: \(words.isEmpty ? "\(error)" : words)")
        }
    }

    private func loaded(_ monitor: QMPClient, _ states: Set<RunState>) async throws -> Look {
        for _ in 0..<3000 {
            let migration = try await monitor.migrationState().status
            let status = try await monitor.status()
            if status == RunState.running.rawValue || ranTooEarly {
                return .flawed("Somebody has started the guest on the destination before it was released")
            }
            if migration == "completed", status != RunState.inmigrate.rawValue {
                guard let state = RunState(rawValue: status), states.contains(state) else {
                    let expected = states.map(\.rawValue).sorted().joined(separator: " or ")
                    return .flawed("The guest arrived in the state '\(status)' instead of \(expected)")
                }
                return .loaded(state)
            }
            await loop.sleep(for: .milliseconds(5))
        }
        throw GuestError("QEMU did not finish loading the guest within 15 s")
    }

    /// Opens the monitors to others, and resumes the guest if it shall run. It belongs to this host whatever happens here, so what
    /// fails is repeated, not rolled back.
    func admit() async throws {
        guard var record else { throw GuestError("The record of the guest is gone") }
        let monitor = try await connect()
        monitor.onEvent = nil
        letMonitorsGo()
        do { try store.openMonitors(of: record) } catch { log(.error, "\(error)") }
        if let standsAs {
            log(.info, "guest '\(name)' stands still as it did where it came from: \(standsAs.sentence)")
            if !isOff { await activateImages(monitor) }
        } else {
            try await resume(monitor)
        }
        record.released = nil
        if isOff {
            closeMonitor()
            log(
                .info,
                "guest '\(name)' is off, as it was where it came from; 'crossdock guest start \(name)' starts it"
            )
            try await store.switchOff(&record)
        } else {
            try store.save(record)
        }
        self.record = record
    }

    /// A guest that stands still has its images all the same. One that does not get them keeps standing, and gets them when it is resumed.
    private func activateImages(_ monitor: QMPClient) async {
        var attempt = 1
        while true {
            do { return try await monitor.activateImages() } catch {
                guard monitor.isConnected, attempt < 20 else {
                    let reason = "guest '\(name)' stands still, and QEMU does not take control of its images: \(error)"
                    return log(.warning, reason)
                }
                await loop.sleep(for: .milliseconds(20 * attempt))
                attempt += 1
            }
        }
    }

    private func resume(_ monitor: QMPClient) async throws {
        var attempt = 0
        while true {
            do {
                if try await monitor.status() != RunState.running.rawValue { try await monitor.resume() }
                if resumedAt == nil { resumedAt = .now }
                break
            } catch let error as QMPError where error.code == .refused {
                attempt += 1
                log(.error, "the guest belongs to this host, but QEMU does not resume it: \(error)")
                if attempt >= 20 { throw error }
                await loop.sleep(for: .milliseconds(100 * attempt))
            }
        }
        _ = try? await monitor.execute("announce-self", ["initial": 50, "max": 550, "rounds": 5, "step": 50])
        // What stops it from here on is its own affair, and not ours to undo.
        guard let state = RunState(rawValue: (try? await monitor.status()) ?? ""), state != .running,
            state != .suspended
        else { return }
        log(.warning, "guest '\(name)' belongs to this host and was resumed, and does not run: \(state.sentence)")
    }

    // MARK: The end

    private func closeMonitor() {
        let monitor = monitor
        self.monitor = nil
        monitor?.onDisconnect = nil
        monitor?.onEvent = nil
        monitor?.close()
    }

    /// Lets go of a guest that belongs to this host.
    func release() {
        letMonitorsGo()
        closeMonitor()
        unlink(incomingSocket)
        // One that has ended leaves sockets that nobody opened.
        if record?.process?.isRunning != true { store.removeArrivals(of: name) }
    }

    /// Ends a QEMU that is being started, so that nobody waits for it.
    func interrupt() { ((try? store.load(name)) ?? nil)?.process?.signal(SIGKILL) }

    /// Ends QEMU and forgets the guest.
    func remove(restoring previous: GuestRecord?) async {
        letMonitorsGo()
        closeMonitor()
        // QEMU's process is recorded before its monitor answers.
        let known = (try? store.load(name)) ?? nil
        await record?.process?.terminate()
        await known?.process?.terminate()
        // Its source asks after that, and the words go with the rest.
        lastRefusal = refusal
        store.remove(arriving: name, restoring: previous)
    }
}
