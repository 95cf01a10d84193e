import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// `crossdock doctor` between two hosts, with real guests: what passes, and each check that fails.
@Suite(.serialized, .timeLimit(.minutes(24)))
struct DoctorEndToEnd {
    private struct Report: Decodable {
        var good: Bool
        var findings: [Finding]

        func failures() -> [Check] { findings.filter { $0.result == .fail }.map(\.check) }
        func of(_ check: Check) -> [Finding] { findings.filter { $0.check == check } }
    }

    private func doctor(
        _ lab: Lab,
        _ host: String? = nil,
        guest: String? = nil,
        credentials: [String]? = nil,
        more: [String] = []
    ) async throws -> Report {
        var words = ["doctor"]
        words += [host ?? "localhost:\(lab.controlPort)"]
        if let guest { words += ["--guest", guest] }
        words += ["--state-dir", lab.state("a"), "--json"] + (credentials ?? lab.credentials()) + more
        let result = try await lab.crossdock(words, seconds: 240)
        guard let report = JSONText.decode(Report.self, from: Array(result.output.utf8)) else {
            throw TestFailure("No report: \(result.all)")
        }
        #expect(result.code == (report.good ? 0 : 24), "\(result.all)")
        return report
    }

    /// What doctor passes must migrate.
    @Test func whatPassesMigrates() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        try await lab.startDestination("a")
        let report = try await doctor(
            lab,
            guest: "web1",
            more: ["--address", "localhost:\(lab.controlPort(of: "a"))", "--measure-disks"]
        )
        #expect(report.good, "\(report.failures())")
        // Both sides speak: their values stand beside each other.
        let space = try #require(report.of(.space).first { $0.guest == nil })
        #expect(space.here?.contains("free") == true && space.there?.contains("free") == true, "\(space)")
        #expect(report.of(.diskRate).first?.there?.hasSuffix("MiB/s") == true)
        #expect(report.of(.ports).count(where: { $0.result == .ok }) == 3, "\(report.of(.ports))")
        #expect(report.of(.machine).first?.guest == "web1")
        #expect(report.of(.announcement).first?.result == .ok)
        #expect(report.of(.mtu).first?.result == .ok && report.of(.clock).contains { $0.here == "within 1 ms" })
        #expect(try lab.leftAtDestination() == [])
        #expect(try await lab.leftAtSource() == [])
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
    }

    /// The table is for people: every failure has a sentence and something to do under it.
    @Test func peopleAreToldWhatToDo() async throws {
        let lab = try Lab()
        let port = try await freePort()
        let result = try await lab.crossdock(
            ["doctor", "localhost:\(port)", "--state-dir", lab.state("a")] + lab.credentials()
        )
        #expect(result.code == 24)
        #expect(result.output.contains("fail: ports: ") && result.output.contains("      do: systemctl status"))
        #expect(result.output.contains("checks fail"))
    }

    @Test func aNameThatLeadsNowhereFails() async throws {
        let lab = try Lab()
        #expect(try await doctor(lab, "nosuch.invalid").failures() == [.name])
    }

    @Test func aPortThatNobodyListensOnFails() async throws {
        let lab = try Lab()
        #expect(try await doctor(lab, "localhost:\(try await freePort())").failures() == [.ports])
    }

    @Test(arguments: ["stranger", "expired"])
    func certificatesThatTheOtherSideRejectsFail(_ kind: String) async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let stranger = try TestPKI()
        let directory =
            kind == "stranger"
            ? stranger.directory : try lab.pki.issue("expired", hosts: ["localhost"], starts: -7200, ends: -60)
        let report = try await doctor(lab, credentials: lab.credentials(directory, ",sanity-check=off"))
        #expect(Set(report.failures()) == [.certificate], "\(report.findings)")
    }

    @Test func aCertificateForAnotherNameFails() async throws {
        let lab = try Lab()
        let other = try lab.pki.issue("other", hosts: ["host-b"])
        try await lab.startDestination(credentials: lab.credentials(other))
        #expect(try await doctor(lab).failures() == [.certificate])
    }

    /// A line that takes small packets and drops large ones, without a word.
    @Test func aLineThatDropsLargePacketsFails() async throws {
        let lab = try Lab()
        try await lab.network(
            "nft 'add table inet hole; add chain inet hole out { type filter hook output priority 0; }; "
                + "add rule inet hole out meta l4proto tcp meta length > 600 drop'"
        )
        try await lab.startDestination()
        let report = try await doctor(lab, "127.0.0.1:\(lab.controlPort)")
        #expect(report.failures() == [.mtu], "\(report.findings)")
    }

    @Test func aHostWhoseNBDPortIsClosedFails() async throws {
        let lab = try Lab()
        let nbd = try await freePort()
        try await lab.network(
            "nft 'add table inet wall; add chain inet wall in { type filter hook input priority 0; }; "
                + "add rule inet wall in tcp dport \(nbd) reject with tcp reset'"
        )
        try await lab.startDestination(ports: (0, nbd))
        let report = try await doctor(lab, "127.0.0.1:\(lab.controlPort)")
        #expect(report.failures() == [.ports], "\(report.findings)")
        #expect(report.of(.ports).last?.there == "\(nbd)")
    }

    /// Guests can leave, and would not come home.
    @Test func aWayBackThatIsClosedIsAWarning() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let report = try await doctor(lab, more: ["--address", "localhost:\(try await freePort())"])
        #expect(report.good)
        #expect(report.of(.ports).contains { $0.result == .warn && $0.message?.contains("The way back") == true })
        // Nobody has it connect to another host.
        let elsewhere = try await doctor(lab, more: ["--address", "192.0.2.1"])
        #expect(elsewhere.of(.name).contains { $0.message?.contains("not where the question came from") == true })
    }

    @Test func aCordonedHostFails() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        #expect(try await lab.crossdock(["cordon", "--state-dir", lab.state("b"), "--message", "work"]).code == 0)
        let report = try await doctor(lab)
        #expect(report.failures() == [.agent])
        #expect(report.findings.contains { $0.message?.contains("work") == true })
    }

    @Test func aFullImageDirectoryFails() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 40)
        try await lab.startIdleGuest(disks: [disk])
        let images = lab.directory.directory("small")
        try await lab.startDestination(images: images, mounting: "mount -t tmpfs -o size=8m none \(images)")
        let report = try await doctor(lab, guest: "web1")
        #expect(Set(report.failures()) == [.space])
        #expect(report.failures().count == 2, "the host's, and the guest's: \(report.findings)")
    }

    // MARK: guests

    /// Something about a guest or the other host, and the check that fails for it.
    struct Trouble: Sendable, CustomStringConvertible {
        var description: String
        var check: Check
        /// What the guest has in addition.
        var guest: [String] = []
        /// What the destination has in addition.
        var destination: [String] = []
        /// A sed expression over the arguments of QEMU at the destination, one a line.
        var edit: String?
        /// What QEMU at the destination has in addition.
        var extra = ""
    }

    private static let troubles = [
        Trouble(
            description: "a processor feature less",
            check: .processor,
            guest: ["-cpu", "qemu64,+aes"],
            edit: "s/,aes=on/,aes=off/"
        ),
        Trouble(
            description: "a device more",
            check: .machine,
            edit: "",
            extra: "-device virtio-rng-pci,addr=1e.0"
        ),
        Trouble(
            description: "a display on an address that is not allowed",
            check: .network,
            guest: ["-vnc", "0.0.0.0:DISPLAY"]
        ),
        Trouble(
            description: "a forwarding from a port that is taken",
            check: .listeners,
            guest: ["-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:PORT-:22", "-device", "virtio-net-pci,netdev=n0"]
        ),
        Trouble(
            description: "more memory than one source may have",
            check: .policy,
            destination: ["--most-memory", "32M"]
        ),
    ]

    @Test(arguments: troubles)
    func whatTheRehearsalFindsFailsItsCheck(_ trouble: Trouble) async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let port = try await freePort()
        let more = trouble.guest.map {
            $0.replacing("PORT", with: "\(port)").replacing("DISPLAY", with: "\(port - 5900)")
        }
        try await lab.startIdleGuest(disks: [disk], more: more)
        var environment: [String: String] = [:]
        if let edit = trouble.edit {
            let arguments = lab.directory.file("arguments")
            let script = """
                case "$*" in *"-machine none"*) exec /usr/bin/qemu-system-x86_64 "$@";; esac
                printf '%s\\n' "$@" | sed -e '\(edit)' >\(arguments)
                set --
                while IFS= read -r word; do set -- "$@" "$word"; done <\(arguments)
                exec /usr/bin/qemu-system-x86_64 "$@" \(trouble.extra)
                """
            environment["PATH"] = try lab.makeEmulator(script)
        }
        try await lab.startDestination(
            environment: environment,
            more: trouble.destination + (trouble.edit == nil ? [] : ["--no-confinement"])
        )
        let report = try await doctor(lab, guest: "web1")
        #expect(Set(report.failures()) == [trouble.check], "\(report.findings.filter { $0.result != .ok })")
        let found = try #require(report.of(trouble.check).first { $0.result == .fail })
        #expect(found.guest == "web1" && found.message != nil && found.remedy != nil)
        #expect(try lab.leftAtDestination() == [])
    }

    @Test func anotherGuestOfTheNameFails() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        let other = try await lab.makeImage("other.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(on: "b", disks: [other])
        #expect(try await doctor(lab, guest: "web1").failures() == [.leftovers])
    }

    @Test func aHardLinkOfAnImageFails() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        #expect(link(disk, lab.directory.file("second.raw")) == 0)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        #expect(try await doctor(lab, guest: "web1").failures() == [.files])
    }

    @Test func aBlockJobOfSomebodyElseFails() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 40)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        let target = lab.directory.file("backup.raw")
        try await lab.monitor("a") {
            _ = try await $0.execute(
                "drive-backup",
                ["device": "virtio0", "target": .string(target), "sync": "full", "format": "raw", "speed": 65536]
            )
        }
        #expect(try await doctor(lab, guest: "web1").failures() == [.blockers])
    }

    @Test func aDeviceOfThisHostFails() async throws {
        let lab = try Lab()
        let monitor = lab.directory.file("foreign.sock")
        let shared = lab.directory.directory("shared")
        let guest = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-fsdev",
            "local,id=f0,path=\(shared),security_model=none", "-device", "virtio-9p-pci,fsdev=f0,mount_tag=t",
        ])
        let adopted = try await lab.crossdock([
            "guest", "adopt", "web1", "--state-dir", lab.state("a"), "--qmp", monitor,
        ])
        #expect(adopted.code == 0, "\(adopted.all)")
        try await lab.startDestination()
        #expect(try await doctor(lab, guest: "web1").failures().contains(.devices))
        #expect(guest.isRunning)
    }

    @Test func aGuestThatTellsNoSwitchIsAWarning() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        try await lab.monitor("a") { _ = try await $0.execute("migrate-set-parameters", ["announce-rounds": 0]) }
        let report = try await doctor(lab, guest: "web1")
        #expect(report.good && report.of(.announcement).first?.result == .warn, "\(report.findings)")
    }

    @Test func aHostWithoutQEMUFails() async throws {
        let lab = try Lab()
        try await lab.startDestination(environment: ["PATH": lab.directory.directory("empty")])
        #expect(try await doctor(lab).failures() == [.programs])
    }

    @Test func aGuestThatIsNotThereFails() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        #expect(try await doctor(lab, guest: "nobody").failures() == [.rehearsal])
    }

    /// An agent of an earlier release does not know the question.
    @Test func anEarlierReleaseIsAWarning() async throws {
        let lab = try Lab()
        try await lab.startDestination(program: PreviousReleaseEndToEnd.program)
        let report = try await doctor(lab)
        #expect(report.good, "\(report.findings)")
        #expect(report.of(.agent).contains { $0.there == "an earlier release" })
    }
}
