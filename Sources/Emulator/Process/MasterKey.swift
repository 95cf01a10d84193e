internal import CLinux
internal import Glibc
internal import IO
public import TLS

/// Secrets for a QEMU process: encrypted in its command line, with a key that only the process gets.
///
/// The key is new each time and lives in an anonymous file in memory that the process inherits (QEMU's `secret` objects,
/// `keyid`). Nothing of it is on a disk.
public final class MasterKey: Sendable {
    /// What the key is called in QEMU.
    static let id = "crossdock-key"
    /// The key's file, for the process to inherit.
    public let descriptor: Int32
    private let objects: [String]

    /// Encrypts secrets.
    ///
    /// - Parameter secrets: their values by the ids that QEMU shall know them by.
    public init(sealing secrets: [String: SecretBytes]) throws {
        var generator = SystemRandomNumberGenerator()
        var bytes = (0..<Secret.masterKeyLength).map { _ in UInt8.random(in: 0...255, using: &generator) }
        let descriptor = xd_memory_file("crossdock-key")
        guard descriptor >= 0 else { throw FileError.system("make a file in memory", errno) }
        self.descriptor = descriptor
        do {
            try DurableFile.append(bytes, to: descriptor, path: "a file in memory")
            lseek(descriptor, 0, SEEK_SET)
            let key = Secret(id: Self.id, bytes: try SecretBytes(wiping: &bytes))
            objects = try secrets.sorted { $0.key < $1.key }.map { id, value in
                let (iv, data) = try Secret.encrypt(value, master: key)
                return
                    "secret,id=\(KeyValue.escape(id)),keyid=\(Self.id),format=base64,iv=\(KeyValue.escape(iv)),data=\(data)"
            }
        } catch {
            close(descriptor)
            throw error
        }
    }

    deinit { close(descriptor) }

    /// The options that make the secrets, the key first.
    ///
    /// - Parameters:
    ///   - file: where the process finds the key; under its own number when nil.
    ///   - option: `-object`, or `--object` for QEMU's tools.
    public func arguments(file: String? = nil, option: String = "-object") -> [String] {
        let path = file ?? "/dev/fd/\(descriptor)"
        return ([option, "secret,id=\(Self.id),format=raw,file=\(path)"]) + objects.flatMap { [option, $0] }
    }
}
