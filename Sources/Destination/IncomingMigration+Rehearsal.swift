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
        var sizes = offer.sizes
        var outputs: Set<String> = []
        let facts = try await facts(offer)
        let relocation = try offer.commandLine.relocated(for: facts, origin: offer.origin) { reference in
            var placement = GuestCommandLine.Placement(path: reference.path)
            switch reference.kind {
            case .disk: placement = self.placement(offer, reference, keepsBacking: [])
            case .file:
                let file = offer.files.first { $0.path == reference.path }
                placement.path = "\(agent.configuration.imageDirectory)/.files/\(file?.digest ?? "")"
            case .output: placement.path = output(reference.path, offer, &outputs)
            case .backing: break
            }
            if let size = offer.sizes[reference.path] { sizes[placement.path] = size }
            return placement
        }
        let line = GuestCommandLine(arguments: relocation.arguments, directory: "/")
        let problems = try HostResources(line).problems()
        if !problems.isEmpty { throw Refusal(reasons: problems) }
        let shadow = try await ShadowEmulator.start(
            line,
            program: localProgram(offer.commandLine.program),
            .init(sizes: sizes, memory: offer.memory, memoryID: offer.memoryID),
            isIncoming: true,
            policy: try await agent.makePolicy(),
            on: agent.loop
        )
        self.shadow = shadow
        var warnings: [String] = []
        let free = xd_free_bytes(agent.configuration.imageDirectory)
        let most = offer.disks.filter { IncomingImages.deviceSize(imagePath($0, offer)) == nil }.reduce(0) {
            $0 + $1.size
        }
        if free < most {
            warnings.append(
                "The image directory on the destination has \(free) bytes free; if the guest fills its disks, they need \(most)"
            )
        }
        let backing = offer.disks.flatMap(\.backing).filter { file in
            var status = stat()
            return stat(file.path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
                && UInt64(status.st_size) == file.size
        }
        return Message.Shadow(
            fingerprint: try await MachineFingerprint(of: shadow.monitor),
            emulatorVersion: shadow.monitor.version,
            changes: relocation.changes,
            warnings: warnings,
            backing: backing.map(\.path),
            clock: Int64(Date.now.timeIntervalSince1970 * 1000),
            free: free
        )
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
    func findKeptBacking(_ offer: Message.Offer, _ rehearsed: Message.Rehearsed) async -> Set<String> {
        var kept: Set<String> = []
        for disk in offer.disks where !disk.backing.isEmpty {
            // What a source could have put here itself is not taken for an image of this host.
            let isOwn = disk.backing.allSatisfy {
                DurableFile.resolve($0.path, in: "/").hasPrefix(agent.configuration.imageDirectory + "/") == false
            }
            var isSame = isOwn && disk.backing.last.map { ImageHeader.isAlone($0.path) } ?? false
            for file in disk.backing where isSame {
                var known = file
                known.digest = rehearsed.backing[file.path] ?? ""
                guard policy?.canRead(file.path) ?? true, await Self.matches(file.path, known) else {
                    isSame = false
                    break
                }
            }
            if isSame { kept.insert(disk.name) }
        }
        return kept
    }
}
