internal import CLinux
internal import Glibc
internal import IO
internal import TLS

/// The transmission phase of one connection.
///
/// Requests that can be done at once are done in the order of their arrival on the connection's own task; the others
/// become child tasks, a bounded number of them. Replies are gathered while more requests are there to be read.
final class Transmission: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.
    /// A back end may keep payloads until they are durable elsewhere, and give them all back at once.
    private static let pool = BufferPool(keep: 8 << 20, atWork: 64 << 20)
    /// How many requests of a connection may wait for slow work, and how many bytes of payload they may hold.
    private static let slowRequests = 32
    private static let slowBytes = 64 << 20
    /// The longest payload that is read only to be dropped, so that the connection survives.
    private static let dropped = 64 << 20
    /// Zeroes in a reply to READ are left out in blocks of this size.
    private static let hole = 4096
    /// How much is done for a connection before others of its loop have a turn.
    private static let requestsInTurn = 128
    private static let bytesInTurn = 8 << 20
    /// How much longer than its content a compressed payload may be, in bytes.
    private static let frameOverhead: UInt64 = 1024
    /// The most extents in one reply to BLOCK_STATUS.
    private static let extents = 8192

    private let channel: any Channel
    private let backEnd: any BackEnd
    private let form: HeaderForm
    private let contexts: [SelectedContext]
    private let terms: NBDRequest.Terms
    private let takesCompressed: Bool
    private var decompressor: ZstdDecompressor?
    /// Is told the length of each payload that has come.
    private let received: (Int) -> Void
    private let draining: () -> Bool
    /// What the requests of this peer hold, over all its connections; nil when nobody counts.
    private let account: PayloadAccount?
    private let writeLock = AsyncLock()
    private let slowDone = AsyncCondition()
    private var slow = 0
    private var slowPayload = 0
    private var hasUnsent = false
    /// Small requests that were answered since the last wait.
    private var answeredAtOnce = 0
    /// How many writes came without the flag that extended headers require of them.
    private(set) var unflaggedWrites = 0
    private var turn = 0
    private var turnBytes = 0
    /// Used again for each small request, unless the back end has kept it.
    private var scratch = IOBuffer(capacity: 16 << 10)
    private let header = IOBuffer(capacity: 32)
    /// The head of a reply; written and sent under the lock.
    private let head = IOBuffer(capacity: 64)

    init(
        channel: any Channel,
        _ negotiated: NegotiatedExport,
        account: PayloadAccount?,
        received: @escaping (Int) -> Void,
        draining: @escaping () -> Bool
    ) {
        self.channel = channel
        self.account = account
        (self.received, self.draining) = (received, draining)
        backEnd = negotiated.export.backEnd
        form = negotiated.form
        takesCompressed = negotiated.export.takesCompressed && form == .extended
        contexts = negotiated.contexts
        // Clients send up to 32 MiB whatever they were told (libnbd, the kernel), and the specification asks not to drop them for
        // that ("Size constraints"); a back end that passes on a smaller maximum works in parts.
        var blockSizes = backEnd.traits.blockSizes
        blockSizes.maximum = max(blockSizes.maximum, UInt32(NBDWire.maximumPayload))
        terms = NBDRequest.Terms(
            size: backEnd.size,
            flags: negotiated.export.flags(negotiated.access, form: negotiated.form),
            blockSizes: blockSizes,
            form: form,
            hasContexts: !contexts.isEmpty
        )
    }

    /// Whether the client waits for each small reply before it asks again: what counts then is how soon it is read.
    private var isAlternating: Bool {
        defer { answeredAtOnce = 0 }
        return answeredAtOnce == 1 && slow == 0
    }

    func run() async throws {
        try await withThrowingDiscardingTaskGroup { group in
            while try await readHeader() {
                let bytes = header.bytes(0..<form.requestSize)
                guard let request = NBDRequest(decoding: bytes, form: form) else {
                    throw violation("not an NBD request")
                }
                if request.command == NBDCommand.disconnect.rawValue { break }
                try await giveWay(request)
                guard let work = try await receive(request) else { continue }
                let isDone: Bool
                do {
                    isDone = try await doneAtOnce(work)
                } catch {
                    giveBack(work)
                    throw error
                }
                if isDone {
                    giveBack(work)
                    answeredAtOnce += request.length <= UInt64(scratch.capacity) ? 1 : 2
                } else {
                    // Nothing may come between the test and the wait, or the last signal is missed.
                    while slow >= Self.slowRequests || slowPayload > Self.slowBytes {
                        if hasUnsent { try await flushReplies() } else { await slowDone.wait() }
                    }
                    slow += 1
                    slowPayload += work.cost
                    group.addTask(executorPreference: channel.loop) { try await self.runSlow(work) }
                }
            }
        }
        try await flushReplies()
        try? await channel.withDeadline(.seconds(2), for: "Closing") { try await channel.finishWriting() }
    }

    /// A client whose requests never run out must not keep the loop from its other work.
    private func giveWay(_ request: NBDRequest) async throws {
        turn += 1
        try await giveWay(bytes: request.length)
    }

    private func giveWay(bytes: UInt64) async throws {
        turnBytes += Int(min(bytes, UInt64(Self.bytesInTurn)))
        guard turn >= Self.requestsInTurn || turnBytes >= Self.bytesInTurn else { return }
        (turn, turnBytes) = (0, 0)
        try await flushReplies()
        await Task.yield()
    }

    private func violation(_ text: String) -> ChannelError {
        ChannelError(.protocolViolation, "Dropped \(channel.peerName): \(text)")
    }

    // MARK: Requests

    /// A request that is in order, with what it brought.
    private struct Work: Sendable {
        var request: NBDRequest
        var payload: Payload?
        var contexts: [SelectedContext]
        /// What the peer's account has for it.
        var held = 0

        /// How much memory it holds until its reply is sent.
        var cost: Int {
            request.command <= NBDCommand.write.rawValue ? Int(request.length) : 0
        }
    }

    /// Reads a request's header; what was gathered for the peer is sent before waiting for it.
    private func readHeader() async throws -> Bool {
        let size = form.requestSize
        var done = 0
        while done < size {
            if let count = try channel.readNow(into: header.mutable(done..<size)) {
                if count == 0 {
                    if done == 0 { return false }
                    throw ChannelError(.truncated, "\(channel.peerName) closed the connection within a request")
                }
                done += count
            } else {
                if hasUnsent { try await flushReplies() }
                (turn, turnBytes) = (0, 0)
                if isAlternating { channel.loop.expectMore() }
                do {
                    try await channel.waitReadable()
                } catch let error as ChannelError where error.code == .truncated && done == 0 {
                    return false
                }
            }
        }
        return true
    }

    private func readPayload(_ bytes: UnsafeMutableRawBufferPointer) async throws {
        var done = 0
        while done < bytes.count {
            if let count = try channel.readNow(into: UnsafeMutableRawBufferPointer(rebasing: bytes[done...])) {
                guard count > 0 else {
                    throw ChannelError(.truncated, "\(channel.peerName) closed the connection within a request")
                }
                done += count
            } else {
                // A client may wait for earlier replies before it sends the rest.
                if hasUnsent { try await flushReplies() }
                try await channel.waitReadable()
            }
        }
    }

    private func dropPayload(_ count: UInt64) async throws {
        guard count <= UInt64(Self.dropped) else { throw violation("a payload of \(count) bytes") }
        var rest = Int(count)
        let buffer = IOBuffer(capacity: min(rest, 64 << 10) + 1)
        while rest > 0 {
            let part = min(rest, buffer.capacity)
            try await readPayload(buffer.mutable(0..<part))
            rest -= part
        }
    }

    /// Checks a request and reads what belongs to it; nil when it was answered with an error.
    private func receive(_ original: NBDRequest) async throws -> Work? {
        var request = original
        var work = Work(request: request, payload: nil, contexts: contexts)
        let follows = request.payloadSize(form: form)
        if draining() {
            try await dropPayload(follows)
            try await reply(request, error: NBDError(.shutdown, "The server is shutting down"))
            return nil
        }
        if takesCompressed, request.command == NBDWire.compressedWrite { return try await receiveCompressed(request) }
        let isWrite = request.command == NBDCommand.write.rawValue
        if form == .extended {
            if request.lacksPayloadFlag(form: form) { unflaggedWrites += 1 }
            if follows > UInt64(terms.blockSizes.maximum) { throw violation("a payload of \(follows) bytes") }
        }
        let takesList =
            request.command == NBDCommand.blockStatus.rawValue && follows > 0
            && terms.flags.contains(.blockStatusPayload)
        if takesList {
            guard let (length, chosen) = try await receiveContexts(follows) else {
                try await reply(request, error: NBDError(.invalid, "The list of metadata contexts makes no sense"))
                return nil
            }
            request.length = length
            work.request = request
            work.contexts = chosen
        }
        // The reply has the offset that was asked for.
        let isTrim = request.command == NBDCommand.trim.rawValue
        if let fault = (isTrim ? request.roundedInwards(terms) : request).fault(terms) {
            if !takesList { try await dropPayload(follows) }
            try await reply(original, error: fault)
            return nil
        }
        work.held = try await hold(work.cost)
        if isWrite {
            let count = Int(follows)
            let buffer = buffer(count)
            do {
                try await readPayload(buffer.mutable(0..<count))
            } catch {
                giveBack(work)
                throw error
            }
            work.payload = Payload(buffer, 0..<count)
            received(count)
        }
        return work
    }

    /// Reads a write whose payload is compressed; nil when it was answered with an error.
    private func receiveCompressed(_ request: NBDRequest) async throws -> Work? {
        let prefix = Packer.prefix
        guard request.flags == .payloadLength, request.length <= UInt64(terms.blockSizes.maximum),
            request.length > UInt64(prefix)
        else {
            throw violation("a compressed write of \(request.length) bytes with the flags \(request.flags.rawValue)")
        }
        try await readPayload(header.mutable(0..<prefix))
        let size: UInt32 = header.bytes(0..<prefix).bigEndian(0)
        // What does not shrink is sent as it is: what is longer by more than a frame's own bytes has something else in it.
        guard request.length <= UInt64(size) + Self.frameOverhead else {
            throw violation("a compressed write of \(request.length) bytes for \(size)")
        }
        let write = NBDRequest(.write, cookie: request.cookie, offset: request.offset, length: UInt64(size))
        if let fault = write.fault(terms) {
            try await dropPayload(request.length - UInt64(prefix))
            try await reply(write, error: fault)
            return nil
        }
        // It becomes more than was counted, and takes as long as that.
        try await giveWay(bytes: UInt64(size))
        var work = Work(request: write, payload: nil, contexts: [])
        let count = Int(request.length) - prefix
        work.held = try await hold(work.cost + count)
        do {
            let packed = Self.pool.buffer(count)
            try await readPayload(packed.mutable(0..<count))
            guard let used = decompressor ?? ZstdDecompressor() else {
                throw ChannelError(.system, "There is no memory to decompress what \(channel.peerName) writes")
            }
            decompressor = used
            let buffer = buffer(Int(size))
            try used.decompress(packed.bytes(0..<count), into: buffer.mutable(0..<Int(size)))
            work.payload = Payload(buffer, 0..<Int(size))
            received(Int(size))
        } catch {
            giveBack(work)
            throw error
        }
        return work
    }

    /// Waits until the peer may hold so much more. Returns how much of it is counted: short requests are bounded by their number.
    private func hold(_ count: Int) async throws -> Int {
        guard let account, count > scratch.capacity else { return 0 }
        if !account.tryTake(count) {
            if hasUnsent { try await flushReplies() }
            await account.take(count)
        }
        return count
    }

    private func giveBack(_ work: Work) {
        if work.held > 0 { account?.give(work.held) }
    }

    /// The effect length and the contexts that a BLOCK_STATUS with a payload is about; nil when the list makes no sense.
    private func receiveContexts(_ count: UInt64) async throws -> (UInt64, [SelectedContext])? {
        guard count >= 12, count % 4 == 0, count <= UInt64(8 + 4 * contexts.count) else {
            try await dropPayload(count)
            return nil
        }
        let buffer = IOBuffer(capacity: Int(count))
        try await readPayload(buffer.mutable(0..<Int(count)))
        let bytes = buffer.bytes(0..<Int(count))
        var chosen: [SelectedContext] = []
        for position in stride(from: 8, to: Int(count), by: 4) {
            let id: UInt32 = bytes.bigEndian(position)
            guard let context = contexts.first(where: { $0.id == id }), !chosen.contains(context) else { return nil }
            chosen.append(context)
        }
        return (bytes.bigEndian(0), chosen)
    }

    /// A buffer of at least so many bytes. A long one that is fresh costs only the memory that is written.
    private func buffer(_ count: Int) -> IOBuffer {
        if count <= scratch.capacity, isKnownUniquelyReferenced(&scratch) { return scratch }
        return Self.pool.buffer(count)
    }

    // MARK: Work

    /// Does what needs no waiting.
    private func doneAtOnce(_ work: Work) async throws -> Bool {
        let request = work.request
        do {
            switch NBDCommand(rawValue: request.command) {
            case .read:
                let data = readBuffer(request)
                guard try backEnd.tryRead(into: data.mutable, at: request.offset) else { return false }
                try await replyData(request, data)
            case .write:
                guard let payload = work.payload,
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

    private func runSlow(_ work: Work) async throws {
        defer {
            giveBack(work)
            slow -= 1
            slowPayload -= work.cost
            slowDone.signal()
        }
        let request = work.request
        do {
            let fua = request.flags.contains(.fua)
            switch NBDCommand(rawValue: request.command) {
            case .read:
                let data = readBuffer(request)
                try await backEnd.read(into: data, at: request.offset)
                try await replyData(request, data)
            case .write:
                if let payload = work.payload { try await backEnd.write(payload, at: request.offset, fua: fua) }
                try await reply(request)
            case .flush:
                try await backEnd.flush()
                try await reply(request)
            case .trim:
                let whole = request.roundedInwards(terms)
                if whole.length > 0 || fua {
                    try await backEnd.trim(at: whole.offset, count: whole.length, fua: fua)
                }
                try await reply(request)
            case .cache:
                try await backEnd.cache(at: request.offset, count: request.length)
                try await reply(request)
            case .writeZeroes:
                var options: ZeroOptions = fua ? [.fua] : []
                if !request.flags.contains(.noHole) { options.insert(.mayDeallocate) }
                if request.flags.contains(.fastZero) { options.insert(.fast) }
                try await backEnd.zero(at: request.offset, count: request.length, options)
                try await reply(request)
            case .blockStatus: try await replyStatus(work)
            case .disconnect, nil: break
            }
        } catch let error as NBDError {
            try await reply(request, error: error)
        }
        try await flushReplies()
    }

    /// A buffer for a read's data with room for the reply's head before it.
    private func readBuffer(_ request: NBDRequest) -> Payload {
        // The data begins on a page boundary, so that direct I/O could fill it.
        let count = Int(request.length)
        let lead = count >= 4096 || terms.blockSizes.minimum >= 512 ? 4096 : 64
        return Payload(buffer(lead + count), lead..<(lead + count))
    }

    // MARK: Replies

    private func replyData(_ request: NBDRequest, _ data: Payload) async throws {
        if data.range.isEmpty { return try await reply(request) }
        if form != .simple, !request.flags.contains(.doNotFragment), let runs = Self.runs(data.bytes, request.offset) {
            return try await replyRuns(request, data, runs)
        }
        let size = form == .simple ? NBDWire.simpleReplySize : form.chunkSize + 8
        let start = data.range.lowerBound - size
        let head = data.buffer.mutable(start..<data.range.lowerBound)
        if form == .simple {
            encodeSimple(head, 0, request.cookie)
        } else {
            chunk(NBDChunk.offsetData, request, length: 8 + data.count).encode(into: head, form: form)
            head.storeBigEndian(request.offset, at: form.chunkSize)
        }
        await writeLock.acquire()
        defer { writeLock.release() }
        try await channel.writeAll(data.buffer.bytes(start..<data.range.upperBound), flush: false)
        hasUnsent = true
    }

    private struct Run {
        var range: Range<Int>
        var isHole: Bool
    }

    /// The data in runs with and without content; nil when there is content everywhere.
    private static func runs(_ bytes: UnsafeRawBufferPointer, _ offset: UInt64) -> [Run]? {
        func isHole(_ range: Range<Int>) -> Bool {
            // Most data does not begin with zeroes.
            bytes.loadUnaligned(fromByteOffset: range.lowerBound, as: UInt64.self) == 0
                && xd_is_zero(bytes.baseAddress! + range.lowerBound, range.count) != 0
        }
        var runs: [Run]?
        var position = 0
        let first = Self.hole - Int(offset % UInt64(Self.hole))
        var end = first == Self.hole ? first : first + Self.hole
        if first < Self.hole, first < bytes.count { position = first }
        var content = 0
        while end <= bytes.count {
            if isHole(position..<end) {
                if content < position {
                    (runs, content) = ((runs ?? []) + [Run(range: content..<position, isHole: false)], position)
                }
                if let last = runs?.last, last.isHole {
                    runs![runs!.count - 1].range = last.range.lowerBound..<end
                } else {
                    runs = (runs ?? []) + [Run(range: position..<end, isHole: true)]
                }
                content = end
            }
            position = end
            end += Self.hole
        }
        if runs != nil, content < bytes.count { runs!.append(Run(range: content..<bytes.count, isHole: false)) }
        return runs
    }

    private func replyRuns(_ request: NBDRequest, _ data: Payload, _ runs: [Run]) async throws {
        await writeLock.acquire()
        defer { writeLock.release() }
        for (index, run) in runs.enumerated() {
            let type = run.isHole ? NBDChunk.offsetHole : NBDChunk.offsetData
            let length = run.isHole ? 12 : 8 + run.range.count
            let size = form.chunkSize + (run.isHole ? 12 : 8)
            let bytes = head.mutable(0..<size)
            chunk(type, request, length: length, done: index == runs.count - 1).encode(into: bytes, form: form)
            bytes.storeBigEndian(request.offset + UInt64(run.range.lowerBound), at: form.chunkSize)
            if run.isHole {
                bytes.storeBigEndian(UInt32(run.range.count), at: form.chunkSize + 8)
                try await channel.writeAll(head.bytes(0..<size), flush: false)
            } else {
                try await channel.writeAll(head.bytes(0..<size), data.part(run.range).bytes, flush: false)
            }
        }
        hasUnsent = true
    }

    private func reply(_ request: NBDRequest, error: NBDError? = nil) async throws {
        if form != .simple, let error { return try await replyError(request, error) }
        // A simple reply is right for everything but a read once structured replies were negotiated, and for nothing with
        // extended headers.
        let isChunk = form == .extended || form == .structured && request.command == NBDCommand.read.rawValue
        let size = isChunk ? form.chunkSize : NBDWire.simpleReplySize
        await writeLock.acquire()
        defer { writeLock.release() }
        if isChunk {
            chunk(NBDChunk.none, request, length: 0).encode(into: head.mutable(0..<size), form: form)
        } else {
            encodeSimple(head.mutable(0..<size), error?.number.rawValue ?? 0, request.cookie)
        }
        try await channel.writeAll(head.bytes(0..<size), flush: false)
        hasUnsent = true
    }

    private func replyError(_ request: NBDRequest, _ error: NBDError) async throws {
        let text = Array(OptionReply.sanitize(error.message).utf8)
        let size = form.chunkSize + 6 + text.count
        let buffer = IOBuffer(capacity: size)
        let bytes = buffer.mutable(0..<size)
        chunk(NBDChunk.error, request, length: 6 + text.count).encode(into: bytes, form: form)
        bytes.storeBigEndian(error.number.rawValue, at: form.chunkSize)
        bytes.storeBigEndian(UInt16(text.count), at: form.chunkSize + 4)
        buffer.mutable((size - text.count)..<size).copyBytes(from: text)
        try await send(buffer.bytes(0..<size))
    }

    /// One chunk for each context.
    private func replyStatus(_ work: Work) async throws {
        let request = work.request
        let limit = request.flags.contains(.requestOne) ? 1 : Self.extents
        var answers: [[Extent]] = []
        for context in work.contexts {
            answers.append(
                try await backEnd.extents(of: context.name, at: request.offset, count: request.length, limit: limit)
            )
        }
        for (index, extents) in answers.enumerated() {
            let isExtended = form == .extended
            let entry = isExtended ? 16 : 8
            let lead = form.chunkSize + (isExtended ? 8 : 4)
            let size = lead + entry * extents.count
            let buffer = Self.pool.buffer(size)
            let bytes = buffer.mutable(0..<size)
            chunk(
                isExtended ? NBDChunk.extendedBlockStatus : NBDChunk.blockStatus,
                request,
                length: size - form.chunkSize,
                done: index == answers.count - 1
            ).encode(into: bytes, form: form)
            bytes.storeBigEndian(work.contexts[index].id, at: form.chunkSize)
            if isExtended { bytes.storeBigEndian(UInt32(extents.count), at: form.chunkSize + 4) }
            for (number, extent) in extents.enumerated() {
                let position = lead + entry * number
                if isExtended {
                    bytes.storeBigEndian(extent.length, at: position)
                    bytes.storeBigEndian(extent.flags, at: position + 8)
                } else {
                    bytes.storeBigEndian(UInt32(clamping: extent.length), at: position)
                    bytes.storeBigEndian(UInt32(clamping: extent.flags), at: position + 4)
                }
            }
            try await send(buffer.bytes(0..<size))
        }
    }

    private func chunk(_ type: UInt16, _ request: NBDRequest, length: Int, done: Bool = true) -> ChunkHeader {
        ChunkHeader(done: done, type: type, cookie: request.cookie, offset: request.offset, length: length)
    }

    private func encodeSimple(_ bytes: UnsafeMutableRawBufferPointer, _ error: UInt32, _ cookie: UInt64) {
        bytes.storeBigEndian(NBDWire.simpleReplyMagic, at: 0)
        bytes.storeBigEndian(error, at: 4)
        bytes.storeBigEndian(cookie, at: 8)
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
