import Glibc
import IO
import TLS
import TestSupport
import Testing

/// A published test vector of a hash function.
struct HashVector: Sendable, CustomTestStringConvertible {
    let algorithm: HashAlgorithm
    let message: String
    let digest: String
    var testDescription: String { "\(algorithm.rawValue) of '\(message)'" }

    init(_ algorithm: HashAlgorithm, _ message: String, _ digest: String) {
        self.algorithm = algorithm
        self.message = message
        self.digest = digest
    }

    /// RFC 1321 A.5; FIPS 180 examples ("abc", the message of two blocks, empty); the RIPEMD-160 page of its authors;
    /// GB/T 32905-2016, appendix A.
    static let all: [HashVector] = [
        .init(.md5, "", "d41d8cd98f00b204e9800998ecf8427e"),
        .init(.md5, "abc", "900150983cd24fb0d6963f7d28e17f72"),
        .init(.md5, "message digest", "f96b697d7cb7938d525a2f31aaf161d0"),
        .init(.sha1, "abc", "a9993e364706816aba3e25717850c26c9cd0d89d"),
        .init(
            .sha1,
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "84983e441c3bd26ebaae4aa1f95129e5e54670f1"
        ),
        .init(.sha224, "abc", "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
        .init(.sha256, "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        .init(.sha256, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        .init(
            .sha256,
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
        ),
        .init(
            .sha384,
            "abc",
            "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed"
                + "8086072ba1e7cc2358baeca134c825a7"
        ),
        .init(
            .sha512,
            "abc",
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
                + "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"
        ),
        .init(.ripemd160, "", "9c1185a5c5e9fc54612808977ee8f548b2258d31"),
        .init(.ripemd160, "abc", "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
        .init(.ripemd160, "message digest", "5d0689ef49d2fae572b881b123a85ffa21595f36"),
        .init(.sm3, "abc", "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"),
    ]
}

struct HashTests {
    @Test(arguments: HashVector.all)
    func publishedVectorsHoldInOnePieceAndInPieces(_ vector: HashVector) throws {
        let message = Array(vector.message.utf8)
        #expect(try Hash.digest(vector.algorithm, of: message).hex == vector.digest)
        #expect(vector.algorithm.hash(message).hex == vector.digest)
        var hash = try Hash(vector.algorithm)
        for byte in message { hash.update([byte]) }
        hash.update([])
        #expect(hash.finish().hex == vector.digest)
    }

    @Test(arguments: HashAlgorithm.allCases)
    func aVectorOfBuffersHashesAsOneBuffer(_ algorithm: HashAlgorithm) throws {
        var pieces = [[UInt8]]([Array("one ".utf8), [], Array("two ".utf8), Array("three".utf8)])
        let whole = pieces.flatMap { $0 }
        let joined = try Hash.digest(algorithm, of: whole)
        let first = pieces.removeFirst()
        let rest = pieces.flatMap { $0 }
        try first.withUnsafeBytes { a in
            try rest.withUnsafeBytes { b in
                let vector = [
                    iovec(iov_base: UnsafeMutableRawPointer(mutating: a.baseAddress), iov_len: a.count),
                    iovec(iov_base: nil, iov_len: 0),
                    iovec(iov_base: UnsafeMutableRawPointer(mutating: b.baseAddress), iov_len: b.count),
                ]
                let digest = try vector.withUnsafeBufferPointer { try Hash.digest(algorithm, of: $0) }
                #expect(digest == joined)
            }
        }
        #expect(joined.bytes.count == algorithm.digestLength)
    }

    @Test func aMillionTimesTheLetterAAsFIPS180HasIt() throws {
        let bytes = [UInt8](repeating: UInt8(ascii: "a"), count: 1_000_000)
        #expect(
            try Hash.digest(.sha256, of: bytes).hex
                == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
        )
        #expect(try Hash.digest(.sha1, of: bytes).hex == "34aa973cd4c4daa4f61eeb2bdbad27316534016f")
    }

    /// RFC 4231, cases 1, 2, 6 (a key longer than a block); RFC 2202, case 2, for MD5 and SHA-1.
    @Test func publishedHMACVectorsHold() throws {
        let jefe = Array("Jefe".utf8)
        let question = Array("what do ya want for nothing?".utf8)
        #expect(try Hash.hmac(.md5, key: jefe, of: question).hex == "750c783e6ab0b503eaa86e310a5db738")
        #expect(try Hash.hmac(.sha1, key: jefe, of: question).hex == "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79")
        #expect(
            try Hash.hmac(.sha256, key: jefe, of: question).hex
                == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        )
        #expect(
            try Hash.hmac(.sha224, key: [UInt8](repeating: 0x0b, count: 20), of: Array("Hi There".utf8)).hex
                == "896fb1128abbdf196832107cd49df33f47b4b1169912ba4f53684b22"
        )
        #expect(
            try Hash.hmac(
                .sha512,
                key: [UInt8](repeating: 0xaa, count: 131),
                of: Array("Test Using Larger Than Block-Size Key - Hash Key First".utf8)
            ).hex
                == "80b24263c7c1a3ebb71493c1dd7be8b49b46d1f41b4aeec1121b013783f8f352"
                + "6b56d037e05f2598bd0fd2215d6a1e5295e64f73f63f0aec8b915a985d786598"
        )
    }

    /// FIPS 198 leaves an empty key legal; the value is the one in Python's and OpenSSL's own suites.
    @Test func anEmptyKeyIsAKey() throws {
        #expect(
            try Hash.hmac(.sha256, key: [], of: []).hex
                == "b613679a0814d9ec772f95d778c35fc5ff1697c493715653c6c712144292c5ad"
        )
    }

    @Test func digestsAreTextInHexadecimalAndBase64() throws {
        let digest = try Hash.digest(.md5, of: Array("abc".utf8))
        #expect(digest.base64 == "kAFQmDzST7DWlj99KOF/cg==")
        #expect(digest.matches(Digest(bytes: digest.bytes)))
        #expect(!digest.matches(Digest(bytes: digest.bytes.reversed())))
    }

    @Test func anUnknownNameIsToldWithTheKnownOnes() {
        let error = #expect(throws: CryptoError.self) { try HashAlgorithm(named: "sha3") }
        #expect(error?.description.contains("'sha3' is not known") == true)
        #expect(error?.description.contains("sha256") == true)
    }
}
