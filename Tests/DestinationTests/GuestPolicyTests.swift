import Destination
import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// The operator's policy as a value: what each rule refuses, in which words, and which flag would allow it.
struct GuestPolicyTests {
    private func policy(_ rules: String...) throws -> GuestPolicy {
        try GuestPolicy(parsing: rules.joined(separator: "\n"), file: "policy")
    }

    private func demands(_ words: String..., change: (inout Message.Offer) -> Void = { _ in }) throws -> GuestDemands {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64", "-nodefaults"] + words, directory: "/")
        var offer = Message.Offer(
            guest: "web1",
            commandLine: line,
            machine: "pc",
            emulatorVersion: "",
            disks: [],
            files: [],
            hasUUID: false
        )
        change(&offer)
        return try GuestDemands(line, offer)
    }

    private func problems(_ policy: GuestPolicy, _ demands: GuestDemands, obstacle: String? = nil) -> [String] {
        policy.problems(of: demands, filterObstacle: obstacle)
    }

    // MARK: consoles

    @Test func whoMayHaveConsolesIsNamedWithWhatHeMay() throws {
        let policy = try policy(
            "allow-console = CN=host-a,O=A view of all",
            "allow-console = CN=host-b view",
            "allow-console = CN=host-c",
            "allow-console = CN=host-c  view"
        )
        let readers = ["CN=host-a,O=A view of all": true, "CN=host-b": false, "CN=host-c": false]
        #expect(policy.consoleReaders == readers, "what is said twice is said in the narrower way")
        #expect(throws: GuestError.self) { try self.policy("allow-console =  view") }
        #expect(GuestPolicy().consoleReaders.isEmpty)
    }

    @Test func whatIsNoModeIsNotTakenForAPartOfAnIdentity() throws {
        for mode in ["look", "read", "view-only", "Write", "VIEW"] {
            let error = #expect(throws: GuestError.self) { try self.policy("allow-console = CN=host-a \(mode)") }
            #expect(error?.message.contains("'\(mode)' behind the identity") == true, "\(String(describing: error))")
        }
        let policy = try policy(
            #"allow-console = "CN=host-a,O=What to read" view"#,
            #"allow-console = "CN=host-b,O=What to view""#
        )
        #expect(policy.consoleReaders == ["CN=host-a,O=What to read": false, "CN=host-b,O=What to view": true])
        #expect(throws: GuestError.self) { try self.policy(#"allow-console = "CN=host-a"#) }
        #expect(throws: GuestError.self) { try self.policy(#"allow-console = "CN=host-a" look"#) }
    }

    // MARK: seeds

    @Test func aDirectoryOfSeedsIsForOneIdentity() throws {
        let policy = try policy(
            "allow-seed = CN=host-a,O=x=/srv/a",
            "allow-seed=CN=host-a,O=x=/srv/b=/c",
            "allow-seed=u=/d"
        )
        #expect(policy.seedDirectories == ["CN=host-a,O=x": ["/srv/a"], "CN=host-a,O=x=/srv/b": ["/c"], "u": ["/d"]])
        for value in ["/srv/a", "CN=host-a", "CN=host-a=srv", "=/srv"] {
            #expect(throws: GuestError.self, "\(value)") { try self.policy("allow-seed = \(value)") }
        }
    }

    // MARK: listening

    @Test(arguments: [
        ["-vnc", "127.0.0.1:1"], ["-vnc", "localhost:1"], ["-vnc", "unix:/run/vnc"], ["-vnc", "none"],
        ["-serial", "tcp:127.0.0.2:4000,server=on"], ["-chardev", "socket,id=c,host=::1,port=1,server=on"],
        ["-chardev", "socket,id=c,path=/s,server=on"], ["-spice", "port=5930,addr=127.0.0.1"],
        ["-spice", "addr=/run/spice,unix=on"], ["-netdev", "user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:2222-:22"],
        ["-netdev", "hubport,id=n,hubid=0"], ["-netdev", "socket,id=n,listen=127.0.0.1:9"],
    ])
    func loopbackAndUnixSocketsNeedNoRule(_ words: [String]) throws {
        var wants = try demands()
        wants.endpoints = try GuestCommandLine(arguments: ["qemu", "-nodefaults"] + words, directory: "/").endpoints()
        #expect(problems(GuestPolicy(), wants, obstacle: "there is no nft") == [])
    }

    @Test(arguments: [
        (["-vnc", ":1"], "-vnc", ""), (["-vnc", "192.0.2.1:1"], "-vnc", "192.0.2.1"),
        (["-vnc", "127.0.0.1:1,websocket=0.0.0.0:6000"], "-vnc", "0.0.0.0"),
        (["-serial", "tcp::4000,server=on"], "-serial", ""),
        (["-parallel", "telnet:192.0.2.1:4000,server=on"], "-parallel", "192.0.2.1"),
        (["-chardev", "socket,id=c,host=2001:db8::1,port=1,server=on"], "-chardev", "2001:db8::1"),
        (["-chardev", "socket,id=c,port=1,server=on"], "-chardev", ""),
        (["-chardev", "udp,id=c,host=192.0.2.9,port=1,localport=2"], "-chardev", ""),
        (["-serial", "udp:192.0.2.9:1@192.0.2.1:2"], "-serial", "192.0.2.1"),
        (["-spice", "port=5930"], "-spice", ""), (["-spice", "tls-port=5930,addr=0.0.0.0"], "-spice", "0.0.0.0"),
        (["-netdev", "user,id=n,restrict=on,hostfwd=tcp::2222-:22"], "-netdev", ""),
        (["-nic", "user,restrict=on,hostfwd=udp:192.0.2.1:53-:53"], "-nic", "192.0.2.1"),
        (["-netdev", "socket,id=n,listen=:9"], "-netdev", ""),
        (["-vnc", "unix:/x,websocket=0.0.0.0:5702"], "-vnc", "0.0.0.0"), (["-vnc", "none,websocket=5702"], "-vnc", ""),
        (["-netdev", "socket,id=n,mcast=230.0.0.1:1234"], "-netdev", "230.0.0.1"),
        (["-netdev", "stream,id=n,server=on,addr.type=inet,addr.host=host-a,addr.port=9"], "-netdev", "host-a"),
        (["-netdev", "dgram,id=n,local.type=inet,local.host=0.0.0.0,local.port=9"], "-netdev", "0.0.0.0"),
        // What is no plain address is none that is known to be loopback.
        (["-vnc", "127.1:1"], "-vnc", "127.1"),
    ])
    func otherAddressesNeedTheirRuleWhichTheRefusalNames(_ words: [String], _ option: String, _ host: String) throws {
        var wants = try demands()
        wants.endpoints = try GuestCommandLine(arguments: ["qemu", "-nodefaults"] + words, directory: "/").endpoints()
        let flag = "--allow-listen \(host.isEmpty ? "all" : host)"
        let said = problems(GuestPolicy(), wants)
        #expect(said.count == 1, "\(said)")
        #expect(said[0].hasPrefix("\(option) would listen on ") && said[0].hasSuffix("\(flag) allows it"), "\(said)")
        #expect(try problems(policy("allow-listen = all"), wants) == [])
        if !host.isEmpty { #expect(try problems(policy("allow-listen = \(host)"), wants) == []) }
        #expect(try problems(policy("allow-listen = 198.51.100.1"), wants).count == 1)
    }

    @Test func answersOfUDPOnLoopbackWouldBeFilteredAndThatIsSaid() throws {
        let wants = try demands("-netdev", "user,id=n,restrict=on,hostfwd=udp:127.0.0.1:53-:53")
        let said = problems(GuestPolicy(), wants)
        #expect(said.count == 1 && said[0].contains("--guest-network host"), "\(said)")
        #expect(try problems(policy("guest-network = host"), wants) == [])
    }

    // MARK: connecting

    @Test(arguments: [
        ["-netdev", "user,id=n"], ["-nic", "user,model=e1000"], ["-net", "user"],
        ["-netdev", "user,id=n,restrict=off"],
        ["-netdev", "socket,id=n,connect=192.0.2.1:9"], ["-chardev", "socket,id=c,host=192.0.2.1,port=1"],
        ["-serial", "tcp:192.0.2.1:4000"], ["-audiodev", "pa,id=a,server=192.0.2.1"],
        ["-drive", "file=nbd://192.0.2.1/x,format=raw"], ["-hda", "nbd:192.0.2.1:10809"],
        ["-blockdev", "driver=raw,node-name=n,file.driver=nbd,file.server.type=inet,file.server.host=192.0.2.1"],
        ["-blockdev", #"{"driver":"https","node-name":"n","url":"https://192.0.2.1/x"}"#],
        ["-blockdev", "driver=iscsi,node-name=n,portal=192.0.2.1,target=iqn.x"],
    ])
    func whatConnectsIsRefusedOnlyWhereNothingKeepsItFromThisHost(_ words: [String]) throws {
        var wants = try demands()
        wants.endpoints = try GuestCommandLine(arguments: ["qemu", "-nodefaults"] + words, directory: "/").endpoints()
        #expect(problems(GuestPolicy(), wants) == [])
        let said = problems(GuestPolicy(), wants, obstacle: "there is no nft")
        #expect(said.count == 1, "\(said)")
        #expect(said.first?.contains("there is no nft; --guest-network host allows it") == true, "\(said)")
        #expect(try problems(policy("guest-network = host"), wants, obstacle: "there is no nft") == [])
    }

    @Test(arguments: [
        ["-serial", "tcp:127.0.0.1:4000"], ["-chardev", "socket,id=c,host=localhost,port=1"],
        ["-drive", "file=nbd://[::1]:10809/x,format=raw"], ["-hda", "nbd:127.8.0.1:10809"],
        ["-netdev", "socket,id=n,connect=169.254.169.254:80"], ["-chardev", "udp,id=c,port=1"],
        ["-blockdev", #"{"driver":"nbd","node-name":"n","server":{"type":"inet","host":"fe80::1%eth0","port":"1"}}"#],
        ["-blockdev", "driver=https,node-name=w,url=https://user@0.0.0.0:80/x"],
    ])
    func whatConnectsToThisHostIsRefused(_ words: [String]) throws {
        var wants = try demands()
        wants.endpoints = try GuestCommandLine(arguments: ["qemu", "-nodefaults"] + words, directory: "/").endpoints()
        let said = problems(GuestPolicy(), wants)
        #expect(said.count == 1 && said[0].contains("would connect to"), "\(said)")
        #expect(said.first?.hasSuffix("--guest-network host allows it") == true)
        #expect(try problems(policy("guest-network = host"), wants) == [])
    }

    @Test func theNetworkThatQEMUMakesByItselfCounts() throws {
        let bare = GuestCommandLine(arguments: ["qemu-system-x86_64", "-m", "64"], directory: "/")
        #expect(try bare.endpoints().map(\.role) == [.connects])
        for words in [["-nodefaults"], ["-nic", "none"], ["-netdev", "hubport,id=n,hubid=0"]] {
            #expect(try GuestCommandLine(arguments: ["qemu"] + words, directory: "/").endpoints() == [])
        }
    }

    // MARK: taps

    @Test func aTapMustBeThereAndInABridgeThatIsListed() throws {
        let directory = try TestDirectory()
        let net = directory.directory("net")
        for (name, flags) in [("tap0", "0x1002"), ("tap1", "0x1002"), ("tun0", "0x1001")] {
            try DurableFile.makeDirectory("\(net)/\(name)")
            try DurableFile.write(Array("\(flags)\n".utf8), to: "\(net)/\(name)/tun_flags")
        }
        try DurableFile.makeDirectory("\(net)/eth0")
        #expect(symlink("../br0", "\(net)/tap0/master") == 0)
        let interfaces = NetworkInterfaces(net)
        func said(_ policy: GuestPolicy, _ network: String) throws -> [String] {
            policy.problems(of: try demands("-netdev", network), filterObstacle: nil, interfaces: interfaces)
        }
        let (none, listed, all) = (
            GuestPolicy(), try policy("allow-bridge = br0", "allow-bridge = br1"), try policy("allow-bridge = all")
        )
        for one in [none, listed, all] {
            #expect(try said(one, "tap,id=n,ifname=tap0") == [])
            for missing in ["tap9", "tun0", "eth0", "../net/tap0", "tap%d", ""] {
                let problems = try said(one, "tap,id=n,ifname=\(missing)")
                #expect(problems.count == 1 && problems[0].contains("'\(missing)' is not there"), "\(problems)")
            }
            #expect(try said(one, "tap,id=n").first?.contains("without a name") == true)
        }
        for one in [none, all] { #expect(try said(one, "tap,id=n,ifname=tap1") == []) }
        #expect(try said(listed, "tap,id=n,ifname=tap1").first?.contains("is in no bridge") == true)
        let other = try said(policy("allow-bridge = br1"), "tap,id=n,ifname=tap0")
        #expect(other.count == 1 && other[0].hasSuffix("--allow-bridge br0 allows it"), "\(other)")
    }

    @Test func aTapIsMadeOnlyInABridgeThatIsListed() throws {
        let directory = try TestDirectory()
        let net = directory.directory("net")
        for bridge in ["br0", "br1"] { try DurableFile.makeDirectory("\(net)/\(bridge)/bridge") }
        for tap in ["tap0", "tap1"] {
            try DurableFile.makeDirectory("\(net)/\(tap)")
            try DurableFile.write(Array("0x1002\n".utf8), to: "\(net)/\(tap)/tun_flags")
            #expect(symlink("../br1", "\(net)/\(tap)/master") == 0)
        }
        try DurableFile.write(Array("1\n".utf8), to: "\(net)/tap1/carrier")
        func said(_ policy: GuestPolicy, _ tap: String, _ bridge: String) throws -> [String] {
            let demands = try demands("-netdev", "tap,id=n,ifname=\(tap)") {
                $0.networks = [.init(tap: tap, bridge: bridge)]
            }
            return policy.problems(of: demands, filterObstacle: nil, interfaces: NetworkInterfaces(net))
                // Whether this process may make one is another matter.
                .filter { !$0.contains("cannot make") }
        }
        let (none, listed, all) = (GuestPolicy(), try policy("allow-bridge = br0"), try policy("allow-bridge = all"))
        for one in [listed, all] { #expect(try said(one, "tap9", "br0") == []) }
        #expect(try said(none, "tap9", "br0").first?.hasSuffix("none is; --allow-bridge br0 allows it") == true)
        #expect(try said(listed, "tap9", "br1").first?.contains("those are br0; --allow-bridge br1") == true)
        #expect(try said(all, "tap9", "br9").first?.contains("'br9' is not there") == true)
        // A tap that is there, in that bridge, and that nobody uses is used, as one that was not mapped.
        #expect(try said(none, "tap0", "br1") == [])
        #expect(try said(none, "tap1", "br1").count == 1)
        #expect(try said(listed, "tap0", "br1").first?.contains("in the bridge 'br1', which") == true)
    }

    // MARK: limits

    @Test func whatAGuestTakesIsReadFromItsCommandLine() throws {
        func usage(_ words: String...) throws -> GuestUsage {
            let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/")
            return GuestUsage(memory: try line.memory(), processors: try line.processors())
        }
        let mebi: UInt64 = 1 << 20
        #expect(try usage() == GuestUsage(memory: 128 * mebi, processors: 1))
        #expect(try usage("-m", "64").memory == 64 * mebi)
        #expect(try usage("-m", "1.5G").memory == 1536 * mebi)
        #expect(try usage("-m", "64,slots=2,maxmem=1G").memory == 1024 * mebi)
        #expect(try usage("-m", "64", "-m", "size=2G").memory == 2048 * mebi)
        #expect(try usage("-M", "pc,memory.size=2G,memory.max-size=3G").memory == 3072 * mebi)
        #expect(try usage("-m", "64", "-object", "memory-backend-ram,id=x,size=1G").memory == 1088 * mebi)
        let nodes = ["-object", "memory-backend-ram,id=x,size=64M", "-numa", "node,memdev=x"]
        #expect(try GuestCommandLine(arguments: ["qemu", "-m", "64"] + nodes, directory: "/").memory() == 64 * mebi)
        #expect(try usage("-smp", "4").processors == 4)
        #expect(try usage("-smp", "2,maxcpus=8").processors == 8)
        #expect(try usage("-smp", "sockets=2,cores=3,threads=2").processors == 12)
        #expect(try usage("-smp", "sockets=8", "-smp", "cores=8", "-machine", "pc,smp.threads=2").processors == 128)
        #expect(try usage("-M", "pc,smp.cpus=9").processors == 9)
        // No number of a peer traps.
        for words in [
            ["-m", "x"], ["-m", "99999999999999999999T"], ["-smp", "-1"], ["-smp", "x"],
            ["-smp", "9223372036854775808"],
            ["-smp", "sockets=18446744073709551615,cores=18446744073709551615"], ["-smp", "sockets=1000,cores=1000"],
        ] {
            let line = GuestCommandLine(arguments: ["qemu"] + words, directory: "/")
            #expect(throws: GuestError.self) { (try line.memory(), try line.processors()) }
        }
        let wants = try demands { offer in
            offer.memory = 4096 * mebi
            offer.disks = [.init(name: "disk0", size: 10, allocated: 0, path: "/a")]
            offer.files = [.init(path: "/b", size: 5, digest: "")]
        }
        #expect(wants.usage == GuestUsage(memory: 4096 * mebi, processors: 1, disk: 15))
    }

    @Test func limitsCountEverythingOfOneSource() throws {
        let limits = try policy("most-memory = 1G", "most-processors = 4", "most-disk = 2G", "most-guests = 2").limits
        let small = GuestUsage(memory: 512 << 20, processors: 2, disk: 1 << 30)
        #expect(limits.problems(of: small, besides: []) == [])
        #expect(limits.problems(of: small, besides: [small]) == [])
        let said = limits.problems(of: small, besides: [small, small])
        #expect(
            said == [
                "The limit of 2 guests for the guests of one source (--most-guests) is exceeded: those that are here, on their way or expected have "
                    + "2, and this one wants 1",
                "The limit of 1G of memory for the guests of one source (--most-memory) is exceeded: those that are here, on their way or expected "
                    + "have 1G, and this one wants 512M",
                "The limit of 4 processors for the guests of one source (--most-processors) is exceeded: those that are here, on their way "
                    + "or expected have 4, and this one wants 2",
                "The limit of 2G of disks for the guests of one source (--most-disk) is exceeded: those that are here, on their way or expected "
                    + "have 2G, and this one wants 1G",
            ]
        )
        let huge = GuestUsage(memory: .max, processors: .max, disk: .max)
        #expect(limits.problems(of: huge, besides: [huge]).count == 3)
        #expect(GuestLimits().problems(of: huge, besides: [huge, huge]) == [])
    }

    // MARK: the file

    @Test func aFileHasTheRulesOfTheFlags() throws {
        let policy = try policy(
            "# what guests may have",
            "",
            "allow-directory=/srv/images   # read only",
            "  allow-bridge = br0",
            "\tallow-listen = [2001:db8::1]",
            "most-memory = 64G",
            "guest-network = host"
        )
        #expect(policy.directories == ["/srv/images"])
        #expect(policy.bridges.names == ["br0"] && !policy.bridges.hasAll)
        #expect(policy.listenAddresses.names == ["2001:db8::1"])
        #expect(policy.limits.memory == 64 << 30 && policy.network == .host)
    }

    @Test(arguments: [
        ("allow-bridge br0", "policy, line 2: a line is 'rule = value'"),
        ("allow-everything = yes", "policy, line 2: There is no rule 'allow-everything'"),
        ("most-memory = much", "policy, line 2: most-memory: 'much' is no size"),
        ("most-guests = -1", "policy, line 2: most-guests: '-1' is no number"),
        ("allow-directory = srv", "policy, line 2: allow-directory: 'srv' is no absolute path"),
        ("guest-network = none", "policy, line 2: guest-network: 'none' is neither"),
        ("allow-listen =", "policy, line 2: allow-listen: it has no value"),
    ])
    func aBadLineIsNamed(_ line: String, _ words: String) throws {
        let error = #expect(throws: GuestError.self) { try policy("most-guests = 1", line) }
        #expect(error?.description.hasPrefix(words) == true, "\(String(describing: error))")
    }
}
