internal import Emulator
internal import IO

/// The connection to a guest's serial socket. Confined to its loop.
final class SerialHold: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// What happens to it.
    enum Event {
        case connected
        case bytes([UInt8])
        /// It is over, or never began; the reason, half a sentence.
        case ended(String)
    }

    let place: ConsolePlace
    private let loop: EventLoop
    private var channel: SocketChannel?
    private(set) var isOver = false
    private let buffer = IOBuffer(capacity: ConsoleFrame.mostBytes)
    private let take: (SerialHold, Event) -> Void

    /// Whether it is there.
    var isConnected: Bool { channel != nil && !isOver }

    /// Begins to connect.
    init(_ place: ConsolePlace, on loop: EventLoop, _ take: @escaping (SerialHold, Event) -> Void) {
        (self.place, self.loop, self.take) = (place, loop, take)
        Task(executorPreference: loop) {
            let why = await self.run()
            self.end()
            self.take(self, .ended(why))
        }
    }

    private func run() async -> String {
        guard let path = place.path, let process = place.process else { return "the guest does not run" }
        let socket: SocketChannel
        do {
            socket = try await SocketChannel.connect(to: .unix(path: path), on: loop)
            // Who may write where the socket is could lead what is typed to anybody who listens on this host.
            guard socket.isFrom(process: process.pid) else {
                socket.close()
                throw GuestError("who listens at \(path) is not the guest's QEMU")
            }
        } catch { return "the agent cannot connect to \(place.name): \(error)" }
        defer { socket.close() }
        guard !isOver else { return "it is not wanted any more" }
        channel = socket
        take(self, .connected)
        while !isOver {
            guard let count = try? await socket.readSome(into: buffer.mutable(0..<buffer.capacity)), count > 0 else {
                break
            }
            take(self, .bytes(Array(buffer.bytes(0..<count))))
            // A guest that writes all the time must not keep the loop to itself.
            await Task.yield()
        }
        return "the guest's QEMU has closed its serial socket"
    }

    /// Takes what is there already.
    func drain() {
        while let channel, !isOver, let count = try? channel.readNow(into: buffer.mutable(0..<buffer.capacity)),
            count > 0
        {
            take(self, .bytes(Array(buffer.bytes(0..<count))))
        }
    }

    /// The most bytes that are typed at once.
    static let mostTyped = 64

    /// Types, and waits until QEMU has taken that: what it has not taken when the guest leaves is lost.
    ///
    /// - Throws: when QEMU takes nothing any more.
    func write(_ bytes: [UInt8]) async throws {
        guard let channel, !isOver else { throw ChannelError(.closed, "The console is not held") }
        do {
            try await channel.write(bytes)
            var pause = Duration.microseconds(500)
            while !isOver, channel.hasUntaken {
                await loop.sleep(for: pause)
                pause = min(pause * 2, .milliseconds(20))
            }
        } catch {
            channel.abort(ChannelError(.closed, "The guest's QEMU takes no input: \(error)"))
            throw error
        }
    }

    /// Lets go of it.
    func end() {
        isOver = true
        channel?.abort(ChannelError(.closed, "The guest's console is elsewhere now"))
    }
}
