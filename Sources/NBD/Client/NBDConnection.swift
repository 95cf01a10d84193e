internal import Glibc
public import IO
public import TLS

/// One connection of a client in the transmission phase: any number of requests in flight.
///
/// Confined to the channel's loop. Requests leave in the order of `submit`, replies come in any order.
public final class NBDConnection: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.

    /// What happens when a request is done: called once, on the loop.
    public typealias Completion = (NBDError?) -> Void

    private struct Pending {
        let command: UInt16
        let offset: UInt64
        let length: Int
        let data: Payload?
        var received = 0
        var extents: [Extent] = []
        var error: NBDError?
        let completion: Completion
        let onExtents: (([Extent]) -> Void)?
    }

    private struct Outgoing {
        let request: NBDRequest
        let payload: Payload?
    }

    /// How many bytes the export has.
    public let size: UInt64
    /// The loop that the connection is confined to.
    public var loop: EventLoop { channel.loop }
    /// What the server understands.
    public let flags: TransmissionFlags
    /// The TLS session, nil in clear text.
    public let tls: TLSSession?
    /// Why the connection ended; nil while it works.
    public private(set) var failure: (any Error)?
    /// Payload bytes in requests that are not yet answered.
    public private(set) var bytesInFlight = 0
    /// Called once when the connection fails.
    public var onFailure: ((any Error) -> Void)?

    private let channel: any Channel
    private let structured: Bool
    private let allocationContext: UInt32?
    private var pending: [UInt64: Pending] = [:]
    private var nextCookie: UInt64 = 1
    private var queue: [Outgoing] = []
    private let queued = AsyncCondition()
    private var isClosing = false

    private init(_ negotiated: ClientNegotiation.Result) {
        channel = negotiated.channel
        size = negotiated.size
        flags = negotiated.flags
        structured = negotiated.structured
        allocationContext = negotiated.allocationContext
        tls = negotiated.tls
    }

    /// Negotiates and starts the connection's two tasks on the channel's loop.
    ///
    /// - Parameters:
    ///   - channel: a fresh connection to the server, closed when this throws.
    ///   - options: what is wanted.
    /// - Throws: `ChannelError` or `CredentialError` that says what the server refused and why.
    public static func open(over channel: any Channel, _ options: NBDClientOptions) async throws -> NBDConnection {
        do {
            let connection = NBDConnection(try await ClientNegotiation.run(channel, options))
            connection.start()
            return connection
        } catch {
            channel.close()
            throw error
        }
    }

    /// Connects to an address and negotiates.
    public static func connect(
        to address: SocketAddress,
        on loop: EventLoop,
        _ options: NBDClientOptions
    ) async throws -> NBDConnection {
        try await open(over: SocketChannel.connect(to: address, on: loop, timeout: options.timeout), options)
    }

    private func start() {
        Task(executorPreference: channel.loop) { await self.sendRequests() }
        Task(executorPreference: channel.loop) { await self.receiveReplies() }
    }

    // MARK: Requests

    /// Sends a request.
    ///
    /// - Parameters:
    ///   - command: what to do.
    ///   - flags: its flags.
    ///   - offset: where.
    ///   - length: how many bytes; at most the payload's for reads and writes.
    ///   - data: what a write sends, or where a read puts what it gets.
    ///   - onExtents: gets what a block status found, before the completion.
    ///   - completion: called once, on the loop, possibly before this returns when the connection has failed.
    public func submit(
        _ command: NBDCommand,
        flags: CommandFlags = [],
        offset: UInt64 = 0,
        length: UInt32 = 0,
        data: Payload? = nil,
        onExtents: (([Extent]) -> Void)? = nil,
        completion: @escaping Completion
    ) {
        if let failure {
            completion(NBDError(.io, "The NBD connection has failed: \(failure)"))
            return
        }
        let cookie = nextCookie
        nextCookie += 1
        pending[cookie] = Pending(
            command: command.rawValue,
            offset: offset,
            length: Int(length),
            data: command == .read ? data : nil,
            completion: completion,
            onExtents: onExtents
        )
        if command == .read || command == .write { bytesInFlight += Int(length) }
        let request = NBDRequest(command, flags: flags, cookie: cookie, offset: offset, length: length)
        queue.append(Outgoing(request: request, payload: command == .write ? data : nil))
        queued.signal()
    }

    private func perform(
        _ command: NBDCommand,
        flags: CommandFlags = [],
        offset: UInt64 = 0,
        length: UInt32 = 0,
        data: Payload? = nil
    ) async throws {
        let error = await withUnsafeContinuation { (continuation: UnsafeContinuation<NBDError?, Never>) in
            submit(command, flags: flags, offset: offset, length: length, data: data) {
                continuation.resume(returning: $0)
            }
        }
        if let error { throw error }
    }

    /// Reads into a payload.
    public func read(into data: Payload, at offset: UInt64) async throws {
        try await perform(.read, offset: offset, length: UInt32(data.count), data: data)
    }

    /// Writes a payload.
    public func write(_ data: Payload, at offset: UInt64, fua: Bool = false) async throws {
        try await perform(.write, flags: fua ? [.fua] : [], offset: offset, length: UInt32(data.count), data: data)
    }

    /// Makes a range read as zeroes.
    public func zero(at offset: UInt64, count: UInt32, mayDeallocate: Bool = true) async throws {
        try await perform(.writeZeroes, flags: mayDeallocate ? [] : [.noHole], offset: offset, length: count)
    }

    /// Discards a range.
    public func trim(at offset: UInt64, count: UInt32) async throws {
        try await perform(.trim, offset: offset, length: count)
    }

    /// Makes all completed writes durable.
    public func flush() async throws { try await perform(.flush) }

    /// Asks what a range consists of; empty when the server cannot tell.
    public func extents(at offset: UInt64, count: UInt32) async throws -> [Extent] {
        guard allocationContext != nil else { return [] }
        var found: [Extent] = []
        let error = await withUnsafeContinuation { (continuation: UnsafeContinuation<NBDError?, Never>) in
            submit(.blockStatus, offset: offset, length: count, onExtents: { found = $0 }) {
                continuation.resume(returning: $0)
            }
        }
        if let error { throw error }
        return found
    }

    /// Says goodbye and closes, after the requests that were submitted before.
    public func disconnect() async {
        guard failure == nil else { return }
        isClosing = true
        queue.append(Outgoing(request: NBDRequest(.disconnect, cookie: 0), payload: nil))
        queued.signal()
        try? await channel.withDeadline(.seconds(5), for: "Closing") {
            while failure == nil { await ended.wait() }
        }
        fail(ChannelError(.closed, "The NBD connection to \(channel.peerName) is closed"))
    }

    /// Fails the connection and all its requests. Called on the loop.
    public func abort(_ reason: ChannelError) { fail(reason) }

    // MARK: The two tasks

    private let ended = AsyncCondition()

    private func sendRequests() async {
        let headers = IOBuffer(capacity: NBDWire.requestSize)
        do {
            while failure == nil {
                if queue.isEmpty {
                    await queued.wait()
                    continue
                }
                let batch = queue
                queue.removeAll(keepingCapacity: true)
                for item in batch {
                    item.request.encode(into: headers.mutable(0..<NBDWire.requestSize))
                    let header = headers.bytes(0..<NBDWire.requestSize)
                    if let payload = item.payload {
                        try await channel.writeAll(header, payload.bytes, flush: false)
                    } else {
                        try await channel.writeAll(header, flush: false)
                    }
                    if item.request.command == NBDCommand.disconnect.rawValue { try await channel.finishWriting() }
                }
                if queue.isEmpty { try await channel.flushAll() }
            }
        } catch {
            fail(error)
        }
    }

    private func receiveReplies() async {
        let header = IOBuffer(capacity: 64)
        do {
            while failure == nil {
                guard try await channel.readFull(into: header.mutable(0..<4)) else {
                    throw ChannelError(.closed, "\(channel.peerName) closed the NBD connection")
                }
                switch header.bytes(0..<4).bigEndian(0, UInt32.self) {
                case NBDWire.simpleReplyMagic: try await receiveSimple(header)
                case NBDWire.structuredReplyMagic where structured: try await receiveChunk(header)
                default: throw violation("sent something that is no reply")
                }
            }
        } catch {
            fail(error)
        }
    }

    private func violation(_ text: String) -> ChannelError {
        ChannelError(.protocolViolation, "The NBD server at \(channel.peerName) \(text)")
    }

    private func require(_ buffer: UnsafeMutableRawBufferPointer) async throws {
        guard try await channel.readFull(into: buffer) || buffer.isEmpty else {
            throw ChannelError(.truncated, "\(channel.peerName) closed the NBD connection within a reply")
        }
    }

    private func receiveSimple(_ header: IOBuffer) async throws {
        try await require(header.mutable(0..<12))
        let bytes = header.bytes(0..<12)
        let number: UInt32 = bytes.bigEndian(0)
        let cookie: UInt64 = bytes.bigEndian(4)
        guard let request = pending[cookie] else { throw violation("answered a request that was not made") }
        if number != 0 {
            finish(cookie, NBDError(.init(rawValue: number) ?? .invalid, "The NBD server reported error \(number)"))
            return
        }
        if request.command == NBDCommand.read.rawValue {
            if structured { throw violation("answered a read with a simple reply") }
            if let data = request.data { try await require(data.buffer.mutable(data.range)) }
        }
        finish(cookie, nil)
    }

    private func receiveChunk(_ header: IOBuffer) async throws {
        try await require(header.mutable(0..<16))
        let bytes = header.bytes(0..<16)
        let flags: UInt16 = bytes.bigEndian(0)
        let type: UInt16 = bytes.bigEndian(2)
        let cookie: UInt64 = bytes.bigEndian(4)
        let length = Int(bytes.bigEndian(12, UInt32.self))
        guard var request = pending[cookie] else { throw violation("answered a request that was not made") }
        switch type {
        case NBDChunk.none:
            guard length == 0, flags & NBDChunk.done != 0 else { throw violation("sent a malformed chunk") }
        case NBDChunk.offsetData:
            guard length > 8 else { throw violation("sent a malformed chunk") }
            try await require(header.mutable(0..<8))
            let range = try place(request, header.bytes(0..<8).bigEndian(0), length - 8)
            try await require(range)
            request.received += length - 8
        case NBDChunk.offsetHole:
            guard length == 12 else { throw violation("sent a malformed chunk") }
            try await require(header.mutable(0..<12))
            let count = Int(header.bytes(0..<12).bigEndian(8, UInt32.self))
            let range = try place(request, header.bytes(0..<12).bigEndian(0), count)
            memset(range.baseAddress!, 0, count)
            request.received += count
        case NBDChunk.blockStatus: try await receiveStatus(&request, length)
        case let code where code & (1 << 15) != 0: request.error = try await receiveError(type, length)
        default: throw violation("sent a chunk of the unknown type \(type)")
        }
        if flags & NBDChunk.done == 0 {
            pending[cookie] = request
            return
        }
        if request.error == nil, request.command == NBDCommand.read.rawValue, request.received != request.length {
            throw violation("answered a read with \(request.received) of \(request.length) bytes")
        }
        if request.error == nil { request.onExtents?(request.extents) }
        finish(cookie, request.error)
    }

    private func place(_ request: Pending, _ offset: UInt64, _ count: Int) throws -> UnsafeMutableRawBufferPointer {
        guard request.command == NBDCommand.read.rawValue, let data = request.data, count > 0,
            offset >= request.offset, offset - request.offset <= UInt64(request.length),
            count <= request.length - Int(offset - request.offset)
        else { throw violation("sent data that was not asked for") }
        let start = data.range.lowerBound + Int(offset - request.offset)
        return data.buffer.mutable(start..<(start + count))
    }

    private func receiveStatus(_ request: inout Pending, _ length: Int) async throws {
        guard request.command == NBDCommand.blockStatus.rawValue, length >= 12, (length - 4) % 8 == 0,
            length <= 4 + 8 << 20
        else { throw violation("sent a malformed block status") }
        let buffer = IOBuffer(capacity: length)
        try await require(buffer.mutable(0..<length))
        let bytes = buffer.bytes(0..<length)
        guard bytes.bigEndian(0, UInt32.self) == allocationContext else {
            throw violation("sent the status of a context that was not negotiated")
        }
        for position in stride(from: 4, to: length, by: 8) {
            let count: UInt32 = bytes.bigEndian(position)
            let flags: UInt32 = bytes.bigEndian(position + 4)
            guard count > 0 else { throw violation("sent an extent of nothing") }
            request.extents.append(
                Extent(length: UInt64(count), isHole: flags & 1 != 0, isZero: flags & 2 != 0)
            )
        }
    }

    private func receiveError(_ type: UInt16, _ length: Int) async throws -> NBDError {
        guard length >= 6, length <= 65536 else { throw violation("sent a malformed error") }
        let buffer = IOBuffer(capacity: length)
        try await require(buffer.mutable(0..<length))
        let bytes = buffer.bytes(0..<length)
        let count = Int(bytes.bigEndian(4, UInt16.self))
        guard count <= length - 6 else { throw violation("sent a malformed error") }
        let number: UInt32 = bytes.bigEndian(0)
        let text = OptionReply.sanitize(
            String(decoding: UnsafeRawBufferPointer(rebasing: bytes[6..<(6 + count)]), as: UTF8.self)
        )
        return NBDError(
            .init(rawValue: number) ?? .invalid,
            text.isEmpty ? "The NBD server reported error \(number)" : text
        )
    }

    private func finish(_ cookie: UInt64, _ error: NBDError?) {
        guard let request = pending.removeValue(forKey: cookie) else { return }
        if request.command <= NBDCommand.write.rawValue { bytesInFlight -= request.length }
        request.completion(error)
    }

    private func fail(_ error: any Error) {
        guard failure == nil else { return }
        failure = error
        channel.close()
        queued.signal()
        ended.signal()
        queue.removeAll()
        let lost = pending
        pending.removeAll()
        bytesInFlight = 0
        for request in lost.values { request.completion(NBDError(.io, "The NBD connection was lost: \(error)")) }
        if !isClosing { onFailure?(error) }
    }
}
