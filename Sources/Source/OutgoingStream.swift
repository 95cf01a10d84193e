internal import IO
internal import Migration
internal import Synchronization
internal import TLS

/// QEMU's migration stream on its way out: a Unix socket for QEMU, and a TLS connection for each of its connections.
final class OutgoingStream: @unchecked Sendable {
    // Unchecked: set up once; the rest is confined to `loop`, but for the counters.
    let socket: String
    private let listener: Listener
    private let loop: EventLoop
    private let plan: MigrationPlan
    private let credentials: any TLSCredentials
    private let sent = Atomic<UInt64>(0)
    private let opened = Atomic<Int>(0)
    /// The only process that may connect.
    private let client: Int32?
    private var channels: [any Channel] = []
    private let onFailure: @Sendable (String) -> Void

    /// Bytes of the stream that were passed on.
    var bytesSent: UInt64 { sent.load(ordering: .relaxed) }
    /// How many TLS connections were opened.
    var connections: Int { opened.load(ordering: .relaxed) }

    private init(
        _ socket: String,
        _ listener: Listener,
        _ plan: MigrationPlan,
        _ credentials: any TLSCredentials,
        _ client: Int32?,
        _ onFailure: @escaping @Sendable (String) -> Void
    ) {
        self.client = client
        self.socket = socket
        self.listener = listener
        self.plan = plan
        self.credentials = credentials
        self.onFailure = onFailure
        loop = listener.loop
    }

    static func start(
        socket: String,
        plan: MigrationPlan,
        credentials: any TLSCredentials,
        client: Int32?,
        on loop: EventLoop,
        onFailure: @escaping @Sendable (String) -> Void
    ) async throws -> OutgoingStream {
        try await loop.run {
            let listener = try await Listener.listen(on: .unix(path: socket), loop: loop)
            try SocketOwner.give(socket, to: client)
            let stream = OutgoingStream(socket, listener, plan, credentials, client, onFailure)
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
                let far = try await ControlConnection.openStream(plan, index: index, credentials: credentials, on: loop)
                channels.append(far)
                opened.wrappingAdd(1, ordering: .relaxed)
                index += 1
                Task(executorPreference: loop) {
                    do {
                        try await StreamRelay.run(near, far) { self.sent.wrappingAdd(UInt64($0), ordering: .relaxed) }
                    } catch {
                        self.onFailure("The migration stream broke: \(error)")
                    }
                }
            } catch {
                near.close()
                onFailure("\(error)")
            }
        }
    }

    /// Breaks the stream: QEMU's migration fails and the guest resumes by itself. From any thread.
    func abort(_ reason: String) {
        loop.execute {
            self.listener.close()
            for channel in self.channels { channel.abort(ChannelError(.closed, reason)) }
            self.channels = []
        }
    }
}
