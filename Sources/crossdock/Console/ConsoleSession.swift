import Emulator
import Glibc
import IO
import Migration
import Web

/// A console in a terminal: what the guest writes goes to standard output, and keys go to the guest. It outlives the agent: it connects again, and
/// goes on where it was. Confined to its loop.
final class ConsoleSession: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// How a session ends.
    enum Ending: Sendable, Hashable {
        /// The user has left with Ctrl-].
        case left
        /// A signal has ended it.
        case signal(Int32)
        /// The guest has moved.
        case moved(to: String)
        /// The agent has it no more, or has not come back.
        case closed(String)

        /// The exit code; nil for 0.
        var code: Int32? {
            switch self {
            case .left, .moved: nil
            case .signal(let number): 128 + number
            case .closed: MigrationError.Code.unreachable.rawValue
            }
        }

        func sentence(guest: String) -> String {
            switch self {
            case .left: "left the console of guest '\(guest)'"
            case .signal(let number): "left the console of guest '\(guest)' on signal \(number)"
            case .moved(let host): "guest '\(guest)' has moved to \(host): give 'crossdock console \(guest)' there"
            case .closed(let reason): "the console of guest '\(guest)' has ended: \(reason)"
            }
        }
    }

    /// What ends a session, as a terminal sends it: Ctrl-].
    private static let escape: UInt8 = 0x1d
    /// How long an agent that has gone is waited for.
    private static let patience = Duration.seconds(60)
    /// How many reasons are told of why nothing comes, which another host may have made up.
    private static let mostReasons = 16

    private let guest: String
    private let socket: String
    private let isViewOnly: Bool
    /// The host that has the guest, as in a query; nil when the agent knows.
    private let host: String?
    private let loop: EventLoop
    private var position: UInt64?
    private var ring: String?
    private var channel: WebSocketChannel?
    private var standing: ConsoleStanding?
    /// Why the agent says that no more comes, in full.
    private var parting: String?
    /// What the user was told of why nothing comes from the guest, since something came last.
    private var reasons: Set<String> = []
    private var ending: Ending?
    /// What the agent says to who comes back to it; nil while it says nothing.
    private var refusal: String?
    private var terminal: RawTerminal?
    private var screen: DescriptorChannel?

    init(guest: String, socket: String, from: UInt64?, host: String?, isViewOnly: Bool, on loop: EventLoop) {
        (self.guest, self.socket, self.isViewOnly, self.loop) = (guest, socket, isViewOnly, loop)
        self.host = host
        position = from
    }

    /// Ends the session. Called on the loop.
    func end(_ ending: Ending) {
        guard self.ending == nil else { return }
        self.ending = ending
        let reason = ChannelError(.closed, "The console is left")
        channel?.abort(reason)
        screen?.abort(reason)
    }

    /// Runs until the session ends.
    ///
    /// - Throws: `MigrationError` when there is no console to begin with.
    func run() async throws -> Ending {
        var opened: WebSocketChannel? = try await open()
        terminal = RawTerminal()
        defer { terminal?.restore() }
        let screen = try DescriptorChannel.standard(on: loop)
        self.screen = screen
        if terminal != nil { printError("crossdock: console of guest '\(guest)'; Ctrl-] leaves it\r") }
        let typing = Task(executorPreference: loop) { await self.type(from: screen) }
        while ending == nil, let channel = opened {
            self.channel = channel
            let lost = await show(channel, on: screen)
            channel.close()
            self.channel = nil
            let reason = (parting ?? channel.peerCloseReason).shown(most: ConsoleFrame.mostEnding)
            switch channel.peerCloseCode {
            case 4001?: end(.moved(to: reason))
            case 4000? where reason != "the agent ends": end(.closed(reason))
            default: break
            }
            if ending != nil { break }
            say("the agent is gone (\(lost)); waiting for it")
            opened = await reopen()
        }
        let result =
            ending ?? .closed(refusal.map { "the agent is back, and says: \($0)" } ?? "the agent has not come back")
        end(result)
        screen.abort(ChannelError(.closed, "The console is left"))
        await typing.value
        return result
    }

    /// A line for the user between what the guest writes.
    private func say(_ text: String) {
        printError("\(terminal == nil ? "" : "\r\n")crossdock: \(text)\(terminal == nil ? "" : "\r")")
    }

    // MARK: connecting

    private func reopen() async -> WebSocketChannel? {
        let end = ContinuousClock.now + Self.patience
        while ending == nil, ContinuousClock.now < end {
            await loop.sleep(for: .milliseconds(300))
            do {
                let channel = try await open()
                say("the agent is back")
                refusal = nil
                return channel
            } catch let error as MigrationError where error.code == .guest {
                // It may have the console again in a moment.
                if refusal != error.message { say("the agent is back, and says: \(error.message); asking it again") }
                refusal = error.message
            } catch {}
        }
        return nil
    }

    private func open() async throws -> WebSocketChannel {
        var path = "/consoles/\(guest)/serial?view=\(isViewOnly ? "only" : "all")"
        if let position { path += "&from=\(position)" }
        if let ring { path += "&ring=\(ring)" }
        if let host { path += "&host=\(host)" }
        let channel = try await AgentSocket.open(path, at: socket, on: loop)
        parting = nil
        if !isViewOnly {
            try await channel.write(ConsoleFrame.note(try JSONText.encode(ConsoleWish(write: true))).encoded)
        }
        return channel
    }

    // MARK: showing and typing

    /// Shows what comes until the connection ends. Returns why it did.
    private func show(_ channel: WebSocketChannel, on screen: DescriptorChannel) async -> String {
        let buffer = IOBuffer(capacity: ConsoleFrame.mostBytes)
        var parser = ConsoleFrame.Parser()
        do {
            while true {
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                if count == 0 { return "it has closed the connection" }
                parser.append(buffer.bytes(0..<count))
                while let frame = try parser.next() { try await take(frame, on: screen) }
            }
        } catch { return "\(error)" }
    }

    private func take(_ frame: ConsoleFrame, on screen: DescriptorChannel) async throws {
        switch frame {
        case .output(let offset, let bytes):
            if let position, ring != nil, offset > position {
                say("\(offset - position) bytes are left out: they came faster than they were read")
            }
            do { try await screen.write(bytes) } catch {
                end(.left)
                throw error
            }
            position = offset + UInt64(bytes.count)
            ring = standing?.ring
        case .note(let bytes):
            guard let new = JSONText.decode(ConsoleStanding.self, from: bytes) else { return }
            if let ending = new.ending { return parting = ending }
            if let known = ring, known != new.ring {
                say("the agent has begun a new record of the console")
                (ring, position) = (nil, nil)
            }
            if let notice = new.notice { say(notice.shown(most: 400)) }
            if let reason = new.reason, !new.connected, reasons.count < Self.mostReasons,
                reasons.insert(reason).inserted
            {
                say("not connected: \(reason.shown(most: 600))")
            }
            if new.connected {
                reasons = []
                if standing?.connected == false { say("connected") }
            }
            if let trouble = new.trouble, trouble != standing?.trouble { say(trouble.words.shown(most: 900)) }
            if new.trouble == nil, standing?.trouble != nil { say("guest '\(guest)' needs nobody any more") }
            standing = new
        case .input, .end: break
        }
    }

    private func type(from screen: DescriptorChannel) async {
        let buffer = IOBuffer(capacity: 4096)
        while ending == nil {
            guard let count = try? await screen.readSome(into: buffer.mutable(0..<buffer.capacity)), count > 0 else {
                break
            }
            var bytes = Array(buffer.bytes(0..<count))
            let escape = terminal == nil ? nil : bytes.firstIndex(of: Self.escape)
            if let escape { bytes.removeSubrange(escape...) }
            if !bytes.isEmpty, !isViewOnly { try? await channel?.write(ConsoleFrame.input(bytes).encoded) }
            if escape != nil { return end(.left) }
        }
        // Whoever has closed the terminal has left; a program that has no more to say goes on reading.
        if terminal != nil { end(.left) }
    }
}
