import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// Guests whose networks are taps in bridges of their host, which are called otherwise on the other one.
@Suite(
    .serialized,
    .timeLimit(.minutes(10)),
    .enabled(if: geteuid() == 0 && access("/dev/net/tun", R_OK | W_OK) == 0, "only root makes taps")
)
struct NetworkEndToEnd {
    private static let address = "52:54:00:12:34:77"

    /// A lab with a bridge for each host, and a tap in that of host a.
    private static func lab(_ more: String = "true") async throws -> Lab {
        let lab = try Lab()
        let bridges = ["br-a", "br-b"].map { "ip link add \($0) type bridge forward_delay 0 && ip link set \($0) up" }
        try await lab.network(
            bridges.joined(separator: " && ")
                + " && ip tuntap add tap7 mode tap && ip link set tap7 master br-a up && \(more)"
        )
        return lab
    }

    private static func card(_ netdev: String) -> [String] {
        ["-device", "virtio-net-pci,netdev=n0,rombar=0,mac=\(address)", "-netdev", netdev]
    }

    private static let usual = card("tap,id=n0,ifname=tap7,script=no,downscript=no")

    private func run(_ lab: Lab, _ words: String...) async throws -> String {
        let result = try await Tool.run(lab.prefix + words)
        guard result.code == 0 else { throw TestFailure(result.all) }
        return result.output
    }

    /// The taps that are ports of a bridge, in the words of `ip`.
    private func ports(_ lab: Lab, of bridge: String) async throws -> [String] {
        try await run(lab, "ip", "-o", "-d", "link", "show", "master", bridge).split(separator: "\n").map(String.init)
    }

    private func expectRefused(_ result: ToolResult, _ code: MigrationError.Code = .refused, _ words: String...) {
        #expect(result.code == code.rawValue, "\(result.all)")
        for one in words { #expect(result.errors.contains(one), "'\(one)' is not in: \(result.all)") }
    }

    @Test func aTapIsMadeInTheBridgeThatIsNamedAndRemovedWithTheGuestAlsoOnTheWayBack() async throws {
        let lab = try await Self.lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk], more: Self.usual)
        try await lab.startDestination(more: ["--allow-bridge", "br-b"])
        try await lab.startDestination("a", more: ["--allow-bridge", "br-a"])
        let look = try await lab.migrate(more: ["--dry-run", "--network", "br-a=br-b"])
        #expect(look.code == 0, "\(look.all)")
        #expect(look.output.contains("network tap7: a tap interface is made in the bridge br-b"), "\(look.all)")
        #expect(try await ports(lab, of: "br-b") == [])

        let away = try await lab.migrate(more: ["--network", "tap7=br-b"])
        #expect(away.code == 0, "\(away.all)")
        // The name is taken here: both hosts are this one.
        let record = try #require(try lab.guests("b").load("web1"))
        #expect(
            record.taps == [
                .init(name: "xdtap0", bridge: "br-b", hasQueues: false, former: .init(tap: "tap7", bridge: "br-a"))
            ]
        )
        let port = try #require(try await ports(lab, of: "br-b").first)
        #expect(
            port.contains(": xdtap0:") && port.contains("LOWER_UP") && port.contains("alias crossdock guest web1"),
            "\(port)"
        )
        let user = try #require(record.confinement?.policy.user)
        #expect(Lab.guestUsers.contains(user) && port.contains("user \(user)"), "\(port)")
        // What the guest announced has come through the bridge.
        try await eventually("the bridge knows where the guest is") {
            try await self.run(lab, "bridge", "fdb", "show", "br", "br-b").contains("\(Self.address) dev xdtap0")
        }
        // A stop takes the tap with it, and a start makes it again.
        for (words, count) in [(["stop", "--force"], 0), (["start"], 1)] {
            let done = try await lab.crossdock(["guest"] + words + ["web1", "--state-dir", lab.state("b")])
            #expect(done.code == 0, "\(done.all)")
            #expect(try await ports(lab, of: "br-b").count == count)
        }

        // At home the tap is there still, and is nobody's: it is used, and stays.
        let home = try await lab.migrate(from: "b", port: lab.controlPort(of: "a"), more: ["--network", "br-b=br-a"])
        #expect(home.code == 0, "\(home.all)")
        #expect(try await ports(lab, of: "br-b") == [])
        let again = try await lab.migrate(more: ["--network", "br-a=br-b"])
        #expect(again.code == 0, "\(again.all)")
        #expect(try await ports(lab, of: "br-b").count == 1)
    }

    /// A bridge that looks for loops passes nothing on for a while. A guest that was paused then would be announced to nobody.
    @Test func whatTheGuestAnnouncesPassesThroughABridgeThatWaitsWithNewPorts() async throws {
        let lab = try await Self.lab(
            [
                "ip link set br-b type bridge stp_state 1 forward_delay 200", "ip link add v0 type veth peer name v1",
                "ip link add br-c type bridge forward_delay 0", "ip link set v0 master br-b",
                "ip link set v1 master br-c", "ip link set v0 up", "ip link set v1 up", "ip link set br-c up",
            ].joined(separator: " && ")
        )
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk], more: Self.usual)
        try await lab.startDestination(more: ["--allow-bridge", "br-b"])
        try await eventually("the way to the neighbour is open") {
            try await self.run(lab, "bridge", "link", "show", "dev", "v0").contains("state forwarding")
        }
        let away = try await lab.migrate(more: ["--network", "br-a=br-b"])
        #expect(away.code == 0, "\(away.all)")
        try await eventually("the neighbour knows where the guest is") {
            try await self.run(lab, "bridge", "fdb", "show", "br", "br-c").contains("\(Self.address) dev v1")
        }
    }

    @Test func whatIsNotThereOrNotAllowedIsRefusedBeforeAnythingIsMade() async throws {
        let lab = try await Self.lab("ip link add br-down type bridge")
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk], more: Self.usual)
        try await lab.startDestination(more: ["--allow-bridge", "all"])
        try await lab.startDestination("c")
        for more in [["--dry-run"], []] {
            expectRefused(
                try await lab.migrate(more: more + ["--network", "br-a=br9"]),
                .refused,
                "The network bridge 'br9' is not there on this host"
            )
            expectRefused(
                try await lab.migrate(more: more + ["--network", "br-a=br-down"]),
                .refused,
                "The network bridge 'br-down' is down on this host"
            )
            expectRefused(
                try await lab.migrate(port: lab.controlPort(of: "c"), more: more + ["--network", "br-a=br-b"]),
                .refused,
                "The bridge 'br-b' is not one in which this host makes tap interfaces for guests",
                "--allow-bridge br-b allows it"
            )
            expectRefused(
                try await lab.migrate(more: more + ["--network", "br-x=br-b"]),
                .guest,
                "Guest 'web1' has no network 'br-x' for --network; it has tap7 (in the bridge br-a)"
            )
        }
        for wrong in [["br-a"], ["=br-b"], ["br-a="], ["br-a=br/b"], ["br-a=br-b", "br-a=br-c"]] {
            let result = try await lab.migrate(more: wrong.flatMap { ["--network", $0] })
            #expect(result.code == 64 && result.errors.contains("--network"), "\(result.all)")
        }
        #expect(try await ports(lab, of: "br-b") == [])
        #expect(try await lab.leftAtSource() == [])
    }

    @Test func aMoveThatIsGivenUpLeavesNoTap() async throws {
        let lab = try await Self.lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 32)
        try await lab.startIdleGuest(disks: [disk], more: Self.usual)
        try await lab.startDestination(more: ["--allow-bridge", "br-b"])
        let move = try lab.beginMigration(more: ["--network", "br-a=br-b", "--bandwidth", "1M"])
        try await eventually(seconds: 60, "the tap is made") { try await self.ports(lab, of: "br-b").count == 1 }
        move.signal(SIGINT)
        _ = try await move.finish()
        #expect(try await ports(lab, of: "br-b") == [])
        #expect(try await ports(lab, of: "br-a").count == 1)
        #expect(try await lab.leftAtSource() == [])
        #expect(try lab.leftAtDestination() == [])
    }

    @Test func aGuestWhoseTapIsMadeByAScriptMovesToABridge() async throws {
        let lab = try await Self.lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let script = lab.directory.file("ifup")
        try DurableFile.write(
            Array("#!/bin/sh\nexec ip link set \"$1\" master br-a up\n".utf8),
            to: script,
            mode: 0o755
        )
        try await lab.startIdleGuest(disks: [disk], more: Self.card("tap,id=n0,script=\(script),downscript=no"))
        try await lab.startDestination(more: ["--allow-bridge", "br-b"])
        expectRefused(
            try await lab.migrate(more: ["--dry-run"]),
            .guest,
            "runs a script of this host, which the other one does not have; --network tap0=BRIDGE"
        )
        let moved = try await lab.migrate(more: ["--network", "br-a=br-b"])
        #expect(moved.code == 0, "\(moved.all)")
        #expect(try await ports(lab, of: "br-b").count == 1)
        let line = try #require(try lab.guests("b").load("web1")?.commandLine.arguments.joined(separator: " "))
        #expect(line.contains("script=no,downscript=no") && !line.contains(script), "\(line)")
    }

    @Test func aGuestThatIsAskedForComesHomeToTheNetworkThatItHad() async throws {
        let lab = try await Self.lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk], more: Self.usual)
        func credentials(_ host: String) throws -> [String] {
            lab.credentials(try lab.pki.issue("host-\(host)", hosts: ["localhost", "127.0.0.1"]))
        }
        let (a, b) = (try credentials("a"), try credentials("b"))
        try await lab.startDestination("a", credentials: a, more: ["--allow-bridge", "br-a"])
        try await lab.startDestination(
            "b",
            credentials: b,
            more: ["--allow-bridge", "br-b", "--allow-recall", "CN=host-a"]
        )
        func evacuate() async throws -> ToolResult {
            try await lab.crossdock(
                [
                    "evacuate", "--to", "localhost:\(lab.controlPort(of: "b"))", "--known-only", "--state-dir",
                    lab.state("a"),
                ] + a
                    + ["--network", "br-a=br-b", "--network", "br-unused=br-b"],
                seconds: 240
            )
        }
        func restore(_ more: [String] = []) async throws -> ToolResult {
            try await lab.crossdock(
                ["restore", "--state-dir", lab.state("a"), "--address", "localhost:\(lab.controlPort(of: "a"))"] + a
                    + more,
                seconds: 240
            )
        }
        let away = try await evacuate()
        #expect(away.code == 0, "\(away.all)")
        #expect(try await ports(lab, of: "br-b").count == 1)
        // The tap that it had is gone, and a new one takes its place.
        _ = try await run(lab, "ip", "link", "del", "tap7")
        let home = try await restore()
        #expect(home.code == 0, "\(home.all)")
        #expect(try await ports(lab, of: "br-a").first?.contains(": tap7:") == true)
        #expect(try await ports(lab, of: "br-b") == [])
        // Another bridge takes its place when that is said.
        let again = try await evacuate()
        #expect(again.code == 0, "\(again.all)")
        _ = try await run(lab, "ip", "link", "add", "br-c", "type", "bridge", "forward_delay", "0")
        _ = try await run(lab, "ip", "link", "set", "br-c", "up")
        lab.stopDestination("a")
        try await lab.startDestination("a", credentials: a, more: ["--allow-bridge", "br-c"])
        let elsewhere = try await restore(["--network", "br-b=br-c"])
        #expect(elsewhere.code == 0, "\(elsewhere.all)")
        #expect(try await ports(lab, of: "br-c").count == 1)
        #expect(try await ports(lab, of: "br-b") == [])
    }
}
