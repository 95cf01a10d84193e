import CCount
import Glibc
import IO
import TLS

/// Measures TLS channels: `channel-bench DIR [GIB] [ROUNDS]` prints a Markdown table, `channel-bench DIR rekey` sends more than
/// 2^24 records in both directions at once over one session, `channel-bench DIR serve IMAGE` and `channel-bench DIR connects PORT
/// PORT N` measure connections to NBD servers. DIR is a credential directory for localhost.
let arguments = CommandLine.arguments
guard arguments.count >= 2 else {
    print("usage: channel-bench DIR [GIB] [ROUNDS] | DIR rekey")
    exit(64)
}
let directory = arguments[1]
let message = 256 << 10

func credentials(_ endpoint: TLSEndpoint) throws -> X509Credentials {
    try X509Credentials(id: "bench", directory: directory, endpoint: endpoint, sanityCheck: false)
}

/// A connected pair of TLS channels over TCP, each end on a loop of its own.
func connectedPair(_ a: EventLoop, _ b: EventLoop) async throws -> (TLSChannel, TLSChannel) {
    let listener = try await b.run { try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: b) }
    let server = try credentials(.server)
    let client = try credentials(.client)
    async let accepted = b.run {
        let channel = try await TLSChannel.handshake(over: try await listener.accept(), credentials: server)
        listener.close()
        return channel
    }
    let connected = try await a.run {
        let base = try await SocketChannel.connect(to: listener.address, on: a)
        return try await TLSChannel.handshake(over: base, credentials: client, hostname: "localhost")
    }
    return (connected, try await accepted)
}

/// Moves bytes from one end to the other in messages; returns wall seconds, processor seconds and allocations a message.
func stream(_ gibibytes: Double) async throws -> (wall: Double, processor: Double, allocations: Double) {
    let (a, b) = (EventLoop(name: "sender"), EventLoop(name: "receiver"))
    defer {
        a.stop()
        b.stop()
    }
    let (sender, receiver) = try await connectedPair(a, b)
    let messages = Int(gibibytes * Double(1 << 30)) / message
    let buffer = IOBuffer(capacity: message)
    memset(buffer.mutable(0..<message).baseAddress!, 7, message)
    let target = IOBuffer(capacity: message)
    func run(_ count: Int) async throws {
        async let received: Void = b.run {
            for _ in 0..<count { _ = try await receiver.readFull(into: target.mutable(0..<message)) }
        }
        try await a.run {
            for index in 0..<count {
                try await sender.writeAll(buffer.bytes(0..<message), flush: index % 4 == 3 || index == count - 1)
            }
        }
        try await received
    }
    try await run(100)
    let (start, used, allocated) = (ContinuousClock.now, processorSeconds(), bench_allocations())
    try await run(messages)
    let wall = (ContinuousClock.now - start) / .seconds(1)
    let result = (wall, processorSeconds() - used, Double(bench_allocations() - allocated) / Double(messages))
    try await a.run { sender.close() }
    try await b.run { receiver.close() }
    return result
}

/// Exchanges 4 KiB messages; the times of the round trips in microseconds.
func pingPong(_ count: Int) async throws -> [Double] {
    let (a, b) = (EventLoop(name: "ping"), EventLoop(name: "pong"))
    defer {
        a.stop()
        b.stop()
    }
    let (ping, pong) = try await connectedPair(a, b)
    let size = 4096
    let (x, y) = (IOBuffer(capacity: size), IOBuffer(capacity: size))
    async let echo: Void = b.run {
        for _ in 0..<count {
            _ = try await pong.readFull(into: y.mutable(0..<size))
            try await pong.writeAll(y.bytes(0..<size))
        }
    }
    let times = try await a.run {
        var times: [Double] = []
        times.reserveCapacity(count)
        for _ in 0..<count {
            let start = ContinuousClock.now
            try await ping.writeAll(x.bytes(0..<size))
            _ = try await ping.readFull(into: x.mutable(0..<size))
            times.append((ContinuousClock.now - start) / .microseconds(1))
        }
        ping.close()
        return times
    }
    try await echo
    return times
}

func handshakes(_ client: any TLSCredentials, _ server: any TLSCredentials, _ count: Int) throws -> (Double, Double) {
    let (start, used) = (ContinuousClock.now, processorSeconds())
    for _ in 0..<count {
        let a = try TLSSession(credentials: client, hostname: "localhost")
        let b = try TLSSession(credentials: server)
        var done = (false, false)
        while done != (true, true) {
            if !done.0 { done.0 = try a.handshake(with: "server") == .complete }
            a.send { bytes in
                b.receive(bytes); return bytes.count
            }
            if !done.1 { done.1 = try b.handshake(with: "client") == .complete }
            b.send { bytes in
                a.receive(bytes); return bytes.count
            }
        }
    }
    return (
        Double(count) / ((ContinuousClock.now - start) / .seconds(1)), (processorSeconds() - used) * 1e6 / Double(count)
    )
}

func rekey() throws {
    let a = try TLSSession(credentials: credentials(.client), hostname: "localhost")
    let b = try TLSSession(credentials: credentials(.server))
    var done = (false, false)
    func carry(_ from: TLSSession, _ to: TLSSession) {
        from.send { bytes in
            to.receive(bytes); return bytes.count
        }
    }
    while done != (true, true) {
        if !done.0 { done.0 = try a.handshake(with: "server") == .complete }
        carry(a, b)
        if !done.1 { done.1 = try b.handshake(with: "client") == .complete }
        carry(b, a)
    }
    let batch = 4096
    let rounds = (1 << 24) / batch + 64
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: batch, alignment: 16)
    var byte: UInt8 = 0
    for round in 0..<rounds {
        // Both ends write before either reads, so that the updates of the two directions cross.
        for end in [a, b] {
            for index in 0..<batch {
                byte = UInt8(truncatingIfNeeded: index &+ round)
                _ = try withUnsafeBytes(of: &byte) { try end.encrypt($0) }
            }
        }
        carry(a, b)
        carry(b, a)
        for end in [a, b] {
            var received = 0
            while received < batch {
                let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[received...])
                guard let count = try end.decrypt(into: rest), count > 0 else {
                    print("FAILED: a record is missing in round \(round)")
                    exit(1)
                }
                received += count
            }
            for index in 0..<batch where buffer[index] != UInt8(truncatingIfNeeded: index &+ round) {
                print("FAILED: byte \(index) of round \(round) is wrong")
                exit(1)
            }
        }
    }
    print("rekey: \(rounds * batch) records in each direction of one session, all of them right (2^24 is \(1 << 24))")
}

if arguments.count > 3, arguments[2] == "serve" {
    let isPSK = arguments.count > 4
    try await Connects.serve(
        isPSK ? PSKCredentials(id: "p", directory: directory, endpoint: .server) : credentials(.server),
        image: arguments[3]
    )
    exit(0)
}
if arguments.count > 5, arguments[2] == "connects" {
    let isPSK = arguments.count > 6
    let client: any TLSCredentials =
        isPSK ? try PSKCredentials(id: "p", directory: directory, endpoint: .client) : try credentials(.client)
    let ports = try arguments[3...4].map { text in
        guard let port = UInt16(text) else { throw CredentialError("'\(text)' is no port") }
        return port
    }
    var rates: [[Double]] = [[], []]
    for _ in 0..<5 {
        for (index, port) in ports.enumerated() {
            rates[index].append(try await Connects.rate(client, port: port, count: Int(arguments[5]) ?? 100))
        }
    }
    let ratio = Spread(zip(rates[0], rates[1]).map { $0 / $1 })
    print(
        "Connect, TLS (\(isPSK ? "PSK" : "mutual ECDSA")), GO, disconnect a second: Crossdock \(Spread(rates[0]).text(0)), "
            + "nbdkit \(Spread(rates[1]).text(0)), ratio \(ratio.text(2))"
    )
    exit(0)
}
if arguments.count > 2, arguments[2] == "rekey" {
    try rekey()
    exit(0)
}
let gibibytes = arguments.count > 2 ? Double(arguments[2]) ?? 2 : 2
let rounds = arguments.count > 3 ? Int(arguments[3]) ?? 5 : 5
var ours: [(wall: Double, processor: Double, allocations: Double)] = []
var naive: [(wall: Double, processor: Double, allocations: Double)] = []
for _ in 0..<rounds {
    ours.append(try await stream(gibibytes))
    let (start, used, allocated) = (ContinuousClock.now, processorSeconds(), bench_allocations())
    guard bench_naive_tls(directory, Int(gibibytes * Double(1 << 30)), message) == 0 else {
        print("FAILED: the naive transfer")
        exit(1)
    }
    naive.append(
        (
            (ContinuousClock.now - start) / .seconds(1), processorSeconds() - used,
            Double(bench_allocations() - allocated) * Double(message) / (gibibytes * Double(1 << 30))
        )
    )
}
let ratio = Spread(zip(ours, naive).map { $0.processor / $1.processor })
let speed = Spread(zip(ours, naive).map { $1.wall / $0.wall })
print(
    "| TLS 1.3, AES-128-GCM, TCP loopback, 256 KiB messages, \(format(gibibytes, 1)) GiB, \(rounds) pairs | Crossdock | naive GnuTLS | ratio |"
)
print("|---|---|---|---|")
print(
    "| CPU-s/GiB, both ends | \(Spread(ours.map { $0.processor / gibibytes }).text(2)) "
        + "| \(Spread(naive.map { $0.processor / gibibytes }).text(2)) | \(ratio.text(2)) |"
)
print(
    "| GiB/s | \(Spread(ours.map { gibibytes / $0.wall }).text(2)) | \(Spread(naive.map { gibibytes / $0.wall }).text(2)) "
        + "| \(speed.text(2)) |"
)
print(
    "| allocations a message, GnuTLS's own included | \(Spread(ours.map(\.allocations)).text(1)) "
        + "| \(Spread(naive.map(\.allocations)).text(1)) | |"
)
let times = try await pingPong(20_000).sorted()
print(
    "\n4 KiB ping-pong: median \(format(times[times.count / 2], 1)) us, 99.9 % below \(format(times[times.count * 999 / 1000], 1)) us, "
        + "longest \(format(times.last! / 1000, 2)) ms (a Nagle stall takes 40 ms)"
)
let psk = "/tmp/crossdock-bench-psk.\(getpid())"
mkdir(psk, 0o700)
let keys = fopen("\(psk)/keys.psk", "w")
fputs("qemu:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n", keys)
fclose(keys)
defer {
    unlink("\(psk)/keys.psk")
    rmdir(psk)
}
let (ecdsa, ecdsaCost) = try handshakes(credentials(.client), credentials(.server), 300)
let (shared, sharedCost) = try handshakes(
    PSKCredentials(id: "p", directory: psk, endpoint: .client),
    PSKCredentials(id: "p", directory: psk, endpoint: .server),
    600
)
print(
    "Handshakes on one thread, both ends: mutual ECDSA \(format(ecdsa, 0))/s (\(format(ecdsaCost, 0)) us), "
        + "PSK \(format(shared, 0))/s (\(format(sharedCost, 0)) us)"
)
