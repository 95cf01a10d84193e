internal import Glibc
public import IO
public import TLS

/// Where the server is that is judged, and how to get in.
public struct ConformanceTarget: Sendable {
    /// The server.
    public var address: SocketAddress
    /// An export that exists.
    public var export: String
    /// With credentials every case that does not say otherwise runs within TLS.
    public var credentials: (any TLSCredentials)?
    /// The name that the server's certificate must be for.
    public var hostname: String?
    /// Whether cases may write to the export: they destroy its first mebibyte.
    public var mayWrite: Bool
    /// Whether cases that wait for the server's deadlines are run.
    public var isPatient: Bool

    /// Describes a server.
    public init(
        address: SocketAddress,
        export: String,
        credentials: (any TLSCredentials)? = nil,
        hostname: String? = nil,
        mayWrite: Bool = false,
        isPatient: Bool = false
    ) {
        self.address = address
        self.export = export
        self.credentials = credentials
        self.hostname = hostname
        self.mayWrite = mayWrite
        self.isPatient = isPatient
    }
}

/// Why a case failed, or was not run.
struct ConformanceFailure: Error {
    let text: String
    var isSkip = false
}

/// One connection to a server that is judged: says exactly what a case wants said. Confined to the channel's loop.
final class ConformanceProbe {
    struct OptionAnswer {
        let option: UInt32
        let type: UInt32
        let payload: [UInt8]
    }

    /// The whole reply to one request.
    struct Answer {
        struct Chunk {
            let type: UInt16
            let offset: UInt64
            let payload: [UInt8]
        }
        var cookie: UInt64
        var error: UInt32 = 0
        var isSimple = false
        var data: [UInt8] = []
        var chunks: [Chunk] = []
    }

    let target: ConformanceTarget
    private(set) var channel: any Channel
    var form = HeaderForm.simple
    private(set) var size: UInt64 = 0
    private(set) var flags: TransmissionFlags = []
    private(set) var blockSizes: BlockSizes?
    private(set) var contexts: [SelectedContext] = []
    /// The shortest length and alignment that every server takes.
    var unit: UInt64 { max(512, UInt64(blockSizes?.minimum ?? 512)) }

    private init(_ channel: any Channel, _ target: ConformanceTarget) {
        self.channel = channel
        self.target = target
    }

    static func connect(_ target: ConformanceTarget, on loop: EventLoop) async throws -> ConformanceProbe {
        ConformanceProbe(try await SocketChannel.connect(to: target.address, on: loop), target)
    }

    func close() { channel.close() }

    static func message(_ build: (inout MessageWriter) -> Void) -> [UInt8] {
        var writer = MessageWriter()
        build(&writer)
        return writer.bytes
    }

    static func string(_ text: String) -> [UInt8] {
        message { $0.append(counted: text) }
    }

    static func option(_ number: UInt32, _ payload: [UInt8] = [], length: UInt32? = nil) -> [UInt8] {
        message {
            $0.append(NBDWire.optionMagic)
            $0.append(number)
            $0.append(length ?? UInt32(payload.count))
            $0.append(payload)
        }
    }

    // MARK: Handshake

    func send(_ bytes: [UInt8]) async throws { try await channel.write(bytes) }

    func greet(flags: UInt32 = 3) async throws {
        let greeting = try await channel.read(exactly: 18)
        guard Array(greeting[..<16]) == Array(ServerHandshake.greeting[..<16]) else {
            throw ConformanceFailure(text: "the greeting is not that of newstyle negotiation")
        }
        try await send(Self.message { $0.append(flags) })
    }

    /// Greets and, with credentials, goes on within TLS.
    func begin() async throws {
        try await greet()
        if target.credentials != nil { try await secure() }
    }

    func secure() async throws {
        guard let credentials = target.credentials else { throw ConformanceFailure(text: "needs TLS", isSkip: true) }
        try await expect(5, [], NBDOptionReply.ack)
        try await startTLS(credentials)
    }

    func startTLS(_ credentials: any TLSCredentials) async throws {
        channel = try await TLSChannel.handshake(
            over: channel,
            credentials: credentials,
            hostname: target.hostname,
            timeout: .seconds(5)
        )
    }

    func optionAnswer() async throws -> OptionAnswer {
        var header = MessageReader(try await channel.read(exactly: 20))
        guard header.integer(UInt64.self) == NBDWire.optionReplyMagic, let option = header.integer(UInt32.self),
            let type = header.integer(UInt32.self), let length = header.integer(UInt32.self), length <= 1 << 20
        else { throw ConformanceFailure(text: "the reply to an option is malformed") }
        return OptionAnswer(option: option, type: type, payload: try await channel.read(exactly: Int(length)))
    }

    /// Sends an option and takes all its replies, the last of which is an ACK or an error.
    func ask(_ number: UInt32, _ payload: [UInt8] = []) async throws -> [OptionAnswer] {
        try await send(Self.option(number, payload))
        return try await answers(number)
    }

    func answers(_ number: UInt32) async throws -> [OptionAnswer] {
        var answers: [OptionAnswer] = []
        while true {
            let answer = try await optionAnswer()
            guard answer.option == number else {
                throw ConformanceFailure(text: "option \(number) was answered as option \(answer.option)")
            }
            answers.append(answer)
            if answer.type == NBDOptionReply.ack || NBDOptionReply.isError(answer.type) { return answers }
            guard answers.count < 20_000 else { throw ConformanceFailure(text: "replies without end") }
        }
    }

    /// The last reply to an option must be of one of these types.
    @discardableResult
    func expect(_ number: UInt32, _ payload: [UInt8], _ types: UInt32...) async throws -> [OptionAnswer] {
        let answers = try await ask(number, payload)
        let type = answers[answers.count - 1].type
        guard types.contains(type) else {
            throw ConformanceFailure(
                text: "option \(number) with \(payload.count) bytes was answered with \(Self.name(type)), "
                    + "not with \(types.map(Self.name).joined(separator: " or "))"
            )
        }
        return answers
    }

    /// The negotiation still works.
    func expectAlive() async throws { try await expect(0x1234_5678, [], NBDOptionReply.unsupported) }

    static func name(_ type: UInt32) -> String {
        let names: [UInt32: String] = [
            NBDOptionReply.ack: "ACK", NBDOptionReply.server: "SERVER", NBDOptionReply.info: "INFO",
            NBDOptionReply.metaContext: "META_CONTEXT", NBDOptionReply.unsupported: "ERR_UNSUP",
            NBDOptionReply.policy: "ERR_POLICY", NBDOptionReply.invalid: "ERR_INVALID",
            NBDOptionReply.platform: "ERR_PLATFORM", NBDOptionReply.tlsRequired: "ERR_TLS_REQD",
            NBDOptionReply.unknown: "ERR_UNKNOWN", NBDOptionReply.shutdown: "ERR_SHUTDOWN",
            NBDOptionReply.blockSizeRequired: "ERR_BLOCK_SIZE_REQD", NBDOptionReply.tooBig: "ERR_TOO_BIG",
            NBDOptionReply.extendedHeadersRequired: "ERR_EXT_HEADER_REQD",
        ]
        return names[type] ?? "\(type)"
    }

    /// The server must close the connection, without another word of NBD.
    func expectClosed(_ why: String) async throws {
        let buffer = IOBuffer(capacity: 4096)
        do {
            let count = try await channel.withDeadline(.seconds(5), for: "closing") {
                try await channel.readSome(into: buffer.mutable(0..<4096))
            }
            if count > 0 { throw ConformanceFailure(text: "\(why), and the server went on talking") }
        } catch let error as ChannelError {
            if error.code == .timedOut {
                throw ConformanceFailure(text: "\(why), and the server kept the connection open")
            }
        }
    }

    static func goPayload(_ name: String, _ wanted: [UInt16] = [3]) -> [UInt8] {
        message {
            $0.append(string(name))
            $0.append(UInt16(wanted.count))
            for item in wanted { $0.append(item) }
        }
    }

    static func contextPayload(_ name: String, _ queries: [String]) -> [UInt8] {
        message {
            $0.append(string(name))
            $0.append(UInt32(queries.count))
            for query in queries { $0.append(string(query)) }
        }
    }

    /// Negotiates all the way to the transmission phase.
    func enter(_ wanted: HeaderForm = .structured, contexts queries: [String] = []) async throws {
        try await begin()
        if wanted == .extended {
            let answer = try await ask(11)
            guard answer[answer.count - 1].type == NBDOptionReply.ack else {
                throw ConformanceFailure(text: "the server has no extended headers", isSkip: true)
            }
            form = .extended
        } else if wanted == .structured {
            let answer = try await ask(8)
            guard answer[answer.count - 1].type == NBDOptionReply.ack else {
                throw ConformanceFailure(text: "the server has no structured replies", isSkip: true)
            }
            form = .structured
        }
        if !queries.isEmpty {
            for answer in try await ask(10, Self.contextPayload(target.export, queries))
            where answer.type == NBDOptionReply.metaContext {
                var reader = MessageReader(answer.payload)
                let id = reader.integer(UInt32.self) ?? 0
                contexts.append(
                    SelectedContext(
                        id: id,
                        name: String(decoding: reader.bytes(reader.count) ?? [], as: UTF8.self)
                    )
                )
            }
            guard !contexts.isEmpty else {
                throw ConformanceFailure(text: "the server has no metadata contexts", isSkip: true)
            }
        }
        try await go()
    }

    func go() async throws {
        for answer in try await expect(7, Self.goPayload(target.export), NBDOptionReply.ack) {
            guard answer.type == NBDOptionReply.info else { continue }
            var reader = MessageReader(answer.payload)
            switch reader.integer(UInt16.self) {
            case NBDInfo.export:
                size = reader.integer(UInt64.self) ?? 0
                flags = TransmissionFlags(rawValue: reader.integer(UInt16.self) ?? 0)
            case NBDInfo.blockSize:
                if let minimum = reader.integer(UInt32.self), let preferred = reader.integer(UInt32.self),
                    let maximum = reader.integer(UInt32.self)
                {
                    blockSizes = BlockSizes(minimum: minimum, preferred: preferred, maximum: maximum)
                }
            default: break
            }
        }
    }

    // MARK: Transmission

    static let cookie: UInt64 = 0x0123_4567_89ab_cdef

    func send(
        _ command: UInt16,
        flags: CommandFlags = [],
        cookie: UInt64 = cookie,
        offset: UInt64 = 0,
        length: UInt64 = 0,
        payload: [UInt8] = []
    ) async throws {
        var request = NBDRequest(.read, flags: flags, cookie: cookie, offset: offset, length: length)
        request.command = command
        let header = IOBuffer(capacity: 32)
        request.encode(into: header.mutable(0..<form.requestSize), form: form)
        try await send([UInt8](header.bytes(0..<form.requestSize)) + payload)
    }

    /// Takes a whole reply. A simple reply to READ has `length` bytes of data.
    func answer(length: Int = 0) async throws -> Answer {
        var answer: Answer?
        while true {
            var magic = MessageReader(try await channel.read(exactly: 4))
            switch magic.integer(UInt32.self) {
            case NBDWire.simpleReplyMagic where form != .extended && answer == nil:
                var rest = MessageReader(try await channel.read(exactly: 12))
                var simple = Answer(cookie: 0, error: rest.integer() ?? 0, isSimple: true)
                simple.cookie = rest.integer() ?? 0
                if simple.error == 0, length > 0 { simple.data = try await channel.read(exactly: length) }
                return simple
            case NBDWire.structuredReplyMagic where form == .structured,
                NBDWire.extendedReplyMagic where form == .extended:
                let rest = IOBuffer(copying: try await channel.read(exactly: form.chunkSize - 4))
                let chunk = ChunkHeader(decodingAfterMagic: rest.bytes(0..<(form.chunkSize - 4)), form: form)
                guard chunk.length <= 64 << 20 else {
                    throw ConformanceFailure(text: "a chunk of \(chunk.length) bytes")
                }
                let payload = try await channel.read(exactly: Int(chunk.length))
                var current = answer ?? Answer(cookie: chunk.cookie)
                guard current.cookie == chunk.cookie else { throw ConformanceFailure(text: "two replies are mixed") }
                current.chunks.append(.init(type: chunk.type, offset: chunk.offset, payload: payload))
                if chunk.type & 1 << 15 != 0 {
                    var reader = MessageReader(payload)
                    current.error = reader.integer() ?? 0
                }
                answer = current
                if chunk.isDone { return current }
            default: throw ConformanceFailure(text: "the reply's magic is wrong for what was negotiated")
            }
        }
    }

    /// Sends a request and takes its reply, whose cookie must be the request's.
    func perform(
        _ command: UInt16,
        flags: CommandFlags = [],
        offset: UInt64 = 0,
        length: UInt64 = 0,
        payload: [UInt8] = []
    ) async throws -> Answer {
        var flags = flags
        if form == .extended, command == 1 { flags.insert(.payloadLength) }
        try await send(command, flags: flags, offset: offset, length: length, payload: payload)
        let answer = try await answer(length: command == 0 ? Int(min(length, 1 << 30)) : 0)
        guard answer.cookie == Self.cookie else { throw ConformanceFailure(text: "the reply has another cookie") }
        return answer
    }

    /// The data of a successful READ, put together and checked.
    func read(at offset: UInt64, _ length: Int, flags: CommandFlags = []) async throws -> [UInt8] {
        let answer = try await perform(0, flags: flags, offset: offset, length: UInt64(length))
        guard answer.error == 0 else { throw ConformanceFailure(text: "a good read failed with error \(answer.error)") }
        if answer.isSimple { return answer.data }
        var data = [UInt8](repeating: 0, count: length)
        var parts = ReceivedParts()
        for chunk in answer.chunks where chunk.type == NBDChunk.offsetData || chunk.type == NBDChunk.offsetHole {
            var reader = MessageReader(chunk.payload)
            let at = reader.integer(UInt64.self) ?? 0
            let isHole = chunk.type == NBDChunk.offsetHole
            let count = isHole ? Int(reader.integer(UInt32.self) ?? 0) : reader.count
            guard at >= offset, at - offset <= UInt64(length), count > 0, count <= length - Int(at - offset),
                parts.insert(Int(at - offset)..<(Int(at - offset) + count))
            else { throw ConformanceFailure(text: "the chunks of a read overlap, or lie outside it") }
            if !isHole {
                data.replaceSubrange(Int(at - offset)..<(Int(at - offset) + count), with: reader.bytes(count) ?? [])
            }
        }
        guard parts.count == UInt64(length) else {
            throw ConformanceFailure(text: "the chunks of a read have \(parts.count) of \(length) bytes")
        }
        return data
    }

    /// The connection still works.
    func expectServing() async throws { _ = try await read(at: 0, Int(unit)) }
}
