internal import Glibc

/// A numeric address of the network, as far as rules about addresses need it.
struct HostAddress: Hashable, Sendable {
    /// Four bytes or sixteen.
    private let bytes: [UInt8]

    /// Reads an address as `inet_pton` does; brackets and a zone (`%eth0`) are left out.
    ///
    /// - Returns: nil for a name, and for the short forms of IPv4 addresses.
    init?(_ text: String) {
        let plain = String(Self.withoutBrackets(text).prefix { $0 != "%" })
        var four = in_addr()
        var sixteen = in6_addr()
        if inet_pton(AF_INET, plain, &four) == 1 {
            bytes = withUnsafeBytes(of: &four) { Array($0) }
        } else if inet_pton(AF_INET6, plain, &sixteen) == 1 {
            let found = withUnsafeBytes(of: &sixteen) { Array($0) }
            // ::ffff:192.0.2.1 is an IPv4 address.
            let isMapped = found[..<10].allSatisfy { $0 == 0 } && found[10] == 255 && found[11] == 255
            bytes = isMapped ? Array(found[12...]) : found
        } else {
            return nil
        }
    }

    static func withoutBrackets(_ text: String) -> String {
        text.hasPrefix("[") && text.hasSuffix("]") ? String(text.dropFirst().dropLast()) : text
    }

    var isIPv4: Bool { bytes.count == 4 }
    /// 127.0.0.0/8 or ::1.
    var isLoopback: Bool { isIPv4 ? bytes[0] == 127 : bytes.dropLast().allSatisfy { $0 == 0 } && bytes[15] == 1 }
    /// 169.254.0.0/16 or fe80::/10.
    var isLinkLocal: Bool {
        isIPv4 ? bytes[0] == 169 && bytes[1] == 254 : bytes[0] == 0xfe && bytes[1] & 0xc0 == 0x80
    }
    /// 0.0.0.0 or ::, which a connection takes for loopback.
    var isUnspecified: Bool { bytes.allSatisfy { $0 == 0 } }

    /// Whether it is kept from guests whose network is filtered.
    var isGuarded: Bool { isLoopback || isLinkLocal || isUnspecified }

    /// The address in its usual form.
    var text: String {
        var buffer = [CChar](repeating: 0, count: Int(INET6_ADDRSTRLEN))
        guard inet_ntop(isIPv4 ? AF_INET : AF_INET6, bytes, &buffer, socklen_t(buffer.count)) != nil else { return "" }
        return String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}
