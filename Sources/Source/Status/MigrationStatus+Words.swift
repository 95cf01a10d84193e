internal import Emulator
internal import IO
internal import Migration

extension MigrationStatus {
    mutating func describe(_ standing: SourceStanding, _ files: MigrationFiles, _ guests: GuestStore) {
        let isRecovering = files.running(.recovery) != nil
        let isAtWork = isRecovering || files.running(.agent) != nil
        isUnderWay = isAtWork && !standing.isOver
        let recover = "crossdock recover \(migration)"
        switch standing {
        case .rolledBack(let reason): (state, detail) = ("rolled back", reason)
        case .confirmed: (state, detail) = ("migrated", "belongs to \(peer)")
        case .taken(let by):
            state = "taken"
            if report?.code == MigrationError.Code.undecided.rawValue {
                trouble = .doubled
                detail =
                    "belongs to this host by the word of \(by), and \(peer) has it as well: both may run it. End the one that "
                    + "shall not go on"
            } else {
                if !isAtWork { (trouble, command) = (.undecided, recover) }
                detail =
                    "belongs to this host by the word of \(by); \(peer) does not know it yet, '\(recover)' tells it"
            }
        case .overruled(let by):
            (state, detail) = ("overruled", overruled(by, guests))
        case .released:
            (state, trouble) = ("undecided", .undecided)
            if !isAtWork { command = recover }
            let asking = isAtWork ? "it is being asked" : "'\(recover)' asks it"
            detail =
                "released to \(peer), which has not confirmed that it has it; paused here, and must not be started; "
                + "\(asking)\(lastWarning(files))"
        case .open, .reclaimed:
            if isRecovering {
                (state, detail) = ("recovering", "the source agent ended; the guest belongs to this host")
            } else if case .reclaimed = standing {
                (state, trouble, command) = ("interrupted", isAtWork ? nil : .interrupted, isAtWork ? nil : recover)
                detail =
                    "\(peer) will never run it; it belongs to this host, see 'crossdock recover'\(lastWarning(files))"
            } else if isAtWork {
                (state, detail) = ("migrating", "to \(peer)\(course(files))")
            } else {
                (state, trouble, command) = ("interrupted", .interrupted, recover)
                detail =
                    "the source agent ended; the guest belongs to this host, see 'crossdock recover'\(lastWarning(files))"
            }
        }
        if !standing.isOver { detail += frozen(guests) }
    }

    mutating func describe(_ standing: DestinationStanding, _ guests: GuestStore) {
        switch standing {
        case .rolledBack(let reason): (state, detail) = ("rolled back", reason)
        case .taken(let by, _): (state, detail) = ("taken", "belongs to this host by the word of \(by)")
        case .overruled(let by): (state, detail) = ("overruled", overruled(by, guests))
        case .owner: (state, detail) = ("owned", "came from \(peer)")
        case .prepared:
            (state, detail) = ("prepared", "waiting for the word of \(peer); it must not be resumed by hand")
        case .accepted: (state, detail) = ("receiving", "from \(peer)")
        }
    }

    private func frozen(_ guests: GuestStore) -> String {
        guard let process = (try? guests.load(guest))??.process, process.isFrozen else { return "" }
        return "; its QEMU, process \(process.pid), is frozen"
    }

    /// A guest that belongs to the other host by an operator's word, and may run here all the same.
    private mutating func overruled(_ by: String, _ guests: GuestStore) -> String {
        let words = "belongs to \(peer) by the word of \(by); it must not run here"
        guard let process = (try? guests.load(guest))??.process, process.isRunning, !process.isFrozen else {
            return words
        }
        (trouble, command) = (.doubled, "crossdock guest stop \(guest)")
        return
            "\(words), and its QEMU is here, as process \(process.pid): both hosts may run it. End the one that shall not go on, here with "
            + "'crossdock guest stop \(guest)'"
    }

    /// Where a migration is: its phase, and how far that is.
    private mutating func course(_ files: MigrationFiles) -> String {
        guard let phase = last(\.phase, files) else { return "" }
        self.phase = phase
        var text = ", phase \(phase)"
        let now = ((try? DurableFile.read(files.progress)) ?? nil).flatMap { MigrationEvent(parsing: $0) }
        guard let now, now.phase == phase, let percent = now.percent else { return text }
        progress = now
        text += ", \(Int(min(max(percent, 0), 100))) %"
        if let remaining = now.remaining, remaining < 360_000 { text += ", \(SpanText.of(remaining)) left" }
        return text
    }

    /// What the agent has said last, for a migration that does not go on by itself.
    private func lastWarning(_ files: MigrationFiles) -> String {
        last(\.message, files).map { ". It said last: \($0)" } ?? ""
    }

    private func last(_ member: @escaping (MigrationEvent) -> String?, _ files: MigrationFiles) -> String? {
        guard let bytes = try? DurableFile.read(files.events) else { return nil }
        return bytes.split(separator: UInt8(ascii: "\n")).reversed().lazy
            .compactMap { MigrationEvent(parsing: Array($0)).flatMap(member) }.first
    }
}
