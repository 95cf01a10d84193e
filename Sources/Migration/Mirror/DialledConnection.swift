public import IO
public import NBD

/// A connection to an NBD server that gets as far as it can before its export is known, while others look at that.
///
/// It is a head start and nothing else: whatever becomes of it, a connection can be made anew.
public final class DialledConnection: Sendable {
    private let loop: EventLoop
    private let negotiation: Task<NBDNegotiation?, Never>

    /// Begins at once.
    ///
    /// - Parameters:
    ///   - address: the server.
    ///   - loop: where the connection lives.
    ///   - options: what is known; the export is said later.
    public init(to address: SocketAddress, on loop: EventLoop, _ options: NBDClientOptions) {
        self.loop = loop
        let options = MirrorRelay.bounded(options)
        negotiation = Task(executorPreference: loop) { try? await NBDConnection.dial(address, on: loop, options) }
    }

    /// Opens the export, on the connection's loop; nil when the connection did not get that far, or has ended since.
    func open(_ options: NBDClientOptions) async -> NBDConnection? {
        guard let negotiation = await negotiation.value else { return nil }
        return try? await NBDConnection.open(negotiation, options)
    }

    /// It is not wanted. From any thread.
    public func giveUp() {
        negotiation.cancel()
        Task(executorPreference: loop) { await self.negotiation.value?.abort() }
    }
}
