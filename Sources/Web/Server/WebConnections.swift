internal import IO

/// Whose connections there are, and which may stay. A value: it ends nobody, it says who has to go.
struct WebConnections: Sendable {
    private var unproven = UnprovenConnections(limit: WebLimits.unprovenConnections)
    private var proven: [ObjectIdentifier: String] = [:]
    private var ofNetwork: [String: Int] = [:]

    /// How many there are.
    var count: Int { unproven.count + proven.count }

    /// A connection has come.
    ///
    /// - Returns: the one that has to give way.
    mutating func add(_ channel: any Channel) -> (any Channel)? { unproven.add(channel) }

    /// The client of a connection has shown a right, or does so again.
    ///
    /// - Returns: why it cannot stay, half a sentence; nil when it can.
    mutating func prove(_ channel: any Channel) -> String? {
        let key = ObjectIdentifier(channel)
        if proven[key] != nil { return nil }
        let network = channel.peerAddress.map(UnprovenConnections.network) ?? "local"
        guard proven.count < WebLimits.provenConnections else {
            return "the limit of \(WebLimits.provenConnections) connections is reached"
        }
        guard ofNetwork[network] ?? 0 < WebLimits.connectionsOfNetwork else {
            return "the limit of \(WebLimits.connectionsOfNetwork) connections of one network is reached"
        }
        unproven.remove(channel)
        proven[key] = network
        ofNetwork[network, default: 0] += 1
        return nil
    }

    /// A connection has ended.
    mutating func remove(_ channel: any Channel) {
        unproven.remove(channel)
        guard let network = proven.removeValue(forKey: ObjectIdentifier(channel)) else { return }
        let rest = (ofNetwork[network] ?? 1) - 1
        ofNetwork[network] = rest == 0 ? nil : rest
    }
}
