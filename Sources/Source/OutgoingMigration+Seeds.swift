internal import Emulator
internal import IO
internal import Migration

/// What the destination may have of the disks already, and what this host keeps for their way back.
extension OutgoingMigration {
    /// Gives each disk this move's lineage, behind those that it came with.
    func nameLineages() {
        let known = record?.lineages ?? [:]
        for index in mirrors.disks.indices {
            let path = DurableFile.resolve(mirrors.disks[index].path, in: "/")
            let earlier = (known[path] ?? []).compactMap { Lineage($0) }
            mirrors.disks[index].lineages = earlier.suffix(Lineage.most - 1) + [Lineage()]
        }
    }

    /// Puts proofs of what the disks came with into what is said next.
    ///
    /// - Parameter nonce: the destination's; nil when it wants no proofs.
    /// - Returns: what the destination's own proofs are judged by.
    func proveLineages(_ nonce: String?) throws -> SeedExchange? {
        guard let nonce, let session = link.control?.session, link.features.contains(.seeds) else { return nil }
        let own = SeedExchange.makeNonce()
        let exchange = try SeedExchange(session, source: own, destination: nonce)
        var proofs: [String: [String]] = [:]
        for disk in mirrors.disks where disk.mayBeSeeded {
            let name = disk.offer.name
            let shown = try disk.lineages.dropLast().map { try exchange.proof(of: $0, by: .source, for: name) }
            if !shown.isEmpty { proofs[name] = shown }
        }
        guard !proofs.isEmpty else { return nil }
        rehearsed.seedNonce = own
        rehearsed.lineages = proofs
        return exchange
    }

    /// Believes the destination that it has something of a disk, if that was asked for or it has proved it.
    func acceptSeeds(_ ready: Message.Ready) {
        for (name, proof) in ready.seeds ?? [:] {
            guard let index = mirrors.disks.firstIndex(where: { $0.offer.name == name }) else { continue }
            let disk = mirrors.disks[index]
            let isProved = disk.lineages.contains {
                exchange?.isProof(proof, of: $0, by: .destination, for: name) == true
            }
            mirrors.disks[index].isSeeded = disk.offer.seed != nil || isProved
            if !mirrors.disks[index].isSeeded {
                context.warn(
                    "The destination cannot prove that its image of \(name) is an earlier one; all of it is sent"
                )
            }
        }
    }

    /// What RELEASE tells of the disks; nil for a destination that does not know what to do with it.
    var lineages: [String: [Lineage]]? {
        guard link.features.contains(.seeds) else { return nil }
        let known = mirrors.disks.filter { !$0.lineages.isEmpty }.map { ($0.offer.name, $0.lineages) }
        return known.isEmpty ? nil : Dictionary(known) { first, _ in first }
    }

    /// The old images are what the guest left with: each may be the beginning of its disk when that comes back.
    func offerSeeds() {
        guard context.report.code == 0, let fence else { return }
        for disk in mirrors.disks where disk.format == "raw" && !disk.isSealed {
            guard let lineage = disk.lineages.last, let image = fence.images.first(where: { $0.path == disk.path }),
                !image.isDevice
            else { continue }
            FencedImages.offer(fence.path(of: image), as: lineage, context.files)
        }
    }
}

extension SourceDisk {
    /// Whether an image at the destination can be the beginning of it: a raw one, whole and in clear.
    var mayBeSeeded: Bool {
        offer.format == "raw" && offer.backing.isEmpty && offer.keySecret == nil && !offer.isContainer
            && offer.seed == nil
    }
}
