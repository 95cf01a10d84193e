internal import Emulator
internal import IO
internal import Migration
internal import TLS

/// What this host has already of the disks of a guest that comes.
extension IncomingMigration {
    // MARK: Old images

    /// What an old image may be, before the source has proved that it knows it.
    private struct Candidate: Sendable {
        var path: String
        var migration: String
        var lineage: Lineage
    }

    /// The images that a guest left here, the latest first, if its destination has confirmed that it is whole. Blocks.
    ///
    /// Only those of a guest of this name, whose lock this migration has: nobody else deletes them meanwhile.
    private static func candidates(_ guest: String, _ migrations: MigrationStore) -> [Candidate] {
        let readings = migrations.ids().compactMap { id -> (Int, [Candidate])? in
            guard let reading = (try? migrations.reading(of: id)) ?? nil, reading.guest == guest,
                reading.standing == .source(.confirmed), let record = FencedRecord(of: migrations.files(of: id))
            else { return nil }
            let known = (record.lineages ?? [:]).filter { record.paths.contains($0.key) }
            return (reading.order, known.map { Candidate(path: $0.key, migration: id, lineage: $0.value) })
        }
        return readings.sorted { $0.0 > $1.0 }.flatMap(\.1)
    }

    /// The disks that may be begun with what is here, so that they do not need all of their room.
    func mayBeSeeded(_ offer: Message.Offer) async -> Set<String> {
        guard conversation.features.contains(.seeds) else { return [] }
        let migrations = agent.migrations
        let isKnown = await BlockingPool.shared.value { !Self.candidates(offer.guest, migrations).isEmpty }
        return isKnown ? Set(offer.disks.filter(\.mayBeSeeded).map(\.name)) : []
    }

    /// Finds the old images whose lineages the source has proved to know, and shows it that this host knows them too.
    func findOldImages(_ offer: Message.Offer, _ connection: MessageConnection) async throws {
        guard let nonce = seedNonce, let own = rehearsed.seedNonce, let proofs = rehearsed.lineages,
            let channel = connection.channel as? TLSChannel
        else { return }
        let exchange = try SeedExchange(channel.session, source: own, destination: nonce)
        let (migrations, log, id) = (agent.migrations, log, id)
        let directory = agent.configuration.imageDirectory
        let found = try await BlockingPool.shared.run {
            var candidates = Self.candidates(offer.guest, migrations)
            var found: [String: (OldImage, String)] = [:]
            for disk in offer.disks where disk.mayBeSeeded {
                let shown = (proofs[disk.name] ?? []).prefix(Lineage.most)
                let index = candidates.firstIndex { candidate in
                    shown.contains { exchange.isProof($0, of: candidate.lineage, by: .source, for: disk.name) }
                }
                guard let index else { continue }
                let candidate = candidates.remove(at: index)
                do {
                    let image = try OldImage(
                        candidate.path,
                        of: candidate.migration,
                        candidate.lineage,
                        size: disk.size,
                        for: directory
                    )
                    let proof = try exchange.proof(of: candidate.lineage, by: .destination, for: disk.name)
                    found[disk.name] = (image, proof)
                } catch { log(.info, "Migration \(id): \(disk.name) is sent as a whole: \(error)") }
            }
            return found
        }
        for (name, (image, proof)) in found { (oldImages[name], seedProofs[name]) = (image, proof) }
    }

    /// An old image and where it is filled.
    func placed(_ image: OldImage, of disk: Message.Offer.Disk, _ offer: Message.Offer) -> PlacedImage {
        PlacedImage(image: image, path: imagePath(disk, offer), files: agent.migrations.files(of: image.migration))
    }

    /// Whether there is room for what has to be made here.
    ///
    /// - Throws: `Refusal` when there is not.
    func checkRoom(_ offer: Message.Offer) throws {
        if let reason = shortage(offer, without: Set(oldImages.keys)) {
            throw Refusal(obstacles: [.init(.space, reason)])
        }
    }

    // MARK: Images of the operator

    /// The image that the source names for a disk; nil when it names none.
    ///
    /// - Throws: `GuestError` when it may not.
    func template(_ disk: Message.Offer.Disk) throws -> SeedTemplate? {
        guard let name = disk.seed else { return nil }
        let directories = agent.configuration.policy.seedDirectories[peer.name] ?? []
        guard !directories.isEmpty else {
            throw GuestError(
                "'\(peer.name)' may name no seeds on this host; its --allow-seed '\(peer.name)=DIR' lists a directory of them"
            )
        }
        guard disk.format == "raw", disk.keySecret == nil, !disk.isContainer, disk.backing.isEmpty else {
            throw GuestError("\(disk.name) is no raw disk in clear, and only those can begin with a seed")
        }
        return SeedTemplate(directories: directories, name: name)
    }

    /// What is wrong with the images that the source names, a sentence each.
    func problemsOfTemplates(_ offer: Message.Offer) async -> [String] {
        var problems: [String] = []
        for disk in offer.disks where disk.seed != nil {
            do {
                let template = try template(disk)
                try await BlockingPool.shared.run { try template?.check(size: disk.size) }
            } catch { problems.append("\(error)") }
        }
        return problems
    }

    // MARK: The table

    /// Tells on a connection of its own what is here of a disk.
    func serveSeed(_ index: Int, _ connection: MessageConnection) async throws {
        guard handover.isOpen, let offer, offer.disks.indices.contains(index), let images = disks?.images else {
            try await connection.send(.abort("No table of a seed is due"))
            return
        }
        do {
            let turns = agent.accounts.digests
            try await images.serveTable(of: offer.disks[index].name, on: connection, turns, for: peer.name) {
                try await connection.send(.welcome(.init(state: self.handover.onWire)))
            }
        } catch {
            try? await connection.send(.abort("\(error)"))
            throw error
        }
    }
}

extension Message.Offer.Disk {
    /// Whether an old image can be the beginning of it: a raw one, whole and in clear.
    var mayBeSeeded: Bool { format == "raw" && backing.isEmpty && keySecret == nil && !isContainer && seed == nil }
}
