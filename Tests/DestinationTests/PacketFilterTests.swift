import Glibc
import IO
import TestSupport
import Testing

@testable import Destination

/// What the packet filter keeps from a guest's user, with the kernel's own packets.
struct PacketFilterTests {
    @Test func onlyNameServersOnGuardedAddressesAreAllowedForQuestions() throws {
        let text = """
            # a comment
            nameserver 127.0.0.53
            nameserver 192.0.2.1
            nameserver fe80::1%eth0
            search example.org
            nameserver not-an-address
            """
        let filter = PacketFilter(users: 7...9, nameServers: PacketFilter.nameServers(in: text))
        #expect(filter.nameServers.map(\.text) == ["127.0.0.53", "fe80::1"])
        #expect(filter.table == "crossdock_guests_7_9")
        #expect(filter.ruleset.contains("meta skuid 7-9"))
        #expect(PacketFilter(users: 7...9, nameServers: []).ruleset.contains("dport") == false)
    }

    /// Whoever is a guest's user tries everything; each attempt prints a line.
    private static let attempts = """
        import os, socket, threading
        def serve(family, address, protocol=0, port=0):
            server = socket.socket(family, socket.SOCK_STREAM, protocol)
            server.bind((address, port))
            server.listen(16)
            def run():
                while True:
                    client = server.accept()[0]
                    client.sendall(b"hello")
                    client.close()
            threading.Thread(target=run, daemon=True).start()
            return server.getsockname()[1]
        def datagrams(address, port):
            server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            server.bind((address, port))
            server.settimeout(0.2)
            return server
        MPTCP, FAST_OPEN = 262, 0x20000000
        four, six, every = serve(socket.AF_INET, "127.0.0.1"), serve(socket.AF_INET6, "::1"), serve(socket.AF_INET, "0.0.0.0")
        many = serve(socket.AF_INET, "127.0.0.1", MPTCP)
        serve(socket.AF_INET, "127.0.0.53", port=53)
        plain, names = datagrams("127.0.0.1", 0), datagrams("127.0.0.53", 53)
        reader, writer = os.pipe()
        def connect(name, family, address, port, protocol=0):
            try:
                client = socket.socket(family, socket.SOCK_STREAM, protocol)
                client.settimeout(5)
                client.connect((address, port))
                print(name, "open", flush=True)
            except OSError as error:
                print(name, "denied", flush=True)
        def all_of_them():
            connect("tcp", socket.AF_INET, "127.0.0.1", four)
            connect("tcp6", socket.AF_INET6, "::1", six)
            connect("unspecified", socket.AF_INET, "0.0.0.0", every)
            connect("another", socket.AF_INET, "127.9.9.9", every)
            connect("mapped", socket.AF_INET6, "::ffff:127.0.0.1", four)
            connect("mptcp", socket.AF_INET, "127.0.0.1", many, MPTCP)
            connect("names", socket.AF_INET, "127.0.0.53", 53)
            try:
                fast = socket.socket()
                fast.sendto(b"x", FAST_OPEN, ("127.0.0.1", four))
                print("fast open", flush=True)
            except OSError:
                print("fast denied", flush=True)
            for server in (plain, names):
                try:
                    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", server.getsockname())
                except OSError:
                    pass
        child = os.fork()
        if child == 0:
            os.setgid(1900020001)
            os.setuid(1900020001)
            all_of_them()
            own = socket.create_server(("127.0.0.1", 0))
            os.write(writer, b"%d" % own.getsockname()[1])
            client = own.accept()[0]
            client.sendall(b"from the guest")
            client.close()
            os._exit(0)
        port = int(os.read(reader, 10))
        print("own", socket.create_connection(("127.0.0.1", port), 5).recv(64).decode(), flush=True)
        os.waitpid(child, 0)
        for name, server in (("udp", plain), ("questions", names)):
            try:
                server.recv(1)
                print(name, "open", flush=True)
            except OSError:
                print(name, "denied", flush=True)
        os.setgid(65534)
        os.setuid(65534)
        connect("others", socket.AF_INET, "127.0.0.1", four)
        """

    @Test(.enabled(if: geteuid() == 0, "only root has users to give, and packet filters"))
    func aGuestsUserOpensNothingOnLoopbackAndAnswersWhoeverAsks() async throws {
        let filter = PacketFilter(
            users: 1_900_020_000...1_900_020_009,
            nameServers: PacketFilter.nameServers(in: "nameserver 127.0.0.53\n")
        )
        let directory = try TestDirectory()
        try DurableFile.write(Array(filter.ruleset.utf8), to: directory.file("rules"))
        try DurableFile.write(Array(Self.attempts.utf8), to: directory.file("attempts.py"))
        // Twice: the second one replaces the first.
        let script = """
            ip link set lo up && nft -f \(directory.file("rules")) && nft -f \(directory.file("rules")) \
            && nft list tables && python3 \(directory.file("attempts.py"))
            """
        let result = try await Tool.run(Namespace.network + ["sh", "-c", script])
        #expect(
            result.output.split(separator: "\n") == [
                "table inet crossdock_guests_1900020000_1900020009", "tcp denied", "tcp6 denied", "unspecified denied",
                "another denied", "mapped denied", "mptcp denied", "names open", "fast denied", "own from the guest",
                "udp denied", "questions open", "others open",
            ],
            "\(result.all)"
        )
    }
}
