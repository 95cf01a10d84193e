internal import IO

/// What a file with a private key says without its passphrase: of which kind it is, and whether it has one.
struct SSHKeyFile: Sendable {
    /// The key's type; nil where the format does not tell.
    let type: String?
    /// The public part, Base64; nil where the format does not tell.
    let publicKey: String?
    /// Whether it has a passphrase.
    let isEncrypted: Bool

    /// The types that libssh can sign with.
    private static let usable: Set<String> = [
        "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
    ]

    /// Why it cannot be used; nil when it can.
    var obstacle: String? {
        guard let type, !Self.usable.contains(type) else { return nil }
        return type.hasPrefix("sk-")
            ? "it belongs to a hardware token (\(type)), which only an agent can ask: 'ssh-add' it"
            : "keys of the type \(type.shown(most: 60)) are not supported; use one of the type ed25519, ecdsa or rsa, or an agent that has it"
    }

    /// Reads what is not secret.
    init(_ bytes: [UInt8]) {
        let text = String(decoding: bytes, as: UTF8.self)
        let lines = text.split(whereSeparator: \.isNewline)
        guard lines.first?.contains("BEGIN OPENSSH PRIVATE KEY") == true else {
            type = lines.first?.contains("BEGIN DSA PRIVATE KEY") == true ? "ssh-dss" : nil
            publicKey = nil
            isEncrypted = text.contains("ENCRYPTED")
            return
        }
        let body = lines.filter { !$0.hasPrefix("-") }.joined()
        var rest = (Base64.decode(body.utf8) ?? [])[...]
        rest = rest.dropFirst("openssh-key-v1\0".utf8.count)
        func number() -> Int? {
            guard rest.count >= 4 else { return nil }
            defer { rest = rest.dropFirst(4) }
            return rest.prefix(4).reduce(0) { $0 << 8 | Int($1) }
        }
        func string() -> [UInt8]? {
            guard let count = number(), count <= rest.count else { return nil }
            defer { rest = rest.dropFirst(count) }
            return Array(rest.prefix(count))
        }
        let cipher = string()
        _ = string()
        _ = string()
        _ = number()
        let blob = string()
        isEncrypted = cipher.map { $0 != Array("none".utf8) } ?? false
        publicKey = blob.map { Base64.encode($0) }
        type = blob.flatMap { blob in
            rest = blob[...]
            return string().map { String(decoding: $0, as: UTF8.self) }
        }
    }
}
