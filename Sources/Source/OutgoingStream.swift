internal import IO
internal import Migration
internal import Synchronization
internal import TLS

/// QEMU's migration stream on its way out: a Unix socket for QEMU, and a TLS connection for each of its connections, or several that share
/// the first one.
final class OutgoingStream: @unchecked Sendable {
    // Unchecked: set up once; the rest is confined to `loop`, but for the counters.
    let socket: String
    private let listener: Listener
    private let loop: EventLoop
    private let plan: MigrationPlan
    private let credentials: any TLSCredentials
    /// What carries QEMU's first connection in pieces; nil when one connection carries it as it is.
    private let lanes: Lanes?
    /// The connection for the first of QEMU's that was begun already.
    private var dialled: DialledStream?
    private let sent = Atomic<UInt64>(0)
    private let onLine = Atomic<UInt64>(0)
    private let opened = Atomic<Int>(0)
    /// The only process that may connect.
    private let client: Int32?
    private var channels: [any Channel] = []
    private var isAborted = false
    private let onFailure: @Sendable (String) -> Void

    /// Connections that carry a stream in pieces.
    struct Lanes {
        /// Which sending of the memory it is.
        var attempt: Int
        /// How many.
        var count: Int
        /// Whether the pieces are compressed.
        var compression: Compression
        /// What the line was measured to take, in bytes per second.
        var lineRate: Double?
        /// What the disks have just seen of it; nil when they have not.
        var seen: (rate: Double, roundTrip: Duration)?
        /// Whether the destination says what it has passed on.
        var isAcknowledged: Bool
        /// Which loops those after the first one are spread over.
        var loops: EventLoopGroup
    }

    /// Bytes of the stream that were passed on.
    var bytesSent: UInt64 { sent.load(ordering: .relaxed) }
    /// What they were on the line, where pieces may be compressed.
    var bytesOnLine: UInt64? { lanes?.compression ?? .off == .off ? nil : onLine.load(ordering: .relaxed) }
    /// How many TLS connections were opened.
    var connections: Int { opened.load(ordering: .relaxed) }

    private init(
        _ socket: String,
        _ listener: Listener,
        _ plan: MigrationPlan,
        _ credentials: any TLSCredentials,
        _ client: Int32?,
        _ lanes: Lanes?,
        _ dialled: DialledStream?,
        _ onFailure: @escaping @Sendable (String) -> Void
    ) {
        self.client = client
        self.lanes = lanes
        self.dialled = dialled
        self.socket = socket
        self.listener = listener
        self.plan = plan
        self.credentials = credentials
        self.onFailure = onFailure
        loop = listener.loop
    }

    /// Waits for QEMU at a socket.
    ///
    /// - Parameters:
    ///   - socket: its path.
    ///   - plan: where the stream goes.
    ///   - credentials: this side's.
    ///   - client: the only process that may connect.
    ///   - lanes: what is to share QEMU's first connection. Needs `Feature.lanes`.
    ///   - dialled: the connection for the first of QEMU's that was begun already, on the loop.
    ///   - loop: where the stream lives.
    ///   - onFailure: is told why the stream broke.
    static func start(
        socket: String,
        plan: MigrationPlan,
        credentials: any TLSCredentials,
        client: Int32?,
        lanes: Lanes? = nil,
        dialled: DialledStream? = nil,
        on loop: EventLoop,
        onFailure: @escaping @Sendable (String) -> Void
    ) async throws -> OutgoingStream {
        try await loop.run {
            let listener = try await Listener.listen(on: .unix(path: socket), loop: loop)
            try SocketOwner.give(socket, to: client)
            let stream = OutgoingStream(socket, listener, plan, credentials, client, lanes, dialled, onFailure)
            Task(executorPreference: loop) { await stream.accept() }
            return stream
        }
    }

    /// QEMU's connections have no names on the wire, so the destination must see them in the order QEMU made them: the
    /// next one is accepted once the one before is through.
    private func accept() async {
        var index = 0
        while let near = try? await listener.accept() {
            guard near.isFrom(process: client) else {
                near.close()
                continue
            }
            channels.append(near)
            do {
                let far = try await open(index, near)
                let isInPieces = lanes != nil && index == 0
                index += 1
                Task(executorPreference: loop) {
                    do { try await self.carry(near, far, isInPieces: isInPieces) } catch {
                        self.onFailure("The migration stream broke: \(error)")
                    }
                }
            } catch {
                near.close()
                onFailure("\(error)")
            }
        }
    }

    /// Opens what carries one of QEMU's connections. The destination has to see the first lane before the others.
    private func open(_ index: Int, _ near: SocketChannel) async throws -> [TLSChannel] {
        guard let lanes, index == 0 else { return [try await open(index, nil, on: loop)] }
        let first = try await open(index, .init(attempt: lanes.attempt, number: 0), on: loop)
        let others = try await withThrowingTaskGroup(of: (Int, TLSChannel).self) { group in
            for number in 1..<max(lanes.count, 1) {
                let other = lanes.loops.next()
                group.addTask(executorPreference: other) {
                    (number, try await self.open(index, .init(attempt: lanes.attempt, number: number), on: other))
                }
            }
            var opened: [Int: TLSChannel] = [:]
            while let (number, lane) = try await group.next() { opened[number] = lane }
            return opened
        }
        // The second one has something to say.
        return [first] + others.sorted { $0.key < $1.key }.map(\.value)
    }

    private func open(_ index: Int, _ lane: Message.Hello.Lane?, on other: EventLoop) async throws -> TLSChannel {
        let begun = index == 0 && lane == nil ? await dialled?.channel() : nil
        let far = try await ControlConnection.openStream(
            plan,
            index: index,
            lane: lane,
            dialled: begun,
            credentials: credentials,
            on: other
        )
        opened.wrappingAdd(1, ordering: .relaxed)
        try await loop.run {
            guard !self.isAborted else {
                far.abort(ChannelError(.closed, "The stream was given up"))
                throw MigrationError(.failed, "The stream was given up")
            }
            self.channels.append(far)
        }
        return far
    }

    private func carry(_ near: SocketChannel, _ far: [TLSChannel], isInPieces: Bool) async throws {
        guard isInPieces, let lanes else {
            return try await StreamRelay.run(near, far[0]) { self.sent.wrappingAdd(UInt64($0), ordering: .relaxed) }
        }
        let sender = LaneSender(
            from: near,
            over: far,
            compression: lanes.compression,
            lineRate: lanes.lineRate,
            seen: lanes.seen,
            isAcknowledged: lanes.isAcknowledged
        ) { bytes, onLine in
            self.sent.wrappingAdd(UInt64(bytes), ordering: .relaxed)
            self.onLine.wrappingAdd(UInt64(onLine), ordering: .relaxed)
        }
        try await sender.run()
    }

    /// Breaks the stream: QEMU's migration fails and the guest resumes by itself. From any thread.
    func abort(_ reason: String) {
        loop.execute {
            self.isAborted = true
            self.listener.close()
            for channel in self.channels { channel.abort(ChannelError(.closed, reason)) }
            self.channels = []
        }
    }
}
