/// Which bridges of the destination take the place of those of this host.
public struct NetworkMap: Sendable, Hashable, Codable {
    /// The destination's bridges, by the bridge or the tap of this host.
    public var bridges: [String: String]
    /// Whether it is for several guests, which need not have all of these networks.
    public var isForMany: Bool

    /// Makes a map.
    public init(_ bridges: [String: String], isForMany: Bool = false) {
        self.bridges = bridges
        self.isForMany = isForMany
    }
}
