public import Glibc
public import IO

/// TLS over any channel, with many records in each system call.
public final class TLSChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop of the channel below.

    /// The session.
    public let session: TLSSession
    private let base: any Channel
    private var ended = false
    /// Less than a record of plaintext that waits for more.
    private let gathered = ByteFIFO(capacity: TLSSession.recordSize)

    /// The loop of the channel below.
    public var loop: EventLoop { base.loop }
    /// Encrypted and buffered; half-close is a close_notify.
    public let features: ChannelFeatures = [.secure, .buffersWrites, .halfClose]
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

    private init(session: TLSSession, base: any Channel) {
        self.session = session
        self.base = base
    }

    /// Performs the handshake over `base` as the client or the server, as the credentials say.
    ///
    /// - Parameters:
    ///   - base: a channel that nothing was read from in advance: the handshake takes the very next byte. Closed when
    ///     the handshake fails.
    ///   - credentials: whose endpoint decides the role.
    ///   - hostname: the name that the server's certificate must be for.
    ///   - clientCertificate: whether a server insists on a certificate.
    ///   - timeout: the time allowed for the handshake.
    public static func handshake(
        over base: any Channel,
        credentials: any TLSCredentials,
        hostname: String? = nil,
        clientCertificate: TLSSession.ClientCertificate = .asCredentials,
        timeout: Duration = .seconds(10)
    ) async throws -> TLSChannel {
        do {
            let session = try TLSSession(
                credentials: credentials,
                hostname: hostname,
                clientCertificate: clientCertificate
            )
            let channel = TLSChannel(session: session, base: base)
            try await base.withCancellation {
                try await base.withDeadline(timeout, for: "The TLS handshake") {
                    do {
                        while try !session.handshake(peer: base.peerName) {
                            try await channel.flushAll()
                            while try !channel.fill() { try await base.waitReadable() }
                        }
                    } catch let error as ChannelError where error.code == .tls {
                        try? await channel.flushAll()
                        throw error
                    }
                    try await channel.flushAll()
                }
            }
            if credentials.endpoint == .server { ServerHandshakes.count(isAccepted: true) }
            return channel
        } catch {
            if credentials.endpoint == .server { ServerHandshakes.count(isAccepted: false) }
            base.close()
            throw error
        }
    }

    /// Has another loop carry the session. Called on this channel's loop while nobody waits for it.
    ///
    /// - Returns: the channel from here on, and this one is closed; this one itself when it is over something else than a socket.
    /// - Throws: `ChannelError` for a channel that has failed.
    public func moved(to target: EventLoop) async throws -> TLSChannel {
        try await flushAll()
        guard let socket = base as? SocketChannel else { return self }
        let channel = TLSChannel(session: session, base: try await socket.moved(to: target))
        channel.ended = ended
        return channel
    }

    /// Reads ciphertext. Returns whether anything arrived, the end of the transport included.
    private func fill() throws -> Bool {
        let space = session.inbound.space(64 << 10)
        let part = UnsafeMutableRawBufferPointer(rebasing: space.prefix(TLSSession.readSize))
        guard let count = try base.readNow(into: part) else { return false }
        if count == 0 { session.transportEnded = true } else { session.inbound.append(count: count) }
        return true
    }

    /// See `Channel.read(into:)`. The end is a close_notify; an end of the transport without one throws
    /// `ChannelError.Code.truncated`.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if ended { return 0 }
        var total = 0
        for buffer in buffers where buffer.iov_len > 0 {
            let target = UnsafeMutableRawBufferPointer(start: buffer.iov_base, count: buffer.iov_len)
            while true {
                let decrypted: Int?
                do {
                    decrypted = try session.decrypt(into: target, peer: peerName)
                } catch {
                    // What arrived before the failure is delivered; GnuTLS repeats the error at the next call.
                    if total > 0 { return total }
                    throw error
                }
                if let count = decrypted {
                    if count == 0 {
                        ended = total == 0
                        return total
                    }
                    total += count
                    if count < buffer.iov_len { return try afterRead(total) }
                    break
                }
                if total > 0 { return try afterRead(total) }
                if try !fill() { return try afterRead(nil) }
            }
        }
        return try afterRead(total)
    }

    /// A read may have made GnuTLS answer a key update; the answer must not wait for the next write.
    private func afterRead(_ result: Int?) throws -> Int? {
        // A peer that has gone may have said something before: the failure is for the next call.
        if !session.outbound.isEmpty, session.outbound.count < 1024 {
            do { _ = try flushRecords() } catch { if (result ?? 0) == 0 { throw error } }
        }
        return result
    }

    /// See `Channel.write(from:)`. What does not fill a record waits for more until `flush`, so that small messages share one:
    /// each record costs both ends as much as some kilobytes do.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        var total = 0
        for buffer in buffers { total += buffer.iov_len }
        if gathered.count + total < TLSSession.recordSize {
            gather(buffers, from: 0)
            return total
        }
        let limit = TLSSession.batchSize
        if session.outbound.count >= limit, try !flushRecords() { return nil }
        let before = gathered.count
        var taken = before == 0 ? try session.encrypt(buffers, wholeRecords: true) : try encryptBehind(buffers)
        gathered.remove(min(taken, before))
        if taken >= before, before + total - taken < TLSSession.recordSize {
            gather(buffers, from: taken - before)
            taken = before + total
        }
        if session.outbound.count >= limit { _ = try flushRecords() }
        return taken > before ? taken - before : nil
    }

    /// Encrypts what was gathered, and the buffers behind it.
    private func encryptBehind(_ buffers: UnsafeBufferPointer<iovec>) throws -> Int {
        try withUnsafeTemporaryAllocation(of: iovec.self, capacity: buffers.count + 1) { vectors in
            let bytes = gathered.bytes
            vectors[0] = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
            for (index, buffer) in buffers.enumerated() { vectors[index + 1] = buffer }
            return try session.encrypt(UnsafeBufferPointer(vectors), wholeRecords: true)
        }
    }

    private func gather(_ buffers: UnsafeBufferPointer<iovec>, from start: Int) {
        var skip = start
        for buffer in buffers {
            let part = max(0, buffer.iov_len - skip)
            if part > 0 {
                gathered.append(UnsafeRawBufferPointer(start: buffer.iov_base + (buffer.iov_len - part), count: part))
            }
            skip = max(0, skip - buffer.iov_len)
        }
    }

    /// Sends everything that was written.
    public func flush() throws -> Bool {
        while !gathered.isEmpty {
            let bytes = gathered.bytes
            var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
            let taken = try withUnsafePointer(to: &vector) {
                try session.encrypt(UnsafeBufferPointer(start: $0, count: 1))
            }
            gathered.remove(taken)
            if taken == 0, try !flushRecords() { return false }
        }
        return try flushRecords()
    }

    /// Sends the records that are there.
    private func flushRecords() throws -> Bool { try base.drain(session.outbound) }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws { try await base.waitReadable() }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws { try await base.waitWritable() }

    /// Sends a close_notify after all that was written.
    public func finishWriting() async throws {
        try await flushAll()
        session.closeNotify()
        try await flushAll()
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) { base.abort(reason) }

    /// Closes the channel below, without a close_notify.
    public func close() { base.close() }
}
