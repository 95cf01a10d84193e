import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import Web

/// Gives the screen of a guest, which the agent of this host shows, to viewers of VNC on this host: each connection goes on to the agent in a
/// websocket of its own. Confined to its loop.
final class DisplayRelay: @unchecked Sendable {
    // Unchecked: confined to the loop.

    private let guest: String
    private let socket: String
    private let isViewOnly: Bool
    private let loop: EventLoop
    private var listeners: NetworkListener?
    private var signal: Int32?
    /// How many viewers there are.
    private var viewers = 0
    private var isWatching = false
    /// What the operator was told last of why the guest stands still.
    private var trouble: String?
    /// Between two questions whether the guest stands still: of RFB viewers show a name at most.
    private static let period = Duration.seconds(2)

    init(guest: String, socket: String, isViewOnly: Bool, on loop: EventLoop) {
        (self.guest, self.socket, self.isViewOnly, self.loop) = (guest, socket, isViewOnly, loop)
    }

    /// Ends it on a signal. Called on the loop.
    func end(_ signal: Int32) {
        self.signal = self.signal ?? signal
        listeners?.close()
    }

    /// Serves viewers until it is ended.
    ///
    /// - Parameter address: where; nil for a Unix socket in a directory of its own.
    /// - Returns: the number of the signal that has ended it.
    /// - Throws: `MigrationError` when there is no screen to begin with, `ChannelError` when nobody can be listened for there.
    func run(at address: SocketAddress?) async throws -> Int32 {
        if let refusal = try await refusal() { throw MigrationError(.guest, refusal) }
        let own =
            address == nil
            ? try DurableFile.makePrivateDirectory(in: ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp") : nil
        defer { if let own { DurableFile.remove(own) } }
        let listeners = try await NetworkListener.listen(
            on: [address ?? .unix(path: "\(own ?? "")/\(guest).vnc")],
            loop: loop
        )
        self.listeners = listeners
        for address in listeners.addresses {
            output("Viewers of VNC find the screen of guest '\(guest)' at \(Self.words(address)); Ctrl-C ends this.\n")
        }
        if signal != nil { listeners.close() }
        await listeners.serve { viewer in
            await self.serve(viewer)
            viewer.close()
        }
        return signal ?? SIGTERM
    }

    /// An address as viewers take it: with two colons before a port that is no number of a display.
    private static func words(_ address: SocketAddress) -> String {
        switch address {
        case .unix(let path): path
        case .inet(let host, let port): host.contains(":") ? "[\(host)]::\(port)" : "\(host)::\(port)"
        default: "\(address)"
        }
    }

    private func serve(_ viewer: SocketChannel) async {
        if case .unix? = viewer.localAddress, !viewer.isFrom(process: nil) { return }
        viewers += 1
        defer { viewers -= 1 }
        watch()
        do {
            let path = "/consoles/\(guest)/vnc?view=\(isViewOnly ? "only" : "all")"
            let agent = try await AgentSocket.open(path, at: socket, on: loop)
            defer { agent.close() }
            let forth = Task(executorPreference: loop) { await Self.copy(from: viewer, to: agent) }
            await Self.copy(from: agent, to: viewer)
            await forth.value
            switch agent.peerCloseCode {
            case 4001?: printError("crossdock: guest '\(guest)' has moved to \(agent.peerCloseReason.shown(most: 255))")
            case 4000?, 4002?:
                // Of what is still so, a Close frame holds half a sentence only.
                let reason = try await refusal() ?? agent.peerCloseReason.shown(most: 255)
                printError("crossdock: a viewer was sent away: \(reason)")
            default: break
            }
        } catch { printError("crossdock: \(error)") }
    }

    /// Tells who has given the command why the picture stands still, as long as there are viewers.
    private func watch() {
        guard !isWatching else { return }
        isWatching = true
        Task(executorPreference: loop) {
            defer { self.isWatching = false }
            while self.viewers > 0, self.signal == nil {
                // An agent that does not answer is told of by the viewers' connections.
                if let body = try? await self.standing() { self.explain(body["trouble"]) }
                await self.loop.sleep(for: Self.period)
            }
        }
    }

    private func explain(_ new: JSONValue?) {
        let known = new.flatMap { JSONText.decode(GuestTrouble.self, from: Array($0.text.utf8)) }
        let words = known?.words.shown(most: 900)
        defer { trouble = words }
        if let words, words != trouble { printError("crossdock: \(words)") }
        if words == nil, trouble != nil { printError("crossdock: guest '\(guest)' needs nobody any more") }
    }

    /// Copies one direction; when it ends, so does the other.
    private static func copy(from source: any Channel, to target: any Channel) async {
        let buffer = IOBuffer(capacity: 64 << 10)
        while let count = try? await source.readSome(into: buffer.mutable(0..<buffer.capacity)), count > 0 {
            guard (try? await target.writeAll(buffer.bytes(0..<count))) != nil else { break }
        }
        let reason = ChannelError(.closed, "The other side has gone")
        source.abort(reason)
        target.abort(reason)
    }

    // MARK: the agent

    private func ask() async throws -> (status: Int, body: JSONValue?) {
        try await AgentSocket.ask("/consoles/\(guest)/vnc", at: socket, on: loop)
    }

    /// How the screen stands; nil when the agent does not say.
    private func standing() async throws -> JSONValue? {
        let (status, body) = try await ask()
        return status == 200 ? body : nil
    }

    /// Why there is no such screen now; nil when there is one.
    private func refusal() async throws -> String? {
        let (status, body) = try await ask()
        if status == 200, body?["available"]?.bool == true { return nil }
        let reason = body?["reason"]?.string ?? body?["error"]?.string ?? "the agent answers with \(status)"
        return "The screen of guest '\(guest)' cannot be had: \(reason)"
    }
}
