public import IO
public import TLS

/// The client's side of the newstyle negotiation, step by step, for whoever wants to look at a server. Confined to the
/// channel's loop.
///
/// With credentials nothing but STARTTLS is ever said in clear text.
public final class NBDNegotiation: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.

    /// An export as the server lists it.
    public struct Listing: Sendable, Equatable {
        /// The name.
        public let name: String
        /// What it is, for people; often empty.
        public let summary: String
    }

    /// The TLS session, nil in clear text.
    public private(set) var tls: TLSSession?
    /// The form of headers that was agreed on.
    public private(set) var form = HeaderForm.simple
    /// Whether the server understands options; one that does not offers its default export or one by name, nothing else.
    public private(set) var isFixed = false
    /// The selected metadata contexts, by the numbers that the server gave them.
    private(set) var contexts: [SelectedContext] = []
    private(set) var channel: any Channel
    /// The shortest time between an option and its reply: about the network's round trip.
    private(set) var roundTrip = Duration.seconds(3600)
    private var asked = ContinuousClock.now
    private var options: NBDClientOptions
    private var handshakeFlags: HandshakeFlags = []

    /// The most that a server may say in answer to one option, in bytes.
    private static let maximumReply = 64 << 10
    /// The most exports of a list.
    private static let maximumExports = 100_000

    private init(_ channel: any Channel, _ options: NBDClientOptions) {
        self.channel = channel
        self.options = options
    }

    /// Greets the server, starts TLS, and agrees on the form of headers.
    ///
    /// - Parameters:
    ///   - channel: a fresh connection; closed when this throws.
    ///   - options: what is wanted. Their export and contexts do not matter yet.
    /// - Throws: `ChannelError` or `CredentialError` that says what the server refused and why.
    public static func start(over channel: any Channel, _ options: NBDClientOptions) async throws -> NBDNegotiation {
        let negotiation = NBDNegotiation(channel, options)
        do {
            try await negotiation.timed {
                try await negotiation.greet()
                if let credentials = options.credentials { try await negotiation.startTLS(credentials) }
                if negotiation.isFixed { try await negotiation.agreeOnForm() }
            }
            return negotiation
        } catch {
            channel.close()
            throw error
        }
    }

    /// Says which export and contexts are wanted after all.
    func choose(_ other: NBDClientOptions) {
        (options.export, options.contexts) = (other.export, other.contexts)
    }

    /// Runs a step within the time that is allowed for it; cancelling the task ends it.
    private func timed<T>(_ body: () async throws -> T) async throws -> T {
        let channel = channel
        return try await channel.withCancellation {
            try await channel.withDeadline(options.timeout, for: "The NBD negotiation") { try await body() }
        }
    }

    private func violation(_ text: String) -> ChannelError {
        ChannelError(.protocolViolation, "The NBD server at \(channel.peerName) \(text)")
    }

    // MARK: Steps

    private func greet() async throws {
        var greeting = MessageReader(try await channel.read(exactly: 16))
        guard greeting.integer(UInt64.self) == NBDWire.greetingMagic else {
            throw violation("does not speak NBD: its greeting is another protocol's")
        }
        guard greeting.integer(UInt64.self) == NBDWire.optionMagic else {
            throw violation("speaks only the old form of NBD, which has neither TLS nor names")
        }
        var flags = MessageReader(try await channel.read(exactly: 2))
        handshakeFlags = HandshakeFlags(rawValue: flags.integer() ?? 0)
        isFixed = handshakeFlags.contains(.fixedNewstyle)
        if !isFixed, options.credentials != nil {
            throw violation("speaks only an old form of the negotiation, which has no TLS")
        }
        var answer = MessageWriter()
        answer.append(UInt32(handshakeFlags.intersection([.fixedNewstyle, .noZeroes]).rawValue))
        try await channel.write(answer.bytes)
    }

    private func startTLS(_ credentials: any TLSCredentials) async throws {
        try await send(.startTLS)
        let (type, payload) = try await receive(.startTLS)
        guard type == NBDOptionReply.ack else { throw refusal(.startTLS, type, payload, nil) }
        let secure = try await TLSChannel.handshake(
            over: channel,
            credentials: credentials,
            hostname: options.hostname,
            timeout: options.timeout
        )
        if let identity = options.identity, secure.session.peer.name != identity {
            secure.close()
            throw ChannelError(
                .tls,
                "\(channel.peerName) proved to be '\(secure.session.peer.name.shown(most: 500))', and only '\(identity)' is meant"
            )
        }
        tls = secure.session
        channel = secure
    }

    private func agreeOnForm() async throws {
        if options.form == .extended, try await accepts(.extendedHeaders) {
            form = .extended
        } else if options.form != .simple, try await accepts(.structuredReply) {
            form = .structured
        }
    }

    /// Whether the server says yes to an option without data; refusing TLS, or us, is an error.
    private func accepts(_ option: NBDOption) async throws -> Bool {
        try await send(option)
        let (type, payload) = try await receive(option)
        if type == NBDOptionReply.ack { return true }
        let isFatal = [NBDOptionReply.tlsRequired, NBDOptionReply.shutdown, NBDOptionReply.policy].contains(type)
        if NBDOptionReply.isError(type), !isFatal { return false }
        throw refusal(option, type, payload, nil)
    }

    /// Asks for the names of the exports.
    public func list() async throws -> [Listing] {
        try await timed {
            try requireFixed()
            try await send(.list)
            var found: [Listing] = []
            while true {
                let (type, payload) = try await receive(.list)
                if type == NBDOptionReply.ack { return found }
                guard type == NBDOptionReply.server else { throw refusal(.list, type, payload, nil) }
                var reader = MessageReader(payload)
                guard let name = reader.string(), let rest = reader.bytes(reader.count) else {
                    throw violation("sent a malformed name of an export")
                }
                guard found.count < Self.maximumExports else { throw violation("lists exports without end") }
                found.append(Listing(name: name, summary: OptionReply.describe(rest)))
            }
        }
    }

    private func requireFixed() throws {
        guard isFixed else { throw violation("speaks an old form of the negotiation, which cannot be asked anything") }
    }

    /// Asks about an export without using it.
    public func info(_ name: String) async throws -> NBDExportInfo {
        try await timed {
            try requireFixed()
            guard let info = try await ask(.info, name) else {
                throw violation("does not tell about exports without using them")
            }
            return info
        }
    }

    /// Asks which metadata contexts an export has: those that match the queries, or all.
    public func listContexts(_ name: String, queries: [String] = []) async throws -> [String] {
        try await timed { try await askContexts(.listMetaContext, name, queries).map(\.name) }
    }

    /// Goes on to the transmission phase: the export and the contexts of the options.
    func go() async throws -> NBDExportInfo {
        try await timed {
            if isFixed {
                if form != .simple, !options.contexts.isEmpty {
                    contexts = try await askContexts(.setMetaContext, options.export, options.contexts)
                }
                if let info = try await ask(.go, options.export) { return info }
                guard form != .extended else { throw violation("knows extended headers, but not GO") }
            }
            return try await exportName()
        }
    }

    /// Says goodbye in the middle of the negotiation, and closes.
    public func abort() async {
        if isFixed {
            try? await timed {
                try await send(.abort)
                _ = try await receive(.abort)
                try await channel.finishWriting()
            }
        }
        channel.close()
    }

    // MARK: Options

    private func send(_ option: NBDOption, _ payload: [UInt8] = []) async throws {
        var writer = MessageWriter(capacity: 16 + payload.count)
        writer.append(NBDWire.optionMagic)
        writer.append(option.rawValue)
        writer.append(UInt32(payload.count))
        writer.append(payload)
        try await channel.write(writer.bytes)
        asked = .now
    }

    private func receive(_ option: NBDOption) async throws -> (type: UInt32, payload: [UInt8]) {
        var header = MessageReader(try await channel.read(exactly: 20))
        roundTrip = min(roundTrip, .now - asked)
        guard header.integer(UInt64.self) == NBDWire.optionReplyMagic else { throw violation("sent a malformed reply") }
        guard header.integer(UInt32.self) == option.rawValue, let type = header.integer(UInt32.self),
            let length = header.integer(UInt32.self)
        else { throw violation("answered another option than \(option)") }
        guard length <= Self.maximumReply else { throw violation("sent a reply of \(length) bytes to \(option)") }
        guard type != NBDOptionReply.ack || length == 0 else { throw violation("sent data with its yes to \(option)") }
        return (type, try await channel.read(exactly: Int(length)))
    }

    /// The server's refusal of an option, with its own words when it sent some.
    private func refusal(_ option: NBDOption, _ type: UInt32, _ payload: [UInt8], _ export: String?) -> ChannelError {
        let reason =
            switch type {
            case NBDOptionReply.tlsRequired: "requires TLS"
            case NBDOptionReply.policy:
                option == .startTLS ? "does not offer TLS, and nothing is said to it in clear text" : "refuses us"
            case NBDOptionReply.unknown: "has no export '\(export ?? "")'"
            case NBDOptionReply.unsupported:
                option == .startTLS
                    ? "does not offer TLS, and nothing is said to it in clear text" : "does not support \(option)"
            case NBDOptionReply.shutdown: "is shutting down"
            case NBDOptionReply.blockSizeRequired: "insists on a block size"
            default:
                NBDOptionReply.isError(type)
                    ? "answered \(option) with error \(type & ~NBDOptionReply.errorBit)"
                    : "answered \(option) with something that is no answer to it"
            }
        let text = OptionReply.sanitize(String(decoding: payload, as: UTF8.self))
        return violation(text.isEmpty || !NBDOptionReply.isError(type) ? reason : "\(reason): \(text)")
    }

    /// Sends INFO or GO; nil when the server knows neither.
    private func ask(_ option: NBDOption, _ name: String) async throws -> NBDExportInfo? {
        let wanted = [NBDInfo.name, NBDInfo.description, NBDInfo.blockSize]
        var request = MessageWriter()
        request.append(counted: name)
        request.append(UInt16(wanted.count))
        for item in wanted { request.append(item) }
        try await send(option, request.bytes)
        var info = NBDExportInfo(name: name, size: 0, flags: [])
        var hasSize = false
        for _ in 0..<64 {
            let (type, payload) = try await receive(option)
            if type == NBDOptionReply.ack {
                guard hasSize else { throw violation("did not say how large the export is") }
                return info
            }
            if type == NBDOptionReply.unsupported { return nil }
            guard type == NBDOptionReply.info else { throw refusal(option, type, payload, name) }
            var reader = MessageReader(payload)
            guard let kind = reader.integer(UInt16.self) else { throw violation("sent malformed information") }
            switch kind {
            case NBDInfo.export:
                guard let size = reader.integer(UInt64.self), let flags = reader.integer(UInt16.self), reader.isEmpty,
                    !hasSize
                else { throw violation("sent malformed information about the export") }
                (info.size, info.flags) = (try checked(size), Self.checked(flags, form))
                hasSize = true
            case NBDInfo.name:
                guard let text = MessageReader.text(reader.bytes(reader.count) ?? []) else {
                    throw violation("sent a malformed name of an export")
                }
                info.name = text
            case NBDInfo.description:
                info.summary = OptionReply.describe(reader.bytes(reader.count) ?? [])
            case NBDInfo.blockSize:
                guard let minimum = reader.integer(UInt32.self), let preferred = reader.integer(UInt32.self),
                    let maximum = reader.integer(UInt32.self), reader.isEmpty
                else { throw violation("sent malformed block sizes") }
                let sizes = BlockSizes(minimum: minimum, preferred: preferred, maximum: maximum)
                guard sizes.isSane else {
                    throw violation("has block sizes that make no sense: \(minimum), \(preferred), \(maximum)")
                }
                info.blockSizes = sizes
            default: break
            }
        }
        throw violation("sends information without end")
    }

    private func checked(_ size: UInt64) throws -> UInt64 {
        guard size <= UInt64(Int64.max) else { throw violation("has an export of \(size) bytes, which cannot be") }
        return size
    }

    private static func checked(_ raw: UInt16, _ form: HeaderForm) -> TransmissionFlags {
        var flags = TransmissionFlags(rawValue: raw)
        // Without this bit the others mean nothing.
        if !flags.contains(.hasFlags) { return [] }
        if form == .simple { flags.remove(.sendDF) }
        if form != .extended { flags.remove(.blockStatusPayload) }
        return flags
    }

    private func askContexts(
        _ option: NBDOption,
        _ name: String,
        _ queries: [String]
    ) async throws -> [SelectedContext] {
        try requireFixed()
        guard form != .simple else { return [] }
        var request = MessageWriter()
        request.append(counted: name)
        request.append(UInt32(queries.count))
        for query in queries { request.append(counted: query) }
        try await send(option, request.bytes)
        var found: [SelectedContext] = []
        while true {
            let (type, payload) = try await receive(option)
            if type == NBDOptionReply.ack { return found }
            if type == NBDOptionReply.unsupported { return [] }
            // What the server has against the export it will say to GO in the same words.
            if NBDOptionReply.isError(type), option == .setMetaContext { return [] }
            guard type == NBDOptionReply.metaContext else { throw refusal(option, type, payload, name) }
            var reader = MessageReader(payload)
            guard let id = reader.integer(UInt32.self), let text = MessageReader.text(reader.bytes(reader.count) ?? []),
                found.count < 4096
            else { throw violation("sent a malformed metadata context") }
            if option == .setMetaContext {
                guard !found.contains(where: { $0.id == id || $0.name == text }), queries.contains(text) else {
                    throw violation("selected a metadata context that it was not asked for")
                }
            }
            found.append(SelectedContext(id: id, name: text))
        }
    }

    private func exportName() async throws -> NBDExportInfo {
        try await send(.exportName, Array(options.export.utf8))
        var reply: MessageReader
        do {
            let rest = handshakeFlags.contains(.noZeroes) ? 0 : 124
            reply = MessageReader(try await channel.read(exactly: 10 + rest))
        } catch let error as ChannelError where error.code == .closed || error.code == .truncated {
            throw violation("closed the connection: it has no export '\(options.export)', or not for us")
        }
        let size = try checked(reply.integer() ?? 0)
        return NBDExportInfo(name: options.export, size: size, flags: Self.checked(reply.integer() ?? 0, form))
    }
}
