import IO
import TLS
import TestSupport
import Testing

/// Bytes of a hexadecimal text; spaces are for the reader.
func hexBytes(_ text: String) -> [UInt8] {
    let digits = text.filter { !$0.isWhitespace }
    return stride(from: 0, to: digits.count, by: 2).map { index in
        let start = digits.index(digits.startIndex, offsetBy: index)
        return UInt8(digits[start..<digits.index(start, offsetBy: 2)], radix: 16)!
    }
}

/// A published test vector of a cipher.
struct CipherVector: Sendable, CustomTestStringConvertible {
    let algorithm: CipherAlgorithm
    let mode: CipherMode
    let key: String
    let iv: String
    let plain: String
    let cipher: String
    var testDescription: String { "\(algorithm.rawValue) \(mode.rawValue)" }

    private static let sp800Plain = "6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51"

    static let all: [CipherVector] = [
        // FIPS 197, appendix C.
        .init(
            algorithm: .aes128,
            mode: .ecb,
            key: "000102030405060708090a0b0c0d0e0f",
            iv: "",
            plain: "00112233445566778899aabbccddeeff",
            cipher: "69c4e0d86a7b0430d8cdb78070b4c55a"
        ),
        .init(
            algorithm: .aes192,
            mode: .ecb,
            key: "000102030405060708090a0b0c0d0e0f1011121314151617",
            iv: "",
            plain: "00112233445566778899aabbccddeeff",
            cipher: "dda97ca4864cdfe06eaf70a0ec0d7191"
        ),
        .init(
            algorithm: .aes256,
            mode: .ecb,
            key: "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
            iv: "",
            plain: "00112233445566778899aabbccddeeff",
            cipher: "8ea2b7ca516745bfeafc49904b496089"
        ),
        // NIST SP 800-38A, F.2.1, F.2.5, F.5.1.
        .init(
            algorithm: .aes128,
            mode: .cbc,
            key: "2b7e151628aed2a6abf7158809cf4f3c",
            iv: "000102030405060708090a0b0c0d0e0f",
            plain: sp800Plain,
            cipher: "7649abac8119b246cee98e9b12e9197d 5086cb9b507219ee95db113a917678b2"
        ),
        .init(
            algorithm: .aes256,
            mode: .cbc,
            key: "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            iv: "000102030405060708090a0b0c0d0e0f",
            plain: sp800Plain,
            cipher: "f58c4c04d6e5f1ba779eabfb5f7bfbd6 9cfc4e967edb808d679f777bc6702c7d"
        ),
        .init(
            algorithm: .aes128,
            mode: .ctr,
            key: "2b7e151628aed2a6abf7158809cf4f3c",
            iv: "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
            plain: sp800Plain,
            cipher: "874d6191b620e3261bef6864990db6ce 9806f66b7970fdff8617187bb9fffdff"
        ),
        // IEEE 1619-2007, vector 2 (vector 1 has two equal keys, which are refused here).
        .init(
            algorithm: .aes128,
            mode: .xts,
            key: "11111111111111111111111111111111 22222222222222222222222222222222",
            iv: "33333333330000000000000000000000",
            plain: "4444444444444444444444444444444444444444444444444444444444444444",
            cipher: "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"
        ),
        // FIPS 81, table B1, and its CBC example C1.
        .init(
            algorithm: .des,
            mode: .ecb,
            key: "0123456789abcdef",
            iv: "",
            plain: "4e6f772069732074 68652074696d6520 666f7220616c6c20",
            cipher: "3fa40e8a984d4815 6a271787ab8883f9 893d51ec4b563b53"
        ),
        .init(
            algorithm: .des,
            mode: .cbc,
            key: "0123456789abcdef",
            iv: "1234567890abcdef",
            plain: "4e6f772069732074 68652074696d6520 666f7220616c6c20",
            cipher: "e5c7cdde872bf27c 43e934008c389c0f 683788499a7c05f6"
        ),
        // NIST SP 800-67, appendix B.1.
        .init(
            algorithm: .tripleDES,
            mode: .ecb,
            key: "0123456789abcdef23456789abcdef01456789abcdef0123",
            iv: "",
            plain: "5468652071756663 6b2062726f776e20 666f78206a756d70",
            cipher: "a826fd8ce53b855f cce21c8112256fe6 68d5c05dd9b6b900"
        ),
        // RFC 2144, appendix B.1.
        .init(
            algorithm: .cast5,
            mode: .ecb,
            key: "0123456712345678234567893456789a",
            iv: "",
            plain: "0123456789abcdef",
            cipher: "238b4fe5847e44b2"
        ),
        // NESSIE's verified vectors for Serpent, set 1, vector 0.
        .init(
            algorithm: .serpent128,
            mode: .ecb,
            key: "80000000000000000000000000000000",
            iv: "",
            plain: "00000000000000000000000000000000",
            cipher: "264e5481eff42a4606abda06c0bfda3d"
        ),
        .init(
            algorithm: .serpent256,
            mode: .ecb,
            key: "8000000000000000000000000000000000000000000000000000000000000000",
            iv: "",
            plain: "00000000000000000000000000000000",
            cipher: "a223aa1288463c0e2be38ebd825616c0"
        ),
        // The Twofish paper, appendix A.
        .init(
            algorithm: .twofish128,
            mode: .ecb,
            key: "00000000000000000000000000000000",
            iv: "",
            plain: "00000000000000000000000000000000",
            cipher: "9f589f5cf6122c32b6bfec2f2ae8c35a"
        ),
        .init(
            algorithm: .twofish256,
            mode: .ecb,
            key: "0123456789abcdeffedcba987654321000112233445566778899aabbccddeeff",
            iv: "",
            plain: "00000000000000000000000000000000",
            cipher: "37527be0052334b89f0cfccae87cfa20"
        ),
    ]
}

struct CipherTests {
    @Test(arguments: CipherVector.all)
    func publishedVectorsHoldInBothDirections(_ vector: CipherVector) throws {
        for encrypting in [true, false] {
            let cipher = try Cipher.make(vector.algorithm, vector.mode, key: hexBytes(vector.key))
            if !vector.iv.isEmpty { try cipher.setIV(hexBytes(vector.iv)) }
            let (input, output) = encrypting ? (vector.plain, vector.cipher) : (vector.cipher, vector.plain)
            let result = encrypting ? try cipher.encrypt(hexBytes(input)) : try cipher.decrypt(hexBytes(input))
            #expect(result == hexBytes(output))
        }
    }

    @Test(arguments: CipherAlgorithm.allCases)
    func everySupportedPairOfCipherAndModeRoundTrips(_ algorithm: CipherAlgorithm) throws {
        for mode in CipherMode.allCases {
            let keyLength = algorithm.keyLength * (mode == .xts ? 2 : 1)
            let key = (0..<keyLength).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ 3) }
            guard algorithm.isSupported(in: mode) else {
                #expect(mode == .xts)
                let error = #expect(throws: CryptoError.self) { try Cipher.make(algorithm, mode, key: key) }
                #expect(error?.description.contains("not supported") == true)
                continue
            }
            let plain = (0..<96).map { UInt8($0) }
            let cipher = try Cipher.make(algorithm, mode, key: key)
            let iv = [UInt8](repeating: 9, count: algorithm.blockLength)
            if mode != .ecb { try cipher.setIV(iv) }
            let secret = try cipher.encrypt(plain)
            #expect(secret != plain)
            if mode != .ecb { try cipher.setIV(iv) }
            #expect(try cipher.decrypt(secret) == plain)
        }
    }

    /// VNC's password authentication may well come upon one.
    @Test func weakKeysOfDESAreUsable() throws {
        let cipher = try Cipher.make(.des, .ecb, key: [UInt8](repeating: 0, count: 8))
        #expect(try cipher.encrypt([UInt8](repeating: 0, count: 8)).hex == "8ca64de9c1b123a7")
    }

    @Test func wrongLengthsAreNamed() throws {
        func message(_ body: () throws -> Void) -> String {
            let error = #expect(throws: CryptoError.self) { try body() }
            return error?.description ?? ""
        }
        #expect(message { _ = try Cipher.make(.aes256, .cbc, key: [1, 2, 3]) }.contains("a key of 32 bytes, not 3"))
        #expect(
            message { _ = try Cipher.make(.aes128, .xts, key: [UInt8](repeating: 1, count: 32)) }
                .contains("two different keys")
        )
        let cipher = try Cipher.make(.aes256, .cbc, key: [UInt8](repeating: 1, count: 32))
        #expect(message { try cipher.setIV([1]) } == "IV should be 16 bytes in length not 1")
        #expect(message { _ = try cipher.encrypt([1, 2, 3]) } == "Length 3 must be a multiple of the block length 16")
        let counter = try Cipher.make(.aes128, .ctr, key: [UInt8](repeating: 1, count: 16))
        try counter.setIV([UInt8](repeating: 0, count: 16))
        #expect(try counter.encrypt([1, 2, 3]).count == 3)
        #expect(message { _ = try CipherAlgorithm(named: "rot13") }.contains("'rot13' is not known"))
    }
}

struct PBKDF2Tests {
    /// RFC 6070 for SHA-1; the RFC 7914 (scrypt), section 11, vectors for SHA-256.
    @Test func publishedVectorsHold() throws {
        func key(_ algorithm: HashAlgorithm, _ passphrase: String, _ salt: String, _ iterations: Int, _ length: Int)
            throws -> String
        {
            try PBKDF2.derive(
                algorithm,
                passphrase: Array(passphrase.utf8),
                salt: Array(salt.utf8),
                iterations: iterations,
                length: length
            ).hex
        }
        #expect(try key(.sha1, "password", "salt", 1, 20) == "0c60c80f961f0e71f3a9b524af6012062fe037a6")
        #expect(try key(.sha1, "password", "salt", 4096, 20) == "4b007901b765489abead49d926f721d065a429c1")
        #expect(
            try key(.sha1, "passwordPASSWORDpassword", "saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25)
                == "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"
        )
        #expect(
            try key(.sha256, "passwd", "salt", 1, 64)
                == "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
                + "49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        )
        #expect(throws: CryptoError.self) { try key(.sha256, "passwd", "salt", 0, 64) }
        #expect(throws: CryptoError.self) { try key(.sha256, "", "salt", 1, 64) }
        #expect(throws: CryptoError.self) { try key(.sha256, "passwd", "salt", 1, 0) }
    }

    @Test func iterationsGrowWithTheTimeAllowed() throws {
        let short = try PBKDF2.countIterations(.sha256, length: 32, taking: .milliseconds(20))
        let long = try PBKDF2.countIterations(.sha256, length: 32, taking: .milliseconds(2000))
        // A hundred times the time; how far apart they are exactly depends on the machine's load.
        #expect(long > short)
        #expect(short >= 1000)
    }
}
