internal import Emulator
internal import IO
internal import Migration
internal import NBD

/// The guest's disks on their way: QEMU's mirror jobs, and the relays that carry them.
///
/// Confined to the control loop.
final class DiskMirrors: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    private let context: MigrationContext
    private let link: DestinationLink
    private var plan: MigrationPlan { context.plan }
    var disks: [SourceDisk] = []
    /// The disks of which only what is above the backing image is copied.
    var keepsBacking: Set<String> = []
    /// Whether every disk is still mirrored, so that the memory can be sent again.
    private(set) var areWhole = true
    /// The highest speed at which the disks were copied, in bytes per second.
    private(set) var rate = 0.0
    /// How many reconnections there had been when the disks were verified.
    private var verifiedReconnects = 0
    /// Is told of each disk whose destination is away or has no space.
    var onOutage: (() -> Void)?

    init(_ context: MigrationContext, _ link: DestinationLink) {
        self.context = context
        self.link = link
    }

    // MARK: the relays

    /// Begins the connections for every disk, as far as they go before their exports are known. Worth it on a long line only.
    func dial() {
        guard let control = link.control, link.nbdPort != 0, control.isFar else { return }
        let address = plan.address.with(port: link.nbdPort)
        for index in disks.indices {
            let loop = context.dataLoops.next()
            disks[index].loop = loop
            disks[index].dialled = (0..<plan.firstConnections).map { _ in
                DialledConnection(to: address, on: loop, options(""))
            }
        }
    }

    /// What was begun and is not wanted.
    func giveUpDialled() {
        for index in disks.indices {
            for connection in disks[index].dialled { connection.giveUp() }
            disks[index].dialled = []
        }
    }

    private func options(_ export: String) -> NBDClientOptions {
        var options = NBDClientOptions(export: export, credentials: context.credentials, hostname: plan.host)
        options.identity = plan.identity
        return options
    }

    /// Opens the connections for every disk, of all disks at once, and a Unix socket for QEMU in front of them.
    func connect(_ ready: Message.Ready, client: Int32?) async throws {
        keepsBacking = Set(ready.keepsBacking)
        let relays = try await withThrowingTaskGroup(of: (Int, MirrorRelay).self) { group in
            for index in disks.indices {
                group.addTask(executorPreference: context.loop) {
                    (index, try await self.connect(index, ready, client: client))
                }
            }
            var relays: [(Int, MirrorRelay)] = []
            var failure: (any Error)?
            while let result = await group.nextResult() {
                switch result {
                case .success(let relay): relays.append(relay)
                case .failure(let error): failure = failure ?? error
                }
            }
            guard let failure else { return relays }
            for (_, relay) in relays { relay.abort("Another disk could not be connected") }
            throw failure
        }
        for (index, relay) in relays { disks[index].relay = relay }
        for index in disks.indices where disks[index].isSeeded { followTable(of: index) }
    }

    private func connect(_ index: Int, _ ready: Message.Ready, client: Int32?) async throws -> MirrorRelay {
        let disk = disks[index]
        // One that was begun for a port that is not the server's any more is of no use.
        let isSamePort = ready.nbdPort == link.nbdPort
        if isSamePort { disks[index].dialled = [] }
        guard let export = ready.exports[disk.offer.name] else {
            throw MigrationError(.failed, "The destination has no export for \(disk.offer.name)")
        }
        let socket = context.files.mirrorSocket(of: disk.offer.name)
        guard socket.utf8.count < 104 else {
            throw MigrationError(.failed, "The path \(socket) is too long for a socket; use a shorter --state-dir")
        }
        do {
            var endurance = MirrorEndurance(
                patience: .seconds(plan.patience),
                memory: plan.mirrorMemory,
                expected: disk.allocated,
                isFenced: true,
                bandwidth: firstSpeed,
                beacon: context.beacon
            )
            endurance.lineRate = context.report.rehearsal.map { $0.bytesPerSecond / Double(max(disks.count, 1)) }
            endurance.compression = link.features.contains(.compressedWrites) ? plan.compression : .off
            return try await MirrorRelay.start(
                socket: socket,
                to: plan.address.with(port: ready.nbdPort),
                options: options(export),
                connections: plan.firstConnections,
                connectionsAtMost: plan.connections(disks: disks.count),
                size: disk.offer.size,
                client: client,
                endurance: endurance,
                dialled: isSamePort ? disk.dialled : [],
                isSeeded: disk.isSeeded,
                on: disk.loop ?? context.dataLoops.next()
            ) { [weak self] reason in
                guard let self else { return }
                self.context.loop.execute { self.outage(index, reason) }
            } onFailure: { [weak self] reason in
                guard let self else { return }
                let name = disk.offer.name
                self.context.loop.execute {
                    self.context.fail(MigrationError(.failed, "Copying \(name) failed: \(reason)"))
                }
            }
        } catch let error as ChannelError {
            throw MigrationError(.failed, "Cannot reach the export of \(disk.offer.name): \(error.message)")
        }
    }

    /// Has the destination tell what it has of a disk.
    private func followTable(of index: Int) {
        let (plan, credentials, name) = (plan, context.credentials, disks[index].offer.name)
        disks[index].relay?.followTable { loop in
            try await ControlConnection.openSeed(plan, index: index, credentials: credentials, on: loop)
        } onBreak: { [weak self] reason in
            guard let self else { return }
            self.context.loop.execute {
                self.context.warn(
                    "\(name): what the destination has is not known to the end, and the rest is sent: \(MigrationContext.said(reason))"
                )
            }
        }
    }

    /// The destination of a mirror is away or has no space, which is waited for, or is back.
    private func outage(_ index: Int, _ reason: String?) {
        let name = disks[index].offer.name
        disks[index].absence = reason
        if let reason {
            context.warn("\(name): \(reason). The guest stays here meanwhile; trying again for \(plan.patience) s")
            onOutage?()
        } else {
            context.warn("\(name): the copy goes on")
        }
    }

    /// Whether the destination cannot be reached, or has no space, at the moment.
    var isAway: Bool { link.isReconnecting || disks.contains { $0.absence != nil } }

    /// Why nothing can go to the destination at the moment.
    var absence: String {
        for disk in disks { if let reason = disk.absence { return "\(disk.offer.name): \(reason)" } }
        return "\(plan.host) is away"
    }

    /// The destination's NBD server is another one, or at another place.
    func move(to address: SocketAddress) { for disk in disks { disk.relay?.move(to: address) } }

    /// Fails what QEMU waits for.
    func abort(_ reason: String) { for disk in disks { disk.relay?.abort(reason) } }

    func closeRelays() async { for disk in disks { await disk.relay?.close() } }

    /// The nodes that lead to relays, by name.
    var targetNodes: [String] { disks.filter(\.hasTarget).map { $0.targetNode(plan.id) } }

    // MARK: the copy

    /// Starts the mirrors and waits until all have caught up.
    ///
    /// - Parameter look: is called now and then meanwhile.
    func copy(_ monitor: QMPClient, look: () async throws -> Void) async throws {
        let speed = firstSpeed
        for index in disks.indices {
            let disk = disks[index]
            guard let relay = disk.relay else { continue }
            let target = disk.targetNode(plan.id)
            try await monitor.addNBDNode(
                target,
                socket: relay.socket,
                export: "\(plan.id)/\(disk.offer.name)",
                mayBeEmptied: !disk.isSeeded
            )
            disks[index].hasTarget = true
            try await monitor.mirror(
                job: disk.jobName(plan.id),
                node: disk.node,
                target: target,
                sync: keepsBacking.contains(disk.offer.name) ? "top" : "full",
                // Of a seeded disk QEMU reads more than is sent, and the relay keeps to the limit.
                speed: disk.isSeeded ? 0 : speed,
                buffer: disk.isSeeded ? nil : Self.buffer(for: speed)
            )
            (disks[index].hasJob, disks[index].speed) = (true, speed)
        }
        try await catchUp(monitor, look: look)
    }

    /// Bytes a second that each disk begins with; 0 for no limit.
    private var firstSpeed: UInt64 {
        BandwidthShares(total: plan.bandwidth).speeds(disks.map { _ in true }).first ?? 0
    }

    /// Gives the disks that have to catch up what the others do not need.
    private func share(_ monitor: QMPClient) async throws {
        guard plan.bandwidth > 0, disks.count > 1 else { return }
        // What is written in a moment is no reason to divide anew.
        let little = firstSpeed / 2
        let catchesUp = disks.map { !$0.isReady || $0.remaining > little }
        let speeds = BandwidthShares(total: plan.bandwidth).speeds(catchesUp)
        for index in disks.indices where disks[index].hasJob && disks[index].speed != speeds[index] {
            disks[index].speed = speeds[index]
            if disks[index].isSeeded {
                disks[index].relay?.limit(to: speeds[index])
            } else {
                try await monitor.setSpeed(ofJob: disks[index].jobName(plan.id), to: speeds[index])
            }
        }
    }

    /// What QEMU may have under way of a disk whose copy is limited. Its own 16 MiB go out at once, however slow the copy shall be, and it
    /// then waits for as long as they should have taken.
    private static func buffer(for speed: UInt64) -> UInt64? {
        speed == 0 ? nil : min(max(speed / 4, ChunkDigests.chunkSize), 16 << 20)
    }

    /// Waits until what is left of the disks can be sent while the guest is paused.
    func catchUp(_ monitor: QMPClient, look: () async throws -> Void) async throws {
        var meter = RateMeter()
        var dataMeter = RateMeter()
        // QEMU has the destination zeroed first, all of a disk at once: that is no part of the copy, whose rate it would hide for seconds.
        var copyMeter = RateMeter()
        var convergence = Convergence()
        var looked = ContinuousClock.now
        var shown = 0.0
        // What moves before the first look counts too.
        meter.add(sentBytes)
        dataMeter.add(dataBytes)
        copyMeter.add(0)
        while true {
            try await context.wait(.milliseconds(200))
            try await refreshJobs(monitor)
            try await share(monitor)
            if ContinuousClock.now - looked > .seconds(2) {
                try await look()
                looked = .now
            }
            meter.add(sentBytes)
            dataMeter.add(dataBytes)
            let remaining = remaining
            let total = disks.reduce(0) { $0 + ($1.job?.total ?? $1.offer.size) }
            // QEMU looks for holes first, which takes its time for a large disk, and knows nothing of what is to do meanwhile.
            let isCounted = disks.allSatisfy { $0.isReady || ($0.job?.total ?? 0) > 0 }
            let percent = !isCounted ? 0 : total == 0 ? 100 : 100 * (1 - Double(min(remaining, total)) / Double(total))
            // QEMU and the relay are not asked at the same moment: what passes from one to the other then is counted twice, or not.
            if percent > shown || percent < shown - Self.unsteadiness { shown = percent }
            if isCounted { copyMeter.add(total - min(remaining, total)) }
            // What goes out at once at the beginning is no rate that lasts.
            let most = plan.bandwidth > 0 ? Double(plan.bandwidth) : .infinity
            // What is empty, or there already, takes the disks forward, and not the line.
            let pace = hasFreeData ? copyMeter.shown : min(copyMeter.shown, most)
            context.progress(
                percent: shown,
                rate: min(dataMeter.shown, most),
                remaining: isCounted && pace > 0 ? Double(remaining) / pace : nil,
                seeded: seededBytes,
                of: "disks"
            )
            if !isAway, fits(max(dataMeter.peak, rate, leastRate)) {
                if disks.allSatisfy(\.isReady) { break }
                // QEMU keeps a job that is limited in its speed waiting before it says that it is ready.
                convergence.reset()
            } else if isAway {
                // An outage says nothing about the guest, and has a limit of its own.
                convergence.reset()
            } else if convergence.hasFailed(remaining: remaining, rate: meter.rate) {
                throw notConverged("disks", remaining, meter.rate)
            }
        }
        rate = max(rate, dataMeter.peak, leastRate)
    }

    /// So many points of a percentage fall without a guest that writes.
    private static let unsteadiness = 5.0

    /// What the link carried before the copy, for disks of which too little is sent to measure it, as far as it may be used.
    private var leastRate: Double {
        guard hasFreeData, let measured = context.report.rehearsal?.bytesPerSecond else {
            return 0
        }
        return plan.bandwidth > 0 ? min(measured, Double(plan.bandwidth)) : measured
    }

    /// Whether what is left can be sent within the downtime limit.
    func fits(_ rate: Double) -> Bool {
        // Nothing was measured when the disks are empty; any link does this much.
        let bytesPerSecond = rate > 0 ? rate : 4_000_000
        return Double(remaining) <= bytesPerSecond * Double(plan.downtimeLimit) / 1000
    }

    func refreshJobs(_ monitor: QMPClient) async throws {
        for index in disks.indices where disks[index].hasJob {
            guard let job = try await monitor.job(disks[index].jobName(plan.id)) else {
                throw MigrationError(.failed, "The mirror of \(disks[index].offer.name) has disappeared")
            }
            if let error = job.error { throw await failure(of: disks[index], error) }
            disks[index].job = job
            if job.status == "ready" { disks[index].isReady = true }
        }
    }

    /// QEMU knows only that its write failed; the relay knows why.
    private func failure(of disk: SourceDisk, _ error: String, atEnd: Bool = false) async -> MigrationError {
        let reason = await disk.relay?.failure() ?? error
        return MigrationError(
            .failed,
            "Copying \(disk.offer.name) (\(disk.path)) failed\(atEnd ? " at its end" : ""): \(reason)"
        )
    }

    /// Bytes of all disks that are at the destination, data and zeroes.
    private var sentBytes: UInt64 {
        disks.reduce(0) { sum, disk in
            guard let counters = disk.relay?.counters else { return sum }
            return sum + counters.bytesSent + counters.zeroBytes + counters.seededBytes
        }
    }

    /// Whether some of what QEMU copies is at the destination already, and is not held to any limit.
    private var hasFreeData: Bool { disks.contains(where: \.isSeeded) }

    /// Bytes of all disks that went over the link as data: zeroes cost nothing and would flatter the link.
    var dataBytes: UInt64 { disks.reduce(0) { sum, disk in sum + (disk.relay?.counters.bytesSent ?? 0) } }

    /// Bytes of all disks that the destination had; nil when it had none of them.
    private var seededBytes: UInt64? {
        let seeded = disks.filter(\.isSeeded)
        return seeded.isEmpty ? nil : seeded.reduce(0) { $0 + ($1.relay?.counters.seededBytes ?? 0) }
    }

    var remaining: UInt64 { disks.reduce(0) { $0 + $1.remaining } }

    func notConverged(
        _ what: String,
        _ remaining: UInt64,
        _ rate: Double,
        writes: Double = 0
    ) -> MigrationError {
        let written = writes > 0 ? ", while the guest writes \(MigrationContext.megabytes(writes))/s" : ""
        let figures =
            "\(MigrationContext.megabytes(Double(remaining))) remain at \(MigrationContext.megabytes(rate))/s\(written)"
        let slower = plan.mostSlowDown < MigrationPlan.mostSlowDown ? ", or allow more with --slow-down" : ""
        return MigrationError(
            .notConverged,
            """
            The migration did not converge: the guest writes to its \(what) faster than the link carries them; \(figures), \
            which does not fit the downtime limit of \(plan.downtimeLimit) ms. Raise --downtime-limit, use a faster link, \
            or calm the guest down\(slower)
            """
        )
    }

    // MARK: the end

    /// Whether another agent may be at the destination since the disks were verified, which has read back nothing yet.
    var isVerified: Bool { verifiedReconnects == context.report.reconnects }

    /// Lets the destination take the digests of everything that has settled, while the guest runs on.
    func verify() async throws {
        // The time depends on the disks: a gigabyte a second is slow for SHA-256, and a silent destination is noticed
        // by its missing pongs.
        // What was there already is read once more.
        let bytes = disks.reduce(0) { $0 + $1.offer.size * ($1.isSeeded ? 2 : 1) }
        for disk in disks where disk.isSeeded { await disk.relay?.endTable() }
        var meter = RateMeter()
        link.onReadBack = { [context] readBack in
            let (done, total) = (min(readBack.done, readBack.total), readBack.total)
            meter.add(done)
            context.progress(
                percent: total == 0 ? 100 : 100 * Double(done) / Double(total),
                rate: meter.rate,
                remaining: meter.rate > 0 ? Double(total - done) / meter.rate : nil
            )
        }
        defer { link.onReadBack = nil }
        let answer = try await link.ask(.mirrored, timeout: .seconds(60 + Int(bytes >> 26)))
        guard case .mirrored = answer else { throw link.unexpected(answer, to: .mirrored) }
        verifiedReconnects = context.report.reconnects
        try context.checkFault()
    }

    /// The destination makes the disks durable when it prepares; QEMU's own FLUSHes while the guest is paused need not wait for it.
    func promiseBarrier() async { for disk in disks { await disk.relay?.promiseBarrier() } }

    /// Ends the mirrors while the guest is paused: QEMU sends what is left.
    func end(_ monitor: QMPClient) async throws {
        areWhole = false
        for disk in disks where disk.hasJob { try await monitor.cancelMirror(disk.jobName(plan.id), force: false) }
        for index in disks.indices where disks[index].hasJob {
            let name = disks[index].jobName(plan.id)
            while true {
                guard let job = try await monitor.job(name) else {
                    throw MigrationError(.failed, "The mirror of \(disks[index].offer.name) has disappeared")
                }
                if job.status == "concluded" {
                    // A job that has ended is not a job that has succeeded.
                    if let error = job.error { throw await failure(of: disks[index], error, atEnd: true) }
                    break
                }
                try await context.wait(.milliseconds(2))
            }
            try await monitor.dismiss(name)
            disks[index].hasJob = false
            try await monitor.removeNode(disks[index].targetNode(plan.id))
            disks[index].hasTarget = false
            if let reason = await disks[index].relay?.failure() {
                throw await failure(of: disks[index], reason, atEnd: true)
            }
        }
    }

    /// What the relays say of the disks, for the destination to compare with what it has.
    func proofs() async throws -> [String: DiskProof] {
        var proofs: [String: DiskProof] = [:]
        // One message carries them all.
        var room = 4 * DiskProof.maximumRuns
        for (index, disk) in disks.enumerated() {
            guard let relay = disk.relay else { continue }
            let proof = try await relay.rest()
            // What QEMU did not write in whole chunks is known to nobody but QEMU.
            let unknown = keepsBacking.contains(disk.offer.name) ? 0 : proof.unknown
            let fits = proof.runs.count <= min(DiskProof.maximumRuns, room)
            if !fits || unknown > 0 {
                let what = fits ? "\(unknown) chunks of \(disk.offer.name)" : "The chunks of \(disk.offer.name)"
                context.warn("\(what) cannot be compared before the guest moves; --verify=full compares all")
            }
            guard fits else { continue }
            room -= proof.runs.count
            proofs[disk.offer.name] = proof
            disks[index].isProved = unknown == 0
        }
        return proofs
    }

    // MARK: events

    func handle(_ event: QMPEvent) {
        guard ["BLOCK_JOB_READY", "BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED"].contains(event.name),
            let name = event.data["device"]?.string,
            let index = disks.firstIndex(where: { $0.jobName(plan.id) == name })
        else { return }
        if event.name == "BLOCK_JOB_READY" {
            disks[index].isReady = true
            return
        }
        guard let error = event.data["error"]?.string ?? (event.name == "BLOCK_JOB_ERROR" ? "I/O error" : nil) else {
            return
        }
        Task(executorPreference: context.loop) {
            self.context.fail(await self.failure(of: self.disks[index], error))
        }
    }

    /// The figures of the relays, for the report.
    func account() {
        for index in disks.indices {
            guard let relay = disks[index].relay, index < context.report.disks.count else { continue }
            context.report.disks[index].bytesSent = relay.counters.bytesSent
            if relay.counters.bytesOnLine < relay.counters.bytesSent {
                context.report.disks[index].bytesOnLine = relay.counters.bytesOnLine
            }
            context.report.disks[index].zeroBytes = relay.counters.zeroBytes
            if disks[index].isSeeded { context.report.disks[index].seededBytes = relay.counters.seededBytes }
            context.report.reconnects += relay.counters.reconnects
            context.report.bytesResent += relay.counters.bytesResent
        }
    }

    var connections: Int { disks.reduce(0) { $0 + ($1.relay?.connections ?? 0) } }

    /// The most connections that a disk was found to be worth.
    var mostConnections: Int { disks.reduce(0) { max($0, $1.relay?.connections ?? 0) } }
}
