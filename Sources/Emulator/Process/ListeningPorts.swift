internal import Glibc
internal import IO

/// On which TCP ports processes of this host listen, as Linux says (proc(5), `/proc/net/tcp`).
public enum ListeningPorts {
    /// The most bytes of Linux's table that are read; one line has 150.
    private static let limit = 16 << 20

    /// The ports of a range on which a certain process listens, and nobody else can be who answers there. Blocks.
    ///
    /// - Throws: `GuestError` when it cannot be seen what the process has open.
    public static func ports(of process: Int32, among range: ClosedRange<UInt16>) throws -> [UInt16] {
        guard let own = RunningEmulator.socketInodes(of: process) else {
            throw GuestError(
                "It cannot be seen on which ports process \(process) listens; run the agent as its user or as root"
            )
        }
        var found: Set<UInt16> = []
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            guard let bytes = try? DurableFile.read(table, limit: limit) else { continue }
            for line in bytes.split(separator: 10).dropFirst() {
                guard let (port, inode) = listener(line), range.contains(port), own.contains(inode) else { continue }
                found.insert(port)
            }
        }
        return found.sorted()
    }

    /// The port and the inode of a line about a socket that listens; nil for any other.
    static func listener(_ line: ArraySlice<UInt8>) -> (port: UInt16, inode: UInt64)? {
        let words = line.split(separator: 32, maxSplits: 10).map { String(decoding: $0, as: UTF8.self) }
        // TCP_LISTEN is 10.
        guard words.count > 9, words[3] == "0A", let colon = words[1].lastIndex(of: ":"),
            let port = UInt16(words[1][words[1].index(after: colon)...], radix: 16), let inode = UInt64(words[9])
        else { return nil }
        return (port, inode)
    }
}
