import Glibc
import IO
import TLS
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(1)))
struct SecretTests {
    let directory: TestDirectory
    let store = ObjectStore()

    init() throws { directory = try TestDirectory() }

    func write(_ bytes: [UInt8], _ name: String) -> String {
        let fd = open(directory.file(name), O_WRONLY | O_CREAT | O_TRUNC, 0o600)
        _ = bytes.withUnsafeBytes { Glibc.write(fd, $0.baseAddress, $0.count) }
        close(fd)
        return directory.file(name)
    }

    func add(_ text: String) throws { try store.add(ObjectDescription(parsing: text)) }
    func failure(_ text: String) -> String {
        let error = #expect(throws: (any Error).self) { try add(text) }
        return error.map { "\($0)" } ?? ""
    }
    func contents(_ id: String) throws -> [UInt8] { try store.secret(id).bytes.withBytes { Array($0) } }

    @Test func aFileIsTakenByteForByteAndBase64IsDecoded() throws {
        try add("secret,id=raw,file=\(write(Array("letmein\n".utf8), "raw"))")
        #expect(try contents("raw") == Array("letmein\n".utf8))
        try add("secret,id=b64,format=base64,file=\(write(Array("bGV0\nbWVpbg==\n".utf8), "b64"))")
        #expect(try contents("b64") == Array("letmein".utf8))
        try add(#"{"qom-type":"secret","id":"json","file":"\#(directory.file("raw"))"}"#)
        #expect(try contents("json") == Array("letmein\n".utf8))
    }

    @Test func aPipeAnInheritedDescriptorAndAFIFOAreRead() async throws {
        var ends: [Int32] = [0, 0]
        #expect(pipe(&ends) == 0)
        _ = "from a pipe".withCString { Glibc.write(ends[1], $0, 11) }
        close(ends[1])
        try add("secret,id=fd,fd=\(ends[0])")
        #expect(try contents("fd") == Array("from a pipe".utf8))
        // The descriptor is closed: nobody inherits it.
        #expect(fcntl(ends[0], F_GETFD) == -1)
        #expect(pipe(&ends) == 0)
        _ = "by path".withCString { Glibc.write(ends[1], $0, 7) }
        close(ends[1])
        try add("secret,id=path,file=/dev/fd/\(ends[0])")
        close(ends[0])
        #expect(try contents("path") == Array("by path".utf8))
        let fifo = directory.file("fifo")
        mkfifo(fifo, 0o600)
        let writer = try ChildProcess(["sh", "-c", "printf 'from a fifo' > \(fifo)"])
        try add("secret,id=fifo,file=\(fifo)")
        #expect(try contents("fifo") == Array("from a fifo".utf8))
        _ = try await writer.finish()
    }

    @Test func wrongCombinationsAreToldInQEMUsWords() {
        let file = write([1], "f")
        #expect(failure("secret,id=a").contains("Either 'file' or 'data' must be provided"))
        #expect(
            failure("secret,id=a,data=eA==,keyid=k,file=\(file)").contains("'file' and 'data' are mutually exclusive")
        )
        #expect(failure("secret,id=a,file=/nowhere").contains("Unable to read /nowhere: No such file"))
        #expect(failure("secret,id=a,file=\(directory.path)").contains("directory"))
        #expect(failure("secret,id=a,file=\(file),format=hex").contains("does not accept value 'hex'"))
        #expect(failure("secret,id=a,file=\(file),keyid=none").contains("No secret with id 'none'"))
        #expect(failure("secret,id=a,fd=999").contains("not open"))
        #expect(failure("secret,id=a,fd=1").contains("above 2"))
        #expect(failure("secret,id=a,file=\(file),color=red").contains("Parameter 'color' is unexpected"))
        #expect(store.listings.isEmpty)
    }

    @Test func dataInClearIsRefusedOnTheCommandLineAndNoMessageRepeatsIt() throws {
        #expect(failure("secret,id=a,data=hunter2").contains("crossdock secret encrypt"))
        for text in [
            "secret,id=a,data=hunter2", "secret,id=a,data=x,hunter2", "secret,id=a,data=hunter2,=",
            "secret,data=hunter2",
        ] {
            #expect(!failure(text).contains("hunter2"))
        }
        // Over the control socket nobody else sees it.
        try store.add(ObjectDescription(parsing: "secret,id=a,data=hunter2"), from: .control)
        #expect(try contents("a") == Array("hunter2".utf8))
        let secret = try store.secret("a")
        #expect(!"\(secret.bytes)".contains("hunter2"))
        var dumped = ""
        dump(secret.bytes, to: &dumped)
        #expect(!dumped.contains("hunter2"))
    }

    /// The transcript of the text that QEMU's secrets were announced with, made by openssl.
    @Test func encryptedDataMadeWithOpensslOpensWithItsMasterKey() async throws {
        let script = """
            cd \(directory.path)
            openssl rand -base64 32 > key.b64
            openssl rand -base64 16 > sec0-iv.b64
            SECRET=$(printf "letmein" | openssl enc -aes-256-cbc -a \
                -K $(base64 -d key.b64 | hexdump -v -e '/1 "%02X"') -iv $(base64 -d sec0-iv.b64 | hexdump -v -e '/1 "%02X"'))
            echo "secret,id=sec0,keyid=secmaster,format=base64,data=$SECRET,iv=$(cat sec0-iv.b64)"
            """
        let made = try await Tool.run(["bash", "-c", script])
        #expect(made.code == 0, "\(made.errors)")
        try add("secret,id=secmaster,format=base64,file=\(directory.file("key.b64"))")
        try add(String(made.output.dropLast()))
        #expect(try contents("sec0") == Array("letmein".utf8))
    }

    @Test(arguments: [0, 1, 15, 16, 17, 4096])
    func whatIsEncryptedHereOpensHereAndWithOpenssl(_ length: Int) async throws {
        let key = (0..<32).map { UInt8($0 * 5 & 0xff) }
        try add("secret,id=master,file=\(write(key, "key"))")
        let plain = (0..<length).map { UInt8(truncatingIfNeeded: $0 &* 31) }
        var copy = plain
        let (iv, data) = try Secret.encrypt(SecretBytes(wiping: &copy), master: store.secret("master"))
        #expect(copy.allSatisfy { $0 == 0 })
        try add("secret,id=s,keyid=master,format=base64,data=\(data),iv=\(iv)")
        #expect(try contents("s") == plain)
        _ = write(Array(data.utf8), "cipher")
        let opened = try await Tool.run([
            "sh", "-c",
            "openssl enc -d -aes-256-cbc -a -A -in \(directory.file("cipher")) -K \(key.hex) "
                + "-iv \(Base64.decode(iv.utf8)!.hex) | openssl dgst -sha256 -r",
        ])
        #expect(opened.output.hasPrefix(HashAlgorithm.sha256.hash(plain).hex))
    }

    @Test func wrongKeysAndVectorsAreToldInQEMUsWords() throws {
        try add("secret,id=short,file=\(write([1, 2, 3], "short"))")
        try add("secret,id=master,file=\(write([UInt8](repeating: 7, count: 32), "key"))")
        try add("secret,id=other,file=\(write([UInt8](repeating: 8, count: 32), "key2"))")
        var plain = Array("letmein".utf8)
        let vector = [UInt8](repeating: 3, count: 16)
        let (iv, data) = try Secret.encrypt(SecretBytes(wiping: &plain), master: store.secret("master"), iv: vector)
        let good = "secret,id=a,format=base64,data=\(data)"
        #expect(failure("\(good),keyid=master").contains("IV is required to decrypt secret"))
        #expect(failure("\(good),keyid=short,iv=\(iv)").contains("Key should be 32 bytes in length"))
        #expect(failure("\(good),keyid=master,iv=AAAA").contains("IV should be 16 bytes in length not 3"))
        #expect(failure("\(good),keyid=master,iv=????").contains("not valid"))
        #expect(failure("\(good),keyid=other,iv=\(iv)").contains("Incorrect number of padding bytes"))
        #expect(failure("secret,id=a,format=base64,data=AAAA,keyid=master,iv=\(iv)").contains("no multiple of 16"))
        #expect(failure("secret,id=a,format=base64,data=!,keyid=master,iv=\(iv)").contains("not valid"))
        #expect(failure("\(good),iv=\(iv)").contains("in clear"))
        try add("\(good),keyid=master,iv=\(iv)")
        #expect(try contents("a") == Array("letmein".utf8))
    }

    @Test func aKeyOfTheKernelsKeyringIsRead() async throws {
        // The thread's keyring would go with a thread; the session's is shared with the child that adds the key.
        let script = """
            import ctypes
            libc = ctypes.CDLL(None, use_errno=True)
            print(libc.syscall(248, b"user", b"crossdock-test", b"from the keyring", 16, -4))
            """
        let added = try await Tool.run(["python3", "-c", script])
        let serial = added.output.split(separator: "\n").first.map(String.init) ?? ""
        #expect(Int(serial) != nil, "\(added.all)")
        try add("secret_keyring,id=k,serial=\(serial)")
        #expect(try contents("k") == Array("from the keyring".utf8))
        #expect(failure("secret_keyring,id=l").contains("'serial' parameter must be given"))
        #expect(failure("secret_keyring,id=l,serial=0").contains("'serial' parameter must be given"))
        #expect(failure("secret_keyring,id=l,serial=1").contains("Unable to read keyring key 1"))
    }

    @Test func aSecretThatOthersNeedCannotBeRemoved() async throws {
        let pki = try TestPKI()
        try add("secret,id=s,file=\(write([65], "s"))")
        try add("tls-creds-x509,id=t,endpoint=server,dir=\(pki.directory),passwordid=s")
        let error = #expect(throws: CredentialError.self) { try store.remove("s") }
        #expect(error?.message.contains("object 's' is in use, can not be deleted") == true)
        try store.remove("t")
        try store.remove("s")
        #expect(store.listings.isEmpty)
    }
}
