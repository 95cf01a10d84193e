/// The handshake with a viewer, seen from a server: version 3.3, 3.7 or 3.8, and who the viewer is known by what is below, or by TLS that begins
/// inside (VeNCrypt). A value without I/O. It ends with the viewer's ClientInit; the screen is told by who goes on.
package struct RFBServerHandshake: Sendable {
    /// How a viewer shows who it is.
    package enum Security: Sendable, Hashable {
        /// It has done so already.
        case none
        /// By TLS with certificates, in which nothing more is asked (VeNCrypt's X509None).
        case certificates
    }

    /// What is to be done, in this order.
    package enum Action: Sendable, Hashable {
        /// These bytes are sent.
        case send([UInt8])
        /// TLS begins with the next byte in both directions; `encrypted` says that it is there.
        case startTLS
        /// The viewer may be told of the screen now.
        case finish
    }

    private enum State: Sendable {
        case version
        case type
        case subversion
        case subtype
        case encrypting
        case hello
        case done
    }

    /// VeNCrypt's number among the types of security.
    private static let vencrypt: UInt8 = 19
    /// X509None among the types of VeNCrypt.
    private static let x509None: UInt32 = 260

    private let security: Security
    private var state = State.version
    private var version = RFBVersion.v38
    private var queued: [UInt8] = []

    /// Makes a handshake that the server begins.
    package init(_ security: Security = .none) { self.security = security }

    /// What is sent before anything has come.
    package var greeting: [UInt8] { RFBVersion.v38.bytes }

    /// Takes what has come.
    ///
    /// - Throws: `RFBFailure`.
    package mutating func receive(_ bytes: some Collection<UInt8>) throws(RFBFailure) -> [Action] {
        queued.append(contentsOf: bytes)
        var actions: [Action] = []
        while let length, queued.count >= length {
            let head = Array(queued.prefix(length))
            queued.removeFirst(length)
            actions += try advance(head)
        }
        // What was sent in clear text must not be taken for what comes out of TLS.
        if case .encrypting = state, !queued.isEmpty { throw .violation("the viewer does not wait for TLS") }
        return actions
    }

    /// TLS is there.
    package mutating func encrypted() -> [Action] {
        guard case .encrypting = state else { return [] }
        state = .hello
        return [.send(UInt32(0).rfb)]
    }

    /// Who the viewer has shown to be in TLS may not, or there is nothing to see: it is told so, and nothing more comes.
    package mutating func refuse(_ reason: String) -> [Action] {
        guard case .encrypting = state else { return [] }
        state = .done
        let text = Array(reason.utf8.prefix(1024))
        return [.send(UInt32(1).rfb + (version == .v38 ? UInt32(text.count).rfb + text : []))]
    }

    /// What has come behind the handshake.
    package mutating func takeRest() -> [UInt8] {
        defer { queued = [] }
        return queued
    }

    private var length: Int? {
        switch state {
        case .version: 12
        case .type, .hello: 1
        case .subversion: 2
        case .subtype: 4
        case .encrypting, .done: nil
        }
    }

    private mutating func advance(_ head: [UInt8]) throws(RFBFailure) -> [Action] {
        var reader = RFBReader(head)
        switch state {
        case .version:
            guard let number = RFBVersion(head), number >= .v33 else {
                throw .violation("the viewer does not speak RFB")
            }
            // As section 7.1.1 has it, any other number is one of 3.3.
            version = number >= .v38 ? .v38 : number == .v37 ? .v37 : .v33
            if version == .v33 {
                guard security == .none else { throw .violation("the viewer is too old for TLS: it speaks RFB 3.3") }
                state = .hello
                return [.send(UInt32(1).rfb)]
            }
            state = .type
            return [.send([1, offered])]
        case .type:
            guard head[0] == offered else { throw .violation("the viewer wants security of type \(head[0])") }
            if security == .certificates {
                state = .subversion
                return [.send([0, 2])]
            }
            state = .hello
            return version == .v38 ? [.send(UInt32(0).rfb)] : []
        case .subversion:
            guard head == [0, 2] else { throw .violation("the viewer speaks VeNCrypt \(head[0]).\(head[1])") }
            state = .subtype
            return [.send([0, 1] + Self.x509None.rfb)]
        case .subtype:
            let subtype = reader.u32()
            guard subtype == Self.x509None else { throw .violation("the viewer wants VeNCrypt of type \(subtype)") }
            state = .encrypting
            return [.send([1]), .startTLS]
        case .hello:
            state = .done
            return [.finish]
        case .encrypting, .done: return []
        }
    }

    private var offered: UInt8 { security == .none ? 1 : Self.vencrypt }
}
