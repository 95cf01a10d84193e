internal import Emulator
internal import Glibc
internal import IO

/// What earlier work has left on a host, and what is mended of it.
extension HostExamination {
    private var migrations: MigrationStore { MigrationStore(stateDirectory: stateDirectory) }
    private var guests: GuestStore { GuestStore(stateDirectory: stateDirectory) }

    func leftovers() -> [Finding] {
        var findings: [Finding] = []
        func add(_ result: Finding.Result, _ here: String, _ message: String, _ remedy: String) {
            findings.append(Finding(.leftovers, result, here: here, message: message, remedy: remedy))
        }
        for id in migrations.ids() {
            do {
                guard let reading = try migrations.reading(of: id), let what = undecided(id, reading) else { continue }
                add(.fail, id, what, "crossdock recover \(id)")
            } catch { add(.fail, id, "\(error)", "crossdock status") }
        }
        for name in guests.names() {
            do { _ = try guests.load(name) } catch {
                add(.warn, name, "\(error)", "crossdock guest forget \(name)")
            }
        }
        for path in staleSockets() {
            add(.warn, path, "Nobody listens on the socket \(path) any more", "crossdock doctor --fix")
        }
        let known = Set(guests.names())
        for name in DurableFile.list(imageDirectory) where !known.contains(name) && !name.hasPrefix(".") {
            add(
                .warn,
                "\(imageDirectory)/\(name)",
                "\(imageDirectory)/\(name) belongs to no guest of this host, and is in the way of one of that name",
                "look into it, and remove it"
            )
        }
        return findings.isEmpty ? [Finding(.leftovers, .ok, here: "none")] : findings
    }

    /// What is not decided about a migration that nobody works on; nil for one that is over, or under way.
    private func undecided(_ id: String, _ reading: JournalReading) -> String? {
        let files = migrations.files(of: id)
        guard files.running(.agent) == nil, files.running(.recovery) == nil else { return nil }
        switch reading.standing {
        case .source(.released):
            return "Guest '\(reading.guest)' was released to \(reading.peer), which has not confirmed that it has it"
        case .source(.open), .source(.reclaimed):
            // A rehearsal and a migration that was never begun leave nothing.
            return "The migration of guest '\(reading.guest)' to \(reading.peer) was interrupted"
        case .source(.taken):
            return "\(reading.peer) does not know yet that guest '\(reading.guest)' was taken for this host"
        case .source, .destination: return nil
        }
    }

    /// Sockets of this state directory that nobody listens on.
    private func staleSockets() -> [String] {
        var paths = ["control.sock", "console.sock"].map { "\(stateDirectory)/\($0)" }
        for name in guests.names() {
            // A QEMU that runs serves one client: nobody is to be in its way.
            guard let record = (try? guests.load(name)) ?? nil, record.process?.isRunning != true else { continue }
            paths += [guests.agentMonitor(of: name), guests.statusMonitor(of: name)]
        }
        return paths.filter { path in
            var status = stat()
            guard lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else { return false }
            return StaleSocket.isDead(path)
        }
    }

    // MARK: mending

    /// Mends what is Crossdock's own: keys that others can read, and sockets that nobody listens on.
    ///
    /// - Returns: what was done, a sentence each without a full stop.
    public func mend() -> [String] {
        var done: [String] = []
        for key in credentials.map(openKeys) ?? [] where chmod(key, 0o600) == 0 {
            done.append("Only its owner can read \(key) now")
        }
        for path in staleSockets() where unlink(path) == 0 { done.append("Removed the socket \(path)") }
        return done
    }
}
