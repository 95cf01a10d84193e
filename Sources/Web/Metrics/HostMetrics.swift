internal import FoundationEssentials
internal import IO
internal import Migration
internal import Source
internal import TLS

/// The figures of a host, as Prometheus reads them.
public enum HostMetrics {
    /// The figures as far as a state directory tells: for node_exporter's textfile collector. Blocks.
    ///
    /// - Parameter host: names the directories; it is not asked.
    public static func text(of host: WebHost) -> String {
        var reader = StateReader(host)
        let look = reader.look(takesEvents: false)
        var totals = MigrationTotals()
        totals.take(reader.ledger)
        var text = MetricsText()
        write(look, reader.ledger, totals, namesGuests: true, to: &text)
        let certificate = HostWatch.certificate(host)
        write(version: host.version, certificate, to: &text)
        return text.text
    }

    static func write(version: String, _ certificate: HostSection.Certificate?, to text: inout MetricsText) {
        text.add(.build, 1, ["version": version, "protocol": "1"])
        if let certificate {
            text.add(.certificate, Double(certificate.expires), ["name": certificate.name])
        }
    }

    /// What the state directory tells.
    ///
    /// - Parameter namesGuests: whether it tells how each guest under way gets on; otherwise only what they add up to.
    static func write(
        _ look: StateReader.Look,
        _ ledger: MigrationLedger,
        _ totals: MigrationTotals,
        namesGuests: Bool,
        to text: inout MetricsText
    ) {
        totals.write(to: &text)
        for move in look.sections.moves where namesGuests {
            let (guest, phase) = (move.guest, move.phase ?? "unknown")
            text.add(.phase, 1, ["guest": guest, "direction": move.direction, "peer": move.peer, "phase": phase])
            text.add(.progress, move.percent.map { $0 / 100 }, ["guest": guest])
            text.add(.rate, move.rate, ["guest": guest])
            text.add(.dirtyRate, move.dirtyRate, ["guest": guest])
            text.add(.remaining, move.remaining, ["guest": guest])
            text.add(.expectedPause, move.expectedPauseMS.map { $0 / 1000 }, ["guest": guest])
        }
        for (state, count) in counts(look.sections.guests.map(\.state)) {
            text.add(.guests, Double(count), ["state": state])
        }
        let movable = look.sections.guests.map { $0.movable.map { $0 ? "yes" : "no" } ?? "unknown" }
        for (answer, count) in counts(movable) { text.add(.movable, Double(count), ["movable": answer]) }
        func open(_ trouble: MigrationStatus.Trouble) -> Double {
            let known = look.sections.trouble.filter { $0.kind == trouble.rawValue && $0.migration != nil }
            return Double(known.count)
        }
        text.add(.undecided, open(.undecided))
        text.add(.interrupted, open(.interrupted))
        let now = Int(Date.now.timeIntervalSince1970)
        let ages = ledger.open.filter { !$0.isOver }.compactMap { $0.began.map { max(now - $0, 0) } }
        text.add(.oldestOpen, Double(ages.max() ?? 0))
        for (kind, count) in counts(look.sections.trouble.map(\.kind)) {
            text.add(.trouble, Double(count), ["kind": kind])
        }
        text.add(.cordoned, look.cordon == nil ? 0 : 1)
        if let evacuation = look.sections.evacuation {
            for (state, count) in counts(evacuation.guests.map(\.state)) {
                text.add(.evacuationGuests, Double(count), ["state": state])
            }
            if evacuation.state == "running" {
                text.add(.evacuationDeadline, evacuation.deadline.map { Double($0) })
            }
        }
        text.add(.evacuationRunning, look.sections.evacuation?.state == "running" ? 1 : 0)
    }

    private static func counts(_ words: [String]) -> [(String, Int)] {
        Dictionary(words.map { ($0, 1) }, uniquingKeysWith: +).sorted { $0.key < $1.key }.map { ($0.key, $0.value) }
    }

    /// What only a running agent knows.
    static func write(_ section: HostSection, _ live: LiveFigures, to text: inout MetricsText) {
        for emulator in section.emulators { text.add(.emulator, 1, ["version": emulator]) }
        if let memory = section.memory {
            text.add(.memory, Double(memory.total))
            text.add(.memoryReserved, Double(memory.reserved))
            text.add(.memoryFree, Double(memory.free))
        }
        if let disk = section.disk {
            text.add(.pool, Double(disk.amount.total), ["pool": disk.directory])
            text.add(.poolReserved, Double(disk.amount.reserved), ["pool": disk.directory])
            text.add(.poolFree, Double(disk.amount.free), ["pool": disk.directory])
        }
        for peer in section.peers {
            text.add(.peerUp, peer.up.map { $0 ? 1 : 0 }, ["peer": peer.name])
            text.add(.peerRoundTrip, peer.roundTripMS.map { $0 / 1000 }, ["peer": peer.name])
            text.add(.peerClock, peer.clockOffsetMS.map { $0 / 1000 }, ["peer": peer.name])
        }
        text.add(.viewers, Double(live.viewers))
        text.add(.sessions, Double(live.sessions))
        text.add(.consoleSessions, Double(live.serialConsoles), ["kind": "serial"])
        text.add(.consoleSessions, Double(live.screens), ["kind": "vnc"])
        text.add(.handshakes, Double(live.acceptedHandshakes), ["result": "accepted"])
        text.add(.handshakes, Double(live.failedHandshakes), ["result": "failed"])
        guard let traffic = live.traffic else { return }
        text.add(.exportConnections, Double(traffic.exportConnections))
        text.add(.transferred, Double(traffic.diskBytes), ["channel": "disk", "direction": "in"])
        text.add(.transferred, Double(traffic.memoryBytes), ["channel": "memory", "direction": "in"])
    }
}

extension WebServer {
    /// The figures of this host now.
    ///
    /// - Parameter namesGuests: whether who reads them may be told which guests are under way.
    func metricsText(namesGuests: Bool) async -> String {
        let version = configuration.host.version
        let live = LiveFigures(
            viewers: feed.count,
            sessions: sessions.count,
            serialConsoles: consoles.count,
            screens: displays.count,
            acceptedHandshakes: ServerHandshakes.accepted,
            failedHandshakes: ServerHandshakes.failed,
            traffic: await configuration.host.traffic()
        )
        let former = totals
        let (text, totals, section) = await feed.glance { look, ledger, section in
            var totals = former
            totals.take(ledger)
            var text = MetricsText()
            HostMetrics.write(look, ledger, totals, namesGuests: namesGuests, to: &text)
            HostMetrics.write(section, live, to: &text)
            return (text, totals, section)
        }
        self.totals = totals
        var whole = text
        HostMetrics.write(version: version, section.certificate, to: &whole)
        return whole.text
    }
}
