internal import Glibc
internal import IO
internal import Migration

/// The disks of one incoming guest: their images, what was read back of them, and what the source says of them.
final class IncomingDisks: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    let images: IncomingImages
    private let loop: EventLoop
    /// Where what the source says is kept for an agent that takes this one's place.
    private let proofsFile: String
    private var proofs: [String: DiskProof] = [:]
    /// The digests at the switchover, once they are known.
    var ownedDigests: [String: String] = [:]
    /// A pass over what was written, beside everything else, and the wait for the next one.
    private var settling: Task<Void, Never>?
    private var settleTimer: LoopTimer?
    private var maySettle = false
    private var occasion = IncomingImages.Occasion.copying
    private var readingBack: Task<Void, any Error>?

    init(_ images: IncomingImages, proofsFile: String, on loop: EventLoop) {
        self.images = images
        self.proofsFile = proofsFile
        self.loop = loop
    }

    // MARK: While they are written

    /// Reads back what is written, again and again, so that little is left for later.
    func settle() {
        maySettle = true
        guard settling == nil else { return }
        settleTimer?.cancel()
        settleTimer = loop.schedule(after: .milliseconds(occasion == .copying ? 500 : 250)) {
            guard self.maySettle, self.settling == nil else { return }
            guard self.images.isStale else { return self.settle() }
            self.settling = Task(executorPreference: self.loop) {
                try? await self.images.updateDigests(self.occasion)
                self.settling = nil
                if self.maySettle { self.settle() }
            }
        }
    }

    /// Ends the passes in the background: another one is due.
    private func endSettling() async {
        maySettle = false
        settleTimer?.cancel()
        guard let settling else { return }
        images.interruptPass(true)
        await settling.value
        images.interruptPass(false)
    }

    /// The copy is over, and the memory comes next.
    func expectMemory() {
        occasion = .running
        settle()
    }

    /// Reads back all that was copied.
    func readCopied() async throws {
        await endSettling()
        occasion = .running
        await images.endTables()
        try await images.updateDigests(.running)
        // What was there already is not what was written here: it may have been damaged since it was read.
        if try await images.compareSeeds() { try await images.updateDigests(.running) }
        settle()
    }

    // MARK: Once they are complete

    /// Ends all writing from the network and makes what was written durable.
    func complete(_ prepared: Message.Prepared) async throws {
        await endSettling()
        await images.closeExports()
        try await images.flush()
        proofs = prepared.proofs
        // A host that falls takes QEMU with it, and then nothing is compared: this need not be durable.
        let path = proofsFile
        try? await BlockingPool.shared.run { try Self.save(prepared, to: path) }
        if prepared.isFull { images.markAll() }
    }

    private static func save(_ prepared: Message.Prepared, to path: String) throws {
        let bytes = try JSONText.encode(prepared)
        let fd = Glibc.open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw FileError.system("create \(path)", errno) }
        defer { close(fd) }
        try DurableFile.append(bytes, to: fd, path: path)
    }

    /// Takes up what an earlier agent was told.
    func loadProofs() throws {
        guard let bytes = try DurableFile.read(proofsFile),
            let saved = JSONText.decode(Message.Prepared.self, from: bytes)
        else { return }
        proofs = saved.proofs
    }

    /// Takes the last digests while the source sends the rest of the memory.
    func readBack() {
        readingBack = Task(executorPreference: loop) { try await self.images.updateDigests(.paused) }
    }

    /// What is wrong with the disks; nil when they are what the source has sent.
    func flaw(_ expected: [String: String]) async -> String? {
        let displaced = images.displaced()
        guard displaced.isEmpty else {
            return
                "The image \(displaced.joined(separator: ", ")) on the destination was moved or replaced while the guest was on its way"
        }
        guard let readingBack else { return nil }
        do {
            try await readingBack.value
            if !expected.isEmpty { ownedDigests = try await images.digests() }
        } catch { return "The images on the destination cannot be read back: \(error)" }
        var wrong = await images.mismatches(proofs)
        for (name, digest) in expected where ownedDigests[name] != digest { wrong.append(name) }
        guard !wrong.isEmpty else { return nil }
        let names = Set(wrong).sorted().joined(separator: ", ")
        return
            "What the destination has of \(names) is not what the source sent: it was damaged on the way or on the disk"
    }

    /// The digests at the switchover, when they were not known before.
    ///
    /// Nothing depends on them but the report, so the guest does not wait for those of a large disk.
    func collectDigests() async -> [String: String]? {
        guard ownedDigests.isEmpty, let digests = try? await images.digests(), !digests.isEmpty else { return nil }
        ownedDigests = digests
        return digests
    }

    // MARK: The end

    /// Lets every pass end early: the results are no longer wanted.
    func interrupt() { images.stopDigests() }

    /// Removes the images, when the migration was given up.
    func delete() async {
        maySettle = false
        settleTimer?.cancel()
        images.stopDigests()
        readingBack?.cancel()
        _ = try? await readingBack?.value
        await settling?.value
        await images.delete()
        unlink(proofsFile)
    }
}
