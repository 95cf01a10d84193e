public import Glibc

/// A stream in the binary messages of a websocket (RFC 6455), over any channel. QEMU's QIOChannelWebsock, and its client.
///
/// The boundaries of messages mean nothing: a write makes one or more messages, a read takes what has come of the present one,
/// however long it is. Pings are answered. The end is a Close frame; an end of the channel below without one is truncation.
public final class WebSocketChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop of the channel below.

    /// The close codes of section 7.4.1 that are sent here.
    enum CloseCode: UInt16 {
        case normal = 1000
        case protocolError = 1002
        case unsupported = 1003
    }

    /// How much of a write goes into one frame: as much as a batch of TLS records carries.
    private static let frameSize = 256 << 10
    /// How much is gathered before it is sent.
    private static let batchSize = 512 << 10

    private let base: any Channel
    private let isServer: Bool
    private let inbound = ByteFIFO(capacity: 64 << 10)
    private let outbound = ByteFIFO(capacity: 64 << 10)
    private var generator = SystemRandomNumberGenerator()
    /// What is left of the data frame that is being read.
    private var remaining: UInt64 = 0
    private var mask: UInt32?
    private var maskOffset = 0
    private var isInMessage = false
    /// How often one read asks the channel below for more.
    private static let fillLimit = 8
    /// Whether the last read stopped before it had seen everything, so that no event may come for the rest.
    private var mayHaveMore = false
    private var transportEnded = false
    private var received: (code: UInt16?, reason: String)?
    private var sentClose = false
    private var pongPending = false
    private var failure: ChannelError?

    /// The loop of the channel below.
    public var loop: EventLoop { base.loop }
    /// As secure as the channel below.
    public var features: ChannelFeatures { base.features.intersection([.secure]).union([.buffersWrites, .halfClose]) }
    /// The peer of the channel below.
    public var peerName: String { base.peerName }
    /// The address below.
    public var localAddress: SocketAddress? { base.localAddress }
    /// The peer's address below.
    public var peerAddress: SocketAddress? { base.peerAddress }
    /// Passed on to the channel below.
    public func setCork(_ enabled: Bool) { base.setCork(enabled) }
    /// Passed on to the channel below.
    public func setDelay(_ enabled: Bool) { base.setDelay(enabled) }
    /// The code with which the peer closed; nil as long as it has not, or when it gave none.
    public var peerCloseCode: UInt16? { received?.code }
    /// What the peer said when it closed; empty when it said nothing.
    public var peerCloseReason: String { received?.reason ?? "" }

    private init(_ base: any Channel, isServer: Bool) {
        self.base = base
        self.isServer = isServer
    }

    // MARK: Handshake

    /// Waits for a client's handshake and answers it.
    ///
    /// - Parameters:
    ///   - base: a channel that nothing was read from. Closed when the handshake fails.
    ///   - timeout: the time allowed.
    /// - Throws: `ChannelError`; the client gets an HTTP error with the reason.
    public static func accept(over base: any Channel, timeout: Duration = .seconds(10)) async throws -> WebSocketChannel
    {
        let channel = WebSocketChannel(base, isServer: true)
        try await channel.negotiating(timeout) {
            do {
                let request = try await channel.readHead()
                try await base.write(WebSocketHandshake.response(to: request))
            } catch let failure as WebSocketHandshake.Failure {
                try? await base.write(WebSocketHandshake.refusal(failure))
                try? await base.finishWriting()
                throw failure
            }
        }
        return channel
    }

    /// Answers a handshake whose request somebody else has read.
    ///
    /// - Parameters:
    ///   - base: the channel that it came over. Closed when the handshake fails.
    ///   - request: the request.
    ///   - following: what was read behind it.
    ///   - timeout: the time allowed.
    /// - Throws: `ChannelError`; the client gets an HTTP error with the reason.
    public static func accept(
        over base: any Channel,
        request: HTTPRequestHead,
        following: [UInt8],
        timeout: Duration = .seconds(10)
    ) async throws -> WebSocketChannel {
        let channel = WebSocketChannel(base, isServer: true)
        following.withUnsafeBytes { channel.inbound.append($0) }
        try await channel.negotiating(timeout) {
            do { try await base.write(WebSocketHandshake.response(to: request)) } catch let failure as HTTPFailure {
                try? await base.write(WebSocketHandshake.refusal(failure))
                try? await base.finishWriting()
                throw failure
            }
        }
        return channel
    }

    /// Performs the handshake as a client.
    ///
    /// - Parameters:
    ///   - base: a connected channel. Closed when the handshake fails.
    ///   - host: the server's name, with its port when it is not the usual one.
    ///   - path: the path, which begins with a slash.
    ///   - fields: further fields of the request: "Origin", "Cookie".
    ///   - timeout: the time allowed.
    /// - Throws: `HTTPRefusal` with the server's words when it opens none, `ChannelError`.
    public static func connect(
        over base: any Channel,
        host: String,
        path: String = "/",
        fields: KeyValuePairs<String, String> = [:],
        timeout: Duration = .seconds(10)
    ) async throws -> WebSocketChannel {
        let channel = WebSocketChannel(base, isServer: false)
        try await channel.negotiating(timeout) {
            let key = WebSocketHandshake.newKey()
            try await base.write(WebSocketHandshake.request(host: host, path: path, key: key, fields: fields))
            let answer = try await channel.readHead()
            if let head = try? HTTPResponseHead(parsing: answer), head.status >= 400 {
                throw HTTPRefusal(head, body: await channel.readBody(of: head))
            }
            try WebSocketHandshake.check(response: answer, key: key)
        }
        return channel
    }

    /// How long the words of a refusal are waited for.
    private static let patience = Duration.seconds(2)

    /// Reads what comes of a refusal's body: no more than a person is to read.
    private func readBody(of head: HTTPResponseHead) async -> [UInt8] {
        let length = min(head.fields["content-length"].flatMap { Int($0) } ?? 0, HTTPRefusal.mostBytes)
        try? await base.withDeadline(Self.patience, for: "The words of a refusal") {
            while inbound.count < length, !transportEnded {
                if try !fill() { try await base.waitReadable() }
            }
        }
        return Array(inbound.bytes.prefix(length))
    }

    private func negotiating(_ timeout: Duration, _ body: () async throws -> Void) async throws {
        do {
            try await base.withCancellation {
                try await base.withDeadline(timeout, for: "The websocket handshake") { try await body() }
            }
        } catch {
            base.close()
            if let failure = error as? WebSocketHandshake.Failure {
                throw ChannelError(
                    .protocolViolation,
                    "The websocket handshake with \(peerName) failed: \(failure.reason)"
                )
            }
            throw error
        }
    }

    /// Reads the HTTP head; what follows it stays queued.
    private func readHead() async throws -> [UInt8] {
        var scanned = 0
        while true {
            let bytes = inbound.bytes
            if let end = HTTPFields.endOfHead(in: bytes, from: scanned) {
                let head = Array(bytes[..<end])
                inbound.remove(end)
                return head
            }
            scanned = bytes.count
            guard scanned < WebSocketHandshake.limit else {
                throw WebSocketHandshake.Failure(
                    status: 431,
                    reason: "the head is longer than \(WebSocketHandshake.limit) bytes"
                )
            }
            while try !fill() { try await base.waitReadable() }
            if transportEnded {
                throw ChannelError(.truncated, "\(peerName) closed the connection in the websocket handshake")
            }
        }
    }

    // MARK: Reading

    private func fill() throws -> Bool {
        let space = inbound.space(16 << 10)
        guard let count = try base.readNow(into: space) else { return false }
        if count == 0 { transportEnded = true } else { inbound.append(count: count) }
        return true
    }

    /// See `Channel.read(into:)`. 0 is the peer's Close frame with code 1000, 1001 or none; another code throws.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        if received != nil { return 0 }
        var total = 0
        var index = 0
        var offset = 0
        var fills = 0
        while index < buffers.count {
            if offset == buffers[index].iov_len {
                index += 1
                offset = 0
                continue
            }
            if remaining > 0, !inbound.isEmpty {
                let space = buffers[index].iov_len - offset
                let count = min(Int(clamping: remaining), min(inbound.count, space))
                let target = UnsafeMutableRawBufferPointer(start: buffers[index].iov_base! + offset, count: count)
                target.copyMemory(from: UnsafeRawBufferPointer(rebasing: inbound.bytes[..<count]))
                if let mask { WebSocketFrameHead.apply(mask, to: target, offset: maskOffset) }
                maskOffset = (maskOffset + count) & 3
                inbound.remove(count)
                remaining -= UInt64(count)
                offset += count
                total += count
                continue
            }
            // What has arrived is delivered before anything that could fail is looked at.
            if remaining == 0 {
                var took = false
                do { took = try nextFrame() } catch {
                    // The failure is kept for the next call.
                    if total > 0 { break }
                    throw error
                }
                if took {
                    if received != nil { break }
                    continue
                }
            }
            if total > 0 { break }
            if transportEnded {
                throw ChannelError(.truncated, "\(peerName) ended the connection without closing the websocket")
            }
            fills += 1
            if fills > Self.fillLimit {
                // A peer that floods us with frames without content must not keep the loop to itself.
                mayHaveMore = true
                _ = try answer()
                return nil
            }
            if try !fill() {
                _ = try answer()
                return nil
            }
        }
        if total > 0 { _ = try? answer() } else { _ = try answer() }
        return total
    }

    /// Pongs must not wait for the next write.
    private func answer() throws -> Bool {
        guard pongPending else { return true }
        pongPending = false
        return try flush()
    }

    /// Takes the next frame's head, and the whole of a control frame. Returns whether anything was taken.
    private func nextFrame() throws -> Bool {
        switch WebSocketFrameHead.parse(inbound.bytes, masked: isServer) {
        case .incomplete: return false
        case .violation(let reason): throw fail(.protocolError, reason)
        case .head(let head, let size):
            if head.opcode.isControl {
                let whole = size + Int(head.length)
                guard inbound.count >= whole else { return false }
                var payload = Array(inbound.bytes[size..<whole])
                if let mask = head.mask {
                    payload.withUnsafeMutableBytes { WebSocketFrameHead.apply(mask, to: $0, offset: 0) }
                }
                inbound.remove(whole)
                try control(head.opcode, payload)
                return true
            }
            switch head.opcode {
            case .text: throw fail(.unsupported, "it sent text, not bytes")
            case .continuation where !isInMessage:
                throw fail(.protocolError, "a continuation has no message to go on with")
            case .binary where isInMessage: throw fail(.protocolError, "a message began in the middle of another")
            default: break
            }
            inbound.remove(size)
            isInMessage = !head.isFinal
            remaining = head.length
            mask = head.mask
            maskOffset = 0
            return true
        }
    }

    private func control(_ opcode: WebSocketFrameHead.Opcode, _ payload: [UInt8]) throws {
        switch opcode {
        case .ping:
            // The answer to an older ping that could not be sent yet may be left out (section 5.5.3), which bounds the queue.
            if !sentClose, outbound.count < 64 << 10 {
                append(.pong, payload)
                pongPending = true
            }
        case .close:
            var code: UInt16?
            var reason = ""
            if !payload.isEmpty {
                guard payload.count >= 2 else { throw fail(.protocolError, "a Close frame has half a code") }
                let value = UInt16(payload[0]) << 8 | UInt16(payload[1])
                guard (1000...1003).contains(value) || (1007...1014).contains(value) || (3000...4999).contains(value)
                else {
                    throw fail(.protocolError, "a Close frame has the code \(value)")
                }
                guard let text = String(validating: payload[2...], as: UTF8.self) else {
                    throw fail(.protocolError, "the reason of a Close frame is not UTF-8")
                }
                code = value
                reason = text
            }
            received = (code, reason)
            if let code, code != 1000, code != 1001 {
                let words = reason.isEmpty ? "" : " ('\(reason)')"
                sendClose(.normal)
                _ = try? flush()
                let error = ChannelError(.closed, "\(peerName) closed the websocket with code \(code)\(words)")
                failure = error
                throw error
            }
        default: break
        }
    }

    /// Tells the peer why, as far as that can be done without waiting, and fails for good.
    private func fail(_ code: CloseCode, _ reason: String) -> ChannelError {
        let error = ChannelError(.protocolViolation, "\(peerName) broke the rules of websocket: \(reason)")
        sendClose(code)
        _ = try? flush()
        failure = error
        return error
    }

    // MARK: Writing

    private func append(_ opcode: WebSocketFrameHead.Opcode, _ payload: [UInt8]) {
        payload.withUnsafeBytes { bytes in
            var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
            withUnsafePointer(to: &vector) { pointer in
                append(opcode, UnsafeBufferPointer(start: pointer, count: 1), length: payload.count)
            }
        }
    }

    /// Queues one frame with the first `length` bytes of the buffers.
    private func append(_ opcode: WebSocketFrameHead.Opcode, _ buffers: UnsafeBufferPointer<iovec>, length: Int) {
        let mask = isServer ? nil : UInt32.random(in: 0...UInt32.max, using: &generator)
        let head = WebSocketFrameHead(isFinal: true, opcode: opcode, mask: mask, length: UInt64(length))
        withUnsafeTemporaryAllocation(byteCount: WebSocketFrameHead.maximumLength, alignment: 8) { buffer in
            let size = head.write(to: buffer)
            outbound.append(UnsafeRawBufferPointer(rebasing: buffer[..<size]))
        }
        var done = 0
        for buffer in buffers where done < length {
            let count = min(buffer.iov_len, length - done)
            if count == 0 { continue }
            let bytes = UnsafeRawBufferPointer(start: buffer.iov_base, count: count)
            outbound.append(bytes)
            if let mask {
                let queued = outbound.bytes
                let target = UnsafeMutableRawBufferPointer(
                    start: UnsafeMutableRawPointer(mutating: queued.baseAddress! + queued.count - count),
                    count: count
                )
                WebSocketFrameHead.apply(mask, to: target, offset: done)
            }
            done += count
        }
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        if sentClose { throw ChannelError.system("write to \(peerName)", EPIPE) }
        if outbound.count >= Self.batchSize, try !flush() { return nil }
        let total = min(Self.frameSize, buffers.reduce(0) { $0 + $1.iov_len })
        if total == 0 { return 0 }
        append(.binary, buffers, length: total)
        if outbound.count >= Self.batchSize { _ = try flush() }
        return total
    }

    /// Sends the gathered frames.
    public func flush() throws -> Bool { try base.drain(outbound) }

    private func sendClose(_ code: CloseCode) { sendClose(code.rawValue, "") }

    private func sendClose(_ code: UInt16, _ reason: String) {
        guard !sentClose else { return }
        append(.close, [UInt8(code >> 8), UInt8(code & 0xff)] + Array(reason.utf8))
        sentClose = true
    }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws {
        if let failure { throw failure }
        if mayHaveMore {
            mayHaveMore = false
            await Task.yield()
            return
        }
        try await base.waitReadable()
    }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws {
        if let failure { throw failure }
        try await base.waitWritable()
    }

    /// Sends a Close frame after all that was written. What the peer still sends can be read.
    public func finishWriting() async throws {
        if let failure { throw failure }
        sendClose(.normal)
        try await flushAll()
    }

    /// The most bytes of a Close frame's reason.
    public static let mostReason = 123

    /// Sends a Close frame with a code of the application's, 4000 to 4999, and a reason, of which as many whole words are sent as a frame holds.
    public func finishWriting(code: UInt16, reason: String) async throws {
        precondition((4000...4999).contains(code), "\(code) is no code for applications")
        if let failure { throw failure }
        sendClose(code, reason.shown(wordsOf: Self.mostReason))
        try await flushAll()
    }

    /// Asks the peer whether it is there; its answer is dropped when it is read.
    public func ping(_ payload: [UInt8] = []) async throws {
        precondition(payload.count <= 125, "a control frame has at most 125 bytes")
        if let failure { throw failure }
        if sentClose { throw ChannelError.system("write to \(peerName)", EPIPE) }
        append(.ping, payload)
        // What does not go now goes with the next write: another task may be waiting to write.
        _ = try flush()
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) {
        loop.execute { self.failure = self.failure ?? reason }
        base.abort(reason)
    }

    /// Closes the channel below; a Close frame is sent first as far as that can be done without waiting.
    public func close() {
        if failure == nil {
            sendClose(.normal)
            _ = try? flush()
            failure = ChannelError(.closed, "The websocket with \(peerName) is closed")
        }
        base.close()
    }
}
