internal import IO

/// The handshake with a server, seen from a viewer: version 3.3, 3.7 or 3.8, no authentication (RFC 6143, section 7.1). A value without I/O.
package struct RFBClientHandshake: Sendable {
    private enum State: Sendable {
        case version
        case type33
        case typeCount
        case types(Int)
        case result
        /// A server says why not, in so many bytes once they are known.
        case refusal(Int?)
        case screen
        case name(ServerInit, Int)
        case done
    }

    private enum Version { case v33, v37, v38 }

    /// The most bytes of a reason that are taken, and that are shown.
    private static let (mostReason, mostShown) = (1024, 300)

    private var state = State.version
    private var version = Version.v38
    private var queued: [UInt8] = []
    /// What the server has said of its screen; nil before that.
    package private(set) var outcome: ServerInit?

    /// Makes a handshake that the server begins.
    package init() {}

    /// Takes what has come.
    ///
    /// - Returns: what is to be sent.
    /// - Throws: `RFBFailure`.
    package mutating func receive(_ bytes: some Collection<UInt8>) throws(RFBFailure) -> [UInt8] {
        queued.append(contentsOf: bytes)
        var answer: [UInt8] = []
        while outcome == nil, let head = take(length) { answer += try advance(head) }
        return answer
    }

    /// What has come behind the handshake.
    package mutating func takeRest() -> [UInt8] {
        defer { queued = [] }
        return queued
    }

    private var length: Int {
        switch state {
        case .version: 12
        case .typeCount: 1
        case .types(let count): count
        case .type33, .result, .refusal(nil): 4
        case .refusal(let count?): count
        case .screen: 24
        case .name(_, let count): count
        case .done: 0
        }
    }

    private mutating func take(_ count: Int) -> [UInt8]? {
        guard queued.count >= count else { return nil }
        defer { queued.removeFirst(count) }
        return Array(queued.prefix(count))
    }

    private mutating func advance(_ head: [UInt8]) throws(RFBFailure) -> [UInt8] {
        var reader = RFBReader(head)
        switch state {
        case .version:
            guard let number = RFBVersion(head) else { throw .violation("the server does not speak RFB") }
            guard number >= .v33 else { throw .refused("the server speaks an older RFB than 3.3") }
            if number >= .v38 {
                (version, state) = (.v38, .typeCount)
                return RFBVersion.v38.bytes
            }
            if number == .v37 {
                (version, state) = (.v37, .typeCount)
                return RFBVersion.v37.bytes
            }
            (version, state) = (.v33, .type33)
            return RFBVersion.v33.bytes
        case .type33:
            switch reader.u32() {
            case 0: state = .refusal(nil)
            case 1: return hello()
            default: throw Self.authentication
            }
            return []
        case .typeCount:
            state = head[0] == 0 ? .refusal(nil) : .types(Int(head[0]))
            return []
        case .types:
            guard head.contains(1) else { throw Self.authentication }
            if version == .v38 {
                state = .result
                return [1]
            }
            return [1] + hello()
        case .result:
            guard reader.u32() == 0 else {
                state = .refusal(nil)
                return []
            }
            return hello()
        case .refusal(nil):
            state = .refusal(Int(min(reader.u32(), UInt32(Self.mostReason))))
            return []
        case .refusal:
            throw .refused("the server says '\(String(decoding: head, as: UTF8.self).shown(most: Self.mostShown))'")
        case .screen:
            let (width, height) = (reader.u16(), reader.u16())
            let format = try PixelFormat(reader.bytes(PixelFormat.count))
            let count = reader.u32()
            guard count <= ServerInit.mostName else { throw .violation("the name of a desktop has \(count) bytes") }
            state = .name(ServerInit(width: width, height: height, format: format, name: ""), Int(count))
            return []
        case .name(var screen, _):
            screen.name = String(decoding: head, as: UTF8.self).shown(most: ServerInit.mostName)
            outcome = screen
            state = .done
            return []
        case .done: return []
        }
    }

    /// ClientInit: others may look, too.
    private mutating func hello() -> [UInt8] {
        state = .screen
        return [1]
    }

    private static let authentication = RFBFailure.refused(
        "it wants a password or TLS of its own; the agent has neither for it"
    )
}

/// A version of the protocol, as the handshake has it: `RFB 003.008` and a line feed.
struct RFBVersion: Sendable, Comparable {
    var major: Int
    var minor: Int

    static let v33 = RFBVersion(major: 3, minor: 3)
    static let v37 = RFBVersion(major: 3, minor: 7)
    static let v38 = RFBVersion(major: 3, minor: 8)

    init(major: Int, minor: Int) { (self.major, self.minor) = (major, minor) }

    /// Reads a version; nil for what is none.
    init?(_ bytes: [UInt8]) {
        guard bytes.count == 12, bytes.starts(with: "RFB ".utf8), bytes[7] == UInt8(ascii: "."), bytes[11] == 10,
            let major = Int(String(decoding: bytes[4..<7], as: UTF8.self)),
            let minor = Int(String(decoding: bytes[8..<11], as: UTF8.self)), major >= 0, minor >= 0
        else { return nil }
        self.init(major: major, minor: minor)
    }

    static func < (one: RFBVersion, other: RFBVersion) -> Bool {
        (one.major, one.minor) < (other.major, other.minor)
    }

    var bytes: [UInt8] {
        func three(_ number: Int) -> String {
            String(repeating: "0", count: max(0, 3 - "\(number)".count)) + "\(number)"
        }
        return Array("RFB \(three(major)).\(three(minor))\n".utf8)
    }
}
