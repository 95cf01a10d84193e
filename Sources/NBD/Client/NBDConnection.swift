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

    /// What a block status found, one call for each context.
    public typealias Findings = (String, [Extent]) -> Void

    /// A request that waits for its reply. A class, so that a reply in many chunks copies nothing.
    private final class Pending {
        let command: UInt16
        let offset: UInt64
        let length: UInt64
        let data: Payload?
        /// The parts of a read that have arrived, in order and without gaps between neighbours.
        var parts = ReceivedParts()
        var extents: [(context: UInt32, extents: [Extent])] = []
        var error: NBDError?
        /// How many chunks reported an error; a server may report several, but not without end.
        var errors = 0
        let completion: Completion
        let onExtents: Findings?

        init(_ request: NBDRequest, data: Payload?, onExtents: Findings?, completion: @escaping Completion) {
            command = request.command
            offset = request.offset
            length = request.length
            self.data = data
            self.onExtents = onExtents
            self.completion = completion
        }

        /// Whether the server may need long: it writes back what it has, or allocates.
        var isSlow: Bool {
            let quick: [NBDCommand] = [.read, .write, .blockStatus]
            return command != NBDWire.compressedWrite && !quick.contains { $0.rawValue == command }
        }
    }

    private struct Outgoing {
        let request: NBDRequest
        let payload: Payload?
    }

    /// What the server said about the export.
    public let info: NBDExportInfo
    /// How many bytes the export has.
    public var size: UInt64 { info.size }
    /// The loop that the connection is confined to.
    public var loop: EventLoop { channel.loop }
    /// What the server understands.
    public var flags: TransmissionFlags { info.flags }
    /// The TLS session, nil in clear text.
    public let tls: TLSSession?
    /// The form of headers that was agreed on.
    public let form: HeaderForm
    /// About how long the network takes to the server and back.
    public let roundTrip: Duration
    /// The metadata contexts that the server knows, of those that were asked for.
    public var contexts: [String] { selected.map(\.name) }
    /// Why the connection ended; nil while it works.
    public private(set) var failure: (any Error)?
    /// Payload bytes in requests that are not yet answered.
    public private(set) var bytesInFlight = 0
    /// Called once when the connection fails.
    public var onFailure: ((any Error) -> Void)?

    private let channel: any Channel
    private let selected: [SelectedContext]
    private let maximumPayload: UInt64
    private let replyTimeout: Duration?
    private var pending: [UInt64: Pending] = [:]
    private var nextCookie: UInt64 = 1
    /// The latest requests for a block status of several metadata contexts that have failed.
    private var failedStatus: [UInt64] = []
    private var queue: [Outgoing] = []
    private let queued = AsyncCondition()
    private var isClosing = false
    private var progress: UInt64 = 0
    private var watch: LoopTimer?

    private init(_ negotiation: NBDNegotiation, _ info: NBDExportInfo, _ options: NBDClientOptions) {
        let channel = negotiation.channel
        self.channel = channel.features.contains(.buffersWrites) ? channel : BufferedChannel(over: channel)
        self.info = info
        form = negotiation.form
        roundTrip = negotiation.roundTrip
        selected = negotiation.contexts
        tls = negotiation.tls
        maximumPayload = UInt64(min(info.effectiveBlockSizes.maximum, UInt32(NBDWire.maximumPayload)))
        replyTimeout = options.replyTimeout
    }

    /// Negotiates and starts the connection's two tasks on the channel's loop.
    ///
    /// - Parameters:
    ///   - channel: a fresh connection to the server, closed when this throws.
    ///   - options: what is wanted.
    /// - Throws: `ChannelError` or `CredentialError` that says what the server refused and why.
    public static func open(over channel: any Channel, _ options: NBDClientOptions) async throws -> NBDConnection {
        try await open(try await NBDNegotiation.start(over: channel, options), options)
    }

    /// Asks for the export in a negotiation that was begun before it was known, and starts the connection's two tasks.
    ///
    /// - Parameters:
    ///   - negotiation: what `dial` has begun; closed when this throws.
    ///   - options: what is wanted; all but the export and the contexts as they were when it was begun.
    /// - Throws: `ChannelError` that says what the server refused and why, or that it has closed the connection meanwhile.
    public static func open(_ negotiation: NBDNegotiation, _ options: NBDClientOptions) async throws -> NBDConnection {
        do {
            negotiation.choose(options)
            let connection = NBDConnection(negotiation, try await negotiation.go(), options)
            connection.start()
            return connection
        } catch {
            negotiation.channel.close()
            throw error
        }
    }

    /// Connects to an address and negotiates.
    public static func connect(
        to address: SocketAddress,
        on loop: EventLoop,
        _ options: NBDClientOptions
    ) async throws -> NBDConnection {
        try await open(try await dial(address, on: loop, options), options)
    }

    /// Connects to an address and negotiates as far as that goes before the export is known: all but one of the round trips.
    ///
    /// A server bounds the time of a negotiation, so that one that was begun long ago may have ended.
    public static func dial(
        _ address: SocketAddress,
        on loop: EventLoop,
        _ options: NBDClientOptions
    ) async throws -> NBDNegotiation {
        // However long a server may think, a host that is there answers at once.
        let limit = min(options.timeout, .seconds(10))
        let socket = try await SocketChannel.connect(to: address, on: loop, timeout: limit)
        // What the kernel holds back is no sign that the server takes anything.
        if options.replyTimeout != nil { socket.limitUnsent(1 << 20) }
        return try await NBDNegotiation.start(over: socket, options)
    }

    private func start() {
        Task(executorPreference: channel.loop) { await self.sendRequests() }
        Task(executorPreference: channel.loop) { await self.receiveReplies() }
        if let replyTimeout { watch(replyTimeout, since: progress) }
    }

    /// Fails the connection when requests wait and nothing has come for so long; ten times as long when one of them may take
    /// its time.
    private func watch(_ limit: Duration, since last: UInt64, quarters: Int = 0) {
        watch = loop.schedule(after: limit / 4) { [weak self] in
            guard let self, failure == nil else { return }
            let isSilent = !pending.isEmpty && progress == last
            let quarters = isSilent ? quarters + 1 : 0
            let allowed = quarters >= 4 && pending.values.contains(where: \.isSlow) ? 40 : 4
            if quarters >= allowed {
                fail(
                    ChannelError(
                        .timedOut,
                        "The NBD server at \(channel.peerName) said nothing for \(limit * (allowed / 4))"
                    )
                )
            } else {
                watch(limit, since: progress, quarters: quarters)
            }
        }
    }

    // MARK: Requests

    /// Sends a request.
    ///
    /// - Parameters:
    ///   - command: what to do.
    ///   - flags: its flags.
    ///   - offset: where.
    ///   - length: how many bytes; the payload's for reads and writes. Compact headers carry less than 2^32.
    ///   - data: what a write sends, or where a read puts what it gets.
    ///   - onExtents: gets what a block status found, before the completion.
    ///   - completion: called once, on the loop, possibly before this returns: when the connection has failed, and when the
    ///     server has not said that it understands such a request.
    public func submit(
        _ command: NBDCommand,
        flags commandFlags: CommandFlags = [],
        offset: UInt64 = 0,
        length: UInt64 = 0,
        data: Payload? = nil,
        onExtents: Findings? = nil,
        completion: @escaping Completion
    ) {
        if let failure {
            completion(NBDError(.io, "The NBD connection has failed: \(failure)"))
            return
        }
        var commandFlags = commandFlags
        if form == .extended, command == .write { commandFlags.insert(.payloadLength) }
        if let refusal = refusal(command, commandFlags, length) {
            completion(refusal)
            return
        }
        let cookie = nextCookie
        nextCookie += 1
        // The server's silence counts from here, not from its last word.
        if pending.isEmpty { progress &+= 1 }
        let request = NBDRequest(command, flags: commandFlags, cookie: cookie, offset: offset, length: length)
        pending[cookie] = Pending(
            request,
            data: command == .read ? data : nil,
            onExtents: onExtents,
            completion: completion
        )
        if command == .read || command == .write { bytesInFlight += Int(length) }
        queue.append(Outgoing(request: request, payload: command == .write ? data : nil))
        queued.signal()
    }

    /// Puts a write in the queue whose data was compressed. Only for an export of which is known that it takes that.
    ///
    /// - Parameters:
    ///   - packed: the size of the data, 4 bytes in network order, and one zstd frame.
    ///   - offset: where the data goes.
    ///   - length: how many bytes it has.
    ///   - completion: called once, on the loop.
    public func submitCompressed(
        _ packed: Payload,
        offset: UInt64,
        length: UInt64,
        completion: @escaping Completion
    ) {
        if let failure {
            completion(NBDError(.io, "The NBD connection has failed: \(failure)"))
            return
        }
        if let refusal = refusal(.write, [], length) {
            completion(refusal)
            return
        }
        let cookie = nextCookie
        nextCookie += 1
        if pending.isEmpty { progress &+= 1 }
        var request = NBDRequest(
            .write,
            flags: .payloadLength,
            cookie: cookie,
            offset: offset,
            length: UInt64(packed.count)
        )
        request.command = NBDWire.compressedWrite
        pending[cookie] = Pending(request, data: nil, onExtents: nil, completion: completion)
        bytesInFlight += packed.count
        queue.append(Outgoing(request: request, payload: packed))
        queued.signal()
    }

    /// Why a request must not be sent to this server; nil when it may.
    private func refusal(_ command: NBDCommand, _ commandFlags: CommandFlags, _ length: UInt64) -> NBDError? {
        func needs(_ flag: TransmissionFlags) -> NBDError? {
            flags.contains(flag) ? nil : NBDError(.notSupported, "The NBD server does not offer \(command)")
        }
        if flags.contains(.readOnly), command == .write || command == .trim || command == .writeZeroes {
            return NBDError(.notPermitted, "The export is read-only")
        }
        if commandFlags.contains(.fua), !flags.contains(.sendFUA) {
            return NBDError(.notSupported, "The NBD server does not offer FUA")
        }
        if commandFlags.contains(.fastZero), !flags.contains(.sendFastZero) {
            return NBDError(.notSupported, "The NBD server does not offer fast zeroes")
        }
        if commandFlags.contains(.doNotFragment), !flags.contains(.sendDF) {
            return NBDError(.notSupported, "The NBD server does not offer unfragmented reads")
        }
        if length > UInt64(UInt32.max), form != .extended {
            return NBDError(.invalid, "A request of \(length) bytes needs extended headers")
        }
        switch command {
        case .read, .write:
            return length <= maximumPayload
                ? nil : NBDError(.invalid, "A payload of \(length) bytes is more than the server's \(maximumPayload)")
        case .flush: return needs(.sendFlush)
        case .trim: return needs(.sendTrim)
        case .cache: return needs(.sendCache)
        case .writeZeroes: return needs(.sendWriteZeroes)
        case .blockStatus:
            return selected.isEmpty ? NBDError(.notSupported, "The NBD server offers no metadata context") : nil
        case .disconnect: return nil
        }
    }

    /// Sends a request and waits for its reply.
    func perform(
        _ command: NBDCommand,
        flags: CommandFlags = [],
        offset: UInt64 = 0,
        length: UInt64 = 0,
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
    public func read(into data: Payload, at offset: UInt64, flags: CommandFlags = []) async throws {
        try await perform(.read, flags: flags, offset: offset, length: UInt64(data.count), data: data)
    }

    /// Writes a payload.
    public func write(_ data: Payload, at offset: UInt64, fua: Bool = false) async throws {
        try await perform(.write, flags: fua ? [.fua] : [], offset: offset, length: UInt64(data.count), data: data)
    }

    /// Makes a range read as zeroes, in as many requests as it takes.
    public func zero(at offset: UInt64, count: UInt64, mayDeallocate: Bool = true, fast: Bool = false) async throws {
        var commandFlags: CommandFlags = mayDeallocate ? [] : [.noHole]
        if fast { commandFlags.insert(.fastZero) }
        try await inParts(of: count) {
            try await perform(.writeZeroes, flags: commandFlags, offset: offset + $0, length: $1)
        }
    }

    /// Discards a range, in as many requests as it takes.
    public func trim(at offset: UInt64, count: UInt64) async throws {
        try await inParts(of: count) { try await perform(.trim, offset: offset + $0, length: $1) }
    }

    /// Brings a range close to the server, in as many requests as it takes.
    public func cache(at offset: UInt64, count: UInt64) async throws {
        try await inParts(of: count) { try await perform(.cache, offset: offset + $0, length: $1) }
    }

    private func inParts(of count: UInt64, _ body: (UInt64, UInt64) async throws -> Void) async throws {
        // A multiple of every block size.
        let largest = form == .extended ? count : UInt64(UInt32.max) & ~0xffff
        var done: UInt64 = 0
        repeat {
            let part = min(count - done, largest)
            try await body(done, part)
            done += part
        } while done < count
    }

    /// Makes all completed writes durable.
    public func flush() async throws { try await perform(.flush) }

    /// The longest range that a BLOCK_STATUS without extended headers can ask about, in whole blocks of every size.
    static let longestShortStatus = UInt64(UInt32.max) & ~0xffff

    /// Asks what a range consists of; empty when the server does not know the context.
    ///
    /// - Parameters:
    ///   - context: one of `contexts`.
    ///   - offset: where the range begins.
    ///   - count: how many bytes it has; compact headers carry less than 2^32.
    ///   - one: whether only the first extent is wanted.
    /// - Returns: extents from `offset` on, at least one, possibly less than the whole range and never beyond it.
    public func extents(
        of context: String = MetaContext.allocation,
        at offset: UInt64,
        count: UInt64,
        one: Bool = false
    ) async throws -> [Extent] {
        guard contexts.contains(context) else { return [] }
        let count = form == .extended ? count : min(count, Self.longestShortStatus)
        var found: [Extent] = []
        let error = await withUnsafeContinuation { (continuation: UnsafeContinuation<NBDError?, Never>) in
            submit(
                .blockStatus,
                flags: one ? [.requestOne] : [],
                offset: offset,
                length: count,
                onExtents: { if $0 == context { found = $1 } }
            ) { continuation.resume(returning: $0) }
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
        let headers = IOBuffer(capacity: 32)
        // A slow link that takes a piece now and then is not a silent one.
        let piece = replyTimeout == nil ? Int.max : 128 << 10
        var batch: [Outgoing] = []
        do {
            while failure == nil {
                if queue.isEmpty {
                    await queued.wait()
                    continue
                }
                batch.removeAll(keepingCapacity: true)
                swap(&batch, &queue)
                for item in batch {
                    item.request.encode(into: headers.mutable(0..<form.requestSize), form: form)
                    let header = headers.bytes(0..<form.requestSize)
                    if let payload = item.payload {
                        var done = min(piece, payload.count)
                        try await channel.writeAll(header, payload.part(0..<done).bytes, flush: false)
                        while done < payload.count {
                            progress &+= 1
                            let next = min(done + piece, payload.count)
                            try await channel.writeAll(payload.part(done..<next).bytes, flush: false)
                            done = next
                        }
                        progress &+= 1
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
                progress &+= 1
                switch (header.bytes(0..<4).bigEndian(0, UInt32.self), form) {
                case (NBDWire.simpleReplyMagic, .simple), (NBDWire.simpleReplyMagic, .structured):
                    try await receiveSimple(header)
                case (NBDWire.structuredReplyMagic, .structured), (NBDWire.extendedReplyMagic, .extended):
                    try await receiveChunk(header)
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
        var done = 0
        while done < buffer.count {
            let count = try await channel.readSome(into: UnsafeMutableRawBufferPointer(rebasing: buffer[done...]))
            guard count > 0 else {
                throw ChannelError(.truncated, "\(channel.peerName) closed the NBD connection within a reply")
            }
            done += count
            progress &+= 1
        }
    }

    private func receiveSimple(_ header: IOBuffer) async throws {
        try await require(header.mutable(0..<12))
        let bytes = header.bytes(0..<12)
        let number: UInt32 = bytes.bigEndian(0)
        let cookie: UInt64 = bytes.bigEndian(4)
        guard let request = pending[cookie] else { throw violation("answered a request that was not made") }
        if form == .structured {
            if request.command == NBDCommand.read.rawValue { throw violation("answered a read with a simple reply") }
            if request.command == NBDCommand.blockStatus.rawValue, number == 0 {
                throw violation("answered a block status with a simple reply")
            }
        }
        if number != 0 {
            finish(cookie, Self.error(number))
            return
        }
        if let data = request.data { try await require(data.mutable) }
        finish(cookie, nil)
    }

    private static func error(_ number: UInt32, _ text: String = "") -> NBDError {
        NBDError(
            .init(rawValue: number) ?? .invalid,
            text.isEmpty ? "The NBD server reported error \(number)" : "The NBD server says: \(text)"
        )
    }

    private func receiveChunk(_ header: IOBuffer) async throws {
        let size = form.chunkSize - 4
        try await require(header.mutable(0..<size))
        let chunk = ChunkHeader(decodingAfterMagic: header.bytes(0..<size), form: form)
        guard let request = pending[chunk.cookie] else {
            if failedStatus.contains(chunk.cookie) { return try await discard(chunk) }
            throw violation("answered a request that was not made")
        }
        if form == .extended, chunk.offset != request.offset {
            throw violation("answered a request with another's offset")
        }
        let isRead = request.command == NBDCommand.read.rawValue
        switch chunk.type {
        case NBDChunk.none:
            guard chunk.length == 0, chunk.isDone else { throw violation("sent a malformed chunk") }
        case NBDChunk.offsetData:
            guard chunk.length > 8, chunk.length - 8 <= request.length else {
                throw violation("sent a malformed chunk")
            }
            try await require(header.mutable(0..<8))
            let count = Int(chunk.length - 8)
            try await require(place(request, header.bytes(0..<8).bigEndian(0), count))
        case NBDChunk.offsetHole:
            guard chunk.length == 12 else { throw violation("sent a malformed chunk") }
            try await require(header.mutable(0..<12))
            let count = Int(header.bytes(0..<12).bigEndian(8, UInt32.self))
            let range = try place(request, header.bytes(0..<12).bigEndian(0), count)
            memset(range.baseAddress!, 0, count)
        case NBDChunk.blockStatus where form == .structured, NBDChunk.extendedBlockStatus where form == .extended:
            try await receiveStatus(request, chunk.length)
        case let code where code & (1 << 15) != 0:
            let error = try await receiveError(chunk)
            if request.error == nil { request.error = error }
            request.errors += 1
            guard request.errors <= 64 else { throw violation("reports errors without end") }
        default: throw violation("sent a chunk of the unknown type \(chunk.type)")
        }
        if !chunk.isDone { return }
        if request.error == nil {
            if isRead, request.parts.count != request.length {
                throw violation("answered a read with \(request.parts.count) of \(request.length) bytes")
            }
            if request.command == NBDCommand.blockStatus.rawValue {
                // Without an error there is one chunk for each context.
                guard request.extents.count == selected.count else { throw violation("left a metadata context out") }
                for answer in request.extents {
                    if let context = selected.first(where: { $0.id == answer.context }) {
                        request.onExtents?(context.name, answer.extents)
                    }
                }
            }
        }
        finish(chunk.cookie, request.error)
    }

    /// Reads what follows the end of an answer: QEMU (7.2 to 11.1) ends its answer to a block status with an error of the first metadata
    /// context, and tells of the other contexts all the same.
    private func discard(_ chunk: ChunkHeader) async throws {
        guard chunk.length <= 64 << 10 else { throw violation("sent a malformed chunk") }
        let rest = IOBuffer(capacity: max(Int(chunk.length), 1))
        try await require(rest.mutable(0..<Int(chunk.length)))
    }

    /// Where a part of a read belongs.
    private func place(
        _ request: Pending,
        _ offset: UInt64,
        _ count: Int
    ) throws -> UnsafeMutableRawBufferPointer {
        guard request.command == NBDCommand.read.rawValue, let data = request.data, count > 0,
            offset >= request.offset, offset - request.offset <= request.length,
            UInt64(count) <= request.length - (offset - request.offset)
        else { throw violation("sent data that was not asked for") }
        let start = Int(offset - request.offset)
        guard request.parts.insert(start..<(start + count)) else {
            throw violation("sent the same data twice, or in too many pieces")
        }
        return data.part(start..<(start + count)).mutable
    }

    private func receiveStatus(_ request: Pending, _ length: UInt64) async throws {
        let isExtended = form == .extended
        let lead = isExtended ? 8 : 4
        let entry = isExtended ? 16 : 8
        guard request.command == NBDCommand.blockStatus.rawValue, length >= UInt64(lead + entry),
            length <= UInt64(lead + entry * NBDWire.maximumExtents), (Int(length) - lead) % entry == 0
        else { throw violation("sent a malformed block status") }
        let buffer = IOBuffer(capacity: 64 << 10)
        try await require(buffer.mutable(0..<lead))
        let id: UInt32 = buffer.bytes(0..<lead).bigEndian(0)
        let count = (Int(length) - lead) / entry
        if isExtended, buffer.bytes(0..<lead).bigEndian(4, UInt32.self) != UInt32(count) {
            throw violation("sent a block status with a wrong count")
        }
        guard selected.contains(where: { $0.id == id }), !request.extents.contains(where: { $0.context == id }) else {
            throw violation("sent the status of a context that was not negotiated")
        }
        var extents: [Extent] = []
        var covered: UInt64 = 0
        for index in 0..<count {
            try await require(buffer.mutable(0..<entry))
            let bytes = buffer.bytes(0..<entry)
            let size: UInt64 = isExtended ? bytes.bigEndian(0) : UInt64(bytes.bigEndian(0, UInt32.self))
            let flags: UInt64 = isExtended ? bytes.bigEndian(8) : UInt64(bytes.bigEndian(4, UInt32.self))
            guard size > 0 else { throw violation("sent an extent of nothing") }
            guard covered < request.length || index == 0 else { throw violation("sent extents beyond the request") }
            // The last extent may go beyond what was asked for; what is known about the rest is not used.
            extents.append(Extent(length: min(size, request.length - covered), flags: flags))
            covered = size > request.length - covered ? request.length : covered + size
        }
        request.extents.append((id, extents))
    }

    private func receiveError(_ chunk: ChunkHeader) async throws -> NBDError {
        guard chunk.length >= 6, chunk.length <= 65536 else { throw violation("sent a malformed error") }
        let length = Int(chunk.length)
        let buffer = IOBuffer(capacity: length)
        try await require(buffer.mutable(0..<length))
        let bytes = buffer.bytes(0..<length)
        let count = Int(bytes.bigEndian(4, UInt16.self))
        let trailer = chunk.type == NBDChunk.errorOffset ? 8 : 0
        guard count <= length - 6 - trailer else { throw violation("sent a malformed error") }
        let number: UInt32 = bytes.bigEndian(0)
        guard number != 0 else { throw violation("sent an error without a number") }
        let text = OptionReply.sanitize(
            String(decoding: UnsafeRawBufferPointer(rebasing: bytes[6..<(6 + count)]), as: UTF8.self)
        )
        return Self.error(number, text)
    }

    private func finish(_ cookie: UInt64, _ error: NBDError?) {
        guard let request = pending.removeValue(forKey: cookie) else { return }
        if error != nil, request.command == NBDCommand.blockStatus.rawValue, selected.count > 1 {
            failedStatus = failedStatus.suffix(15) + [cookie]
        }
        if request.command <= NBDCommand.write.rawValue || request.command == NBDWire.compressedWrite {
            bytesInFlight -= Int(request.length)
        }
        request.completion(error)
    }

    private func fail(_ error: any Error) {
        guard failure == nil else { return }
        failure = error
        watch?.cancel()
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

/// Which parts of a read have arrived.
struct ReceivedParts {
    /// In order, without overlaps, and not next to each other.
    private var ranges: [Range<Int>] = []
    /// How many bytes have arrived.
    private(set) var count: UInt64 = 0

    /// How many parts with gaps between them are kept account of; no server needs so many.
    private static let limit = 4096

    /// Notes a part; false when some of it has arrived before, or there are too many.
    mutating func insert(_ range: Range<Int>) -> Bool {
        // Most replies come in order, so the last range is where the search begins.
        var index = ranges.count
        while index > 0, ranges[index - 1].lowerBound >= range.upperBound { index -= 1 }
        let joinsLeft = index > 0 && ranges[index - 1].upperBound == range.lowerBound
        if index > 0, ranges[index - 1].upperBound > range.lowerBound { return false }
        let joinsRight = index < ranges.count && ranges[index].lowerBound == range.upperBound
        count += UInt64(range.count)
        if joinsLeft, joinsRight {
            ranges[index - 1] = ranges[index - 1].lowerBound..<ranges[index].upperBound
            ranges.remove(at: index)
        } else if joinsLeft {
            ranges[index - 1] = ranges[index - 1].lowerBound..<range.upperBound
        } else if joinsRight {
            ranges[index] = range.lowerBound..<ranges[index].upperBound
        } else {
            if ranges.count >= Self.limit { return false }
            ranges.insert(range, at: index)
        }
        return true
    }
}
