internal import Emulator
internal import IO
internal import Migration
internal import NBD

extension OutgoingMigration {
    /// Opens the connections for every disk and a Unix socket for QEMU in front of them.
    func connectDisks(_ ready: Message.Ready) async throws {
        for index in disks.indices {
            let disk = disks[index]
            guard let export = ready.exports[disk.offer.name] else {
                throw MigrationError(.failed, "The destination has no export for \(disk.offer.name)")
            }
            let socket = migrations.files(of: plan.id).mirrorSocket(of: disk.offer.name)
            guard socket.utf8.count < 104 else {
                throw MigrationError(.failed, "The path \(socket) is too long for a socket; use a shorter --state-dir")
            }
            do {
                disks[index].relay = try await MirrorRelay.start(
                    socket: socket,
                    to: plan.address.with(port: ready.nbdPort),
                    options: NBDClientOptions(export: export, credentials: credentials, hostname: plan.host),
                    connections: plan.connections,
                    size: disk.offer.size,
                    client: record?.process?.pid,
                    endurance: .init(
                        patience: .seconds(plan.patience),
                        memory: plan.mirrorMemory,
                        expected: disk.allocated,
                        isFenced: true
                    ),
                    on: dataLoops.next()
                ) { [weak self] reason in
                    guard let self else { return }
                    self.loop.execute { self.mirrorOutage(index, reason) }
                } onFailure: { [weak self] reason in
                    guard let self else { return }
                    let name = disk.offer.name
                    self.loop.execute { self.fail(MigrationError(.failed, "Copying \(name) failed: \(reason)")) }
                }
            } catch let error as ChannelError {
                throw MigrationError(.failed, "Cannot reach the export of \(disk.offer.name): \(error.message)")
            }
        }
    }

    /// The destination of a mirror is away or has no space, which is waited for, or is back.
    private func mirrorOutage(_ index: Int, _ reason: String?) {
        let name = disks[index].offer.name
        disks[index].isAway = reason != nil
        if let reason {
            warn("\(name): \(reason). The guest runs on; trying again for \(plan.patience) s")
            // QEMU pauses a guest that dirties nothing whatever the downtime limit is, and then waits for the mirrors.
            if isSendingMemory, stoppedAt == nil { memoryFailed("The destination is away, or has no space") }
        } else {
            warn("\(name): the copy goes on")
        }
    }

    /// Whether the destination cannot be reached, or has no space, at the moment.
    var isAway: Bool { isReconnecting || disks.contains(where: \.isAway) }

    /// What the relays say of the disks, for the destination to compare with what it has.
    func proofs() async throws -> [String: DiskProof] {
        var proofs: [String: DiskProof] = [:]
        // One message carries them all.
        var room = 4 * DiskProof.maximumRuns
        for disk in disks {
            guard let relay = disk.relay else { continue }
            let proof = try await relay.rest()
            // What QEMU did not write in whole chunks is known to nobody but QEMU.
            let unknown = keepsBacking.contains(disk.offer.name) ? 0 : proof.unknown
            let fits = proof.runs.count <= min(DiskProof.maximumRuns, room)
            if !fits || unknown > 0 {
                let what = fits ? "\(unknown) chunks of \(disk.offer.name)" : "The chunks of \(disk.offer.name)"
                warn("\(what) cannot be compared before the guest moves; --verify=full compares all")
            }
            guard fits else { continue }
            room -= proof.runs.count
            proofs[disk.offer.name] = proof
        }
        return proofs
    }

    /// Starts the mirrors and waits until all have caught up.
    func mirrorDisks() async throws {
        guard let monitor else { return }
        // From here on there is something in QEMU that must not be left alone.
        try startWatchdog(monitor)
        let speed = plan.bandwidth / UInt64(max(disks.count, 1))
        for index in disks.indices {
            let disk = disks[index]
            guard let relay = disk.relay else { continue }
            let target = disk.targetNode(plan.id)
            try await monitor.addNBDNode(target, socket: relay.socket, export: "\(plan.id)/\(disk.offer.name)")
            disks[index].hasTarget = true
            try await monitor.mirror(
                job: disk.jobName(plan.id),
                node: disk.node,
                target: target,
                sync: keepsBacking.contains(disk.offer.name) ? "top" : "full",
                speed: speed
            )
            disks[index].hasJob = true
        }
        try await catchUp(monitor)
    }

    /// Waits until what is left of the disks can be sent while the guest is paused.
    func catchUp(_ monitor: QMPClient) async throws {
        var meter = RateMeter()
        var dataMeter = RateMeter()
        var convergence = Convergence()
        while true {
            try await wait(.milliseconds(200))
            try await refreshJobs(monitor)
            meter.add(diskBytes)
            dataMeter.add(diskDataBytes)
            let remaining = diskRemaining
            let total = disks.reduce(0) { $0 + ($1.job?.total ?? $1.offer.size) }
            progress(
                percent: total == 0 ? 100 : 100 * (1 - Double(min(remaining, total)) / Double(total)),
                rate: meter.rate,
                remaining: meter.rate > 0 ? Double(remaining) / meter.rate : nil
            )
            if !isAway, fits(remaining, max(dataMeter.peak, diskRate)) {
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
        diskRate = max(diskRate, dataMeter.peak)
    }

    /// Whether so many bytes of disk can be sent within the downtime limit.
    func fits(_ remaining: UInt64, _ rate: Double) -> Bool {
        // Nothing was measured when the disks are empty; any link does this much.
        let bytesPerSecond = rate > 0 ? rate : 4_000_000
        return Double(remaining) <= bytesPerSecond * Double(plan.downtimeLimit) / 1000
    }

    func refreshJobs(_ monitor: QMPClient) async throws {
        for index in disks.indices where disks[index].hasJob {
            guard let job = try await monitor.job(disks[index].jobName(plan.id)) else {
                throw MigrationError(.failed, "The mirror of \(disks[index].offer.name) has disappeared")
            }
            if let error = job.error {
                let reason = await disks[index].relay?.failure() ?? error
                throw MigrationError(.failed, "Copying \(disks[index].offer.name) failed: \(reason)")
            }
            disks[index].job = job
            if job.status == "ready" { disks[index].isReady = true }
        }
    }

    /// Bytes of all disks that are at the destination, data and zeroes.
    var diskBytes: UInt64 {
        disks.reduce(0) { sum, disk in
            guard let counters = disk.relay?.counters else { return sum }
            return sum + counters.bytesSent + counters.zeroBytes
        }
    }

    /// Bytes of all disks that went over the link as data: zeroes cost nothing and would flatter the link.
    var diskDataBytes: UInt64 { disks.reduce(0) { sum, disk in sum + (disk.relay?.counters.bytesSent ?? 0) } }

    var diskRemaining: UInt64 { disks.reduce(0) { $0 + $1.remaining } }

    func notConverged(_ what: String, _ remaining: UInt64, _ rate: Double) -> MigrationError {
        func megabytes(_ bytes: Double) -> String { "\((bytes / 1e5).rounded() / 10) MB" }
        let figures = "\(megabytes(Double(remaining))) remain at \(megabytes(rate))/s"
        return MigrationError(
            .notConverged,
            """
            The migration did not converge: the guest writes to its \(what) faster than the link carries them; \(figures), \
            which does not fit the downtime limit of \(plan.downtimeLimit) ms. Raise --downtime-limit, use a faster link, \
            or calm the guest down
            """
        )
    }

    /// Lets the destination take the digests of everything that has settled, while the guest runs on.
    func verifyDisks() async throws {
        // The time depends on the disks: a gigabyte a second is slow for SHA-256, and a silent destination is noticed
        // by its missing pongs.
        let bytes = disks.reduce(0) { $0 + $1.offer.size }
        let answer = try await ask(.mirrored, timeout: .seconds(60 + Int(bytes >> 26)))
        guard case .mirrored = answer else {
            throw MigrationError(.failed, "The destination answered MIRRORED with \(answer.name)")
        }
        verifiedReconnects = report.reconnects
        if let fault { throw fault }
    }

    /// Ends the mirrors while the guest is paused: QEMU sends what is left and flushes the destination.
    func closeMirrors(_ monitor: QMPClient) async throws {
        areMirrorsWhole = false
        for disk in disks where disk.hasJob { try await monitor.cancelMirror(disk.jobName(plan.id), force: false) }
        for index in disks.indices where disks[index].hasJob {
            let name = disks[index].jobName(plan.id)
            while true {
                guard let job = try await monitor.job(name) else {
                    throw MigrationError(.failed, "The mirror of \(disks[index].offer.name) has disappeared")
                }
                if job.status == "concluded" {
                    // A job that has ended is not a job that has succeeded.
                    if let error = job.error {
                        let reason = await disks[index].relay?.failure() ?? error
                        throw MigrationError(.failed, "Copying \(disks[index].offer.name) failed at its end: \(reason)")
                    }
                    break
                }
                try await wait(.milliseconds(2))
            }
            try await monitor.dismiss(name)
            disks[index].hasJob = false
            try await monitor.removeNode(disks[index].targetNode(plan.id))
            disks[index].hasTarget = false
            if let reason = await disks[index].relay?.failure() {
                throw MigrationError(.failed, "Copying \(disks[index].offer.name) failed at its end: \(reason)")
            }
        }
    }
}

/// The speed of something that is counted now and then.
struct RateMeter {
    private var last: (instant: ContinuousClock.Instant, count: UInt64)?
    /// Per second, smoothed over about a second.
    private(set) var rate = 0.0
    /// The highest smoothed value.
    private(set) var peak = 0.0

    mutating func add(_ count: UInt64, now: ContinuousClock.Instant = .now) {
        if let last, now > last.instant {
            let parts = (now - last.instant).components
            let seconds = Double(parts.seconds) + Double(parts.attoseconds) / 1e18
            guard seconds > 0.02 else { return }
            let sample = Double(count - min(last.count, count)) / seconds
            let weight = min(seconds, 1)
            rate = rate == 0 ? sample : rate * (1 - weight) + sample * weight
            peak = max(peak, rate)
        }
        last = (now, count)
    }
}
