internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import Source

/// Makes the sections out of the state directory, reading only what has changed. Blocks; used by one thread at a time.
struct StateReader {
    private let host: WebHost
    private let store: MigrationStore
    private let evacuations: EvacuationFiles
    private(set) var ledger: MigrationLedger
    private(set) var roll: GuestRoll
    private var tails = EventTails()
    private var plan = StampedFile<Evacuation>()
    private var progress = StampedFile<EvacuationProgress>()
    private var report = StampedFile<EvacuationReport>()
    private var departures: [String: StampedFile<ConsoleDeparture>] = [:]
    private var lastThorough: ContinuousClock.Instant?

    /// How often the processes of all guests are looked at.
    private static let thorough = Duration.seconds(3)
    /// How long an evacuation that has ended is shown, in seconds.
    private static let shown = 86400

    init(_ host: WebHost) {
        self.host = host
        store = MigrationStore(stateDirectory: host.stateDirectory)
        evacuations = EvacuationFiles(stateDirectory: host.stateDirectory)
        ledger = MigrationLedger(store)
        roll = GuestRoll(GuestStore(stateDirectory: host.stateDirectory))
    }

    /// Begins anew with the events: the next look takes none.
    mutating func forgetEvents() { tails = EventTails() }

    /// What a look brings.
    struct Look: Sendable {
        /// All but the host, which is asked and not read.
        var sections = Sections()
        /// What happened meanwhile.
        var events: [EventTails.Line] = []
        /// The guests that may be asked about themselves.
        var askable: [GuestRecord] = []
        /// The guests whose QEMUs are there, also while they are moved.
        var present: Set<String> = []
        /// Who has cordoned the host, when and why.
        var cordon: String?
    }

    /// Looks again.
    ///
    /// - Parameters:
    ///   - looks: what monitors have said of guests.
    ///   - findings: what the examination of the host has found.
    ///   - certificate: the host's.
    ///   - takesEvents: whether the events since the last look are taken.
    mutating func look(
        _ looks: [String: GuestLooks.Look] = [:],
        findings: [Finding] = [],
        certificate: HostSection.Certificate? = nil,
        takesEvents: Bool = true
    ) -> Look {
        let now = ContinuousClock.now
        let isThorough = lastThorough.map { now - $0 >= Self.thorough } ?? true
        if isThorough { lastThorough = now }
        ledger.look()
        roll.look(isThorough: isThorough)
        let underWay = ledger.open.filter(\.isUnderWay)
        var look = Look()
        if takesEvents {
            let sources = underWay.filter { $0.role == .source }.map(\.migration)
            look.events = tails.look(ledger.ids, underWay: Set(sources), store)
        }
        look.sections.moves = underWay.map(Self.move).sorted { $0.migration < $1.migration }
        look.sections.evacuation = evacuation()
        look.sections.guests = guests(looks, moving: Set(underWay.map(\.guest)))
        look.sections.history = history(but: Set(underWay.map(\.migration)))
        look.sections.trouble = trouble(findings, certificate) + Self.left(look.sections.evacuation)
        look.present = Set(roll.guests.values.filter(\.isRunning).map(\.record.name))
        look.askable = roll.guests.values.filter { guest in
            guest.isRunning && !guest.isFrozen && !underWay.contains { $0.guest == guest.record.name }
        }.map(\.record).sorted { $0.name < $1.name }
        do { look.cordon = try Cordon.read(stateDirectory: host.stateDirectory)?.words } catch {
            look.cordon = "\(error)"
        }
        return look
    }

    private static func move(_ status: MigrationStatus) -> MoveEntry {
        let progress = status.progress
        return MoveEntry(
            migration: status.migration,
            guest: status.guest,
            direction: status.role == .source ? "out" : "in",
            peer: status.peer,
            phase: status.phase ?? status.state,
            percent: progress?.percent,
            rate: progress?.rate,
            dirtyRate: progress?.dirtyRate,
            remaining: progress?.remaining,
            expectedPauseMS: progress?.expectedPauseMS,
            began: status.began,
            canCancel: status.role == .source && status.state == "migrating"
        )
    }

    // MARK: guests

    private func guests(_ looks: [String: GuestLooks.Look], moving: Set<String>) -> [GuestEntry] {
        let bars = ledger.startBars()
        var entries: [GuestEntry] = []
        for (name, guest) in roll.guests {
            let (record, bar) = (guest.record, bars[name])
            // It belongs to another host, and what is left of it here is no guest.
            if record.released != nil || bar?.isDecided == true { continue }
            let look = guest.isRunning ? looks[name] : nil
            var entry = GuestEntry(name: name, state: look?.status ?? (guest.isRunning ? "running" : "stopped"))
            entry.memory = look?.memory ?? guest.memory
            entry.processors = look?.processors ?? guest.processors
            entry.disk = look?.disk ?? guest.disk
            entry.origin = record.origin?.identity.shown(most: 200)
            entry.labels = record.placement?.labels ?? [:]
            entry.evacuation = (record.placement?.evacuation ?? .live).rawValue
            entry.console = ConsoleKinds(serial: record.placement?.console != nil, vnc: guest.hasDisplay)
            if let look { (entry.movable, entry.reason) = (look.blocker == nil, look.blocker) }
            if record.isOff == true { entry.state = "stopped" }
            if guest.isFrozen { (entry.state, entry.movable) = ("frozen", false) }
            if let bar {
                entry.state = if case .arriving = bar { "arriving" } else { "released" }
                (entry.movable, entry.reason) = (false, bar.sentence(guest: name))
            } else if moving.contains(name) {
                (entry.movable, entry.reason) = (false, "it is being moved")
            }
            entries.append(entry)
        }
        for (name, reason) in roll.damaged {
            entries.append(GuestEntry(name: name, state: "damaged", movable: false, reason: reason))
        }
        return entries.sorted { $0.name < $1.name }
    }

    // MARK: history

    private mutating func history(but underWay: Set<String>) -> [HistoryEntry] {
        let passed = passedConsoles()
        var entries: [HistoryEntry] = []
        for id in ledger.ids where !underWay.contains(id) {
            guard let summary = ledger.summary(of: id) else { continue }
            var entry = Self.entry(summary)
            if summary.role == .source { entry.console = passed[id] }
            entries.append(entry)
            if entries.count == WebLimits.history { break }
        }
        return entries
    }

    /// Which consoles this host passes on from where guests have gone with a grant, by the migrations that have led them there.
    private mutating func passedConsoles() -> [String: ConsoleKinds] {
        // An agent that reaches no other passes none on.
        guard host.openConsole != nil else { return [:] }
        var passed: [String: ConsoleKinds] = [:]
        var former = departures
        departures = [:]
        for (name, guest) in roll.guests {
            guard let released = guest.record.released else { continue }
            let kinds = ConsoleKinds(serial: guest.record.placement?.console != nil, vnc: guest.hasDisplay)
            guard kinds.serial || kinds.vnc else { continue }
            var file = former.removeValue(forKey: name) ?? StampedFile()
            let departure = file.read(
                ConsoleDeparture.path(of: name, stateDirectory: host.stateDirectory),
                { _ in (try? ConsoleDeparture.read(name, stateDirectory: host.stateDirectory)) ?? nil },
                bytes: { _ in [] }
            )
            departures[name] = file
            if departure?.grant != nil { passed[released.migration] = kinds }
        }
        return passed
    }

    private static func entry(_ summary: MigrationLedger.Summary) -> HistoryEntry {
        HistoryEntry(
            migration: summary.migration,
            guest: summary.guest,
            role: summary.role.rawValue,
            peer: summary.peer,
            outcome: summary.state == "owned" ? "migrated" : summary.state,
            began: summary.began,
            tookMS: summary.tookMS,
            pauseMS: summary.pauseMS,
            reason: summary.reason ?? (["migrated", "owned"].contains(summary.state) ? nil : summary.detail),
            hasReport: summary.hasReport
        )
    }

    // MARK: trouble

    private func trouble(_ findings: [Finding], _ certificate: HostSection.Certificate?) -> [TroubleEntry] {
        var entries: [TroubleEntry] = []
        for status in ledger.troubles() {
            guard let trouble = status.trouble else { continue }
            let kind = trouble == .doubled ? MigrationStatus.Trouble.undecided : trouble
            entries.append(
                TroubleEntry(
                    guest: status.guest == "?" ? nil : status.guest,
                    migration: status.migration,
                    kind: kind.rawValue,
                    sentence: "Guest '\(status.guest)', migration \(status.migration): \(status.detail)",
                    command: status.command
                )
            )
        }
        for (name, reason) in roll.damaged.sorted(by: { $0.key < $1.key }) {
            entries.append(
                TroubleEntry(
                    guest: name,
                    kind: "unreadable",
                    sentence: reason,
                    command: "crossdock guest forget \(name)"
                )
            )
        }
        for id in EvacuationProcess.interrupted(stateDirectory: host.stateDirectory) {
            entries.append(
                TroubleEntry(
                    evacuation: id,
                    kind: "interrupted",
                    sentence: "Evacuation \(id) was interrupted: nobody begins another guest",
                    command: "crossdock evacuate --resume \(id)"
                )
            )
        }
        // Whatever is left of migrations is among them already.
        for finding in findings where finding.result == .fail && finding.check != .leftovers {
            entries.append(
                TroubleEntry(
                    guest: finding.guest,
                    kind: finding.check.rawValue,
                    sentence: finding.message ?? "The check '\(finding.check.rawValue)' fails",
                    command: finding.remedy
                )
            )
        }
        if let certificate, (0..<14).contains(certificate.days) {
            entries.append(
                TroubleEntry(
                    kind: "certificate",
                    sentence: "The certificate of \(certificate.name) ends in \(certificate.days) days",
                    command: "crossdock pair --renew"
                )
            )
        }
        return entries
    }

    /// What an evacuation has left.
    private static func left(_ evacuation: EvacuationSection?) -> [TroubleEntry] {
        guard let evacuation, ["ended", "cancelled"].contains(evacuation.state), evacuation.counts.left > 0 else {
            return []
        }
        return [
            TroubleEntry(
                evacuation: evacuation.id,
                kind: "left",
                sentence: "Evacuation \(evacuation.id): \(evacuation.message ?? "guests are left")",
                command: "crossdock evacuate --to \(evacuation.targets.joined(separator: ","))"
            )
        ]
    }

    // MARK: evacuation

    private mutating func evacuation() -> EvacuationSection? {
        func bytes(_ path: String) -> [UInt8]? { (try? DurableFile.read(path)) ?? nil }
        guard let id = evacuations.latest else { return nil }
        let files = evacuations
        guard let plan = plan.read(files.plan(of: id), { _ in try? files.load(id) }, bytes: bytes) else { return nil }
        let report = report.read(
            files.report(of: id),
            { JSONText.decode(EvacuationReport.self, from: $0) },
            bytes: bytes
        )
        let progress = progress.read(
            files.progress(of: id),
            { JSONText.decode(EvacuationProgress.self, from: $0) },
            bytes: bytes
        )
        if let report, time(nil) - report.ended > Self.shown { return nil }
        var section = EvacuationSection(
            id: id,
            state: "interrupted",
            began: plan.began,
            deadline: plan.order.deadline,
            targets: plan.order.targets.map { "\($0)" },
            parallelCopies: plan.order.parallelCopies
        )
        if let report {
            section.state = report.code == 23 ? "cancelled" : "ended"
            section.message = report.sentence
        } else if files.isCoordinated {
            section.state = "running"
            section.remaining = progress?.remaining
            switch progress?.ending ?? plan.ending {
            case .cancelled: section.message = "It ends after the switchovers that are under way: it was cancelled"
            case .deadline: section.message = "It ends after the switchovers that are under way: its time is over"
            case .failure: section.message = "No other guest is begun: one could not be moved"
            case nil: break
            }
        }
        section.guests = (report?.guests ?? progress?.guests ?? []).map(Self.guest)
        if report != nil {
            for index in section.guests.indices
            where !["moved", "failed", "left"].contains(section.guests[index].state) {
                section.guests[index].state = "left"
                section.guests[index].reason = section.guests[index].reason ?? "it was not begun any more"
            }
        }
        for guest in section.guests {
            switch guest.state {
            case "moved": section.counts.moved += 1
            case "waiting": section.counts.waiting += 1
            case "left", "failed": section.counts.left += 1
            default: section.counts.moving += 1
            }
        }
        return section
    }

    private static func guest(_ guest: EvacuationProgress.Guest) -> EvacuationSection.Guest {
        let state =
            switch (guest.state, guest.phase) {
            case ("planned", _), ("waiting", _): "waiting"
            // Its agent has not said anything yet.
            case ("copying", nil), ("copying", "check"): "rehearsing"
            case ("copying", "queue"): "queued"
            case ("stays", _): "left"
            case ("undecided", _): "failed"
            case (let state, _): state
            }
        var row = EvacuationSection.Guest(guest: guest.name, target: guest.target, state: state)
        (row.percent, row.remaining, row.pauseMS) = (guest.percent, guest.remaining, guest.blackoutMS)
        row.reason = guest.message ?? (guest.state == "undecided" ? "whose it is, is not known yet" : nil)
        return row
    }
}
