internal import IO
internal import TLS

/// What lets one host join a fleet without SSH, as one line of text: who waits for it and where, whose fleet it is, for which host and addresses
/// it is good, until when, and a secret of 128 bits.
public struct JoinToken: Sendable, Hashable {
    /// The fingerprint of the fleet's authority, `SHA256:` and hexadecimal digits.
    public var authority: String
    /// The shared secret, 16 bytes.
    public var secret: [UInt8]
    /// When it ends, in seconds since 1970.
    public var ends: Int64
    /// The port that waits.
    public var port: UInt16
    /// The name of the host that waits.
    public var waiter: String
    /// The addresses of the host that waits.
    public var waiterAddresses: [String]
    /// The host that may join.
    public var host: String
    /// The addresses that its certificate will be for.
    public var addresses: [String]

    /// Makes a token.
    public init(
        authority: String,
        secret: [UInt8] = JoinToken.makeSecret(),
        ends: Int64,
        port: UInt16,
        waiter: String,
        waiterAddresses: [String],
        host: String,
        addresses: [String]
    ) {
        self.authority = authority
        self.secret = secret
        self.ends = ends
        self.port = port
        self.waiter = waiter
        self.waiterAddresses = waiterAddresses
        self.host = host
        self.addresses = addresses
    }

    private static let prefix = "crossdock-join-1:"
    private static let fingerprintPrefix = "SHA256:"
    /// Enough to find a character that was lost or mistyped.
    private static let checkLength = 3

    /// A new secret.
    public static func makeSecret() -> [UInt8] {
        var generator = SystemRandomNumberGenerator()
        return (0..<16).map { _ in UInt8.random(in: 0...255, using: &generator) }
    }

    /// The token as it is copied from one terminal to another.
    public var text: String {
        get throws {
            guard let fingerprint = Self.bytes(ofHexadecimal: authority.dropFirst(Self.fingerprintPrefix.count)),
                fingerprint.count == 32, secret.count == 16
            else { throw FleetError("The fleet's authority has no fingerprint of the usual form") }
            var body = fingerprint + secret
            body += (0..<8).map { UInt8(truncatingIfNeeded: ends >> (56 - 8 * $0)) }
            body += [UInt8(port >> 8), UInt8(truncatingIfNeeded: port)]
            for words in [[waiter], waiterAddresses, [host], addresses] {
                body += Array(words.joined(separator: ",").utf8) + [0]
            }
            body += try Hash.digest(.sha256, of: body).bytes.prefix(Self.checkLength)
            let base64 = Base64.encode(body)
            return Self.prefix
                + base64.replacing("+", with: "-").replacing("/", with: "_").replacing("=", with: "")
        }
    }

    /// Reads a token.
    ///
    /// - Throws: `FleetError` for a text that is none, or not a whole one.
    public init(parsing text: String) throws {
        let words = text.split(whereSeparator: \.isWhitespace).joined()
        guard words.hasPrefix(Self.prefix), words.utf8.count <= 4096 else {
            throw FleetError(
                "That is no token; 'crossdock pair --token HOST' prints one, which begins with \(Self.prefix)"
            )
        }
        var base64 = words.dropFirst(Self.prefix.count).replacing("-", with: "+").replacing("_", with: "/")
        base64 += String(repeating: "=", count: (4 - base64.utf8.count % 4) % 4)
        let broken = FleetError("The token is not whole: characters of it are missing or mistyped; copy it again")
        guard let bytes = Base64.decode(base64.utf8), bytes.count > 32 + 16 + 8 + 2 + Self.checkLength else {
            throw broken
        }
        let body = Array(bytes.dropLast(Self.checkLength))
        guard
            try Hash.digest(.sha256, of: body).bytes.prefix(Self.checkLength).elementsEqual(
                bytes.suffix(Self.checkLength)
            )
        else { throw broken }
        authority = Self.fingerprintPrefix + Array(body[..<32]).hex
        secret = Array(body[32..<48])
        ends = body[48..<56].reduce(0) { $0 << 8 | Int64($1) }
        port = body[56..<58].reduce(0) { $0 << 8 | UInt16($1) }
        let parts = body[58...].split(separator: 0, omittingEmptySubsequences: false).map {
            String(decoding: $0, as: UTF8.self).split(separator: ",").map(String.init)
        }
        guard parts.count == 5, let waiter = parts[0].first, let host = parts[2].first, !parts[1].isEmpty,
            FleetMember.isName(waiter), FleetMember.isName(host), port > 0
        else { throw broken }
        self.waiter = waiter
        waiterAddresses = parts[1]
        self.host = host
        addresses = parts[3]
    }

    private static func bytes(ofHexadecimal text: some StringProtocol) -> [UInt8]? {
        let digits = Array(text.utf8)
        guard digits.count % 2 == 0 else { return nil }
        let values = digits.compactMap { Character(UnicodeScalar($0)).hexDigitValue.map { UInt8($0) } }
        guard values.count == digits.count else { return nil }
        return stride(from: 0, to: values.count, by: 2).map { values[$0] << 4 | values[$0 + 1] }
    }
}
