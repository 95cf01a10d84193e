internal import CLinux
internal import Glibc
internal import IO

/// A password or key that other objects refer to by its id: QEMU's `secret` and `secret_keyring` objects.
public final class Secret: SecurityObject {
    /// The object's id.
    public let id: String
    /// "secret" or "secret_keyring".
    public let type: String
    /// The bytes, decoded and decrypted.
    public let bytes: SecretBytes

    /// How the input of a secret is written, QEMU's `format`.
    public enum Format: String, Sendable, CaseIterable {
        /// As it is.
        case raw
        /// Base64, with line breaks allowed.
        case base64
    }

    /// The length of a master key in bytes: AES-256.
    public static let masterKeyLength = 32
    /// The length of an initialisation vector in bytes.
    public static let ivLength = 16

    /// Makes a secret of bytes.
    public init(id: String, bytes: SecretBytes, type: String = "secret") {
        self.id = id
        self.bytes = bytes
        self.type = type
    }

    /// Makes a secret of input in a format, decrypting it when there is a master key.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - input: what was given as `data` or read from `file`.
    ///   - format: how the input is written; the decrypted bytes are taken as they are.
    ///   - master: the key of QEMU's `keyid`: 32 bytes in Base64, or as they are.
    ///   - iv: QEMU's `iv`: 16 bytes in Base64.
    ///   - type: the object's type.
    /// - Throws: `CredentialError`, in QEMU's words, without any part of the secret.
    public convenience init(
        id: String,
        input: SecretBytes,
        format: Format,
        master: Secret? = nil,
        iv: String? = nil,
        type: String = "secret"
    ) throws {
        var bytes = input
        if format == .base64 { bytes = try Self.decodeBase64(input, "data in secret '\(id)'") }
        if let master {
            bytes = try Self.decrypt(bytes, master: master, iv: iv, id)
        } else if iv != nil {
            throw CredentialError("Secret '\(id)' has 'iv' without 'keyid', the id of the secret with the master key")
        }
        self.init(id: id, bytes: bytes, type: type)
    }

    private static func decodeBase64(_ input: SecretBytes, _ what: String) throws -> SecretBytes {
        try input.withBytes { text in
            guard var decoded = Base64.decode(text) else {
                throw CredentialError("The base64 \(what) is not valid")
            }
            return try SecretBytes(wiping: &decoded)
        }
    }

    /// The key bytes of a master key, whatever form it has.
    private static func masterKey(_ master: Secret) throws -> SecretBytes {
        // A raw key is taken as it is; a Base64 text, with or without QEMU's "format=base64" on the master, is decoded.
        if master.bytes.count == masterKeyLength { return master.bytes }
        let decoded = master.bytes.withBytes { text -> SecretBytes? in
            guard var decoded = Base64.decode(text), decoded.count == masterKeyLength else { return nil }
            return try? SecretBytes(wiping: &decoded)
        }
        guard let decoded else {
            throw CredentialError(
                "Key should be \(masterKeyLength) bytes in length; secret '\(master.id)' has \(master.bytes.count)"
            )
        }
        return decoded
    }

    private static func decrypt(_ input: SecretBytes, master: Secret, iv: String?, _ id: String) throws -> SecretBytes {
        let key = try masterKey(master)
        guard let iv else { throw CredentialError("IV is required to decrypt secret '\(id)'; give it as iv=BASE64") }
        guard let vector = Base64.decode(iv.utf8) else {
            throw CredentialError("The base64 data in 'iv' of secret '\(id)' is not valid")
        }
        guard vector.count == ivLength else {
            throw CredentialError("IV should be \(ivLength) bytes in length not \(vector.count)")
        }
        let hint = "the master key or the IV is not the one that the secret was encrypted with"
        guard input.count > 0, input.count % ivLength == 0 else {
            throw CredentialError(
                "The encrypted data of secret '\(id)' has \(input.count) bytes, which is no multiple of \(ivLength); it is cut "
                    + "off, or format=base64 is missing"
            )
        }
        let cipher = try key.withBytes { try Cipher(.aes256, .cbc, key: $0) }
        try cipher.setIV(vector)
        return try SecretBytes(capacity: input.count) { buffer in
            input.withBytes { buffer.copyMemory(from: $0) }
            try cipher.decrypt(buffer)
            // PKCS #7 (RFC 5652, section 6.3): every padding byte has the number of them.
            let padding = Int(buffer[buffer.count - 1])
            guard (1...ivLength).contains(padding), buffer.suffix(padding).allSatisfy({ Int($0) == padding }) else {
                throw CredentialError(
                    "Incorrect number of padding bytes (\(padding)) found on decrypted data of secret '\(id)': \(hint)"
                )
            }
            return buffer.count - padding
        }
    }

    /// Encrypts bytes as `keyid` and `iv` want them.
    ///
    /// - Returns: the initialisation vector, fresh and random unless one is given, and the data, both in Base64.
    public static func encrypt(
        _ plain: SecretBytes,
        master: Secret,
        iv: [UInt8]? = nil
    ) throws -> (iv: String, data: String) {
        var generator = SystemRandomNumberGenerator()
        let vector = iv ?? (0..<ivLength).map { _ in UInt8.random(in: 0...255, using: &generator) }
        let cipher = try masterKey(master).withBytes { try Cipher(.aes256, .cbc, key: $0) }
        try cipher.setIV(vector)
        let padding = ivLength - plain.count % ivLength
        let encrypted = try SecretBytes(capacity: plain.count + padding) { buffer in
            plain.withBytes { UnsafeMutableRawBufferPointer(rebasing: buffer[..<plain.count]).copyMemory(from: $0) }
            for index in plain.count..<buffer.count { buffer[index] = UInt8(padding) }
            try cipher.encrypt(buffer)
            return buffer.count
        }
        return (Base64.encode(vector), encrypted.withBytes { Base64.encode($0) })
    }

    /// Validates without making a string, which would be a copy that is not wiped.
    private static func isUTF8(_ text: UnsafeRawBufferPointer) -> Bool {
        var decoder = UTF8()
        var iterator = text.makeIterator()
        while true {
            switch decoder.decode(&iterator) {
            case .scalarValue: continue
            case .emptyInput: return true
            case .error: return false
            }
        }
    }

    /// Lends the secret as passphrases to try, in order: exactly as it is, then without one line break at its end.
    ///
    /// QEMU keeps the line break that `echo` leaves in a file, and a key may have been encrypted with it; most people who
    /// write a password into a file do not mean it. Trying both lets every set-up work that works with QEMU, and the one
    /// that people expect.
    ///
    /// - Parameter body: returns whether the passphrase was the right one; it has a final zero byte.
    /// - Throws: `CredentialError` when the secret is no text.
    func tryPassphrases(_ body: (UnsafePointer<CChar>) throws -> Bool) throws -> Bool {
        let isText = bytes.withBytes { text in
            text.firstIndex(of: 0) == nil && Self.isUTF8(text)
        }
        guard isText else { throw CredentialError("Data from secret '\(id)' is not valid UTF-8") }
        var lengths = [bytes.count]
        bytes.withBytes { text in
            if text.last == UInt8(ascii: "\n") {
                let carriage = text.dropLast().last == UInt8(ascii: "\r")
                lengths.append(text.count - (carriage ? 2 : 1))
            }
        }
        for length in lengths {
            var accepted = false
            _ = try SecretBytes(capacity: length + 1) { buffer in
                bytes.withBytes { buffer.copyBytes(from: $0.prefix(length)) }
                buffer[length] = 0
                accepted = try body(UnsafeRawPointer(buffer.baseAddress!).assumingMemoryBound(to: CChar.self))
                return length + 1
            }
            if accepted { return true }
        }
        return false
    }
}
