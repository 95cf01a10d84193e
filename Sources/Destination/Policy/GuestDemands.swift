public import Emulator
public import Migration

/// What a guest of another host wants of this one, as far as its operator's policy is about it.
public struct GuestDemands: Sendable {
    /// The addresses of the network that its QEMU uses.
    public var endpoints: [GuestEndpoint] = []
    /// The tap interfaces; nil for one without a name.
    public var taps: [String?] = []
    /// The networks for which taps are wanted, in bridges of this host.
    public var networks: [Message.Offer.Network] = []
    /// What it takes of the host.
    public var usage = GuestUsage()

    /// Describes what a guest wants.
    public init(endpoints: [GuestEndpoint] = [], taps: [String?] = [], usage: GuestUsage = GuestUsage()) {
        self.endpoints = endpoints
        self.taps = taps
        self.usage = usage
    }

    /// Reads an offer.
    ///
    /// - Parameters:
    ///   - commandLine: its command line for this host.
    ///   - offer: the offer.
    /// - Throws: `GuestError` for an option that cannot be read.
    public init(_ commandLine: GuestCommandLine, _ offer: Message.Offer) throws {
        endpoints = try commandLine.endpoints()
        networks = offer.networks ?? []
        let mapped = Set(networks.map(\.tap))
        taps = try commandLine.taps().filter { $0.map { !mapped.contains($0) } ?? true }
        usage = try offer.usage(as: commandLine)
    }
}
