internal import CLinux
internal import Emulator
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    // MARK: the rehearsal

    func startShadow(_ offer: Message.Offer) async throws -> Message.Shadow {
        let (facts, offered) = (try await self.facts(offer), self.offered(offer))
        // How long a command line takes is up to the source.
        let (relocation, material) = try await BlockingPool.decoding.run {
            try offered.rehearsal(for: facts, deviceSize: IncomingImages.deviceSize)
        }
        let line = GuestCommandLine(arguments: relocation.arguments, directory: "/")
        let (demands, resources) = try await BlockingPool.decoding.run {
            (try GuestDemands(line, offer), try HostResources(line))
        }
        try await applyPolicy(to: demands, offer)
        let abandonment = abandonment
        let missing = await BlockingPool.names.value { resources.problems(until: abandonment) }
        // Before a user is taken for the blank copy: there are only so many.
        if !missing.isEmpty { throw Refusal(obstacles: missing) }
        let policy = try await agent.makePolicy()
        let obstacles = try line.paths().filter { $0.kind == .directory }.compactMap {
            policy.obstacle(toReading: $0.path)
        }
        if !obstacles.isEmpty { throw Refusal(obstacles: obstacles.map { Obstacle(.confinement, $0) }) }
        let shadow = try await ShadowEmulator.start(
            line,
            program: localProgram(offer.commandLine.program),
            material,
            isIncoming: true,
            policy: policy,
            isFiltered: facts.hasSystemCallFilter,
            isWanted: { !abandonment.hasHappened },
            on: agent.loop
        )
        self.shadow = shadow
        try count(deviceMemory: try await shadow.monitor.deviceMemory(), demands, offer)
        var warnings: [String] = []
        let free = xd_free_bytes(agent.configuration.imageDirectory)
        let most = offer.disks.filter { IncomingImages.deviceSize(imagePath($0, offer)) == nil }.reduce(0) {
            $0 + $1.size
        }
        if free < most {
            warnings.append(
                "The image directory on the destination has \(HostFigures.text(free)) free; if the guest fills its disks, they need "
                    + HostFigures.text(most)
            )
        }
        let allowed = agent.configuration.allowedDirectories
        for disk in offer.disks {
            guard let file = disk.backing.first(where: { !allowed.contain($0.path) }) else { continue }
            warnings.append(
                "All of \(disk.name) is copied, also what is in the image under it: on the destination \(file.path) is not there or in "
                    + AllowedDirectories.advice(file.path, isDirectory: false)
            )
        }
        let backing = offer.disks.flatMap(\.backing).filter { file in
            var status = stat()
            return allowed.contain(file.path) && stat(file.path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
                && UInt64(status.st_size) == file.size
        }
        if !offer.isRehearsal, conversation.features.contains(.seeds) { seedNonce = SeedExchange.makeNonce() }
        var sketch = Message.Shadow(
            fingerprint: try await MachineFingerprint(of: shadow.monitor),
            emulatorVersion: shadow.monitor.version,
            changes: relocation.changes + sketchNetworks(offer),
            warnings: warnings,
            backing: backing.map(\.path),
            clock: Int64(Date.now.timeIntervalSince1970 * 1000),
            free: free
        )
        sketch.seedNonce = seedNonce
        return sketch
    }

    /// Ends the blank copy.
    ///
    /// - Returns: why it did not take the stream; nil when it did.
    func endShadow() async -> String? {
        guard let shadow else { return nil }
        self.shadow = nil
        let reason = await outcome(of: shadow)
        await shadow.stop()
        return reason
    }

    private func outcome(of shadow: ShadowEmulator) async -> String? {
        // A stream is taken in a second; on a host under load it takes what it takes.
        let end = ContinuousClock.now + ShadowEmulator.patience
        while true {
            if abandonment.hasHappened { return "The source has given up" }
            let state: String
            do {
                state = try await shadow.monitor.migrationState(timeout: ShadowEmulator.patience).status
            } catch let error as QMPError where error.code == .disconnected {
                // QEMU ends when it cannot load what comes.
                let words = shadow.words
                return "QEMU on the destination does not take the guest: \(words.isEmpty ? "it said nothing" : words)"
            } catch { return "The blank copy of the guest on the destination: \(error)" }
            switch state {
            case "completed": return nil
            // The source says that it is over after it was sent: what is on its way comes soon.
            case "none", "setup":
                if ContinuousClock.now > end - ShadowEmulator.patience + .seconds(5) {
                    return "The blank copy of the guest was not sent"
                }
            case "failed": return "QEMU on the destination does not take the guest: \(shadow.words)"
            default: break
            }
            guard ContinuousClock.now < end else {
                return
                    "The blank copy of the guest was not taken within \(ShadowEmulator.patience): look for load on both hosts"
            }
            await agent.loop.sleep(for: .milliseconds(10))
        }
    }

    /// The disks whose backing images are here with the same contents.
    func findKeptBacking(_ offer: Message.Offer, _ rehearsed: Message.Rehearsed) async throws -> Set<String> {
        var kept: Set<String> = []
        let (allowed, images) = (agent.configuration.allowedDirectories, agent.configuration.imageDirectory)
        let own = DurableFile.resolve(images, in: "/") + "/"
        for disk in offer.disks where !disk.backing.isEmpty {
            // What a source could have put here itself is not taken for an image of this host.
            let isOwn = disk.backing.allSatisfy {
                allowed.contain($0.path) && !DurableFile.resolve($0.path, in: "/").hasPrefix(own)
            }
            var isSame = isOwn && disk.backing.last.map { ImageHeader.isAlone($0.path) } ?? false
            for file in disk.backing where isSame {
                var known = file
                known.digest = rehearsed.backing[file.path] ?? ""
                guard policy?.canRead(file.path) ?? true, try await fileDigests.matches(file.path, known) else {
                    isSame = false
                    break
                }
            }
            if isSame { kept.insert(disk.name) }
        }
        return kept
    }
}
