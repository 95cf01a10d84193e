public import IO

/// What a server does wrong, or unusually. The names follow the checklist for clients.
public enum Misbehaviour: String, Sendable, CaseIterable {
    // What a client that requires TLS must not fall for.
    case tlsUnsupported = "C-1.starttls-unsupported"
    case tlsPolicy = "C-1.starttls-policy"
    case tlsGarbage = "C-1.starttls-garbage"
    case tlsNotFixed = "C-1.not-fixed-newstyle"
    case tlsOldstyle = "C-1.oldstyle"
    case tlsClearText = "C-1.clear-text-after-ack"
    // Malformed negotiation.
    case wrongOption = "C-3.wrong-option"
    case wrongReplyMagic = "C-3.wrong-reply-magic"
    case hugeReply = "C-3.huge-reply"
    case ackWithData = "C-3.ack-with-data"
    case goWithoutExport = "C-4.go-without-export"
    case exportTwice = "C-4.export-twice"
    case blockSizeZero = "C-4.block-size-zero"
    case blockSizeOdd = "C-4.block-size-not-power-of-two"
    case blockSizeOrder = "C-4.preferred-below-minimum"
    case infoWithoutEnd = "C-4.info-without-end"
    case sizeTooLarge = "C-5.size-too-large"
    case exportNameCloses = "C-7.export-name-closes"
    // Malformed replies.
    case unknownCookie = "C-8.unknown-cookie"
    case replyTwice = "C-8.reply-twice"
    case unknownChunk = "C-9.unknown-chunk"
    case chunkOutside = "C-9.chunk-outside"
    case chunkOverlaps = "C-9.chunk-overlaps"
    case chunkEmpty = "C-9.chunk-empty"
    case readShort = "C-9.read-short"
    case errorTooLong = "C-9.error-longer-than-chunk"
    case errorNumberless = "C-9.error-without-number"
    case simpleForStructured = "C-10.simple-for-structured"
    case structuredForSimple = "C-10.structured-for-simple"
    case replyMagic = "C-10.wrong-reply-magic"
    case statusOtherContext = "C-11.other-context"
    case statusEmpty = "C-11.no-extents"
    case statusZeroLength = "C-11.zero-length"
    case statusTooMany = "C-11.too-many"
    case silence = "C-13.silence"
    case vanishes = "C-13.vanishes"
    // What a client must live with.
    case infoUnknown = "C-4.unknown-info"
    case flagsUnknown = "C-6.unknown-flags"
    case flagsMeaningless = "C-6.no-has-flags"
    case goUnsupported = "C-7.go-unsupported"
    case chunksReversed = "C-9.chunks-reversed"
    case statusBeyond = "C-11.extent-beyond-request"
    // Errors that must reach the caller, while the connection goes on.
    case unknownErrorChunk = "C-9.unknown-error-chunk"
    case errorEscapes = "C-9.error-with-escapes"
    case inputOutput = "C-14.eio"

    /// What a good client does about it.
    public enum Expectation: Sendable {
        /// It gives the connection up.
        case fails
        /// It carries on.
        case carriesOn
        /// The request fails and the connection goes on.
        case requestFails
    }

    /// What a good client does about it.
    public var expectation: Expectation {
        switch self {
        case .infoUnknown, .flagsUnknown, .flagsMeaningless, .goUnsupported, .chunksReversed, .statusBeyond: .carriesOn
        case .unknownErrorChunk, .errorEscapes, .inputOutput: .requestFails
        default: .fails
        }
    }

    /// Whether it is about a client that requires TLS.
    public var isAboutTLS: Bool { rawValue.hasPrefix("C-1.") }
}

/// An NBD server with a disk of 1 MiB, full of the letter Z, that does one thing wrong.
public struct MisbehavingServer: Sendable {
    /// How many bytes its disk has.
    public static let size: UInt64 = 1 << 20
    private let fault: Misbehaviour

    /// Makes a server.
    public init(_ fault: Misbehaviour) { self.fault = fault }

    /// Serves one connection until the client or the fault ends it.
    public func serve(_ channel: any Channel) async throws {
        defer { channel.close() }
        var session = Session(channel: channel, fault: fault)
        try await session.greet()
        guard try await session.negotiate() else { return }
        try await session.transmit()
    }

    private struct Session {
        let channel: any Channel
        let fault: Misbehaviour
        var isStructured = false
        var hasContext = false
        var noZeroes = false
        private static let contextID: UInt32 = 7

        init(channel: any Channel, fault: Misbehaviour) {
            self.channel = channel
            self.fault = fault
        }

        private func message(_ build: (inout MessageWriter) -> Void) -> [UInt8] {
            var writer = MessageWriter()
            build(&writer)
            return writer.bytes
        }

        // MARK: Negotiation

        mutating func greet() async throws {
            try await channel.write(
                message {
                    $0.append(NBDWire.greetingMagic)
                    $0.append(fault == .tlsOldstyle ? 0x0000_4202_8186_1253 : NBDWire.optionMagic)
                    $0.append(UInt16(fault == .tlsNotFixed ? 2 : 3))
                }
            )
            var flags = MessageReader(try await channel.read(exactly: 4))
            noZeroes = (flags.integer(UInt32.self) ?? 0) & 2 != 0
        }

        private func reply(_ option: UInt32, _ type: UInt32, _ payload: [UInt8] = []) -> [UInt8] {
            OptionReply.encode(option: option, type: type, payload: payload)
        }

        mutating func negotiate() async throws -> Bool {
            while true {
                var header = MessageReader(try await channel.read(exactly: 16))
                _ = header.integer(UInt64.self)
                let option = header.integer(UInt32.self) ?? 0
                _ = try await channel.read(exactly: Int(header.integer(UInt32.self) ?? 0))
                switch NBDOption(rawValue: option) {
                case .startTLS: try await channel.write(startTLS(option))
                case .structuredReply:
                    if fault == .structuredForSimple {
                        try await channel.write(reply(option, NBDOptionReply.unsupported))
                    } else {
                        try await channel.write(structured(option))
                    }
                case .setMetaContext:
                    hasContext = true
                    let entry = message {
                        $0.append(Self.contextID)
                        $0.append(MetaContext.allocation)
                    }
                    try await channel.write(
                        reply(option, NBDOptionReply.metaContext, entry) + reply(option, NBDOptionReply.ack)
                    )
                case .go:
                    if fault == .goUnsupported || fault == .exportNameCloses {
                        try await channel.write(reply(option, NBDOptionReply.unsupported))
                        continue
                    }
                    try await channel.write(go(option))
                    return true
                case .exportName:
                    if fault == .exportNameCloses { return false }
                    try await channel.write(
                        message {
                            $0.append(MisbehavingServer.size)
                            $0.append(flags)
                        } + [UInt8](repeating: 0, count: noZeroes ? 0 : 124)
                    )
                    return true
                case .abort:
                    try await channel.write(reply(option, NBDOptionReply.ack))
                    return false
                default: try await channel.write(reply(option, NBDOptionReply.unsupported))
                }
            }
        }

        private func startTLS(_ option: UInt32) -> [UInt8] {
            switch fault {
            case .tlsPolicy: reply(option, NBDOptionReply.policy)
            case .tlsGarbage: reply(option, 42, [1, 2, 3])
            case .tlsClearText: reply(option, NBDOptionReply.ack) + reply(8, NBDOptionReply.ack) + go(7)
            default: reply(option, NBDOptionReply.unsupported)
            }
        }

        private mutating func structured(_ option: UInt32) -> [UInt8] {
            isStructured = true
            switch fault {
            case .wrongOption: return reply(option + 1, NBDOptionReply.ack)
            case .wrongReplyMagic: return [UInt8](repeating: 9, count: 20)
            case .hugeReply:
                return message {
                    $0.append(NBDWire.optionReplyMagic)
                    $0.append(option)
                    $0.append(NBDOptionReply.ack)
                    $0.append(UInt32.max)
                }
            case .ackWithData: return reply(option, NBDOptionReply.ack, [1])
            default: return reply(option, NBDOptionReply.ack)
            }
        }

        private var flags: UInt16 {
            switch fault {
            case .flagsUnknown: 0b1111_0001_1110_1101
            case .flagsMeaningless: 0xfffe
            default: TransmissionFlags([.hasFlags, .sendFlush, .sendFUA, .sendWriteZeroes]).rawValue
            }
        }

        private func go(_ option: UInt32) -> [UInt8] {
            let export = reply(
                option,
                NBDOptionReply.info,
                message {
                    $0.append(NBDInfo.export)
                    $0.append(fault == .sizeTooLarge ? 1 << 63 : MisbehavingServer.size)
                    $0.append(flags)
                }
            )
            func sizes(_ minimum: UInt32, _ preferred: UInt32, _ maximum: UInt32) -> [UInt8] {
                reply(
                    option,
                    NBDOptionReply.info,
                    message {
                        $0.append(NBDInfo.blockSize)
                        $0.append(minimum)
                        $0.append(preferred)
                        $0.append(maximum)
                    }
                )
            }
            let ack = reply(option, NBDOptionReply.ack)
            switch fault {
            case .goWithoutExport: return ack
            case .exportTwice: return export + export + ack
            case .blockSizeZero: return export + sizes(0, 4096, 1 << 25) + ack
            case .blockSizeOdd: return export + sizes(768, 4096, 1 << 25) + ack
            case .blockSizeOrder: return export + sizes(8192, 4096, 1 << 25) + ack
            case .infoWithoutEnd:
                let unknown = reply(option, NBDOptionReply.info, [0x77, 0x77])
                return (0..<1000).reduce(into: export) { bytes, _ in bytes += unknown }
            case .infoUnknown: return reply(option, NBDOptionReply.info, [0x12, 0x34, 5, 6]) + export + ack
            default: return export + ack
            }
        }

        // MARK: Transmission

        func transmit() async throws {
            while true {
                let header = IOBuffer(copying: try await channel.read(exactly: 28))
                guard let request = NBDRequest(decoding: header.bytes(0..<28), form: .simple) else { return }
                switch NBDCommand(rawValue: request.command) {
                case .disconnect: return
                case .read: try await read(request)
                case .write:
                    _ = try await channel.read(exactly: Int(request.length))
                    try await channel.write(simple(request, fault == .inputOutput ? 5 : 0))
                case .blockStatus: try await status(request)
                default: try await channel.write(simple(request, 0))
                }
            }
        }

        private func simple(_ request: NBDRequest, _ error: UInt32, cookie: UInt64? = nil) -> [UInt8] {
            message {
                $0.append(NBDWire.simpleReplyMagic)
                $0.append(error)
                $0.append(cookie ?? request.cookie)
            }
        }

        private func chunk(
            _ request: NBDRequest,
            _ type: UInt16,
            _ payload: [UInt8],
            done: Bool = true,
            cookie: UInt64? = nil
        ) -> [UInt8] {
            let header = IOBuffer(capacity: 20)
            ChunkHeader(done: done, type: type, cookie: cookie ?? request.cookie, offset: 0, length: payload.count)
                .encode(into: header.mutable(0..<20), form: .structured)
            return [UInt8](header.bytes(0..<20)) + payload
        }

        private func data(_ offset: UInt64, _ count: Int) -> [UInt8] {
            message { $0.append(offset) } + [UInt8](repeating: UInt8(ascii: "Z"), count: count)
        }

        private func error(_ number: UInt32, _ text: String, claims: UInt16? = nil) -> [UInt8] {
            message {
                $0.append(number)
                $0.append(claims ?? UInt16(text.utf8.count))
                $0.append(text)
            }
        }

        private func read(_ request: NBDRequest) async throws {
            let (offset, count) = (request.offset, Int(request.length))
            let whole = data(offset, count)
            guard isStructured else {
                if fault == .structuredForSimple {
                    return try await channel.write(chunk(request, NBDChunk.offsetData, whole))
                }
                return try await channel.write(simple(request, 0) + whole.dropFirst(8))
            }
            let good = chunk(request, NBDChunk.offsetData, whole)
            let half = chunk(request, NBDChunk.offsetData, data(offset, count / 2), done: false)
            let bytes: [UInt8]
            switch fault {
            case .unknownCookie: bytes = chunk(request, NBDChunk.offsetData, whole, cookie: request.cookie &+ 99)
            case .replyTwice: bytes = good + good
            case .unknownChunk: bytes = chunk(request, 0x77, [1, 2, 3])
            case .chunkOutside: bytes = chunk(request, NBDChunk.offsetData, data(offset + 512, count))
            case .chunkOverlaps:
                bytes = half + chunk(request, NBDChunk.offsetData, data(offset + 1, count / 2), done: false) + good
            case .chunkEmpty: bytes = chunk(request, NBDChunk.offsetData, data(offset, 0), done: false) + good
            case .readShort: bytes = half + chunk(request, NBDChunk.none, [])
            case .errorTooLong: bytes = chunk(request, NBDChunk.error, error(5, "no", claims: 900))
            case .errorNumberless: bytes = chunk(request, NBDChunk.error, error(0, "nothing"))
            case .simpleForStructured: bytes = simple(request, 0) + whole.dropFirst(8)
            case .replyMagic: bytes = [UInt8](repeating: 0x42, count: 20)
            case .silence: return
            case .vanishes:
                try await channel.write(Array(good.prefix(100)))
                return try await channel.finishWriting()
            case .chunksReversed:
                bytes =
                    chunk(
                        request,
                        NBDChunk.offsetData,
                        data(offset + UInt64(count / 2), count - count / 2),
                        done: false
                    )
                    + half + chunk(request, NBDChunk.none, [])
            case .unknownErrorChunk: bytes = chunk(request, 1 << 15 | 0x1234, error(5, "of a new kind"))
            case .errorEscapes: bytes = chunk(request, NBDChunk.error, error(5, "\u{1b}[2J\u{7}beep\n"))
            default: bytes = good
            }
            try await channel.write(bytes)
        }

        private func status(_ request: NBDRequest) async throws {
            func extents(_ id: UInt32, _ lengths: [UInt32]) -> [UInt8] {
                message {
                    $0.append(id)
                    for length in lengths {
                        $0.append(length)
                        $0.append(UInt32(0))
                    }
                }
            }
            let length = UInt32(request.length)
            let payload =
                switch fault {
                case .statusOtherContext: extents(Self.contextID + 1, [length])
                case .statusEmpty: extents(Self.contextID, [])
                case .statusZeroLength: extents(Self.contextID, [0, length])
                case .statusTooMany: extents(Self.contextID, [UInt32](repeating: 1, count: NBDWire.maximumExtents + 1))
                case .statusBeyond: extents(Self.contextID, [length / 2, length * 4])
                default: extents(Self.contextID, [length])
                }
            try await channel.write(chunk(request, NBDChunk.blockStatus, payload))
        }
    }
}
