internal import TLS

/// Whether a server's clients use TLS (NBD specification, "TLS support").
public enum TLSMode: Sendable {
    /// NOTLS: there are no credentials.
    case none
    /// SELECTIVETLS: the client chooses, and exports that require TLS are only there within it.
    case perExport
    /// FORCEDTLS: before TLS nothing but STARTTLS and ABORT is understood.
    case required
}

/// What a negotiation ended with.
struct NegotiatedExport {
    let export: Export
    let access: ExportAccess
    let form: HeaderForm
    /// The selected metadata contexts and the numbers that they were given.
    let contexts: [SelectedContext]
}

/// A metadata context that a client selected.
struct SelectedContext: Equatable {
    let id: UInt32
    let name: String
}

/// The server's side of the newstyle negotiation, without I/O: options go in, replies and decisions come out.
struct ServerHandshake {
    enum Outcome {
        /// Send this and go on with the next option.
        case reply([UInt8])
        /// Send this, then start TLS and call `startedTLS`.
        case startTLS([UInt8])
        /// Send this and go on to the transmission phase.
        case transmit([UInt8], NegotiatedExport)
        /// Send this and close.
        case disconnect([UInt8], reason: String)
    }

    private let mode: TLSMode
    private let exports: ExportTable
    private let clearTextMayUse: Bool
    private var isSecure = false
    private var peer: TLSPeer?
    private var denial: String?
    private var noZeroes = false
    private var fixed = false
    private var form = HeaderForm.simple
    /// The export for which contexts were selected; the selection dies with another export.
    private var contextExport: String?
    private var contexts: [SelectedContext] = []
    /// Whether the server is about to end: every option but ABORT is refused.
    var isDraining = false

    /// - Parameters:
    ///   - mode: whether there is TLS.
    ///   - exports: what there is.
    ///   - clearTextMayUse: whether exports that do not require TLS may be used without it, where the client chooses.
    init(mode: TLSMode, exports: ExportTable, clearTextMayUse: Bool = true) {
        self.clearTextMayUse = clearTextMayUse || mode == .none
        self.mode = mode
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
    ///
    /// - Parameters:
    ///   - peer: who the client proved to be.
    ///   - denial: why it may use nothing here, in words for it; nil when it may.
    mutating func startedTLS(_ peer: TLSPeer, denial: String? = nil) {
        isSecure = true
        self.peer = peer
        self.denial = denial
        form = .simple
        contextExport = nil
        contexts = []
    }

    /// An option that is too long to be read: its payload was dropped.
    mutating func tooBig(option: UInt32) -> [UInt8] {
        if option == NBDOption.setMetaContext.rawValue { (contextExport, contexts) = (nil, []) }
        if mode == .required, !isSecure { return Self.error(option, NBDOptionReply.tlsRequired, Self.tlsFirst) }
        return Self.error(option, NBDOptionReply.tooBig, "The option is too long")
    }

    private static let tlsFirst = "This server requires TLS; send STARTTLS first"

    private static func error(_ option: UInt32, _ type: UInt32, _ text: String) -> [UInt8] {
        OptionReply.error(option: option, type: type, text)
    }

    private static func ack(_ option: UInt32) -> [UInt8] {
        OptionReply.encode(option: option, type: NBDOptionReply.ack)
    }

    /// Why an option is refused whatever it says; nil when it is not.
    private func refusal(_ number: UInt32, _ option: NBDOption?) -> Outcome? {
        func refuse(_ type: UInt32, _ text: String, _ reason: String) -> Outcome {
            // EXPORT_NAME has no error reply.
            option == .exportName ? .disconnect([], reason: reason) : .reply(Self.error(number, type, text))
        }
        if !fixed, option != .exportName {
            return .disconnect([], reason: "the client sent options without fixed newstyle negotiation")
        }
        if option == .abort { return nil }
        if mode == .required, !isSecure, option != .startTLS {
            return refuse(NBDOptionReply.tlsRequired, Self.tlsFirst, "the client asked for an export before TLS")
        }
        if isDraining {
            return refuse(NBDOptionReply.shutdown, "The server is shutting down", "the server is shutting down")
        }
        if let denial { return refuse(NBDOptionReply.policy, denial, denial) }
        return nil
    }

    mutating func receive(option number: UInt32, payload: [UInt8]) -> Outcome {
        let option = NBDOption(rawValue: number)
        if let refusal = refusal(number, option) { return refusal }
        func invalid(_ text: String) -> Outcome { .reply(Self.error(number, NBDOptionReply.invalid, text)) }
        switch option {
        case nil:
            return .reply(Self.error(number, NBDOptionReply.unsupported, "Option \(number) is not supported"))
        case .abort: return .disconnect(Self.ack(number), reason: "")
        case .startTLS:
            guard payload.isEmpty else { return invalid("STARTTLS takes no data") }
            guard mode != .none else {
                return .reply(Self.error(number, NBDOptionReply.policy, "TLS is not configured on this server"))
            }
            guard !isSecure else { return invalid("TLS is active already") }
            return .startTLS(Self.ack(number))
        case .list:
            guard payload.isEmpty else { return invalid("LIST takes no data") }
            return .reply(list(number))
        case .structuredReply:
            guard payload.isEmpty else { return invalid("STRUCTURED_REPLY takes no data") }
            guard form != .extended else {
                return .reply(
                    Self.error(number, NBDOptionReply.extendedHeadersRequired, "Extended headers are in use already")
                )
            }
            guard form != .structured else { return invalid("Structured replies are in use already") }
            form = .structured
            return .reply(Self.ack(number))
        case .extendedHeaders:
            guard payload.isEmpty else { return invalid("EXTENDED_HEADERS takes no data") }
            guard form != .extended else { return invalid("Extended headers are in use already") }
            form = .extended
            return .reply(Self.ack(number))
        case .exportName: return exportName(payload)
        case .info, .go: return info(number, payload, goes: option == .go)
        case .listMetaContext: return listContexts(number, payload)
        case .setMetaContext: return setContexts(number, payload)
        }
    }

    private func list(_ number: UInt32) -> [UInt8] {
        var replies: [UInt8] = []
        if !isSecure, !clearTextMayUse { return Self.ack(number) }
        for export in exports.list(for: peer, isSecure: isSecure) {
            var entry = MessageWriter()
            entry.append(counted: export.name)
            entry.append(export.summary)
            replies += OptionReply.encode(option: number, type: NBDOptionReply.server, payload: entry.bytes)
        }
        return replies + Self.ack(number)
    }

    /// The export of a name for this peer, or the reply that says why there is none.
    private func find(_ name: String, _ number: UInt32) -> (found: (Export, ExportAccess)?, error: [UInt8]) {
        var finding = exports.find(name, for: peer, isSecure: isSecure)
        if !isSecure, !clearTextMayUse { finding = .needsTLS }
        // Where there is no TLS at all, nobody is sent away to use it.
        if case .needsTLS = finding, mode == .none { finding = .nothing }
        switch finding {
        case .found(let export, let access): return ((export, access), [])
        case .denied(let reason): return (nil, Self.error(number, NBDOptionReply.policy, reason))
        case .needsTLS:
            return (
                nil, Self.error(number, NBDOptionReply.tlsRequired, "This export requires TLS; send STARTTLS first")
            )
        case .nothing:
            return (
                nil, Self.error(number, NBDOptionReply.unknown, "Export '\(name)' does not exist, or not for you")
            )
        }
    }

    private func negotiated(_ export: Export, _ access: ExportAccess) -> NegotiatedExport {
        // Contexts that were selected for another export do not hold for this one.
        NegotiatedExport(
            export: export,
            access: access,
            form: form,
            contexts: contextExport == export.name ? contexts : []
        )
    }

    private func exportName(_ payload: [UInt8]) -> Outcome {
        guard form != .extended else {
            return .disconnect([], reason: "the client sent EXPORT_NAME after extended headers")
        }
        guard payload.count <= NBDWire.maximumString, let name = MessageReader.text(payload),
            let (export, access) = find(name, NBDOption.exportName.rawValue).found
        else { return .disconnect([], reason: "the client asked for an export that does not exist, or not for it") }
        guard export.backEnd.traits.blockSizes.minimum <= 512 else {
            return .disconnect([], reason: "the client asked for an export without asking for its block size")
        }
        var reply = MessageWriter(capacity: 134)
        reply.append(export.backEnd.size)
        reply.append(export.flags(access, form: form).rawValue)
        if !noZeroes { reply.append([UInt8](repeating: 0, count: 124)) }
        return .transmit(reply.bytes, negotiated(export, access))
    }

    private func info(_ number: UInt32, _ payload: [UInt8], goes: Bool) -> Outcome {
        var reader = MessageReader(payload)
        guard let name = reader.string(), let count = reader.integer(UInt16.self), reader.count == 2 * Int(count) else {
            return .reply(Self.error(number, NBDOptionReply.invalid, "The request for information is malformed"))
        }
        var wanted: Set<UInt16> = []
        while let item = reader.integer(UInt16.self) { wanted.insert(item) }
        let (found, error) = find(name, number)
        guard let (export, access) = found else { return .reply(error) }
        let sizes = export.backEnd.traits.blockSizes
        guard sizes.minimum <= 512 || wanted.contains(NBDInfo.blockSize) else {
            return .reply(
                Self.error(
                    number,
                    NBDOptionReply.blockSizeRequired,
                    "This export works in blocks of \(sizes.minimum) bytes; ask for its block size"
                )
            )
        }
        func item(_ kind: UInt16, _ build: (inout MessageWriter) -> Void) -> [UInt8] {
            var writer = MessageWriter()
            writer.append(kind)
            build(&writer)
            return OptionReply.encode(option: number, type: NBDOptionReply.info, payload: writer.bytes)
        }
        var replies: [UInt8] = []
        if wanted.contains(NBDInfo.name) { replies += item(NBDInfo.name) { $0.append(export.name) } }
        if wanted.contains(NBDInfo.description), !export.summary.isEmpty {
            replies += item(NBDInfo.description) { $0.append(export.summary) }
        }
        if wanted.contains(NBDInfo.blockSize) || sizes.minimum > 1 {
            replies += item(NBDInfo.blockSize) {
                $0.append(sizes.minimum)
                $0.append(sizes.preferred)
                $0.append(sizes.maximum)
            }
        }
        replies += item(NBDInfo.export) {
            $0.append(export.backEnd.size)
            $0.append(export.flags(access, form: form).rawValue)
        }
        replies += Self.ack(number)
        return goes ? .transmit(replies, negotiated(export, access)) : .reply(replies)
    }

    // MARK: Metadata contexts

    private enum ContextRequest {
        case good(Export, queries: [String])
        case bad([UInt8])
    }

    private func contextRequest(_ number: UInt32, _ payload: [UInt8]) -> ContextRequest {
        // To look at what there is needs no form of reply.
        guard form != .simple || number == NBDOption.listMetaContext.rawValue else {
            return .bad(Self.error(number, NBDOptionReply.invalid, "Metadata contexts need structured replies"))
        }
        let malformed = ContextRequest.bad(
            Self.error(number, NBDOptionReply.invalid, "The request for metadata contexts is malformed")
        )
        var reader = MessageReader(payload)
        guard let name = reader.string(), let count = reader.integer(UInt32.self) else { return malformed }
        var queries: [String] = []
        for _ in 0..<count {
            guard let query = reader.string() else { return malformed }
            queries.append(query)
        }
        guard reader.isEmpty else { return malformed }
        let (found, error) = find(name, number)
        guard let (export, _) = found else { return .bad(error) }
        return .good(export, queries: queries)
    }

    private static func contextReply(_ number: UInt32, _ id: UInt32, _ name: String) -> [UInt8] {
        var entry = MessageWriter()
        entry.append(id)
        entry.append(name)
        return OptionReply.encode(option: number, type: NBDOptionReply.metaContext, payload: entry.bytes)
    }

    private func listContexts(_ number: UInt32, _ payload: [UInt8]) -> Outcome {
        switch contextRequest(number, payload) {
        case .bad(let error): return .reply(error)
        case .good(let export, let queries):
            var replies: [UInt8] = []
            for name in export.backEnd.traits.contexts
            where queries.isEmpty || queries.contains(where: { MetaContext.query($0, matches: name, listing: true) }) {
                replies += Self.contextReply(number, 0, name)
            }
            return .reply(replies + Self.ack(number))
        }
    }

    private mutating func setContexts(_ number: UInt32, _ payload: [UInt8]) -> Outcome {
        // A failed request clears the earlier selection, too.
        contextExport = nil
        contexts = []
        switch contextRequest(number, payload) {
        case .bad(let error): return .reply(error)
        case .good(let export, let queries):
            var replies: [UInt8] = []
            for (index, name) in export.backEnd.traits.contexts.enumerated()
            where queries.contains(where: { MetaContext.query($0, matches: name, listing: false) }) {
                let selected = SelectedContext(id: UInt32(index + 1), name: name)
                contexts.append(selected)
                replies += Self.contextReply(number, selected.id, name)
            }
            contextExport = export.name
            return .reply(replies + Self.ack(number))
        }
    }
}
