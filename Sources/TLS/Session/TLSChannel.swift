public import Glibc
public import IO

/// TLS over any channel, with many records in each system call.
public final class TLSChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop of the channel below.

    /// The session.
    public let session: TLSSession
    private let base: any Channel
    private var ended = false

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
    ///   - timeout: the time allowed for the handshake.
    public static func handshake(
        over base: any Channel,
        credentials: any TLSCredentials,
        hostname: String? = nil,
        timeout: Duration = .seconds(10)
    ) async throws -> TLSChannel {
        do {
            let session = try TLSSession(credentials: credentials, hostname: hostname)
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
            return channel
        } catch {
            base.close()
            throw error
        }
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
            do { _ = try flush() } catch { if (result ?? 0) == 0 { throw error } }
        }
        return result
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        let limit = TLSSession.batchSize
        if session.outbound.count >= limit, try !flush() { return nil }
        let count = try session.encrypt(buffers)
        if session.outbound.count >= limit { _ = try flush() }
        return count > 0 ? count : nil
    }

    /// Sends the gathered records.
    public func flush() throws -> Bool { try base.drain(session.outbound) }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws { try await base.waitReadable() }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws { try await base.waitWritable() }

    /// Sends a close_notify after all that was written.
    public func finishWriting() async throws {
        session.closeNotify()
        try await flushAll()
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) { base.abort(reason) }

    /// Closes the channel below, without a close_notify.
    public func close() { base.close() }
}
