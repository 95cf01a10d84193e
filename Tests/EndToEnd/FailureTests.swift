import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// Bad input and faults: one clear message, the documented code, the guest running on the source, nothing left behind.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct FailureTests {
    /// A lab with an idle guest of one disk.
    func makeLab(data: Int = 8) async throws -> Lab {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 64, data: data)])
        return lab
    }

    func expectRefusal(
        _ lab: Lab,
        _ result: ToolResult,
        code: MigrationError.Code,
        _ words: [String],
        images: String? = nil
    ) async throws {
        #expect(result.code == code.rawValue, "\(result.all)")
        for word in words { #expect(result.errors.contains(word), "'\(word)' is not in: \(result.all)") }
        #expect(try await lab.leftAtSource() == [])
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination(images: images) == [] }
    }

    /// One state directory has one agent: what follows one that ends waits for it, and one that goes on is named.
    @Test func anAgentFollowsOneThatEndsAndNamesOneThatDoesNot() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let first = try #require(lab.destination)
        let command = [
            Lab.crossdock, "destination", "--state-dir", lab.state("b"), "--listen", "127.0.0.1:0", "--nbd-listen",
            "127.0.0.1:0", "--guest-network", "host",
        ]
        async let refused = lab.crossdock(Array(command.dropFirst()) + lab.credentials())
        let (result, follower) = (try await refused, try ChildProcess(command + lab.credentials()))
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(
            result.errors.contains("Another destination agent, process \(first.pid), uses the state directory"),
            "\(result.all)"
        )
        try await follower.wait(for: "the follower's sentence") { follower.errors.contains("waiting up to 10 s") }
        #expect(!follower.output.contains("listening on"))
        first.signal(SIGKILL)
        try await follower.wait(for: "the follower's turn") { follower.output.contains("listening on") }
        follower.signal(SIGTERM)
        #expect(try await follower.finish().code == 0)
    }

    @Test func aCertificateOfAnotherAuthority() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        let other = try TestPKI()
        let result = try await lab.migrate(credentials: lab.credentials(other.directory))
        try await expectRefusal(lab, result, code: .security, ["not signed by the certificate authority"])
    }

    @Test func anExpiredCertificateOfOurOwn() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        let expired = try lab.pki.issue("expired", hosts: ["localhost"], starts: -7200, ends: -3600)
        let early = try await lab.migrate(credentials: lab.credentials(expired))
        try await expectRefusal(lab, early, code: .security, ["\(expired)/client-cert.pem has expired"])
        // Without the check at load time it is the peer that refuses.
        let late = try await lab.migrate(credentials: lab.credentials(expired, ",sanity-check=off"))
        try await expectRefusal(lab, late, code: .security, ["expired", expired])
    }

    @Test func anExpiredCertificateOfTheDestination() async throws {
        let lab = try await makeLab()
        let expired = try lab.pki.issue("expired", hosts: ["localhost"], starts: -7200, ends: -3600)
        let refused = try await lab.crossdock(
            ["destination", "--state-dir", lab.state("b"), "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0"]
                + lab.credentials(expired)
        )
        #expect(refused.code == 12 && refused.errors.contains("server-cert.pem has expired"), "\(refused.all)")
        try await lab.startDestination(credentials: lab.credentials(expired, ",sanity-check=off"))
        let result = try await lab.migrate()
        try await expectRefusal(lab, result, code: .security, ["its certificate was rejected", "expired"])
    }

    @Test func aHostNameThatTheCertificateIsNotFor() async throws {
        let lab = try await makeLab()
        let other = try lab.pki.issue("other", hosts: ["host-b.example"])
        try await lab.startDestination(credentials: lab.credentials(other))
        let result = try await lab.migrate()
        try await expectRefusal(lab, result, code: .security, ["does not match the host name 'localhost'"])
    }

    @Test func nobodyListening() async throws {
        let lab = try await makeLab()
        let port = try await lab.startDestination()
        lab.destination?.signal(SIGTERM)
        _ = try await lab.destination?.finish()
        let result = try await lab.migrate(port: port)
        try await expectRefusal(lab, result, code: .unreachable, ["localhost:\(port)", "Connection refused"])
    }

    @Test func anUnknownHost() async throws {
        let lab = try await makeLab()
        let result = try await lab.migrate(host: "no-such-host.invalid", port: 10808)
        try await expectRefusal(lab, result, code: .unreachable, ["Cannot resolve host 'no-such-host.invalid'"])
    }

    @Test func thePortOfAnotherProtocol() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        let result = try await lab.migrate(port: lab.nbdPort)
        try await expectRefusal(lab, result, code: .unreachable, ["does not speak TLS", "check the port"])
    }

    @Test func aTLSServerThatIsNoDestinationAgent() async throws {
        let lab = try await makeLab()
        let pki = lab.pki.directory
        let port = try await lab.startDestination()
        lab.destination?.signal(SIGTERM)
        _ = try await lab.destination?.finish()
        let server = try ChildProcess([
            "openssl", "s_server", "-accept", "\(port)", "-cert", "\(pki)/server-cert.pem", "-key",
            "\(pki)/server-key.pem", "-CAfile", "\(pki)/ca-cert.pem", "-www",
        ])
        try await server.wait(for: "openssl") { server.output.contains("ACCEPT") }
        let result = try await lab.migrate(port: port)
        try await expectRefusal(
            lab,
            result,
            code: .unreachable,
            ["localhost:\(port)", "does not answer as a destination agent"]
        )
    }

    @Test func aFullImageDirectory() async throws {
        let lab = try await makeLab()
        let images = lab.directory.directory("small")
        try await lab.startDestination(images: images, mounting: "mount -t tmpfs -o size=2M none \(images)")
        let result = try await lab.migrate()
        try await expectRefusal(
            lab,
            result,
            code: .refused,
            [images, "free, the disks need at least"],
            images: images
        )
    }

    @Test func anImageDirectoryThatFillsUpDuringTheCopy() async throws {
        let lab = try Lab()
        // The link takes seconds for the disk. There is room for it at the check; then somebody else takes the room.
        try await lab.throttle("40mbit")
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 64, data: 32)])
        let images = lab.directory.directory("small")
        try await lab.startDestination(images: images, mounting: "mount -t tmpfs -o size=48M none \(images)")
        let migration = try lab.beginMigration(more: ["--patience", "2s"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        guard let agent = lab.destination?.pid else { return }
        let filled = try await Tool.run(
            Namespace.enter(agent) + ["sh", "-c", "head -c 30M /dev/zero > \(images)/somebody-elses-file; true"]
        )
        #expect(filled.code == 0, "\(filled.all)")
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(result.errors.contains("No space left on device"), "\(result.all)")
        #expect(try await lab.leftAtSource() == [])
    }

    @Test func anImageDirectoryThatCannotBeWritten() async throws {
        let lab = try await makeLab()
        let images = lab.directory.directory("frozen")
        try await lab.startDestination(
            images: images,
            mounting: "mount --bind \(images) \(images) && mount -o remount,bind,ro \(images)"
        )
        let result = try await lab.migrate()
        try await expectRefusal(
            lab,
            result,
            code: .refused,
            ["Cannot write the image directory \(images)", "Read-only file system"],
            images: images
        )
    }

    @Test func moreDisksThanThereAreDescriptorsForAreRefusedByEitherSide() async throws {
        let lab = try Lab()
        var disks: [String] = []
        for index in 0..<24 { disks.append(try await lab.makeImage("disk\(index).raw", megabytes: 1, data: 0)) }
        try await lab.startIdleGuest(disks: disks)
        try await lab.startDestination(before: ["prlimit", "--nofile=128:128"])
        let there = try await lab.migrate()
        let words = ["24 disks with 4 connections each take about", "of at most 128 in use", "LimitNOFILE="]
        try await expectRefusal(lab, there, code: .refused, ["The destination agent: "] + words)
        lab.prefix = ["prlimit", "--nofile=128:128"]
        let here = try await lab.migrate()
        try await expectRefusal(lab, here, code: .guest, ["The source agent: ", "or take fewer --connections"] + words)
    }

    @Test func aDiskWithAnExternalSnapshotIsNamedWithWhatIsOnTopOfIt() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        let above = lab.directory.file("above.qcow2")
        try await lab.monitor("a") { monitor in
            _ = try await monitor.execute(
                "blockdev-snapshot-sync",
                ["device": "virtio0", "snapshot-file": .string(above), "format": "qcow2"]
            )
        }
        let result = try await lab.migrate()
        let words = ["is under \(above) since an external snapshot", "'block-commit' with the device 'virtio0'"]
        try await expectRefusal(lab, result, code: .guest, words)
    }

    @Test func anUnknownGuest() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        let result = try await lab.migrate("nobody")
        try await expectRefusal(lab, result, code: .guest, ["no guest 'nobody'", "web1"])
        #expect(DurableFile.list("\(lab.state("a"))/migrations").isEmpty)
    }

    /// A guest that is off moves; one that nobody here can start does not.
    @Test func aGuestThatDoesNotRunAndCannotBeStartedHere() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        #expect(try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")]).code == 0)
        let stopped = try #require(try lab.guests("a").load("web1"))
        var locked = stopped
        locked.secrets = ["key"]
        try lab.guests("a").save(locked)
        let secret = try await lab.migrate()
        #expect(
            secret.code == MigrationError.Code.guest.rawValue
                && secret.errors.contains("its secrets (key) are kept nowhere"),
            "\(secret.all)"
        )
        var foreign = stopped
        foreign.adopted = lab.directory.file("qmp.sock")
        try lab.guests("a").save(foreign)
        let result = try await lab.migrate()
        #expect(
            result.code == MigrationError.Code.guest.rawValue && result.errors.contains("started by something else"),
            "\(result.all)"
        )
        try lab.guests("a").save(stopped)
        #expect(try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")]).code == 0)
        #expect(try await lab.leftAtSource() == [])
    }

    @Test func noQEMUOnTheDestination() async throws {
        let lab = try await makeLab()
        try await lab.startDestination(environment: ["PATH": lab.directory.directory("empty")])
        let result = try await lab.migrate()
        try await expectRefusal(lab, result, code: .refused, ["'qemu-system-x86_64' is not installed on this host"])
    }

    @Test func aQEMUThatDoesNotKnowTheMachineType() async throws {
        let lab = try await makeLab()
        let programs = lab.directory.directory("programs")
        // Debian's other build of QEMU for this processor has the microvm machine only.
        #expect(symlink("/usr/bin/qemu-system-x86_64-microvm", "\(programs)/qemu-system-x86_64") == 0)
        try await lab.startDestination(environment: ["PATH": programs])
        let result = try await lab.migrate()
        try await expectRefusal(lab, result, code: .refused, ["does not know the machine type 'pc-i440fx-"])
    }

    @Test func aGuestOfThatNameOnTheDestinationIsLeftAlone() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        let image = try await lab.makeImage("other.raw", megabytes: 1, data: 0)
        let started = try await lab.crossdock(
            [
                "guest", "start", "web1", "--state-dir", lab.state("b"), "--", "qemu-system-x86_64", "-machine",
                "pc,accel=tcg",
            ]
                + ["-nodefaults", "-display", "none", "-drive", "file=\(image),format=raw"]
        )
        #expect(started.code == 0, "\(started.all)")
        let result = try await lab.migrate()
        #expect(result.code == MigrationError.Code.refused.rawValue, "\(result.all)")
        #expect(result.errors.contains("A guest 'web1' runs on this host already"))
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
        #expect(try await lab.leftAtSource() == [])
    }

    /// Of a speed that is given for all disks of a guest, the last one that is copied has what the others do not need.
    @Test func theLastDiskGetsWhatTheOthersDoNotNeed() async throws {
        let lab = try Lab()
        let small = try await lab.makeImage("small.raw", megabytes: 16, data: 2)
        let large = try await lab.makeImage("large.raw", megabytes: 64, data: 64)
        try await lab.startIdleGuest(disks: [small, large])
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "2M"])
        var most: Int64 = 0
        try await eventually(seconds: 60, "the other disk gets more") {
            let jobs = try await lab.monitor("a") { try await $0.execute("query-block-jobs").array }
            let speeds = jobs.compactMap { $0["speed"]?.integer }
            #expect(speeds.reduce(0, +) <= 2 << 20, "\(speeds)")
            most = max(most, speeds.max() ?? 0)
            return most > 3 << 19
        }
        migration.signal(SIGINT)
        #expect(try await migration.finish().code == MigrationError.Code.cancelled.rawValue)
        #expect(try await lab.leftAtSource() == [])
    }

    @Test func aSecondMigrationOfTheSameGuestAndAnInterruptedFirstOne() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination()
        let first = try lab.beginMigration(more: ["--bandwidth", "1000000"])
        try await first.wait(for: "the copy") { first.output.contains("copying disks") }
        let second = try await lab.migrate()
        #expect(second.code == MigrationError.Code.busy.rawValue, "\(second.all)")
        #expect(second.errors.contains("is being migrated already"))
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        #expect(status.output.contains("migrating"), "\(status.all)")
        first.signal(SIGINT)
        let result = try await first.finish()
        try await expectRefusal(lab, result, code: .cancelled, ["rolling back", "stays on this host"])
    }

    @Test func theDestinationAgentIsKilledDuringTheCopy() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000", "--patience", "2s"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        lab.destination?.signal(SIGKILL)
        let result = try await migration.finish()
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(result.errors.contains("lost") && result.errors.contains("stays on this host"), "\(result.all)")
        #expect(try await lab.leftAtSource() == [])
        // A killed agent cannot clean up; the next one does, when the source does not come back. Until then the copy is nobody's to start.
        try await eventually("the destination's QEMU is all that is left") {
            lab.guests("b").names() == ["web1"]
        }
        let early = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("b")])
        #expect(early.code == 10 && early.errors.contains("is arriving from"), "\(early.all)")
        try await lab.startDestination(more: ["--patience", "1s"])
        try await eventually("the next agent has cleaned up") { try lab.leftAtDestination() == [] }
        #expect(try await lab.migrate().code == 0)
    }

    @Test func theDestinationsQEMUIsKilledDuringTheCopy() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        let first = try lab.guests("b").load("web1")?.process
        first?.signal(SIGKILL)
        // It has nothing yet; another one takes the memory.
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        #expect(try lab.guests("b").load("web1")?.process != first)
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    @Test func aDestinationWhoseQEMUTakesNoMemoryGetsItAgain() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.startDestination()
        try await lab.startLinuxGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 32, data: 4)])
        let migration = try lab.beginMigration(more: ["--bandwidth", "8M", "--patience", "3s"])
        // With a percentage: QEMU has begun to take it.
        try await migration.wait(for: "the memory") { migration.output.contains("sending memory  ") }
        let first = try #require(try lab.guests("b").load("web1")?.process)
        first.signal(SIGSTOP)
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0 && result.errors.contains("has taken no memory for 5 s"), "\(result.all)")
        #expect(try lab.guests("b").load("web1")?.process != first)
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    @Test func theSourcesQEMUIsKilledDuringTheCopy() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        try lab.guests("a").load("web1")?.process?.signal(SIGKILL)
        let result = try await migration.finish()
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(result.errors.contains("ended or closed its monitor"), "\(result.all)")
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
    }

    @Test func aWatchdogThatIsKilledDuringTheCopyIsReplacedAndTheNextOneCleansUp() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination(more: ["--patience", "1s"])
        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000"])
        try await migration.wait(for: "the copy") { try await lab.monitor("a") { try await $0.hasJobs } }
        func watchdogs() -> [Int32] {
            Lab.processes(containing: "source-watchdog").filter { $0.line.contains(lab.state("a")) }.map(\.pid)
        }
        let first = watchdogs()
        #expect(first.count == 1)
        for pid in first { kill(pid, SIGKILL) }
        try await migration.wait(for: "another watchdog") {
            migration.errors.contains("starting another one") && watchdogs().contains { !first.contains($0) }
        }
        try lab.sourceAgent().signal(SIGKILL)
        let result = try await migration.finish()
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        try await eventually("the second watchdog has rolled back") {
            try await lab.crossdock(["status", "--state-dir", lab.state("a")]).output.contains("rolled back")
        }
        #expect(try await lab.leftAtSource() == [])
        // Nobody knows what the agent had counted.
        let id = DurableFile.list("\(lab.state("a"))/migrations").first ?? ""
        #expect(try lab.report("\(lab.state("a"))/migrations/\(id)/report.json").isRecovered == true)
    }

    /// Both processes that know of the migration die; only the journal is left.
    @Test func theSourceAgentAndItsWatchdogAreKilledDuringTheCopyAndRecoverCleansUp() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination(more: ["--patience", "1s"])
        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000"])
        try await migration.wait(for: "the copy") { try await lab.monitor("a") { try await $0.hasJobs } }
        let watchdogs = Lab.processes(containing: "source-watchdog").filter { $0.line.contains(lab.state("a")) }
        #expect(watchdogs.count == 1)
        // An agent that is awake starts another one at once.
        let agent = try lab.sourceAgent()
        agent.signal(SIGSTOP)
        for watchdog in watchdogs { kill(watchdog.pid, SIGKILL) }
        agent.signal(SIGKILL)
        let result = try await migration.finish()
        #expect(result.code == MigrationError.Code.failed.rawValue, "\(result.all)")
        #expect(result.errors.contains("The guest belongs to this host; 'crossdock recover"), "\(result.all)")
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        #expect(status.output.contains("interrupted") && status.output.contains("crossdock recover"), "\(status.all)")
        let recovered = try await lab.crossdock(["recover", "--state-dir", lab.state("a")])
        #expect(recovered.code == 0 && recovered.output.contains("belongs to this host"), "\(recovered.all)")
        #expect(try await lab.leftAtSource() == [])
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
        let again = try await lab.migrate()
        #expect(again.code == 0, "\(again.all)")
    }

    /// The agent died after RELEASED was durable and before OWNED came: only the destination can say what is true.
    @Test func aReleaseThatWasNotConfirmedIsFinishedByRecover() async throws {
        let lab = try await makeLab()
        try await lab.startDestination()
        #expect(try await lab.migrate().code == 0)
        let id = DurableFile.list("\(lab.state("a"))/migrations").first ?? ""
        let journal = MigrationStore(stateDirectory: lab.state("a")).journal(of: id)
        try Lab.forgetLastRecord(of: journal)
        #expect(try Journal.read(journal).last == .released)
        let status = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
        #expect(status.output.contains("undecided"), "\(status.all)")
        let start = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(start.code == 10, "\(start.all)")
        let recovered = try await lab.crossdock(["recover", "--state-dir", lab.state("a")])
        #expect(recovered.code == 0 && recovered.output.contains("belongs to localhost"), "\(recovered.all)")
        #expect(try Journal.read(journal).last == .confirmed)
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
        let nothing = try await lab.crossdock(["recover", "--state-dir", lab.state("a")])
        #expect(nothing.output.contains("nothing to recover"), "\(nothing.all)")
    }

    @Test func theDestinationAgentIsStoppedDuringTheCopy() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        lab.destination?.signal(SIGTERM)
        let result = try await migration.finish()
        try await expectRefusal(lab, result, code: .failed, ["stays on this host"])
        #expect(try await lab.destination?.finish().code == 0)
    }

    @Test func theDestinationsExportsAnswerTheUsualToolsOverTLSOnly() async throws {
        let lab = try await makeLab(data: 32)
        try await lab.startDestination()
        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        let id = DurableFile.list("\(lab.state("a"))/migrations").first ?? ""
        let uri = "nbds://localhost:\(lab.nbdPort)/\(id)/disk0?tls-certificates=\(lab.pki.directory)"
        let info = try await Tool.run(["nbdinfo", "--json", uri])
        #expect(info.output.contains(#""export-size": 67108864"#), "\(info.all)")
        let copy = try await Tool.run(["nbdcopy", uri, "null:"])
        #expect(copy.code == 0, "\(copy.all)")
        let target =
            "driver=nbd,server.type=inet,server.host=localhost,server.port=\(lab.nbdPort),export=\(id)/disk0,tls-creds=tls0"
        let object = "tls-creds-x509,id=tls0,endpoint=client,dir=\(lab.pki.directory)"
        let image = lab.directory.file("copy.raw")
        let convert = try await Tool.run([
            "qemu-img", "convert", "--object", object, "--image-opts", target, "-O", "raw", image,
        ])
        #expect(convert.code == 0, "\(convert.all)")
        let io = try await Tool.run([
            "qemu-io", "--object", object, "-r", "-c", "read -P 0 0 64k", "--image-opts", target,
        ])
        #expect(io.code == 0 && !io.all.contains("failed"), "\(io.all)")
        let plain = try await Tool.run(["nbdinfo", "nbd://localhost:\(lab.nbdPort)/\(id)/disk0"])
        #expect(plain.code != 0 && plain.all.contains("TLS"), "\(plain.all)")
        // Another identity of the same authority does not see the export.
        let other = try lab.pki.issue("other", hosts: ["other"])
        let foreign = try await Tool.run([
            "nbdinfo", "nbds://localhost:\(lab.nbdPort)/\(id)/disk0?tls-certificates=\(other)",
        ])
        #expect(foreign.code != 0, "\(foreign.all)")
        migration.signal(SIGINT)
        try await expectRefusal(lab, try await migration.finish(), code: .cancelled, [])
    }

    @Test func closingTheTerminalDoesNotEndTheMigration() async throws {
        let lab = try await makeLab(data: 16)
        try await lab.startDestination()
        let command = try lab.beginMigration(more: ["--bandwidth", "8000000"])
        try await command.wait(for: "the copy") { command.output.contains("copying disks") }
        command.signal(SIGKILL)
        _ = try await command.finish()
        try await eventually(seconds: 60, "the guest runs on the destination") {
            let list = try await lab.crossdock(["status", "--state-dir", lab.state("a")])
            return list.output.contains("migrated")
        }
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }
}
