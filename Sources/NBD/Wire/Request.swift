/// The form of headers that a negotiation ended with.
public enum HeaderForm: Sendable {
    /// Compact requests, simple replies.
    case simple
    /// Compact requests, structured replies (NBD_OPT_STRUCTURED_REPLY).
    case structured
    /// 64-bit requests and replies (NBD_OPT_EXTENDED_HEADERS).
    case extended

    /// How many bytes a request's header has.
    var requestSize: Int { self == .extended ? 32 : 28 }
    /// How many bytes the header of a reply's chunk has.
    var chunkSize: Int { self == .extended ? 32 : 20 }
}

/// The header of a request (NBD specification, "Request message").
public struct NBDRequest: Sendable, Equatable {
    /// The command's number; unknown ones are answered with EINVAL.
    public var command: UInt16
    /// The flags.
    public var flags: CommandFlags
    /// What the reply repeats.
    public var cookie: UInt64
    /// Where, in bytes.
    public var offset: UInt64
    /// How many bytes; less than 2^32 in a compact header.
    public var length: UInt64

    /// Makes a request.
    public init(_ command: NBDCommand, flags: CommandFlags = [], cookie: UInt64, offset: UInt64 = 0, length: UInt64 = 0)
    {
        self.command = command.rawValue
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
    }

    /// Decodes a header; nil when the magic is wrong.
    init?(decoding bytes: UnsafeRawBufferPointer, form: HeaderForm) {
        let isExtended = form == .extended
        let magic = isExtended ? NBDWire.extendedRequestMagic : NBDWire.requestMagic
        guard bytes.bigEndian(0, UInt32.self) == magic else { return nil }
        flags = CommandFlags(rawValue: bytes.bigEndian(4))
        command = bytes.bigEndian(6)
        cookie = bytes.bigEndian(8)
        offset = bytes.bigEndian(16)
        length = isExtended ? bytes.bigEndian(24) : UInt64(bytes.bigEndian(24, UInt32.self))
    }

    /// Encodes the header. A compact one must have a length of less than 2^32.
    func encode(into bytes: UnsafeMutableRawBufferPointer, form: HeaderForm) {
        let isExtended = form == .extended
        bytes.storeBigEndian(isExtended ? NBDWire.extendedRequestMagic : NBDWire.requestMagic, at: 0)
        bytes.storeBigEndian(flags.rawValue, at: 4)
        bytes.storeBigEndian(command, at: 6)
        bytes.storeBigEndian(cookie, at: 8)
        bytes.storeBigEndian(offset, at: 16)
        if isExtended {
            bytes.storeBigEndian(length, at: 24)
        } else {
            bytes.storeBigEndian(UInt32(length), at: 24)
        }
    }

    /// How many bytes follow the header. A header that says it has a payload has one, whatever its command; a WRITE has one
    /// even when it does not say so, see `lacksPayloadFlag`.
    func payloadSize(form: HeaderForm) -> UInt64 {
        if form == .extended, flags.contains(.payloadLength) { return length }
        return command == NBDCommand.write.rawValue ? length : 0
    }

    /// Whether this is a WRITE that does not set `NBD_CMD_FLAG_PAYLOAD_LEN`, which the specification requires with extended
    /// headers. QEMU's client leaves it out (8.2 to 11.1 at least), and the servers of QEMU and nbdkit take the length for the
    /// payload's all the same.
    func lacksPayloadFlag(form: HeaderForm) -> Bool {
        form == .extended && command == NBDCommand.write.rawValue && !flags.contains(.payloadLength)
    }

    /// A TRIM of whole blocks only: QEMU's client asks for parts of blocks, and a server may do less than it is asked for
    /// (`NBD_CMD_TRIM`). One beyond the end stays as it is.
    func roundedInwards(_ terms: Terms) -> NBDRequest {
        let (end, overflow) = offset.addingReportingOverflow(length)
        let mask = UInt64(terms.blockSizes.minimum) - 1
        guard !overflow, end <= terms.size, mask != 0, offset & mask != 0 || end & mask != 0 else { return self }
        var whole = self
        // The last block may be a part of one.
        let last = end == terms.size ? end : end & ~mask
        let first = offset & mask == 0 ? offset : (offset | mask) + 1
        whole.offset = first < last ? first : 0
        whole.length = first < last ? last - first : 0
        return whole
    }

    /// What a request is checked against.
    struct Terms {
        var size: UInt64
        var flags: TransmissionFlags
        var blockSizes: BlockSizes
        var form: HeaderForm
        var hasContexts: Bool
    }

    /// Checks the request against the export; nil when it is in order.
    ///
    /// For a BLOCK_STATUS with a payload the length must be the effect length by now.
    func fault(_ terms: Terms) -> NBDError? {
        guard let known = NBDCommand(rawValue: command) else {
            return NBDError(.invalid, "Unknown command \(command)")
        }
        guard flags.isSubset(of: Self.allowedFlags(known, terms)) else {
            return NBDError(.invalid, "The command \(known) does not take the flags \(flags.rawValue)")
        }
        switch known {
        case .flush, .disconnect: return nil
        case .write, .trim, .writeZeroes:
            if terms.flags.contains(.readOnly) { return NBDError(.notPermitted, "The export is read-only") }
            if known == .trim, !terms.flags.contains(.sendTrim) { return Self.unadvertised(known) }
            if known == .writeZeroes, !terms.flags.contains(.sendWriteZeroes) { return Self.unadvertised(known) }
        case .cache: if !terms.flags.contains(.sendCache) { return Self.unadvertised(known) }
        case .blockStatus:
            guard terms.hasContexts else { return NBDError(.invalid, "No metadata context was negotiated") }
            guard length > 0 else { return NBDError(.invalid, "A block status of nothing") }
        case .read: break
        }
        return rangeFault(known, terms)
    }

    private static func unadvertised(_ command: NBDCommand) -> NBDError {
        NBDError(.invalid, "The export does not offer the command \(command)")
    }

    private static func allowedFlags(_ command: NBDCommand, _ terms: Terms) -> CommandFlags {
        var allowed: CommandFlags = terms.flags.contains(.sendFUA) ? [.fua] : []
        switch command {
        case .read: if terms.flags.contains(.sendDF) { allowed.insert(.doNotFragment) }
        case .write: if terms.form == .extended { allowed.insert(.payloadLength) }
        case .writeZeroes:
            allowed.insert(.noHole)
            if terms.flags.contains(.sendFastZero) { allowed.insert(.fastZero) }
        case .blockStatus:
            allowed.insert(.requestOne)
            if terms.flags.contains(.blockStatusPayload) { allowed.insert(.payloadLength) }
        default: break
        }
        return allowed
    }

    private func rangeFault(_ known: NBDCommand, _ terms: Terms) -> NBDError? {
        let (end, overflow) = offset.addingReportingOverflow(length)
        if overflow || end > terms.size {
            let number: NBDError.Number = known == .write || known == .writeZeroes ? .noSpace : .invalid
            return NBDError(number, "The range at \(offset) of \(length) bytes is beyond the end of the export")
        }
        let mask = UInt64(terms.blockSizes.minimum) - 1
        // The last block may be a part of one.
        if mask != 0, offset & mask != 0 || (length & mask != 0 && end != terms.size) {
            return NBDError(
                .invalid,
                "The range at \(offset) of \(length) bytes is not in blocks of \(terms.blockSizes.minimum)"
            )
        }
        if known == .read, length > UInt64(terms.blockSizes.maximum) {
            return NBDError(.overflow, "A read of \(length) bytes is larger than \(terms.blockSizes.maximum)")
        }
        if known == .write, length > UInt64(terms.blockSizes.maximum) {
            return NBDError(.invalid, "A write of \(length) bytes is larger than \(terms.blockSizes.maximum)")
        }
        return nil
    }
}

/// The header of one chunk of a reply: structured (20 bytes) or extended (32 bytes).
struct ChunkHeader: Equatable {
    var flags: UInt16
    var type: UInt16
    var cookie: UInt64
    /// Only in the extended form: the offset of the request.
    var offset: UInt64 = 0
    var length: UInt64

    var isDone: Bool { flags & NBDChunk.done != 0 }

    init(done: Bool, type: UInt16, cookie: UInt64, offset: UInt64, length: Int) {
        flags = done ? NBDChunk.done : 0
        self.type = type
        self.cookie = cookie
        self.offset = offset
        self.length = UInt64(length)
    }

    /// Decodes what follows the magic.
    init(decodingAfterMagic bytes: UnsafeRawBufferPointer, form: HeaderForm) {
        flags = bytes.bigEndian(0)
        type = bytes.bigEndian(2)
        cookie = bytes.bigEndian(4)
        if form == .extended {
            offset = bytes.bigEndian(12)
            length = bytes.bigEndian(20)
        } else {
            length = UInt64(bytes.bigEndian(12, UInt32.self))
        }
    }

    func encode(into bytes: UnsafeMutableRawBufferPointer, form: HeaderForm) {
        let isExtended = form == .extended
        bytes.storeBigEndian(isExtended ? NBDWire.extendedReplyMagic : NBDWire.structuredReplyMagic, at: 0)
        bytes.storeBigEndian(flags, at: 4)
        bytes.storeBigEndian(type, at: 6)
        bytes.storeBigEndian(cookie, at: 8)
        if isExtended {
            bytes.storeBigEndian(offset, at: 16)
            bytes.storeBigEndian(length, at: 24)
        } else {
            bytes.storeBigEndian(UInt32(length), at: 16)
        }
    }
}
