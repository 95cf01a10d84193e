internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import NBD

/// Images that had contents when the migration began.
extension IncomingImages {
    /// Notes that a disk is begun with an old image, which is one again if the migration is given up.
    func remember(_ image: PlacedImage, for disk: String) { oldImages[disk] = image }

    /// Makes old images of what is one.
    func giveOldImagesBack() async {
        for old in oldImages.values {
            let problem = await BlockingPool.shared.value { old.giveBack() }
            if let problem { log(.error, problem) }
        }
        oldImages = [:]
    }

    /// Goes on with an old image of a disk, and its export.
    ///
    /// - Throws: `FileError` or `GuestError` that says why it cannot be used; then it is what it was.
    func use(
        _ image: PlacedImage,
        for disk: Message.Offer.Disk,
        export name: String,
        for peer: TLSPeerName
    ) async throws {
        try await makeDirectory()
        do {
            try await BlockingPool.shared.run { try image.place() }
            do { try addSeeded(disk, image.path, name, peer) } catch {
                let problem = await BlockingPool.shared.value { image.giveBack() }
                if let problem { log(.error, problem) }
                throw error
            }
        } catch {
            oldImages[disk.name] = nil
            throw error
        }
    }

    /// Begins a disk with a copy of an image of the operator.
    ///
    /// - Throws: `FileError` or `GuestError` that names the file; then nothing is left of it.
    func copy(
        _ template: SeedTemplate,
        _ disk: Message.Offer.Disk,
        at path: String,
        export name: String,
        for peer: TLSPeerName,
        _ abandonment: Abandonment
    ) async throws {
        try await makeDirectory()
        try await BlockingPool.background.run {
            try template.copy(to: path, size: disk.size) { abandonment.hasHappened }
        }
        do {
            try addSeeded(disk, path, name, peer)
        } catch {
            unlink(path)
            throw error
        }
    }

    private func addSeeded(_ disk: Message.Offer.Disk, _ path: String, _ name: String, _ peer: TLSPeerName) throws {
        let digests = try ChunkDigests(size: disk.size, isBlank: false)
        let file = try Self.openRaw(disk, path, false, digests)
        guard file.size == disk.size else {
            throw GuestError("The image \(path) has \(file.size) bytes, and the disk has \(disk.size)")
        }
        add(disk, path, name, file, false, DiskImage(file), digests, peer, seed: SeedServing())
    }

    /// Tells what an image has already, in pieces that are read, sent and forgotten.
    ///
    /// - Parameters:
    ///   - disk: the disk's name.
    ///   - connection: where to.
    ///   - turns: how many files a source has read at once.
    ///   - identity: that source.
    ///   - greet: is called before the first piece.
    /// - Throws: `ChannelError` when no table is due, or the connection is lost.
    func serveTable(
        of disk: String,
        on connection: MessageConnection,
        _ turns: KeyedSemaphore,
        for identity: String,
        greet: () async throws -> Void
    ) async throws {
        guard let image = images.first(where: { $0.disk.name == disk }), let seed = image.seed, seed.isDue else {
            throw ChannelError(.protocolViolation, "No table of \(disk) is due")
        }
        try seed.begin(connection)
        defer { seed.end() }
        try await greet()
        let (digests, path) = (image.digests, image.path)
        var word = 0
        while word < digests.words, seed.isDue, !mustStop {
            let words = word..<min(word + SeedServing.wordsAtOnce, digests.words)
            try await seed.awaitTurn(turns, identity)
            try await read(digests, path, .running, .init(words: words))
            seed.endTurn()
            guard seed.isDue, !mustStop else { break }
            let piece = await Occasion.running.pool.value { digests.encoded(words: words) }
            try await connection.send(data: piece)
            word = words.upperBound
        }
        // What was read leaves the room to what is needed.
        _ = await Occasion.running.pool.value { Self.dropCache(path) }
    }

    /// Nobody waits for a table any more.
    func endTables() async { for image in images { await image.seed?.stop() } }

    /// Reads what was there when the migration began once more, the first time that this is called, and marks what is not what it was.
    ///
    /// - Returns: whether that was done.
    func compareSeeds() async throws -> Bool {
        guard !areSeedsCompared else { return false }
        for image in images where image.seed != nil {
            let pass = ChunkDigests.Pass(.comparison)
            comparisons[image.path] = pass
            try await read(image.digests, image.path, .running, pass)
            if mustStop { return true }
        }
        areSeedsCompared = true
        return images.contains { $0.seed != nil }
    }
}
