internal import Glibc
internal import IO
internal import TLS

/// The transmission phase of one connection.
///
/// Requests that can be done at once are done in the order of their arrival on the connection's own task; the others
/// become child tasks, a bounded number of them. Replies are gathered while more requests are there to be read.
final class Transmission: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.
    private static let pool = BufferPool()
    /// How many requests of a connection may wait for slow work, and how many bytes of payload they may hold.
    private static let slowRequests = 32
    private static let slowBytes = 64 << 20

    private let channel: any Channel
    private let export: Export
    private let backEnd: any BackEnd
    private let flags: TransmissionFlags
    private let structured: Bool
    private let hasContexts: Bool
    private let writeLock = AsyncLock()
    private let slowDone = AsyncCondition()
    private var slow = 0
    private var slowPayload = 0
    private var hasUnsent = false

    init(channel: any Channel, export: Export, structured: Bool, hasContexts: Bool) {
        self.channel = channel
        self.export = export
        self.structured = structured
        self.hasContexts = hasContexts
        backEnd = export.backEnd
        flags = export.flags
    }

    func run() async throws {
        try await withThrowingDiscardingTaskGroup { group in
            let header = IOBuffer(capacity: NBDWire.requestSize)
            while try await readHeader(header) {
                guard let request = NBDRequest(decoding: header.bytes(0..<NBDWire.requestSize)) else {
                    throw ChannelError(.protocolViolation, "Dropped \(channel.peerName): not an NBD request")
                }
                if request.command == NBDCommand.disconnect.rawValue { break }
                var payload: Payload?
                if request.command == NBDCommand.write.rawValue {
                    guard request.length <= UInt32(NBDWire.maximumPayload) else {
                        throw ChannelError(
                            .protocolViolation,
                            "Dropped \(channel.peerName): a write of \(request.length) bytes"
                        )
                    }
                    let count = Int(request.length)
                    let buffer = Self.pool.buffer(count)
                    guard try await channel.readFull(into: buffer.mutable(0..<count)) || count == 0 else {
                        throw ChannelError(.truncated, "\(channel.peerName) closed the connection within a write")
                    }
                    payload = Payload(buffer, 0..<count)
                }
                if let fault = request.fault(size: backEnd.size, flags: flags, hasContexts: hasContexts) {
                    try await reply(request, error: fault)
                } else if try await !doneAtOnce(request, payload) {
                    while slow >= Self.slowRequests || slowPayload > Self.slowBytes {
                        try await flushReplies()
                        await slowDone.wait()
                    }
                    slow += 1
                    slowPayload += Self.cost(request)
                    group.addTask(executorPreference: channel.loop) {
                        try await self.runSlow(request, payload)
                    }
                }
            }
        }
        try await flushReplies()
        try? await channel.withDeadline(.seconds(2), for: "Closing") { try await channel.finishWriting() }
    }

    /// Reads a request's header; what was gathered for the peer is sent before waiting for it.
    private func readHeader(_ header: IOBuffer) async throws -> Bool {
        var done = 0
        while done < NBDWire.requestSize {
            if let count = try channel.readNow(into: header.mutable(done..<NBDWire.requestSize)) {
                if count == 0 {
                    if done == 0 { return false }
                    throw ChannelError(.truncated, "\(channel.peerName) closed the connection within a request")
                }
                done += count
            } else {
                if hasUnsent { try await flushReplies() }
                do {
                    try await channel.waitReadable()
                } catch let error as ChannelError where error.code == .truncated && done == 0 {
                    return false
                }
            }
        }
        return true
    }

    /// Does what needs no waiting.
    private func doneAtOnce(_ request: NBDRequest, _ payload: Payload?) async throws -> Bool {
        do {
            switch NBDCommand(rawValue: request.command) {
            case .read:
                let (buffer, range) = readBuffer(request)
                guard try backEnd.tryRead(into: buffer.mutable(range), at: request.offset) else { return false }
                try await replyData(request, buffer, range)
            case .write:
                guard let payload,
                    try backEnd.tryWrite(payload, at: request.offset, fua: request.flags.contains(.fua))
                else { return false }
                try await reply(request)
            default: return false
            }
            return true
        } catch let error as NBDError {
            try await reply(request, error: error)
            return true
        }
    }

    /// How much memory a request holds until its reply is sent.
    private static func cost(_ request: NBDRequest) -> Int {
        let holds = request.command == NBDCommand.read.rawValue || request.command == NBDCommand.write.rawValue
        return holds ? Int(request.length) : 0
    }

    private func runSlow(_ request: NBDRequest, _ payload: Payload?) async throws {
        defer {
            slow -= 1
            slowPayload -= Self.cost(request)
            slowDone.signal()
        }
        do {
            let fua = request.flags.contains(.fua)
            let count = UInt64(request.length)
            switch NBDCommand(rawValue: request.command) {
            case .read:
                let (buffer, range) = readBuffer(request)
                try await backEnd.read(into: Payload(buffer, range), at: request.offset)
                try await replyData(request, buffer, range)
            case .write:
                if let payload { try await backEnd.write(payload, at: request.offset, fua: fua) }
                try await reply(request)
            case .flush:
                try await backEnd.flush()
                try await reply(request)
            case .trim:
                try await backEnd.trim(at: request.offset, count: count, fua: fua)
                try await reply(request)
            case .writeZeroes:
                let mayDeallocate = !request.flags.contains(.noHole)
                try await backEnd.zero(at: request.offset, count: count, mayDeallocate: mayDeallocate, fua: fua)
                try await reply(request)
            case .blockStatus:
                let limit = request.flags.contains(.requestOne) ? 1 : 4096
                let extents = try await backEnd.extents(at: request.offset, count: count, limit: limit)
                try await replyStatus(request, extents)
            case .disconnect, nil: break
            }
        } catch let error as NBDError {
            try await reply(request, error: error)
        }
        try await flushReplies()
    }

    /// A buffer for a read's data with room for the reply's header before it.
    private func readBuffer(_ request: NBDRequest) -> (IOBuffer, Range<Int>) {
        // The data begins on a page boundary, so that direct I/O could fill it.
        let count = Int(request.length)
        let lead = count >= 4096 ? 4096 : 32
        return (Self.pool.buffer(lead + count), lead..<(lead + count))
    }

    private func replyData(_ request: NBDRequest, _ buffer: IOBuffer, _ range: Range<Int>) async throws {
        if range.isEmpty { return try await reply(request) }
        let size = structured ? NBDWire.structuredReplySize + 8 : NBDWire.simpleReplySize
        let start = range.lowerBound - size
        let header = buffer.mutable(start..<range.lowerBound)
        if structured {
            encodeChunk(header, NBDChunk.offsetData, NBDChunk.done, request.cookie, UInt32(8 + range.count))
            header.storeBigEndian(request.offset, at: NBDWire.structuredReplySize)
        } else {
            encodeSimple(header, 0, request.cookie)
        }
        try await send(buffer.bytes(start..<range.upperBound))
    }

    private func reply(_ request: NBDRequest, error: NBDError? = nil) async throws {
        let text = structured ? error.map { Array(OptionReply.sanitize($0.message).utf8) } ?? [] : []
        let buffer = Self.pool.buffer(64 + text.count)
        let count: Int
        if structured, let error {
            count = NBDWire.structuredReplySize + 6 + text.count
            let message = buffer.mutable(0..<count)
            encodeChunk(message, NBDChunk.error, NBDChunk.done, request.cookie, UInt32(6 + text.count))
            message.storeBigEndian(error.number.rawValue, at: NBDWire.structuredReplySize)
            message.storeBigEndian(UInt16(text.count), at: NBDWire.structuredReplySize + 4)
            buffer.mutable((count - text.count)..<count).copyBytes(from: text)
        } else {
            // A simple reply is right for everything but a read once structured replies were negotiated.
            let needsChunk = structured && request.command == NBDCommand.read.rawValue
            count = needsChunk ? NBDWire.structuredReplySize : NBDWire.simpleReplySize
            if needsChunk {
                encodeChunk(buffer.mutable(0..<count), NBDChunk.none, NBDChunk.done, request.cookie, 0)
            } else {
                encodeSimple(buffer.mutable(0..<count), error?.number.rawValue ?? 0, request.cookie)
            }
        }
        try await send(buffer.bytes(0..<count))
    }

    private func replyStatus(_ request: NBDRequest, _ extents: [Extent]) async throws {
        let count = NBDWire.structuredReplySize + 4 + 8 * extents.count
        let buffer = Self.pool.buffer(count)
        let message = buffer.mutable(0..<count)
        encodeChunk(message, NBDChunk.blockStatus, NBDChunk.done, request.cookie, UInt32(4 + 8 * extents.count))
        message.storeBigEndian(ServerHandshake.allocationContextID, at: NBDWire.structuredReplySize)
        var position = NBDWire.structuredReplySize + 4
        for extent in extents {
            message.storeBigEndian(UInt32(clamping: extent.length), at: position)
            message.storeBigEndian(extent.flags, at: position + 4)
            position += 8
        }
        try await send(buffer.bytes(0..<count))
    }

    private func encodeSimple(_ bytes: UnsafeMutableRawBufferPointer, _ error: UInt32, _ cookie: UInt64) {
        bytes.storeBigEndian(NBDWire.simpleReplyMagic, at: 0)
        bytes.storeBigEndian(error, at: 4)
        bytes.storeBigEndian(cookie, at: 8)
    }

    private func encodeChunk(
        _ bytes: UnsafeMutableRawBufferPointer,
        _ type: UInt16,
        _ flags: UInt16,
        _ cookie: UInt64,
        _ length: UInt32
    ) {
        bytes.storeBigEndian(NBDWire.structuredReplyMagic, at: 0)
        bytes.storeBigEndian(flags, at: 4)
        bytes.storeBigEndian(type, at: 6)
        bytes.storeBigEndian(cookie, at: 8)
        bytes.storeBigEndian(length, at: 16)
    }

    private func send(_ bytes: UnsafeRawBufferPointer) async throws {
        await writeLock.acquire()
        defer { writeLock.release() }
        try await channel.writeAll(bytes, flush: false)
        hasUnsent = true
    }

    private func flushReplies() async throws {
        guard hasUnsent else { return }
        await writeLock.acquire()
        defer { writeLock.release() }
        hasUnsent = false
        try await channel.flushAll()
    }
}
