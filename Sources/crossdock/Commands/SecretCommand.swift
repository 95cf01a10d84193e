import ArgumentParser
import Glibc
import IO
import TLS

/// Secrets for `--object`.
struct SecretCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "secret",
        abstract: "Encrypts secrets, so that they may stand on a command line.",
        subcommands: [Encrypt.self]
    )

    struct Encrypt: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Encrypts a secret with a master key and prints the --object that holds it.",
            discussion: """
                The secret is read from standard input, without echo from a terminal. One line break at its end is dropped, \
                since it is rarely meant; --exact keeps it. Crossdock and QEMU take the result:

                  --object secret,id=master,format=base64,file=KEYFILE --object "$(crossdock secret encrypt --key KEYFILE)"
                """
        )
        @Option(
            help: ArgumentHelp("The file with the master key: 32 bytes, in Base64 or as they are.", valueName: "file")
        )
        var key: String
        @Flag(help: "Make the file with a new random key; it must not exist.")
        var newKey = false
        @Option(help: "The id of the new secret.")
        var id = "sec0"
        @Option(help: "The id of the secret object that holds the master key.")
        var keyid = "master"
        @Flag(help: "Keep a line break at the end of the secret.")
        var exact = false

        func run() async throws {
            try await failing {
                if newKey { try makeKey() }
                let master = Secret(id: keyid, bytes: try masterKey())
                let (iv, data) = try Secret.encrypt(try plainText(), master: master)
                let object = try ObjectDescription(
                    parsing: "secret,id=\(id),keyid=\(keyid),format=base64,data=\(data),iv=\(iv)"
                )
                output("secret,id=\(object.id),keyid=\(keyid),format=base64,data=\(data),iv=\(iv)\n")
            }
        }

        private func makeKey() throws {
            var generator = SystemRandomNumberGenerator()
            var bytes = (0..<Secret.masterKeyLength).map { _ in UInt8.random(in: 0...255, using: &generator) }
            let secret = try SecretBytes(wiping: &bytes)
            let fd = open(key, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
            guard fd >= 0 else {
                throw FileError.system("make the key file \(key)", errno)
            }
            defer { close(fd) }
            let text = secret.withBytes { Base64.encode($0) } + "\n"
            guard text.utf8CString.withUnsafeBytes({ write(fd, $0.baseAddress, $0.count - 1) }) == text.utf8.count
            else {
                throw FileError.system("write the key file \(key)", errno)
            }
        }

        private func masterKey() throws -> SecretBytes {
            let store = ObjectStore()
            try store.add(ObjectDescription(parsing: "secret,id=key,file=\(KeyValue.escape(key))"))
            return try store.secret("key").bytes
        }

        private func plainText() throws -> SecretBytes {
            let isTerminal = isatty(0) == 1
            var old = termios()
            if isTerminal {
                printError("The secret, followed by Enter:")
                tcgetattr(0, &old)
                var silent = old
                silent.c_lflag &= ~tcflag_t(ECHO)
                tcsetattr(0, TCSAFLUSH, &silent)
            }
            defer { if isTerminal { tcsetattr(0, TCSAFLUSH, &old) } }
            return try SecretBytes(capacity: 1 << 20) { buffer in
                var count = 0
                while count < buffer.count {
                    let next = read(0, buffer.baseAddress! + count, buffer.count - count)
                    if next < 0, errno == EINTR { continue }
                    guard next >= 0 else {
                        throw CredentialError("Cannot read the secret: \(String(cString: strerror(errno)))")
                    }
                    if next == 0 { break }
                    count += next
                    if isTerminal, buffer[count - 1] == UInt8(ascii: "\n") { break }
                }
                if !exact, count > 0, buffer[count - 1] == UInt8(ascii: "\n") {
                    count -= 1
                    if count > 0, buffer[count - 1] == UInt8(ascii: "\r") { count -= 1 }
                }
                guard count > 0 else { throw CredentialError("There is no secret on standard input") }
                return count
            }
        }
    }
}
