internal import IO
package import Migration

extension DestinationHandover.Event {
    /// What a message of the source means here; nil for one that does not move the migration.
    ///
    /// - Parameters:
    ///   - message: what the source said.
    ///   - state: where the migration stands, for the sentence.
    /// - Throws: `ChannelError` for a message of the destination.
    package init?(_ message: Message, in state: DestinationState) throws {
        switch message {
        case .secrets, .probe, .file, .ping, .console, .grant: return nil
        case .offer(let offer): self = .offer(isRehearsal: offer.isRehearsal)
        case .rehearsed: self = .rehearsed
        case .mirrored: self = .mirrored
        case .stream: self = .stream
        case .prepared: self = .prepare
        case .release(let release): self = .release(release)
        case .done: self = .done
        case .abort(let reason): self = .abort(Self.sentence(reason))
        case .overruled(let by): self = .overruled(by: Self.sentence(by))
        case .hello:
            throw ChannelError(.protocolViolation, "HELLO is not due in state \(state.rawValue): it was said already")
        case .host, .open:
            throw ChannelError(.protocolViolation, "\(message.name) is not due: it is about no migration")
        case .welcome, .shadow, .need, .ready, .readBack, .refused, .owned, .opened, .pong:
            throw ChannelError(
                .protocolViolation,
                "\(message.name) is not due in state \(state.rawValue): it is a message of the destination"
            )
        }
    }

    /// What a peer says in words, for logs and journals: on one line, and not longer than a sentence is.
    static func sentence(_ words: String) -> String {
        let bytes = words.utf8.prefix(PeerLimits.sentenceBytes)
        let text = bytes.count < words.utf8.count ? String(decoding: bytes, as: UTF8.self) + " ..." : words
        let isControl = { (scalar: Unicode.Scalar) in scalar.properties.generalCategory == .control }
        guard text.unicodeScalars.contains(where: isControl) else { return text }
        var clean = String.UnicodeScalarView()
        clean.append(contentsOf: text.unicodeScalars.map { isControl($0) ? " " : $0 })
        return String(clean)
    }
}
