import IO
import TestSupport
import Testing

@testable import Web

/// One connection's requests: bodies, what is behind them, and clients that are slow.
@Suite(.timeLimit(.minutes(1)))
struct ConnectionTests {
    /// What a server reads of some bytes, and that client's end.
    func read(
        _ text: String,
        ends: Bool = true,
        _ body: @escaping @Sendable (HTTPConnection, HTTPClient) async throws -> Void
    ) async throws {
        try await onLoop { loop in
            let (client, server) = MemoryChannel.pair(on: loop, capacity: 1 << 20)
            try await client.write(Array(text.utf8))
            if ends { try await client.finishWriting() }
            try await body(HTTPConnection(server), HTTPClient(over: client))
        }
    }

    @Test func requestsFollowEachOther() async throws {
        try await read("POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nHost: h\r\n\r\n")
        {
            connection,
            _ in
            let first = try await connection.next()
            #expect(first?.path == ["a"] && first?.body == Array("abc".utf8))
            let second = try await connection.next()
            #expect(second?.path == ["b"] && second?.body.isEmpty == true)
            #expect(try await connection.next() == nil)
        }
    }

    @Test(arguments: [
        ("POST / HTTP/1.1\r\nHost: h\r\n\r\n", 411),
        ("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 65537\r\n\r\n", 413),
        ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +1\r\n\r\nx", 400),
        ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1,1\r\n\r\nx", 400),
        ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nExpect: tea\r\n\r\nx", 417),
        ("GET /../x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ])
    func aBodyThatIsNoneIsRefused(_ text: String, _ status: Int) async throws {
        try await read(text) { connection, _ in
            let failure = await #expect(throws: HTTPFailure.self) { try await connection.next() }
            #expect(failure?.status == status)
        }
    }

    @Test func aClientThatWaitsForLeaveGetsIt() async throws {
        try await read(
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n",
            ends: false
        ) { connection, client in
            let request = Task(executorPreference: connection.channel.loop) { try await connection.next() }
            #expect(try await client.answer().status == 100)
            try await client.send("abc")
            #expect(try await request.value?.body == Array("abc".utf8))
        }
    }

    @Test func anEndlessHeadAndAHalfOneAreEnded() async throws {
        try await read("GET / HTTP/1.1\r\n" + String(repeating: "X: y\r\n", count: 4000)) { connection, _ in
            let failure = await #expect(throws: HTTPFailure.self) { try await connection.next() }
            #expect(failure?.status == 431)
        }
        try await read("GET / HTTP/1.1\r\nHost: h\r\n") { connection, _ in
            let error = await #expect(throws: ChannelError.self) { try await connection.next() }
            #expect(error?.code == .truncated)
        }
    }

    @Test func whoIsSlowIsEnded() async throws {
        try await onLoop { loop in
            var patience = HTTPConnection.Patience()
            (patience.request, patience.idle) = (.milliseconds(50), .milliseconds(50))
            for text in ["GET / HTTP/1.1\r\nHo", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nabc"] {
                let (client, server) = MemoryChannel.pair(on: loop)
                try await client.write(Array(text.utf8))
                let connection = HTTPConnection(server, patience)
                let error = await #expect(throws: ChannelError.self) { try await connection.next() }
                #expect(error?.code == .timedOut)
            }
            let (client, server) = MemoryChannel.pair(on: loop)
            #expect(try await HTTPConnection(server, patience).next() == nil)
            client.close()
            // Who takes no answer holds the connection no longer.
            let (other, small) = MemoryChannel.pair(on: loop, capacity: 1024)
            patience.answer = .milliseconds(50)
            let stuck = await #expect(throws: ChannelError.self) {
                try await HTTPConnection(small, patience).write([UInt8](repeating: 0, count: 1 << 20))
            }
            #expect(stuck?.code == .timedOut)
            other.close()
        }
    }

    @Test func whatIsNewestReachesASlowViewerAndASilentOneIsEnded() async throws {
        var queue = ViewerQueue()
        for number in 0..<10 { queue.put(.moves, Payload([UInt8(number)])) }
        queue.put(.host, Payload([100]))
        queue.add(Payload([200]))
        queue.add(Payload([201]))
        let taken = queue.take().map { Array($0.buffer.bytes(0..<$0.count)) }
        #expect(taken == [[200], [201], [100], [9]] && queue.isEmpty)
        let large = Payload([UInt8](repeating: 1, count: WebLimits.eventBytes / 2 + 1))
        for _ in 0..<5 { queue.add(large) }
        #expect(queue.take().count == 1)

        try await onLoop { loop in
            let (client, server) = MemoryChannel.pair(on: loop, capacity: 4096)
            let key = WebSocketHandshake.newKey()
            try await client.write(WebSocketHandshake.request(host: "h", path: "/events", key: key))
            let channel = try await WebSocketChannel.accept(over: server)
            let viewer = Viewer(channel, .everybody, visitor: "v", silence: .milliseconds(100)) { true }
            viewer.put(.guests, Payload([UInt8](repeating: 32, count: 1 << 20)))
            // It returns although the client never reads.
            await viewer.serve()
            client.close()
        }
    }
}
