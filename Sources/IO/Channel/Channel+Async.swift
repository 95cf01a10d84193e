public import Glibc

extension Channel {
    /// Reads at least one byte.
    ///
    /// - Returns: the number of bytes, 0 at the orderly end of the stream.
    @inlinable
    public func readSome(into buffer: UnsafeMutableRawBufferPointer) async throws -> Int {
        while true {
            if let count = try readNow(into: buffer) { return count }
            try await waitReadable()
        }
    }

    /// Reads without waiting: the number of bytes, 0 at the end, nil when nothing is there.
    @inlinable
    public func readNow(into buffer: UnsafeMutableRawBufferPointer) throws -> Int? {
        var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
        return try withUnsafePointer(to: &vector) { try read(into: UnsafeBufferPointer(start: $0, count: 1)) }
    }

    /// Reads until the buffer is full.
    ///
    /// - Returns: false when the stream ended in the orderly way before the first byte.
    /// - Throws: `ChannelError` with `Code.truncated` when it ended in the middle.
    @inlinable
    public func readFull(into buffer: UnsafeMutableRawBufferPointer) async throws -> Bool {
        var done = 0
        while done < buffer.count {
            let count = try await readSome(into: UnsafeMutableRawBufferPointer(rebasing: buffer[done...]))
            if count == 0 {
                if done == 0 { return false }
                throw ChannelError(.truncated, "\(peerName) closed the connection in the middle of a message")
            }
            done += count
        }
        return true
    }

    /// Reads exactly `count` bytes.
    ///
    /// - Throws: `ChannelError` with `Code.closed` when the stream ends before the first byte.
    public func read(exactly count: Int) async throws -> [UInt8] {
        let buffer = IOBuffer(capacity: max(count, 1))
        guard try await readFull(into: buffer.mutable(0..<count)) || count == 0 else {
            throw ChannelError(.closed, "\(peerName) closed the connection")
        }
        return [UInt8](buffer.bytes(0..<count))
    }

    /// Writes two pieces, one after the other, and sends them unless told to hold them back.
    ///
    /// Both must stay valid until the call returns.
    @inlinable
    public func writeAll(
        _ first: UnsafeRawBufferPointer,
        _ second: UnsafeRawBufferPointer = UnsafeRawBufferPointer(start: nil, count: 0),
        flush mustFlush: Bool = true
    ) async throws {
        var done = 0
        let total = first.count + second.count
        while done < total {
            guard let count = try writeNow(first, second, from: done) else {
                try await waitWritable()
                continue
            }
            done += count
        }
        if mustFlush { try await flushAll() }
    }

    /// Writes what it can of two pieces, without waiting and from an offset into their sequence.
    @inlinable
    func writeNow(
        _ first: UnsafeRawBufferPointer,
        _ second: UnsafeRawBufferPointer,
        from offset: Int
    ) throws -> Int? {
        if offset >= first.count {
            let rest = offset - first.count
            var vector = iovec(
                iov_base: UnsafeMutableRawPointer(mutating: second.baseAddress! + rest),
                iov_len: second.count - rest
            )
            return try withUnsafePointer(to: &vector) { try write(from: UnsafeBufferPointer(start: $0, count: 1)) }
        }
        return try withUnsafeTemporaryAllocation(of: iovec.self, capacity: 2) { vectors in
            vectors[0] = iovec(
                iov_base: UnsafeMutableRawPointer(mutating: first.baseAddress! + offset),
                iov_len: first.count - offset
            )
            vectors[1] = iovec(
                iov_base: UnsafeMutableRawPointer(mutating: second.baseAddress),
                iov_len: second.count
            )
            return try write(from: UnsafeBufferPointer(rebasing: vectors[0..<(second.isEmpty ? 1 : 2)]))
        }
    }

    /// Sends a queue of a layer above, and then what this channel holds back. Returns whether all of it went.
    public func drain(_ queue: ByteFIFO) throws -> Bool {
        while !queue.isEmpty {
            let bytes = queue.bytes
            var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
            let sent = try withUnsafePointer(to: &vector) { try write(from: UnsafeBufferPointer(start: $0, count: 1)) }
            guard let sent else { return false }
            queue.remove(sent)
        }
        return try flush()
    }

    /// Sends all that is held back.
    @inlinable
    public func flushAll() async throws {
        while try !flush() { try await waitWritable() }
    }

    /// Writes bytes and sends them.
    public func write(_ bytes: [UInt8]) async throws {
        let buffer = IOBuffer(copying: bytes)
        try await writeAll(buffer.bytes(0..<bytes.count))
    }

    /// Runs `body`; when the task is cancelled in the meantime, the channel is aborted, which wakes whatever waits.
    public func withCancellation<T>(_ body: () async throws -> T) async throws -> T {
        try await withTaskCancellationHandler {
            try await body()
        } onCancel: {
            abort(ChannelError(.cancelled, "The operation on \(peerName) was cancelled"))
        }
    }

    /// Runs `body`; when it is not done after `limit`, the channel is aborted with "timed out while ...".
    ///
    /// - Parameters:
    ///   - limit: the time allowed.
    ///   - activity: what is being done, for the message: "TLS handshake".
    ///   - body: the work.
    public func withDeadline<T>(
        _ limit: Duration,
        for activity: String,
        _ body: () async throws -> T
    ) async throws -> T {
        let timer = loop.schedule(after: limit) { [peerName] in
            self.abort(ChannelError(.timedOut, "\(activity) with \(peerName) took longer than \(limit)"))
        }
        defer { timer.cancel() }
        return try await body()
    }
}
