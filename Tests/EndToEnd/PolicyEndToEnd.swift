import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// What the operator of a destination lets guests have, seen from the source and from within the guest.
@Suite(.serialized, .timeLimit(.minutes(5)))
struct PolicyEndToEnd {
    private func expectRefused(_ result: ToolResult, _ words: String...) {
        #expect(result.code == MigrationError.Code.refused.rawValue, "\(result.all)")
        for one in words { #expect(result.errors.contains(one), "'\(one)' is not in: \(result.all)") }
    }

    // MARK: limits

    @Test func whatTheGuestsOfOneSourceTakeIsCountedAsLongAsTheyAreHere() async throws {
        let lab = try Lab()
        let disks = [
            try await lab.makeImage("one.raw", megabytes: 16, data: 1),
            try await lab.makeImage("two.raw", megabytes: 16, data: 1),
        ]
        try await lab.startIdleGuest("one", disks: [disks[0]])
        try await lab.startIdleGuest("two", disks: [disks[1]])
        let limits = ["--most-memory", "100M", "--most-processors", "1", "--most-disk", "30M", "--most-guests", "1"]
        let sentences = ["--most-memory", "--most-processors", "--most-disk", "--most-guests"]
        try await lab.startDestination(more: limits)
        let first = try await lab.migrate("one")
        #expect(first.code == 0, "\(first.all)")
        let usage = try lab.guests("b").load("one")?.arrival?.usage
        #expect(usage == GuestUsage(memory: 64 << 20, processors: 1, disk: 16 << 20))
        // Also in the eyes of the next agent, and by a rehearsal.
        for more in [[], ["--dry-run"]] {
            let second = try await lab.migrate("two", more: more)
            expectRefused(second, "64M, and this one wants 64M", "16M, and this one wants 16M")
            for sentence in sentences { #expect(second.errors.contains(sentence), "\(second.all)") }
            try await lab.replaceDestination(more: limits)
        }
        // Started again it takes what it took.
        for words in [["stop", "--force"], ["start"]] {
            let done = try await lab.crossdock(["guest"] + words + ["one", "--state-dir", lab.state("b")])
            #expect(done.code == 0, "\(done.all)")
            let refused = try await lab.migrate("two", more: ["--dry-run"])
            expectRefused(refused, "16M, and this one wants 16M", "--most-guests")
        }
        #expect(try await lab.monitor("a", "two") { try await $0.status() } == "running")
        // A guest that has left does not count, though its record is here.
        try await lab.startDestination("c")
        let away = try await lab.migrate("one", from: "b", port: lab.controlPort(of: "c"))
        #expect(away.code == 0, "\(away.all)")
        let second = try await lab.migrate("two")
        #expect(second.code == 0, "\(second.all)")
    }

    // MARK: listening

    @Test func aGuestListensWhereTheOperatorLetsIt() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.network("true")
        try await lab.startIdleGuest(disks: [disk], more: ["-vnc", ":7"])
        try await lab.startDestination()
        for more in [["--dry-run"], []] {
            expectRefused(
                try await lab.migrate(more: more),
                "-vnc would listen on all addresses",
                "--allow-listen all allows it"
            )
        }
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        let file = lab.directory.file("policy")
        try DurableFile.write(Array("# displays are for everybody\nallow-listen = all\n".utf8), to: file)
        try await lab.startDestination("c", more: ["--policy", file])
        let moved = try await lab.migrate(port: lab.controlPort(of: "c"))
        #expect(moved.code == 0, "\(moved.all)")
        let display = try await lab.monitor("c") { try await $0.execute("query-vnc") }
        #expect(display["host"]?.string == "0.0.0.0" || display["host"]?.string == "::", "\(display.text)")
    }

    // MARK: taps

    @Test(.enabled(if: geteuid() == 0, "only root makes taps"))
    func aTapMustBeThereAndAMissingOneIsNotMade() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.network("ip tuntap add tap7 mode tap")
        let network = ["-device", "virtio-net-pci,netdev=n0,rombar=0", "-netdev"]
        try await lab.startIdleGuest(disks: [disk], more: network + ["tap,id=n0,ifname=tap7,script=no,downscript=no"])
        // Each host takes it for its own.
        try await lab.startDestination()
        #expect(try await lab.migrate(more: ["--dry-run"]).code == 0)
        try await lab.startDestination("c", more: ["--allow-bridge", "br0"])
        let inNone = try await lab.migrate(port: lab.controlPort(of: "c"), more: ["--dry-run"])
        expectRefused(inNone, "'tap7' is in no bridge", "--allow-bridge")
        let gone = try await Tool.run(lab.prefix + ["ip", "link", "del", "tap7"])
        #expect(gone.code == 0, "\(gone.all)")
        expectRefused(try await lab.migrate(), "The tap interface 'tap7' is not there on this host")
        let links = try await Tool.run(lab.prefix + ["ip", "-o", "link"])
        #expect(!links.output.contains("tap7"), "\(links.all)")
    }

    // MARK: reaching the host

    /// Why a guest's QEMU cannot connect to a port of its host; nil when it can.
    private func refusal(_ lab: Lab, _ side: String, _ host: String, _ port: Int) async throws -> String? {
        try await lab.monitor(side) { monitor in
            let address: JSONValue = ["type": "inet", "data": ["host": .string(host), "port": .string("\(port)")]]
            let backend: JSONValue = ["type": "socket", "data": ["addr": address, "server": false]]
            do {
                try await monitor.execute("chardev-add", ["id": "probe", "backend": backend])
                try await monitor.execute("chardev-remove", ["id": "probe"])
                return nil
            } catch let error as QMPError { return "\(error)" }
        }
    }

    /// Two servers in a lab's network, on the loopback addresses of both families.
    private func startServer(_ lab: Lab) async throws -> (ChildProcess, [Int]) {
        let script = """
            import socket, time
            servers = [socket.create_server(("127.0.0.1", 0), backlog=64), socket.create_server(("::1", 0), family=socket.AF_INET6)]
            print("ports", *[server.getsockname()[1] for server in servers], "end", flush=True)
            time.sleep(600)
            """
        let server = try ChildProcess(lab.prefix + ["python3", "-c", script])
        try await server.wait(for: "two servers") { server.output.contains("end") }
        return (server, server.output.split(separator: " ").compactMap { Int($0) })
    }

    @Test(.enabled(if: geteuid() == 0, "only root has users to give, and packet filters"))
    func aGuestReachesNoLoopbackServiceOfItsHostButItsOwnPortsAreReached() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.network("true")
        let (server, ports) = try await startServer(lab)
        let network = ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,rombar=0"]
        try await lab.startIdleGuest(disks: [disk], more: network + ["-vnc", "127.0.0.1:7"])
        #expect(ports.count == 2)
        for (host, port) in zip(["127.0.0.1", "::1"], ports) { #expect(try await refusal(lab, "a", host, port) == nil) }
        // Two agents with the same users, one after the other, have one table.
        try await lab.startDestination("c", more: ["--guest-network", "filtered"])
        try await lab.startDestination(more: ["--guest-network", "filtered"])
        let tables = try await Tool.run(lab.prefix + ["nft", "list", "tables"])
        #expect(tables.output == "table inet crossdock_guests_1900000000_1900009999\n", "\(tables.all)")
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        for (host, port) in zip(["127.0.0.1", "::1"], ports) {
            let said = try await refusal(lab, "b", host, port)
            #expect(
                said?.contains("No route to host") == true || said?.contains("ermission denied") == true,
                "\(said ?? "connected")"
            )
        }
        // The filter stays, and whoever does not want it is told.
        try await lab.startDestination("d", more: ["--guest-network", "host"])
        let table = "nft delete table inet crossdock_guests_1900000000_1900009999"
        #expect(lab.destination?.errors.contains(table) == true, "\(lab.destination?.errors ?? "")")
        // Others of the host reach those servers, and the guest's display.
        let display = try await lab.monitor("b") { try await $0.execute("query-vnc") }
        let service = display["service"]?.string ?? ""
        let script = """
            import socket
            socket.create_connection(("127.0.0.1", \(ports[0])), 5).close()
            print(socket.create_connection(("127.0.0.1", \(service)), 5).recv(3).decode())
            """
        let reached = try await Tool.run(lab.prefix + ["python3", "-c", script])
        #expect(reached.code == 0 && reached.output == "RFB\n", "\(reached.all)")
        // The operator can choose otherwise, for other users.
        try await lab.startDestination(
            "a",
            more: ["--guest-network", "host", "--guest-users", "1900010000-1900010009"]
        )
        let back = try await lab.migrate(from: "b", port: lab.controlPort(of: "a"))
        #expect(back.code == 0, "\(back.all)")
        #expect(try await refusal(lab, "a", "127.0.0.1", ports[0]) == nil)
        server.signal(SIGTERM)
    }

    @Test func whereNothingFiltersANetworkThatConnectsNeedsAWord() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let network = ["-device", "virtio-net-pci,netdev=n0,rombar=0", "-netdev"]
        try await lab.startIdleGuest(disks: [disk], more: network + ["user,id=n0"])
        let other = try await lab.makeImage("other.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest("web2", disks: [other], more: network + ["user,id=n0,restrict=on"])
        try await lab.startDestination(more: ["--guest-network", "filtered", "--guest-users", "none"])
        #expect(lab.destination?.errors.contains("the network of guests is not filtered") == true)
        expectRefused(
            try await lab.migrate(),
            "-netdev can reach loopback and link-local addresses",
            "guests have no users of their own; --guest-network host allows it"
        )
        let restricted = try await lab.migrate("web2")
        #expect(restricted.code == 0, "\(restricted.all)")
        try await lab.startDestination("c", more: ["--guest-network", "host", "--guest-users", "none"])
        let allowed = try await lab.migrate(port: lab.controlPort(of: "c"))
        #expect(allowed.code == 0, "\(allowed.all)")
    }

    // MARK: whom, and the file

    /// A lab whose `/etc` has QEMU's credentials, and a policy.
    private func makeHost(_ lab: Lab, policy: String) async throws {
        let etc = lab.directory.directory("etc")
        try DurableFile.write(Array(policy.utf8), to: lab.directory.file("policy"))
        try await lab.mount(
            """
            cp -a /etc/. \(etc) 2>/dev/null; mkdir -p \(etc)/pki/qemu \(etc)/crossdock && rm -rf \(etc)/pki/crossdock \
            && cp \(lab.pki.directory)/* \(etc)/pki/qemu && mv \(lab.directory.file("policy")) \(etc)/crossdock/policy \
            && mount --bind \(etc) /etc
            """
        )
    }

    @Test func credentialsThatOtherServicesShareNeedAnAuthorisationOrAWord() async throws {
        let lab = try Lab()
        try await makeHost(lab, policy: "guest-network = host\n")
        let ports = ["--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0"]
        let refused = try await lab.crossdock(["destination", "--state-dir", lab.state("b")] + ports)
        #expect(refused.code != 0 && refused.errors.contains("/etc/pki/qemu"), "\(refused.all)")
        #expect(refused.errors.contains("--tls-authz") && refused.errors.contains("--allow-all-of-authority"))
        try await lab.startDestination("b", credentials: ["--allow-all-of-authority"])
        try await lab.startDestination(
            "c",
            credentials: ["--object", "authz-simple,id=s,identity=CN=host", "--tls-authz", "s"]
        )
        for side in ["b", "c"] { #expect(lab.controlPort(of: side) != 0) }
        // What was named starts, and the operator is told what it means.
        try await lab.startDestination("d")
        #expect(lab.destination?.errors.contains("--allow-all-of-authority") == true)
    }

    /// Memory that is not the guest's own: of a display, and of buffers that QEMU has for it.
    @Test(arguments: [
        ["-device", "virtio-gpu-pci,max_hostmem=64M"], ["-chardev", "ringbuf,id=r,size=67108864"],
        ["-device", "VGA,vgamem_mb=128"], ["-device", "virtio-gpu-pci,id=v", "-set", "device.v.max_hostmem=64M"],
        ["-device", "virtio-gpu-pci"],
    ])
    func theMemoryOfDevicesIsCounted(_ device: [String]) async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk], more: device)
        try await lab.startDestination(more: ["--most-memory", "100M"])
        for more in [["--dry-run"], []] { expectRefused(try await lab.migrate(more: more), "--most-memory") }
        try await lab.replaceDestination(more: ["--most-memory", "600M"])
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        #expect((try lab.guests("b").load("web1")?.arrival?.usage.memory ?? 0) > 100 << 20)
    }

    @Test func aPolicyThatCannotBeReadIsNamedWithItsLine() async throws {
        let lab = try Lab()
        try await makeHost(lab, policy: "most-guests = 2\nmost-memory = lots\n")
        let ports = ["--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0"]
        func start(_ more: [String]) async throws -> ToolResult {
            try await lab.crossdock(["destination", "--state-dir", lab.state("b")] + ports + lab.credentials() + more)
        }
        let service = try await start([])
        #expect(service.code != 0, "\(service.all)")
        #expect(
            service.errors.contains("/etc/crossdock/policy, line 2: most-memory: 'lots' is no size"),
            "\(service.all)"
        )
        let missing = try await start(["--policy", "/nowhere"])
        #expect(missing.code != 0 && missing.errors.contains("The policy /nowhere is not there"), "\(missing.all)")
        let flag = try await start(["--most-disk", "lots"])
        #expect(flag.code == 64 && flag.errors.contains("--most-disk: 'lots' is no size"), "\(flag.all)")
    }
}
