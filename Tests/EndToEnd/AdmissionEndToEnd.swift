import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import Source
import TLS
import TestSupport
import Testing

/// What a destination grants to those who evacuate a host, and what it refuses.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct AdmissionEndToEnd {
    func target(
        _ lab: Lab,
        _ evacuation: String = "1-e",
        as directory: String? = nil,
        side: String = "b"
    ) throws -> TargetHost {
        TargetHost(
            host: "localhost",
            port: lab.controlPort(of: side),
            evacuation: evacuation,
            credentials: try lab.pki.credentials(.client, directory: directory),
            on: lab.loop
        )
    }

    func room(
        _ guest: String = "web1",
        memory: UInt64 = 64 << 20,
        disk: UInt64 = 16 << 20,
        allocated: UInt64 = 1 << 20,
        seconds: UInt32 = 600
    ) -> HostMessage.Reserve {
        .init(
            guest: guest,
            usage: GuestUsage(memory: memory, processors: 1, disk: disk),
            allocated: allocated,
            seconds: seconds
        )
    }

    func granted(_ admission: TargetHost.Admission?) throws -> HostMessage.Reserved {
        guard case .granted(let reserved)? = admission else { throw TestFailure("not granted: \(admission as Any)") }
        return reserved
    }

    func denied(_ admission: TargetHost.Admission?) throws -> String {
        guard case .denied(let reason)? = admission else { throw TestFailure("not denied: \(admission as Any)") }
        return reason
    }

    /// Migrates a guest with a reservation, as an evacuation does: with a plan of its own.
    private func move(_ lab: Lab, _ guest: String, reservation: String?, isRehearsal: Bool = false) async throws
        -> MigrationReport
    {
        var plan = MigrationPlan(
            id: MigrationStore.makeID(),
            guest: guest,
            host: "localhost",
            port: lab.controlPort,
            stateDirectory: lab.state("a")
        )
        plan.reservation = reservation
        plan.isRehearsal = isRehearsal
        let files = MigrationStore(stateDirectory: plan.stateDirectory).files(of: plan.id)
        try DurableFile.makeDirectory(files.directory)
        let order = SourceAgentOrder(
            plan: plan,
            credentials: .init(objects: ["tls-creds-x509,id=tls0,dir=\(lab.pki.directory)"], tlsCreds: "tls0"),
            directory: "/"
        )
        try DurableFile.write(try JSONText.encode(order), to: files.plan)
        // Its events go to its output.
        let words = ["source-agent", "--plan", files.plan, "--events", "1"]
        let agent = try await Tool.run(lab.prefix + [Lab.crossdock] + words, seconds: 120)
        let events = agent.output.split(separator: "\n").compactMap { MigrationEvent(parsing: Array($0.utf8)) }
        guard let report = events.compactMap(\.report).last else { throw TestFailure("no report: \(agent.all)") }
        return report
    }

    // MARK: HOST

    @Test func aHostTellsWhatItHasAndWhatIsLeftToWhoAsks() async throws {
        let lab = try Lab()
        try await lab.startDestination(more: ["--most-memory", "1G", "--most-incoming", "3"])
        let target = try target(lab)
        #expect(try await target.connect().contains(.evacuation))
        #expect(try await target.identity() == "CN=host")
        let state = try await #require(try target.state())
        #expect(state.memory > 0 && state.freeMemory > 0 && state.freeMemory < state.memory && state.freeDisk > 0)
        #expect(state.processors >= 1 && state.mostIncoming == 3 && state.incoming == 0 && state.cordon == nil)
        #expect(state.promisedMemory == 0 && state.promisedDisk == 0)
        #expect(state.allowance.memory == 1 << 30 && state.allowance.disk == nil)
        _ = try granted(try await target.reserve(room(memory: 256 << 20, allocated: 8 << 20)))
        let after = try await #require(try target.state())
        #expect(after.promisedMemory == 256 << 20 && after.promisedDisk == 8 << 20)
        #expect(after.allowance.memory == 768 << 20)
        // To somebody else the same host is promised, and all of the policy's limit is left.
        let other = try self.target(lab, as: try lab.pki.issue("other", hosts: ["other"]))
        let theirs = try await #require(try other.state())
        #expect(theirs.promisedMemory == 256 << 20 && theirs.allowance.memory == 1 << 30)
    }

    @Test func anAgentOfTheReleaseBeforeKnowsNothingOfThisAndIsNotAskedFurther() async throws {
        let lab = try Lab()
        try await lab.startDestination(program: PreviousReleaseEndToEnd.program)
        let target = try target(lab)
        #expect(try await !target.connect().contains(.evacuation))
        #expect(try await target.state() == nil)
        #expect(try await target.reserve(room()) == nil)
        #expect(try await target.turn(for: "web1", patience: .seconds(5)) == nil)
        #expect(try await target.recall(.init(guests: nil, address: "localhost:1")) == nil)
        try await target.release("ab")
    }

    // MARK: RESERVE

    @Test func roomIsKeptForWhoAskedAndTakenByTheGuestThatItIsFor() async throws {
        let lab = try Lab()
        for name in ["one", "two"] {
            try await lab.startIdleGuest(name, disks: [try await lab.makeImage("\(name).raw", megabytes: 16, data: 1)])
        }
        try await lab.startDestination(more: ["--most-memory", "128M"])
        let target = try target(lab)
        let one = try granted(try await target.reserve(room("one")))
        #expect(one.seconds > 590 && one.seconds <= 600)
        // The same again is the same, for the time that is asked for now.
        let again = try granted(try await target.reserve(room("one", seconds: 3_000_000)))
        #expect(again.id == one.id && again.seconds > 3590 && again.seconds <= 3600)
        // It counts in the same books as a migration by hand.
        let three = try granted(try await target.reserve(room("three")))
        let byHand = try await lab.migrate("two")
        #expect(byHand.code == MigrationError.Code.refused.rawValue, "\(byHand.all)")
        #expect(byHand.errors.contains("--most-memory") && byHand.errors.contains("have 128M"), "\(byHand.all)")
        // A rehearsal uses nothing up.
        #expect(try await move(lab, "one", reservation: one.id, isRehearsal: true).outcome == .rehearsed)
        let moved = try await move(lab, "one", reservation: one.id)
        #expect(moved.outcome == .migrated, "\(moved.reason ?? "")")
        let state = try await #require(try target.state())
        #expect(state.allowance.memory == 0)
        try await target.release(three.id)
        try await target.release(three.id)
        let second = try await lab.migrate("two")
        #expect(second.code == 0, "\(second.all)")
    }

    @Test func aReservationIsOfNoUseToAnybodyElse() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination(more: ["--most-guests", "1"])
        let other = try target(lab, as: try lab.pki.issue("other", hosts: ["other"]))
        let theirs = try granted(try await other.reserve(room()))
        let own = try granted(try await target(lab, "1-f").reserve(room("web2")))
        // Neither the room of another identity nor that of another guest is used, and nobody else gives it back.
        for id in [theirs.id, own.id] {
            let report = try await move(lab, "web1", reservation: id)
            #expect(
                report.outcome != .migrated && report.reason?.contains("--most-guests") == true,
                "\(report.reason ?? "")"
            )
        }
        try await target(lab).release(own.id)
        let still = try await move(lab, "web1", reservation: nil)
        #expect(still.outcome != .migrated, "another evacuation has given the room back")
        try await target(lab, "1-f").release(own.id)
        #expect(try await lab.migrate().code == 0)
    }

    @Test func reservationsSurviveTheAgentAndEndWithTheirTime() async throws {
        let lab = try Lab()
        try await lab.startDestination(more: ["--most-guests", "2"])
        let target = try target(lab)
        let kept = try granted(try await target.reserve(room("web1")))
        let short = try granted(try await target.reserve(room("web2", seconds: 1)))
        let reason = try denied(try await target.reserve(room("web3")))
        #expect(reason.contains("--most-guests"), "\(reason)")
        try await lab.replaceDestination(more: ["--most-guests", "2"])
        // The connection is made anew, and the reservation is the same.
        try await eventually("the agent answers") { (try? await target.state()) != nil }
        #expect(try granted(try await target.reserve(room("web1"))).id == kept.id)
        try await eventually("the time of the other one is over") {
            if case .granted(let third)? = try await target.reserve(self.room("web3")) { return third.id != short.id }
            return false
        }
        // A damaged file is named, and keeps nobody out.
        try DurableFile.write(Array("{".utf8), to: "\(lab.state("b"))/reservations.json")
        try await lab.replaceDestination(more: ["--most-guests", "2"])
        #expect(lab.destination?.errors.contains("reservations.json is damaged") == true)
        try await eventually("the agent answers") { (try? await target.state()) != nil }
        _ = try granted(try await target.reserve(room("web4")))
        _ = try granted(try await target.reserve(room("web5")))
    }

    /// A host whose memory and disk are as large as is said.
    private func startSmallHost(_ lab: Lab, memory: UInt64, disk: String, more: [String] = []) async throws {
        let images = lab.directory.directory("small")
        chmod(images, 0o711)
        let facts = lab.directory.file("meminfo")
        try DurableFile.write(
            Array("MemTotal:       \(memory >> 9) kB\nMemAvailable:   \(memory >> 10) kB\n".utf8),
            to: facts
        )
        try await lab.startDestination(
            before: Namespace.mount
                + [
                    "sh", "-c",
                    "mount -t tmpfs -o size=\(disk),mode=711 none \(images) && mount --bind \(facts) /proc/meminfo && exec \"$@\"",
                    "sh",
                ],
            more: ["--image-dir", images] + more
        )
    }

    @Test(.enabled(if: geteuid() == 0, "only root says how much memory there is"))
    func twoEvacuationsToOneTargetCannotOverfillIt() async throws {
        let lab = try Lab()
        try await startSmallHost(lab, memory: 1 << 30, disk: "64M")
        let other = try lab.pki.issue("other", hosts: ["other"])
        let targets = [try target(lab, "1-e"), try target(lab, "1-f", as: other)]
        // Each would fit ten times alone; all at once, as fast as they can.
        let outcomes = try await withThrowingTaskGroup(of: (Int, TargetHost.Admission?).self) { group in
            for (index, target) in targets.enumerated() {
                for guest in 0..<10 {
                    let room = room("web\(index)-\(guest)", memory: 100 << 20, allocated: 1 << 20)
                    group.addTask { (index, try await target.reserve(room)) }
                }
            }
            return try await group.reduce(into: []) { $0.append($1) }
        }
        var (grants, reasons) = ([0, 0], [String]())
        for (index, outcome) in outcomes {
            if case .granted? = outcome { grants[index] += 1 } else { reasons.append(try denied(outcome)) }
        }
        #expect(grants[0] + grants[1] == 10 && reasons.count == 10, "\(grants)")
        for reason in reasons {
            #expect(
                reason.contains("1G of memory free (MemAvailable), of which 1000M is promised")
                    && reason.contains("wants 100M"),
                "\(reason)"
            )
        }
        // The disk is the next limit: 10 of 63 MiB are promised.
        let disk = try denied(try await targets[0].reserve(room("big", memory: 1 << 20, allocated: 60 << 20)))
        #expect(
            disk.contains("of disk free") && disk.contains("10M is promised") && disk.contains("wants 60M"),
            "\(disk)"
        )
        // What is reserved is not eaten by an offer by hand, and the guest that it is for comes.
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 2)])
        let byHand = try await lab.migrate()
        #expect(byHand.code == MigrationError.Code.refused.rawValue, "\(byHand.all)")
        #expect(byHand.errors.contains("of memory free (MemAvailable)") && byHand.errors.contains("wants 64M"))
        guard case .reserved(let last)? = try await freed(targets[0], outcomes) else { return }
        let moved = try await move(lab, "web1", reservation: last.id)
        #expect(moved.outcome == .migrated, "\(moved.reason ?? "")")
    }

    /// Gives one reservation back and takes its room for the guest 'web1'.
    private func freed(
        _ target: TargetHost,
        _ outcomes: [(Int, TargetHost.Admission?)]
    ) async throws -> HostMessage.Content? {
        let own = outcomes.first { index, outcome in
            if index == 0, case .granted? = outcome { return true }
            return false
        }
        guard case .granted(let reserved)? = own?.1 else { return nil }
        try await target.release(reserved.id)
        return .reserved(try granted(try await target.reserve(room("web1", allocated: 4 << 20))))
    }

    @Test func onlySoManyGuestsComeAtOnce() async throws {
        let lab = try Lab()
        for name in ["web1", "web2"] {
            let disk = try await lab.makeImage("\(name).raw", megabytes: 48, data: 16)
            try await lab.startIdleGuest(name, disks: [disk])
        }
        try await lab.startDestination(more: ["--most-incoming", "1"])
        let migration = try lab.beginMigration(more: ["--bandwidth", "3000000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        let second = try await lab.migrate("web2")
        #expect(second.code == MigrationError.Code.refused.rawValue, "\(second.all)")
        #expect(second.errors.contains("--most-incoming") && second.errors.contains("try again"), "\(second.all)")
        #expect(try await target(lab).state()?.incoming == 1)
        // What is rehearsed comes later.
        let rehearsed = try await lab.migrate("web2", more: ["--dry-run"])
        #expect(rehearsed.code == 0, "\(rehearsed.all)")
        #expect(try await migration.finish(seconds: 90).code == 0)
        #expect(try await lab.migrate("web2").code == 0)
    }

    // MARK: the cordon

    @Test func aCordonedHostTakesNobodyNewAndSaysWhy() async throws {
        let lab = try Lab()
        for name in ["web1", "web2"] {
            let disk = try await lab.makeImage("\(name).raw", megabytes: 48, data: 16)
            try await lab.startIdleGuest(name, disks: [disk])
        }
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "3000000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        let state = ["--state-dir", lab.state("b")]
        let cordoned = try await lab.crossdock(["cordon", "--message", "new disks\u{1b}[2J"] + state)
        #expect(cordoned.code == 0 && cordoned.output.contains("cordoned by"), "\(cordoned.all)")
        for more in [["--dry-run"], []] {
            let refused = try await lab.migrate("web2", more: more)
            #expect(refused.code == MigrationError.Code.refused.rawValue, "\(refused.all)")
            for word in ["takes no new guests", "cordoned by", " UTC", ": new disks?[2J", "'crossdock uncordon'"] {
                #expect(refused.errors.contains(word), "'\(word)' is not in: \(refused.all)")
            }
        }
        let target = try target(lab)
        #expect(try denied(try await target.reserve(room())).contains("takes no new guests"))
        #expect(try await target.state()?.cordon?.contains("new disks") == true)
        let status = try await lab.crossdock(["status"] + state)
        #expect(status.output.contains("This host takes no new guests, it is cordoned by"), "\(status.all)")
        // What is on its way goes on.
        let finished = try await migration.finish(seconds: 90)
        #expect(finished.code == 0, "\(finished.all)")
        // The next agent knows it, and a file that cannot be read does not open the door.
        try await lab.replaceDestination()
        #expect(try await lab.migrate("web2").code == MigrationError.Code.refused.rawValue)
        try DurableFile.write(Array("{".utf8), to: "\(lab.state("b"))/cordon.json")
        let damaged = try await lab.migrate("web2")
        #expect(
            damaged.code == MigrationError.Code.refused.rawValue && damaged.errors.contains("cordon.json is damaged")
        )
        let uncordoned = try await lab.crossdock(["uncordon"] + state)
        #expect(uncordoned.code == 0 && uncordoned.output.contains("takes guests again"), "\(uncordoned.all)")
        #expect(try await lab.crossdock(["uncordon"] + state).output.contains("was not cordoned"))
        #expect(try await lab.migrate("web2").code == 0)
    }
}
