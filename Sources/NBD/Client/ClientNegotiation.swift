internal import IO
public import TLS

/// What a client wants of a server.
public struct NBDClientOptions: Sendable {
    /// The export's name; empty for the server's default export.
    public var export: String
    /// With credentials TLS is required: the client never goes on in clear text.
    public var credentials: (any TLSCredentials)?
    /// The name that the server's certificate must be for.
    public var hostname: String?
    /// Whether to ask for `base:allocation`.
    public var wantsAllocation: Bool
    /// The time allowed for the negotiation.
    public var timeout: Duration

    /// Makes options.
    public init(
        export: String,
        credentials: (any TLSCredentials)? = nil,
        hostname: String? = nil,
        wantsAllocation: Bool = false,
        timeout: Duration = .seconds(10)
    ) {
        self.export = export
        self.credentials = credentials
        self.hostname = hostname
        self.wantsAllocation = wantsAllocation
        self.timeout = timeout
    }
}

/// The client's side of the newstyle negotiation.
struct ClientNegotiation {
    struct Result {
        let channel: any Channel
        let size: UInt64
        let flags: TransmissionFlags
        let structured: Bool
        let allocationContext: UInt32?
        let tls: TLSSession?
    }

    private var channel: any Channel
    private let options: NBDClientOptions
    private var tls: TLSSession?

    private init(_ channel: any Channel, _ options: NBDClientOptions) {
        self.channel = channel
        self.options = options
    }

    static func run(_ channel: any Channel, _ options: NBDClientOptions) async throws -> Result {
        var negotiation = ClientNegotiation(channel, options)
        return try await channel.withCancellation {
            try await channel.withDeadline(options.timeout, for: "The NBD negotiation") {
                try await negotiation.negotiate()
            }
        }
    }

    private func violation(_ text: String) -> ChannelError {
        ChannelError(.protocolViolation, "The NBD server at \(channel.peerName) \(text)")
    }

    private mutating func negotiate() async throws -> Result {
        var greeting = MessageReader(try await channel.read(exactly: 18))
        guard greeting.integer(UInt64.self) == NBDWire.greetingMagic else {
            throw violation("does not speak NBD: its greeting is another protocol's")
        }
        guard greeting.integer(UInt64.self) == NBDWire.optionMagic else {
            throw violation("speaks only the old form of NBD, which has no TLS")
        }
        let flags = HandshakeFlags(rawValue: greeting.integer() ?? 0)
        guard flags.contains(.fixedNewstyle) else {
            throw violation("speaks only an old form of the negotiation, which has no TLS")
        }
        var answer = MessageWriter()
        answer.append(UInt32(flags.intersection([.fixedNewstyle, .noZeroes]).rawValue))
        try await channel.write(answer.bytes)
        if let credentials = options.credentials { try await startTLS(credentials) }
        let structured = try await structuredReplies()
        var context: UInt32?
        if structured, options.wantsAllocation { context = try await allocationContext() }
        let (size, transmission) = try await go()
        return Result(
            channel: channel,
            size: size,
            flags: transmission,
            structured: structured,
            allocationContext: context,
            tls: tls
        )
    }

    private func send(_ option: NBDOption, _ payload: [UInt8] = []) async throws {
        var writer = MessageWriter(capacity: 16 + payload.count)
        writer.append(NBDWire.optionMagic)
        writer.append(option.rawValue)
        writer.append(UInt32(payload.count))
        writer.append(payload)
        try await channel.write(writer.bytes)
    }

    private func receive(_ option: NBDOption) async throws -> (type: UInt32, payload: [UInt8]) {
        var header = MessageReader(try await channel.read(exactly: 20))
        guard header.integer(UInt64.self) == NBDWire.optionReplyMagic else { throw violation("sent a malformed reply") }
        guard header.integer(UInt32.self) == option.rawValue, let type = header.integer(UInt32.self),
            let length = header.integer(UInt32.self)
        else { throw violation("answered another option than \(option)") }
        guard length <= 65536 else { throw violation("sent a reply of \(length) bytes to \(option)") }
        return (type, try await channel.read(exactly: Int(length)))
    }

    /// The server's refusal of an option, with its own words when it sent some.
    private func refusal(_ option: NBDOption, _ type: UInt32, _ payload: [UInt8]) -> ChannelError {
        let reason =
            switch type {
            case NBDOptionReply.tlsRequired: "requires TLS"
            case NBDOptionReply.policy: "refuses that by its policy"
            case NBDOptionReply.unknown: "has no export '\(options.export)'"
            case NBDOptionReply.unsupported: "does not support \(option)"
            case NBDOptionReply.shutdown: "is shutting down"
            default: "answered \(option) with error \(type & ~NBDOptionReply.errorBit)"
            }
        let text = OptionReply.sanitize(String(decoding: payload, as: UTF8.self))
        return violation(text.isEmpty ? reason : "\(reason): \(text)")
    }

    private mutating func startTLS(_ credentials: any TLSCredentials) async throws {
        try await send(.startTLS)
        let (type, payload) = try await receive(.startTLS)
        guard type == NBDOptionReply.ack, payload.isEmpty else { throw refusal(.startTLS, type, payload) }
        let secure = try await TLSChannel.handshake(
            over: channel,
            credentials: credentials,
            hostname: options.hostname,
            timeout: options.timeout
        )
        tls = secure.session
        channel = secure
    }

    private func structuredReplies() async throws -> Bool {
        try await send(.structuredReply)
        let (type, payload) = try await receive(.structuredReply)
        if type == NBDOptionReply.ack { return true }
        if type & NBDOptionReply.errorBit != 0, type != NBDOptionReply.tlsRequired { return false }
        throw refusal(.structuredReply, type, payload)
    }

    private func allocationContext() async throws -> UInt32? {
        var query = MessageWriter()
        query.append(UInt32(options.export.utf8.count))
        query.append(options.export)
        query.append(UInt32(1))
        query.append(UInt32(Extent.contextName.utf8.count))
        query.append(Extent.contextName)
        try await send(.setMetaContext, query.bytes)
        var context: UInt32?
        while true {
            let (type, payload) = try await receive(.setMetaContext)
            if type == NBDOptionReply.ack { return context }
            if type & NBDOptionReply.errorBit != 0 { return nil }
            var reader = MessageReader(payload)
            guard type == NBDOptionReply.metaContext, context == nil, let id = reader.integer(UInt32.self),
                reader.bytes(reader.count) == Array(Extent.contextName.utf8)
            else { throw violation("sent a malformed metadata context") }
            context = id
        }
    }

    private func go() async throws -> (UInt64, TransmissionFlags) {
        var request = MessageWriter()
        request.append(UInt32(options.export.utf8.count))
        request.append(options.export)
        request.append(UInt16(0))
        try await send(.go, request.bytes)
        var found: (UInt64, TransmissionFlags)?
        for _ in 0..<64 {
            let (type, payload) = try await receive(.go)
            if type == NBDOptionReply.ack {
                guard let found else { throw violation("did not say how large the export is") }
                return found
            }
            guard type == NBDOptionReply.info else { throw refusal(.go, type, payload) }
            var reader = MessageReader(payload)
            guard let kind = reader.integer(UInt16.self) else { throw violation("sent malformed information") }
            if kind == NBDInfo.export {
                guard let size = reader.integer(UInt64.self), let flags = reader.integer(UInt16.self), reader.isEmpty,
                    found == nil, size <= UInt64(Int64.max)
                else { throw violation("sent malformed information about the export") }
                found = (size, TransmissionFlags(rawValue: flags))
            }
        }
        throw violation("sent information without end")
    }
}
