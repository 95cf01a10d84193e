internal import Glibc

/// The connections to a port whose peers have not proved yet who they are, in the order of their arrival.
///
/// Anybody can make such connections, so their places are few. When they are all taken, the oldest connection of the network
/// that has the most gives way to a new one: who connects and stays silent crowds out itself, and a good peer, which needs
/// a place for milliseconds only, gets one.
public struct UnprovenConnections: Sendable {
    private struct Entry {
        let channel: any Channel
        let network: String
    }
    private let limit: Int
    private var entries: [Entry] = []
    private var counts: [String: Int] = [:]

    /// Makes an empty list.
    ///
    /// - Parameter limit: how many places there are.
    public init(limit: Int) { self.limit = limit }

    /// How many there are.
    public var count: Int { entries.count }

    /// How many a network has.
    public func count(of network: String) -> Int { counts[network] ?? 0 }

    /// Adds a connection.
    ///
    /// - Returns: the one that has to give way; its owner aborts it.
    public mutating func add(_ channel: any Channel) -> (any Channel)? {
        add(channel, from: channel.peerAddress.map(Self.network) ?? "local")
    }

    /// Adds a connection of a network.
    mutating func add(_ channel: any Channel, from network: String) -> (any Channel)? {
        let victim = entries.count >= limit ? removeVictim() : nil
        entries.append(Entry(channel: channel, network: network))
        counts[network, default: 0] += 1
        return victim
    }

    /// Removes a connection; false when it is not there: it has given way to another one.
    @discardableResult
    public mutating func remove(_ channel: any Channel) -> Bool {
        guard let index = entries.firstIndex(where: { $0.channel === channel }) else { return false }
        _ = remove(at: index)
        return true
    }

    private mutating func removeVictim() -> (any Channel)? {
        let most = counts.values.max() ?? 0
        return entries.firstIndex { counts[$0.network] == most }.map { remove(at: $0) }
    }

    private mutating func remove(at index: Int) -> any Channel {
        let entry = entries.remove(at: index)
        let rest = (counts[entry.network] ?? 1) - 1
        counts[entry.network] = rest == 0 ? nil : rest
        return entry.channel
    }

    /// What is counted as one: an IPv4 address, the first 64 bits of an IPv6 address, of which whoever has one usually has all the
    /// others, or all local peers together.
    ///
    /// - Parameter address: in its numeric form.
    public static func network(of address: SocketAddress) -> String {
        guard let host = address.host else { return "local" }
        var bytes = in6_addr()
        // A link-local address has its interface behind it.
        guard inet_pton(AF_INET6, String(host.prefix { $0 != "%" }), &bytes) == 1 else { return host }
        return withUnsafeBytes(of: bytes) { bytes in
            // ::ffff:192.0.2.1, which is IPv4 on a socket that takes both.
            if bytes[..<10].allSatisfy({ $0 == 0 }), bytes[10] == 0xff, bytes[11] == 0xff {
                return bytes[12...].map { "\($0)" }.joined(separator: ".")
            }
            return bytes[..<8].hex + "/64"
        }
    }
}
