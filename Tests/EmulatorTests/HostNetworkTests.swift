import Emulator
import Testing

/// The networks of a command line that are interfaces of the host, and how they become taps of other names.
struct HostNetworkTests {
    private func line(_ words: String...) -> GuestCommandLine {
        GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/")
    }

    @Test func tapsAndBridgesAreFoundAndOthersAreNot() throws {
        let networks = try line(
            "-netdev",
            "tap,id=a,ifname=tap0,queues=4",
            "-netdev",
            "user,id=b",
            "-nic",
            "bridge,br=br7",
            "-netdev",
            "{\"type\":\"tap\",\"id\":\"c\",\"script\":\"/etc/ifup\"}",
            "-netdev",
            "tap,id=d,fd=7",
            "-net",
            "bridge"
        ).hostNetworks()
        #expect(networks.map(\.id) == ["a", nil, "c", nil])
        #expect(networks.map(\.tap) == ["tap0", nil, nil, nil])
        #expect(networks.map(\.bridge) == [nil, "br7", nil, "br0"])
        #expect(networks.map(\.hasQueues) == [true, false, false, false])
        #expect(networks.map(\.runsProgram) == [false, false, true, false])
    }

    @Test(arguments: [
        (
            "tap,id=n,ifname=tap0,script=/a,downscript=/b,vhost=on",
            "tap,id=n,ifname=t1,script=no,downscript=no,vhost=on"
        ),
        ("bridge,id=n,br=br7,helper=/h", "tap,id=n,ifname=t1,script=no,downscript=no"),
        ("tap,id=n,br=br7,helper=/h", "tap,id=n,ifname=t1,script=no,downscript=no"),
    ])
    func aMappedNetworkIsATapThatIsThere(_ before: String, _ after: String) throws {
        let line = line("-m", "64", "-netdev", before)
        let network = try #require(try line.hostNetworks().first)
        let joined = try line.joining([network: "t1"])
        #expect(joined.arguments == ["qemu-system-x86_64", "-m", "64", "-netdev", after])
        #expect(try joined.taps() == ["t1"])
        let renamed = try joined.renamingTaps(["t1": "t2", "other": "t3"])
        #expect(try renamed.taps() == ["t2"])
        #expect(try joined.renamingTaps([:]) == joined)
    }
}
