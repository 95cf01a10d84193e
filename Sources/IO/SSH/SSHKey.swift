package import CSSH

/// What is asked of libssh's keys in more than one place.
package enum SSHKey {
    /// The SHA-256 fingerprint of a public key, as OpenSSH prints it: `SHA256:` and Base64 without padding.
    package static func fingerprint(of key: ssh_key) -> String {
        var hash: UnsafeMutablePointer<UInt8>?
        var length = 0
        guard ssh_get_publickey_hash(key, SSH_PUBLICKEY_HASH_SHA256, &hash, &length) == 0 else { return "unknown" }
        defer { ssh_clean_pubkey_hash(&hash) }
        guard let text = ssh_get_fingerprint_hash(SSH_PUBLICKEY_HASH_SHA256, hash, length) else { return "unknown" }
        defer { ssh_string_free_char(text) }
        return String(cString: text)
    }
}
