internal import CLinux
public import Glibc

/// A stream through an authenticated SSH session whose host key was checked, by libssh.
///
/// The session is made on a thread of the pool, because libssh's key exchange blocks; after that everything happens on the loop.
public final class SSHChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let session: SSHSession
    private let registration: Registration
    private let fd: Int32
    private var reader: UnsafeContinuation<Void, Never>?
    private var writer: UnsafeContinuation<Void, Never>?
    private var failure: ChannelError?
    private var isClosed = false
    private var sentEnd = false

    /// The loop.
    public let loop: EventLoop
    /// Encrypted; half-close is SSH's EOF.
    public let features: ChannelFeatures = [.secure, .halfClose, .buffersWrites]
    /// The server, and where the channel leads.
    public let peerName: String

    private init(_ session: SSHSession, name: String, on loop: EventLoop) throws {
        self.session = session
        peerName = name
        self.loop = loop
        // libssh closes its descriptor when the connection breaks, and the number may be another's then: a copy is watched.
        fd = fcntl(session.descriptor, F_DUPFD_CLOEXEC, 3)
        guard fd >= 0 else { throw ChannelError.system("watch the connection to \(name)", errno) }
        // libssh makes the socket blocking, and would send its whole queue in one call.
        _ = xd_set_nonblocking(fd)
        do {
            registration = try loop.register(fd)
        } catch {
            Glibc.close(fd)
            throw error
        }
        pump()
    }

    deinit {
        let (session, loop, fd) = (session, loop, fd)
        guard !isClosed else { return }
        nonisolated(unsafe) let registration = registration
        loop.execute {
            loop.deregister(fd)
            Glibc.close(fd)
            registration.fail()
            session.free()
        }
    }

    /// Connects, checks the host's key, authenticates and opens the channel. Called on the loop.
    ///
    /// - Throws: `ChannelError` that tells which of these failed, at which host, and what to do.
    public static func connect(
        _ configuration: SSHConfiguration,
        to target: SSHConfiguration.Target,
        on loop: EventLoop
    ) async throws -> SSHChannel {
        let session = try await BlockingPool.shared.run { try SSHSession.open(configuration, target) }
        return try SSHChannel(session, name: "\(configuration.host) (SSH to \(target))", on: loop)
    }

    // MARK: Readiness

    /// SSH's packets are for both directions at once: one that makes room for a writer comes in like data. So each event of
    /// the socket wakes both.
    private func pump() {
        // Used on the loop only, where these tasks run.
        nonisolated(unsafe) let registration = registration
        for isReading in [true, false] {
            Task(executorPreference: loop) { [weak self] in
                while true {
                    if isReading { await registration.waitReadable() } else { await registration.waitWritable() }
                    guard let self, !self.isClosed else { return }
                    self.wake()
                }
            }
        }
    }

    private func wake() {
        reader.take()?.resume()
        writer.take()?.resume()
    }

    private func check() throws {
        if let failure { throw failure }
    }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws {
        try check()
        // libssh may leave packets in the socket, for which the loop has had its event already.
        if xd_is_readable(fd) == 1 {
            await Task.yield()
        } else {
            precondition(reader == nil, "one task at a time reads from a channel")
            await withUnsafeContinuation { reader = $0 }
        }
        try check()
    }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws {
        try check()
        if xd_is_readable(fd) == 1 {
            // Taking the packets is what may make room.
            session.poll()
            await Task.yield()
        } else {
            precondition(writer == nil, "one task at a time writes to a channel")
            await withUnsafeContinuation { writer = $0 }
        }
        try check()
    }

    // MARK: Bytes

    private func fail(_ activity: String, _ words: String) -> ChannelError {
        let error = ChannelError(.closed, "Cannot \(activity) \(peerName): \(words)")
        failure = failure ?? error
        return error
    }

    /// See `Channel.read(into:)`.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        try check()
        var total = 0
        for buffer in buffers where buffer.iov_len > 0 {
            let outcome = session.read(into: buffer.iov_base, buffer.iov_len)
            if case .bytes(let count) = outcome {
                total += count
                if count == buffer.iov_len { continue }
            }
            // What has arrived is delivered first.
            if total > 0 { return total }
            switch outcome {
            case .bytes, .end: return 0
            case .wait: return nil
            case .truncated:
                throw ChannelError(.truncated, "\(peerName) ended the connection without closing the channel")
            case .failed(let words): throw fail("read from", words)
            }
        }
        return total
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        try check()
        if sentEnd { throw ChannelError.system("write to \(peerName)", EPIPE) }
        var total = 0
        for buffer in buffers where buffer.iov_len > 0 {
            let outcome = session.write(from: buffer.iov_base, buffer.iov_len)
            if case .failed(let words) = outcome { throw fail("write to", words) }
            guard case .bytes(let count) = outcome else { break }
            total += count
            if count < buffer.iov_len { break }
        }
        return total == 0 ? nil : total
    }

    /// Sends what libssh holds back.
    public func flush() throws -> Bool {
        try check()
        switch session.flush() {
        case .failed(let words): throw fail("write to", words)
        case .wait: return false
        default: return true
        }
    }

    /// Sends SSH's EOF.
    public func finishWriting() async throws {
        try check()
        guard !sentEnd else { return }
        try await flushAll()
        sentEnd = true
        if case .failed(let words) = session.sendEnd() { throw fail("end the stream to", words) }
        try await flushAll()
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) {
        loop.execute {
            guard self.failure == nil else { return }
            self.failure = reason
            self.wake()
        }
    }

    /// Closes the channel and its session.
    public func close() {
        guard !isClosed else { return }
        failure = failure ?? ChannelError(.closed, "The connection to \(peerName) is closed")
        isClosed = true
        loop.deregister(fd)
        Glibc.close(fd)
        registration.fail()
        session.free()
        wake()
    }
}
