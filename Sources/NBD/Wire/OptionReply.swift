internal import IO

/// An option reply (NBD specification, "Newstyle negotiation").
struct OptionReply {
    static func encode(option: UInt32, type: UInt32, payload: [UInt8] = []) -> [UInt8] {
        var writer = MessageWriter(capacity: 20 + payload.count)
        writer.append(NBDWire.optionReplyMagic)
        writer.append(option)
        writer.append(type)
        writer.append(UInt32(payload.count))
        writer.append(payload)
        return writer.bytes
    }

    /// An error with a text that is safe to show: the peer may have chosen parts of it.
    static func error(option: UInt32, type: UInt32, _ text: String) -> [UInt8] {
        encode(option: option, type: type, payload: Array(sanitize(text).utf8))
    }

    /// What may be shown, in at most 800 bytes: QEMU's client gives a connection up at an error of more than 1000.
    static func sanitize(_ text: some StringProtocol) -> String { text.shown(most: 800) }

    /// What an export is, as it may be shown: as long as any string of the protocol.
    static func describe(_ bytes: [UInt8]) -> String {
        String(decoding: bytes, as: UTF8.self).shown(most: NBDWire.maximumString)
    }
}
