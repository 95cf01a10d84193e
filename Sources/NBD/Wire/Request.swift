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
    /// How many bytes.
    public var length: UInt32

    /// Makes a request.
    public init(_ command: NBDCommand, flags: CommandFlags = [], cookie: UInt64, offset: UInt64 = 0, length: UInt32 = 0)
    {
        self.command = command.rawValue
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
    }

    /// Decodes 28 bytes; nil when the magic is wrong.
    init?(decoding bytes: UnsafeRawBufferPointer) {
        guard bytes.bigEndian(0, UInt32.self) == NBDWire.requestMagic else { return nil }
        flags = CommandFlags(rawValue: bytes.bigEndian(4))
        command = bytes.bigEndian(6)
        cookie = bytes.bigEndian(8)
        offset = bytes.bigEndian(16)
        length = bytes.bigEndian(24)
    }

    func encode(into bytes: UnsafeMutableRawBufferPointer) {
        bytes.storeBigEndian(NBDWire.requestMagic, at: 0)
        bytes.storeBigEndian(flags.rawValue, at: 4)
        bytes.storeBigEndian(command, at: 6)
        bytes.storeBigEndian(cookie, at: 8)
        bytes.storeBigEndian(offset, at: 16)
        bytes.storeBigEndian(length, at: 24)
    }

    /// Checks the request against the export; nil when it is in order.
    func fault(size: UInt64, flags transmission: TransmissionFlags, hasContexts: Bool) -> NBDError? {
        guard let known = NBDCommand(rawValue: command) else {
            return NBDError(.invalid, "Unknown command \(command)")
        }
        var allowed: CommandFlags = transmission.contains(.sendFUA) ? [.fua] : []
        switch known {
        case .read: if transmission.contains(.sendDF) { allowed.insert(.doNotFragment) }
        case .writeZeroes:
            allowed.insert(.noHole)
            if transmission.contains(.sendFastZero) { allowed.insert(.fastZero) }
        case .blockStatus: allowed.insert(.requestOne)
        default: break
        }
        guard flags.isSubset(of: allowed) else {
            return NBDError(.invalid, "Command \(known) does not take the flags \(flags.rawValue)")
        }
        if known == .flush || known == .disconnect { return nil }
        let writes = known == .write || known == .trim || known == .writeZeroes
        if writes, transmission.contains(.readOnly) { return NBDError(.notPermitted, "The export is read-only") }
        if known == .blockStatus {
            guard hasContexts else { return NBDError(.invalid, "No metadata context was negotiated") }
            guard length > 0 else { return NBDError(.invalid, "A block status of nothing") }
        }
        let (end, overflow) = offset.addingReportingOverflow(UInt64(length))
        if overflow || end > size {
            let number: NBDError.Number = known == .write || known == .writeZeroes ? .noSpace : .invalid
            return NBDError(number, "The range at \(offset) of \(length) bytes is beyond the end of the export")
        }
        if known == .read, length > UInt32(NBDWire.maximumPayload) {
            return NBDError(.overflow, "A read of \(length) bytes is larger than \(NBDWire.maximumPayload)")
        }
        return nil
    }
}
