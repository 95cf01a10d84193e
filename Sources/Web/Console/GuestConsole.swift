internal import Emulator
internal import FoundationEssentials
internal import IO
internal import Migration

/// The console of a guest: its serial socket, which serves one client, for many readers and one writer; or that of the host to which the guest has
/// gone. Confined to its loop.
///
/// The guest's QEMU never waits for a reader: what it writes goes into the ring at once, and each reader takes it from there as fast as it can.
final class GuestConsole: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Where what the guest writes comes from, and what is typed goes.
    private enum Source {
        case none
        case serial(SerialHold)
        case host(ConsoleRelay)
    }

    /// The serial socket of a guest that is about to be here.
    private struct Standby {
        let hold: SerialHold
        /// What it has written before it was known what came before that.
        var early = ConsoleRing(capacity: WebLimits.consoleRing)
        /// Since when the guest belongs to this host; nil before that.
        var isHere: ContinuousClock.Instant?
        /// What led to its former host.
        var former: ConsoleRelay?
    }

    /// How long a guest that belongs to this host is not shown because its former host has not said yet what it wrote there last.
    private static let tailPatience = Duration.seconds(3)
    /// How long nothing is typed because the guest is about to be paused.
    private static let stillness = Duration.seconds(60)

    let guest: String
    /// The name of this host.
    private let home: String
    private let loop: EventLoop
    private let log: Log
    private let openings: LimitedLog
    private let mark: String
    private let patience: Duration
    private(set) var id: String
    private(set) var ring = ConsoleRing(capacity: WebLimits.consoleRing)
    private var source = Source.none
    private var standby: Standby?
    private var place: ConsolePlace?
    /// Why nothing comes from the guest; nil when it does.
    private var reason: String? = "the agent has not connected yet"
    private var logged: String?
    /// Whether the guest has come back from another host, and nobody was told yet.
    private var hasReturned = false
    /// Why the guest stands still on this host.
    private var trouble: GuestTrouble?
    private var readers: [ObjectIdentifier: ConsoleReader] = [:]
    private var writer: ConsoleReader?
    /// Since when nobody has read.
    private(set) var idleSince = ContinuousClock.now
    /// The agent that the guest has gone to: what it types comes to the guest there.
    private var heir: String?
    /// Until when nothing is typed.
    private var stillUntil: ContinuousClock.Instant?
    /// What is typed and not taken by the guest yet.
    private let input = ByteFIFO(capacity: 4096)
    private let inputAdded = AsyncCondition()
    private let inputTaken = AsyncCondition()

    /// - Parameters:
    ///   - mark: what this agent calls itself before others.
    ///   - home: the name of this host.
    ///   - patience: how long a host to which the guest has gone is asked again.
    ///   - openings: for what readers can cause.
    init(
        _ guest: String,
        mark: String,
        home: String,
        patience: Duration,
        on loop: EventLoop,
        _ log: Log,
        openings: LimitedLog
    ) {
        self.openings = openings
        self.guest = guest
        self.home = home
        self.mark = mark
        self.patience = patience
        self.loop = loop
        self.log = log
        id = Self.makeMark()
    }

    /// A word that nobody else has.
    static func makeMark() -> String {
        var generator = SystemRandomNumberGenerator()
        return (0..<8).map { _ in UInt8.random(in: 0...255, using: &generator) }.hex
    }

    // MARK: the guest's side

    /// The guest belongs to this host.
    func settle(_ new: ConsolePlace) {
        if let standby {
            if !standby.hold.isOver, standby.hold.place.isSameSocket(as: new) { return arrive(standby, at: new) }
            dropStandby()
        }
        if case .host(let relay) = source {
            relay.end()
            (source, hasReturned) = (.none, true)
        }
        if new != place {
            let former = place
            place = new
            // A socket that has another name since is the same one.
            if former?.isSameSocket(as: new) != true { drop() }
        }
        if let obstacle = new.obstacle { return explain(obstacle) }
        guard case .none = source else { return }
        source = .serial(hold(new))
    }

    /// The guest is on its way here: its serial socket is connected to, and shown to nobody.
    func expect(_ new: ConsolePlace) {
        if case .serial = source { drop() }
        if let standby, !standby.hold.isOver, standby.hold.place.isSameSocket(as: new) { return }
        dropStandby()
        guard new.obstacle == nil else { return }
        standby = Standby(hold: hold(new))
    }

    /// Whether the guest's serial socket is connected to, whoever has the guest.
    var isExpected: Bool { standby?.hold.isConnected ?? true }

    /// The guest has gone: its console goes on from its new host.
    func follow(_ departure: ConsoleDeparture, _ dial: @escaping OpenRemoteConsole) {
        if case .host(let relay) = source {
            if relay.departure == departure { return }
            relay.end()
        }
        let isNews = hasPast
        (heir, hasReturned) = (nil, false)
        if case .serial(let hold) = source {
            hold.drain()
            hold.end()
        }
        place = nil
        stillUntil = nil
        inputAdded.signal()
        let relay = ConsoleRelay(departure, for: self, mark: mark, patience: patience, on: loop, openings, dial)
        source = .host(relay)
        explain(
            "the agent connects to \(departure.host)",
            isNews: true,
            notice: isNews ? "The guest has moved to \(departure.host); its console goes on from there" : nil
        )
        relay.wake()
    }

    /// It stays away.
    func dropStandby() {
        standby?.hold.end()
        standby = nil
    }

    private func hold(_ place: ConsolePlace) -> SerialHold {
        SerialHold(place, on: loop) { [weak self] hold, event in self?.take(event, of: hold) }
    }

    private func take(_ event: SerialHold.Event, of hold: SerialHold) {
        if standby?.hold === hold {
            switch event {
            case .connected: break
            case .bytes(let bytes): standby?.early.append(bytes)
            case .ended: standby = nil
            }
            return
        }
        guard case .serial(let present) = source, present === hold else { return }
        switch event {
        case .connected: show(hold)
        case .bytes(let bytes):
            ring.append(bytes)
            for reader in readers.values { reader.wake() }
        case .ended(let why):
            // A guest that is leaving takes what was typed meanwhile along.
            if isStill { source = .none } else { drop() }
            explain(why)
            if logged != why { log(.warning, "web: console of guest '\(guest)': \(why)") }
            logged = why
        }
    }

    private func show(_ hold: SerialHold) {
        logged = nil
        log(.info, "web: holds the console of guest '\(guest)', \(hold.place.name)")
        let notice = hasReturned ? "The guest has come to \(home); its console goes on from there" : nil
        hasReturned = false
        explain(nil, isNews: true, notice: notice)
        Task(executorPreference: loop) { await self.pump(into: hold) }
    }

    /// The guest belongs to this host: what it writes is shown behind what it wrote before.
    private func arrive(_ standby: Standby, at new: ConsolePlace) {
        place = new
        guard hasPast else { return promote() }
        guard let since = standby.isHere else {
            self.standby?.isHere = .now
            self.standby?.former = relay
            if relay != nil { hasReturned = true }
            relay?.end()
            source = .none
            return explain("the guest has come to this host")
        }
        if ContinuousClock.now - since >= Self.tailPatience { promote() }
    }

    private func promote() {
        guard let standby else { return }
        self.standby = nil
        if case .host(let relay) = source {
            relay.end()
            hasReturned = true
        }
        let early = standby.early.read(from: 0, most: WebLimits.consoleRing)
        _ = ring.skip(to: ring.next + early.offset)
        ring.append(early.bytes)
        source = .serial(standby.hold)
        for reader in readers.values { reader.wake() }
        if standby.hold.isConnected { show(standby.hold) }
    }

    private func drop() {
        if case .serial(let hold) = source {
            source = .none
            hold.end()
        }
        input.removeAll()
        inputTaken.signal()
        inputAdded.signal()
    }

    private func pump(into hold: SerialHold) async {
        while case .serial(let present) = source, present === hold {
            if input.isEmpty || isStill {
                await inputAdded.wait()
                continue
            }
            guard (try? await hold.write(takeInput(SerialHold.mostTyped))) != nil else { return }
        }
    }

    /// What is to be typed next; nothing when there is none.
    func takeInput(_ most: Int) -> [UInt8] {
        let bytes = Array(input.bytes.prefix(most))
        input.remove(bytes.count)
        if !bytes.isEmpty { inputTaken.signal() }
        return bytes
    }

    private var isStill: Bool { stillUntil.map { ContinuousClock.now < $0 } ?? false }

    /// The guest is about to be paused to leave, or stays: what is typed meanwhile waits, since what its QEMU here takes now may not come along.
    func beStill(_ still: Bool) {
        stillUntil = still ? .now + Self.stillness : nil
        inputAdded.signal()
        if still {
            loop.schedule(after: Self.stillness + .milliseconds(10)) { [weak self] in self?.inputAdded.signal() }
        }
    }

    /// What another host's agent kept of the console of a guest that has come here.
    func follow(_ tail: ConsoleTail) {
        guard let bytes = tail.bytes else { return }
        // What was typed there comes before what was typed here since.
        let rest = ((relay ?? standby?.former)?.sent(after: tail.taken) ?? []) + Array(input.bytes)
        input.removeAll()
        (tail.typed + rest).prefix(2 * WebLimits.consoleInput).withUnsafeBytes { input.append($0) }
        inputAdded.signal()
        if standby != nil {
            if tail.ring != id || !ring.extend(with: bytes, at: tail.offset) {
                guard begin(tail.ring), receive(bytes, at: tail.offset) else { return }
            }
            return promote()
        }
        guard tail.ring != id, ring.follow(bytes, at: tail.offset) else { return }
        id = tail.ring
        for reader in readers.values { reader.restart() }
    }

    /// What the agent of the guest's next host goes on with. The guest has gone: nothing is typed to its QEMU here any more.
    ///
    /// - Parameter heir: who that agent is.
    func takeTail(for heir: String) -> ConsoleTail {
        beStill(true)
        self.heir = heir
        if case .serial(let hold) = source { hold.drain() }
        let end = ring.tail(ConsoleTail.most)
        var tail = ConsoleTail(ring: id, offset: end.offset, bytes: end.bytes)
        tail.add(typed: takeInput(ConsoleTail.most))
        tail.taken = readers.values.first { $0.agent == heir }?.taken
        return tail
    }

    // MARK: another host's side

    /// Whether anything was ever read.
    var hasPast: Bool { ring.next > 0 }

    /// Begins another ring, whose offsets begin with the next bytes.
    ///
    /// - Returns: false for a name that is none.
    func begin(_ id: String) -> Bool {
        guard ConsoleTail.isRing(id) else { return false }
        self.id = id
        ring = ConsoleRing(capacity: WebLimits.consoleRing)
        for reader in readers.values { reader.restart() }
        return true
    }

    /// Takes what the guest has written on another host.
    ///
    /// - Returns: false when it is not behind what is here.
    func receive(_ bytes: [UInt8], at offset: UInt64) -> Bool {
        guard offset >= ring.next, ring.skip(to: offset) else { return false }
        ring.append(bytes)
        for reader in readers.values { reader.wake() }
        return true
    }

    /// Whether all readers have what is here.
    var isRead: Bool { readers.values.allSatisfy { $0.position >= ring.next } }

    /// Says why nothing comes from the guest, or that it does.
    func explain(_ new: String?, isNews: Bool = false, notice: String? = nil) {
        guard reason != new || isNews else { return }
        reason = new
        for reader in readers.values { reader.tell(notice) }
    }

    /// The writer is one on another host now.
    func loseWriter() {
        writer = nil
        input.removeAll()
        inputTaken.signal()
    }

    /// Another host does not pass the console on.
    func giveUp(_ ending: ConsoleReader.Ending) {
        input.removeAll()
        for reader in readers.values { reader.end(ending) }
    }

    // MARK: the readers' side

    private var relay: ConsoleRelay? {
        if case .host(let relay) = source { return relay }
        return nil
    }

    /// Whether the guest is here or somewhere where its console can be had.
    var isShown: Bool {
        if case .none = source { return place != nil || hasPast }
        return true
    }
    /// Whether it is another host's.
    var isRemote: Bool { relay != nil }
    /// Whether anybody reads.
    var hasReaders: Bool { !readers.isEmpty }
    /// Whether anybody who reads may write.
    var hasWriters: Bool { readers.values.contains { $0.mayWrite } }
    /// Whether anybody here writes.
    var isWritten: Bool { writer != nil }
    /// The agents behind its readers.
    var path: Set<String> { Set(readers.values.flatMap(\.path)) }
    /// How many of them there are in a row at most.
    var hops: Int { readers.values.map(\.hops).max() ?? 0 }

    /// Why nothing comes when nothing else was said.
    private var absence: String {
        switch source {
        case .none: "the agent has not connected yet"
        case .serial: "the agent connects to it"
        case .host(let relay) where readers.isEmpty:
            "the guest is on \(relay.host), and is read from there once somebody reads"
        case .host(let relay): "the agent connects to \(relay.host)"
        }
    }

    /// How it stands, for who is no reader.
    var standing: ConsoleStanding {
        var isConnected = false
        var (reason, writer) = (reason, writer?.name)
        switch source {
        case .none: break
        case .serial(let hold): isConnected = hold.isConnected
        case .host(let relay):
            // What was tried for readers who have gone says nothing of the guest.
            if readers.isEmpty { reason = nil }
            guard let there = relay.standing else { break }
            isConnected = relay.isLive && there.connected
            reason = there.reason ?? reason
            if writer == nil { writer = there.writer }
        }
        return ConsoleStanding(
            guest: guest,
            ring: id,
            oldest: ring.oldest,
            next: ring.next,
            connected: isConnected,
            reason: isConnected ? nil : reason ?? absence,
            host: relay?.host,
            readers: readers.count,
            writer: writer,
            trouble: relay.map { $0.standing?.trouble } ?? trouble
        )
    }

    /// Says why the guest stands still, or that it does no longer.
    func explain(trouble new: GuestTrouble?) {
        guard new != trouble else { return }
        trouble = new
        tell()
    }

    func standing(for reader: ConsoleReader) -> ConsoleStanding {
        var standing = standing
        standing.mayWrite = reader.mayWrite && relay?.refusesWriting != true
        // Also while the host that has the guest has not said so: it does so unless somebody asks there later.
        standing.writes = writer === reader
        return standing
    }

    /// The offset at which a reader begins that wants to begin at `offset` of the ring `id`.
    func start(_ offset: UInt64?, of id: String?) -> UInt64 {
        guard let offset, id == nil || id == self.id else {
            return ring.next - min(UInt64(WebLimits.consoleScrollback), ring.next - ring.oldest)
        }
        // Nothing has come yet from the host that knows this ring.
        if isRemote, !hasPast { return offset }
        return min(offset, ring.next)
    }

    /// Where the first reader wants to begin, when it has read on before this agent had anything: the other host may know that ring.
    var wantedStart: (offset: UInt64, ring: String)? {
        let offsets = readers.values.compactMap { $0.start.ring == id ? $0.start.offset : nil }
        return offsets.min().map { ($0, id) }
    }

    /// A reader comes that knows a ring, before this agent has read anything from the host that has the guest: it is taken for that host's.
    func recognize(_ start: (offset: UInt64?, ring: String?)) {
        guard isRemote, !hasPast, readers.isEmpty, start.offset != nil, let ring = start.ring, ConsoleTail.isRing(ring)
        else { return }
        id = ring
    }

    func add(_ reader: ConsoleReader) {
        readers[ObjectIdentifier(reader)] = reader
        tell()
        relay?.wake()
    }

    func remove(_ reader: ConsoleReader) {
        readers[ObjectIdentifier(reader)] = nil
        if readers.isEmpty { idleSince = .now }
        if writer === reader { leave(reader) }
        tell()
        relay?.wake()
    }

    private func tell() { for reader in readers.values { reader.tell() } }

    private func leave(_ reader: ConsoleReader) {
        writer = nil
        inputTaken.signal()
        relay?.wake()
    }

    /// A reader wants to be the one who writes, or not any more.
    func wish(_ wish: ConsoleWish, of reader: ConsoleReader) {
        guard wish.write else {
            if writer === reader { leave(reader) }
            return tell()
        }
        guard reader.mayWrite, relay?.refusesWriting != true else {
            return reader.tell("'\(reader.name)' may look here, and not write")
        }
        guard writer !== reader else { return }
        if let former = writer {
            // What it has typed and the guest has not taken is not to be mixed with what comes now.
            input.removeAll()
            former.tell("\(reader.name) has taken over the writing")
        } else if relay?.isLive == false {
            input.removeAll()
        }
        writer = reader
        inputTaken.signal()
        openings(.info, "web: \(reader.name) writes to the console of guest '\(guest)'")
        tell()
        relay?.wake()
    }

    /// Whether what is typed comes to the guest, now or as soon as it is elsewhere.
    private var takesInput: Bool {
        switch source {
        case .none: standby?.isHere != nil
        case .serial(let hold): hold.isConnected
        case .host(let relay): relay.takesInput
        }
    }

    /// Types for the writer; of others, and while nobody holds the socket, it is dropped. Waits while the guest takes nothing.
    func type(_ bytes: [UInt8], from reader: ConsoleReader) async {
        guard writer === reader else {
            guard reader.mayWrite, relay?.refusesWriting != true else {
                return reader.tell("'\(reader.name)' may look here, and not write")
            }
            let others = standing.writer.map { "'\($0)' writes" } ?? "Nobody writes"
            return reader.tell("\(others); who opens the console anew does, or who presses the page's button for it")
        }
        // It types there what was not taken here.
        if let heir, reader.agent == heir { return }
        while writer === reader, takesInput, input.count >= WebLimits.consoleInput, !reader.isOver {
            await inputTaken.wait()
        }
        guard writer === reader, takesInput, !reader.isOver else { return }
        if let heir, reader.agent == heir { return }
        bytes.withUnsafeBytes { input.append($0) }
        reader.taken += UInt64(bytes.count)
        inputAdded.signal()
        relay?.wake()
    }

    /// Ends those who may not read any more.
    func inspect() { for reader in readers.values where !reader.mayStay() { reader.end(nil) } }

    /// Lets go of the socket.
    ///
    /// - Parameter ending: what readers are told, once they have all that was written.
    func end(_ ending: ConsoleReader.Ending) {
        place = nil
        dropStandby()
        relay?.end()
        drop()
        source = .none
        for reader in readers.values { reader.end(ending) }
    }

    /// A reader has gone in the middle of what it wrote.
    func wakeWriters() { inputTaken.signal() }
}
