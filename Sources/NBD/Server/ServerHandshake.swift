internal import TLS

/// The server's side of the newstyle negotiation, without I/O: options go in, replies and decisions come out.
struct ServerHandshake {
    enum Outcome {
        /// Send this and go on with the next option.
        case reply([UInt8])
        /// Send this, then start TLS and call `startedTLS`.
        case startTLS([UInt8])
        /// Send this and go on to the transmission phase.
        case transmit([UInt8], Export)
        /// Send this and close.
        case disconnect([UInt8], reason: String)
    }

    private let requiresTLS: Bool
    private let exports: ExportTable
    private var isSecure = false
    private var peer: TLSPeer?
    private var noZeroes = false
    private var fixed = false
    private(set) var structuredReplies = false
    /// The export for which `base:allocation` was selected; the selection dies with another export.
    private var contextExport: String?
    private(set) var hasAllocationContext = false
    static let allocationContextID: UInt32 = 1

    init(requiresTLS: Bool, exports: ExportTable) {
        self.requiresTLS = requiresTLS
        self.exports = exports
    }

    static var greeting: [UInt8] {
        var writer = MessageWriter()
        writer.append(NBDWire.greetingMagic)
        writer.append(NBDWire.optionMagic)
        writer.append((HandshakeFlags.fixedNewstyle.union(.noZeroes)).rawValue)
        return writer.bytes
    }

    /// Takes the client's flags; nil when it may go on, otherwise the reason to disconnect.
    mutating func receive(clientFlags: UInt32) -> String? {
        guard clientFlags & ~3 == 0 else { return "the client sent unknown handshake flags \(clientFlags)" }
        fixed = clientFlags & 1 != 0
        noZeroes = clientFlags & 2 != 0
        return nil
    }

    /// Forgets everything that came in clear text.
    mutating func startedTLS(_ peer: TLSPeer) {
        isSecure = true
        self.peer = peer
        structuredReplies = false
        contextExport = nil
        hasAllocationContext = false
    }

    /// An option that is too long to be read: its payload was dropped.
    func tooBig(option: UInt32) -> [UInt8] {
        OptionReply.error(option: option, type: NBDOptionReply.tooBig, "The option is too long")
    }

    mutating func receive(option number: UInt32, payload: [UInt8]) -> Outcome {
        func error(_ type: UInt32, _ text: String) -> Outcome {
            .reply(OptionReply.error(option: number, type: type, text))
        }
        let option = NBDOption(rawValue: number)
        if !fixed, option != .exportName {
            return .disconnect([], reason: "the client sent options without fixed newstyle negotiation")
        }
        if requiresTLS, !isSecure, option != .startTLS, option != .abort {
            if option == .exportName { return .disconnect([], reason: "the client asked for an export before TLS") }
            return error(NBDOptionReply.tlsRequired, "This server requires TLS; send STARTTLS first")
        }
        switch option {
        case nil: return error(NBDOptionReply.unsupported, "Option \(number) is not supported")
        case .abort:
            return .disconnect(OptionReply.encode(option: number, type: NBDOptionReply.ack), reason: "")
        case .startTLS:
            guard payload.isEmpty else { return error(NBDOptionReply.invalid, "STARTTLS takes no data") }
            guard requiresTLS else { return error(NBDOptionReply.policy, "TLS is not configured on this server") }
            guard !isSecure else { return error(NBDOptionReply.invalid, "TLS is active already") }
            return .startTLS(OptionReply.encode(option: number, type: NBDOptionReply.ack))
        case .list:
            guard payload.isEmpty else { return error(NBDOptionReply.invalid, "LIST takes no data") }
            return .reply(list(number))
        case .structuredReply:
            guard payload.isEmpty else { return error(NBDOptionReply.invalid, "STRUCTURED_REPLY takes no data") }
            structuredReplies = true
            return .reply(OptionReply.encode(option: number, type: NBDOptionReply.ack))
        case .exportName: return exportName(payload)
        case .info, .go: return info(number, payload, goes: option == .go)
        case .listMetaContext, .setMetaContext: return metaContext(number, payload, sets: option == .setMetaContext)
        }
    }

    private func list(_ number: UInt32) -> [UInt8] {
        var replies: [UInt8] = []
        for export in exports.list(for: peer) {
            var entry = MessageWriter()
            entry.append(UInt32(export.name.utf8.count))
            entry.append(export.name)
            entry.append(export.summary)
            replies += OptionReply.encode(option: number, type: NBDOptionReply.server, payload: entry.bytes)
        }
        return replies + OptionReply.encode(option: number, type: NBDOptionReply.ack)
    }

    private mutating func exportName(_ payload: [UInt8]) -> Outcome {
        guard payload.count <= NBDWire.maximumString, let name = MessageReader.text(payload),
            let export = exports.find(name, for: peer)
        else { return .disconnect([], reason: "the client asked for an export that does not exist") }
        select(export)
        var reply = MessageWriter(capacity: 134)
        reply.append(export.backEnd.size)
        reply.append(export.flags.rawValue)
        if !noZeroes { reply.append([UInt8](repeating: 0, count: 124)) }
        return .transmit(reply.bytes, export)
    }

    /// A context that was selected for another export does not hold for this one.
    private mutating func select(_ export: Export) {
        if contextExport != export.name { hasAllocationContext = false }
    }

    private mutating func info(_ number: UInt32, _ payload: [UInt8], goes: Bool) -> Outcome {
        func error(_ type: UInt32, _ text: String) -> Outcome {
            .reply(OptionReply.error(option: number, type: type, text))
        }
        var reader = MessageReader(payload)
        guard let name = reader.string(), let count = reader.integer(UInt16.self), reader.count == 2 * Int(count) else {
            return error(NBDOptionReply.invalid, "The request for information is malformed")
        }
        var wanted: Set<UInt16> = []
        while let item = reader.integer(UInt16.self) { wanted.insert(item) }
        guard let export = exports.find(name, for: peer) else {
            return error(NBDOptionReply.unknown, "Export '\(name)' does not exist, or not for you")
        }
        func item(_ build: (inout MessageWriter) -> Void) -> [UInt8] {
            var writer = MessageWriter()
            build(&writer)
            return OptionReply.encode(option: number, type: NBDOptionReply.info, payload: writer.bytes)
        }
        var replies: [UInt8] = []
        if wanted.contains(NBDInfo.name) {
            replies += item {
                $0.append(NBDInfo.name)
                $0.append(export.name)
            }
        }
        if wanted.contains(NBDInfo.description), !export.summary.isEmpty {
            replies += item {
                $0.append(NBDInfo.description)
                $0.append(export.summary)
            }
        }
        if wanted.contains(NBDInfo.blockSize) {
            replies += item {
                $0.append(NBDInfo.blockSize)
                $0.append(UInt32(1))
                $0.append(UInt32(65536))
                $0.append(UInt32(NBDWire.maximumPayload))
            }
        }
        replies += item {
            $0.append(NBDInfo.export)
            $0.append(export.backEnd.size)
            $0.append(export.flags.rawValue)
        }
        replies += OptionReply.encode(option: number, type: NBDOptionReply.ack)
        if !goes { return .reply(replies) }
        select(export)
        return .transmit(replies, export)
    }

    private mutating func metaContext(_ number: UInt32, _ payload: [UInt8], sets: Bool) -> Outcome {
        func error(_ type: UInt32, _ text: String) -> Outcome {
            .reply(OptionReply.error(option: number, type: type, text))
        }
        if sets {
            // A failed request clears the earlier selection, too.
            contextExport = nil
            hasAllocationContext = false
        }
        guard structuredReplies else {
            return error(NBDOptionReply.invalid, "Metadata contexts need structured replies")
        }
        var reader = MessageReader(payload)
        guard let name = reader.string(), let count = reader.integer(UInt32.self) else {
            return error(NBDOptionReply.invalid, "The request for metadata contexts is malformed")
        }
        var queries: [String] = []
        for _ in 0..<count {
            guard let query = reader.string() else {
                return error(NBDOptionReply.invalid, "The request for metadata contexts is malformed")
            }
            queries.append(query)
        }
        guard reader.isEmpty else {
            return error(NBDOptionReply.invalid, "The request for metadata contexts has bytes to spare")
        }
        guard let export = exports.find(name, for: peer) else {
            return error(NBDOptionReply.unknown, "Export '\(name)' does not exist, or not for you")
        }
        let matches =
            queries.contains(Extent.contextName)
            || (!sets && (queries.isEmpty || queries.contains("base:")))
        var replies: [UInt8] = []
        if matches {
            var entry = MessageWriter()
            entry.append(sets ? Self.allocationContextID : 0)
            entry.append(Extent.contextName)
            replies += OptionReply.encode(option: number, type: NBDOptionReply.metaContext, payload: entry.bytes)
        }
        if sets, matches {
            contextExport = export.name
            hasAllocationContext = true
        }
        return .reply(replies + OptionReply.encode(option: number, type: NBDOptionReply.ack))
    }
}
