internal import Glibc
internal import IO

/// The network interfaces of a host, as the kernel shows them.
public struct NetworkInterfaces: Sendable {
    private let directory: String

    /// Looks at a host's interfaces.
    ///
    /// - Parameter directory: where each has a directory.
    public init(_ directory: String = "/sys/class/net") { self.directory = directory }

    private func path(_ name: String, _ file: String) -> String? {
        // As the kernel takes names (dev_valid_name): what is longer or has a slash is none.
        guard !name.isEmpty, name.utf8.count < 16, !name.contains("/"), name != ".", name != ".." else { return nil }
        return "\(directory)/\(name)/\(file)"
    }

    /// Whether there is a tap interface of a name.
    func isTap(_ name: String) -> Bool {
        guard let path = path(name, "tun_flags"), let bytes = try? DurableFile.read(path) else { return false }
        // IFF_TUN is 1, IFF_TAP 2.
        let text = String(decoding: bytes, as: UTF8.self).split(separator: "\n").first.map(String.init) ?? ""
        return ByteSize.parse(text).map { $0 & 2 != 0 } ?? false
    }

    /// The bridge that an interface is a port of; nil when it is none.
    func bridge(of name: String) -> String? {
        guard let path = path(name, "master") else { return nil }
        var buffer = [CChar](repeating: 0, count: 4096)
        let count = readlink(path, &buffer, buffer.count)
        guard count > 0 else { return nil }
        let link = String(decoding: buffer.prefix(count).map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return link.split(separator: "/").last.map(String.init)
    }
}
