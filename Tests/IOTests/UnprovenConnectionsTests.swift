import IO
import TestSupport
import Testing

struct UnprovenConnectionsTests {
    @Test(arguments: [
        ("192.0.2.1", "192.0.2.1"), ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002/64"), ("2001:db8:1:2::9", "20010db800010002/64"),
        ("fe80::1%eth0", "fe80000000000000/64"), ("::1", "0000000000000000/64"),
    ])
    func addressesOfWhichOneHostHasManyAreOneNetwork(_ host: String, _ network: String) {
        #expect(UnprovenConnections.network(of: .inet(host: host, port: 1)) == network)
    }

    /// Real connections of two addresses, in the order in which they were accepted.
    @Test func theOldestOfTheNetworkWithTheMostGivesWay() async throws {
        try await onLoop { loop in
            let listener = try await Listener.listen(on: .inet(host: "", port: 0), loop: loop)
            let port = listener.address.port ?? 0
            var near: [SocketChannel] = []
            var far: [SocketChannel] = []
            // The loopback addresses of both families are two networks.
            for host in ["127.0.0.1", "::1", "127.0.0.1", "127.0.0.1", "::1", "127.0.0.1"] {
                near.append(try await SocketChannel.connect(to: .inet(host: host, port: port), on: loop))
                far.append(try await listener.accept())
            }
            var places = UnprovenConnections(limit: 4)
            let victims = far.map { places.add($0) }
            #expect(victims[..<4].allSatisfy { $0 == nil })
            // Three of the first address, and of those the oldest; then two of each, and the oldest of all.
            #expect(victims[4] === far[0] && victims[5] === far[1])
            #expect(places.count == 4 && places.count(of: "127.0.0.1") == 3)
            let removals = [far[2], far[1]].map { places.remove($0) }
            #expect(removals == [true, false], "the second one has given way already")
            #expect(places.count == 3 && places.count(of: "127.0.0.1") == 2)
            for channel in near + far { channel.close() }
            listener.close()
        }
    }
}
