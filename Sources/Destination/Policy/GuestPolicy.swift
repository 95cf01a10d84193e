public import Emulator
internal import Migration

/// What the operator of a destination lets guests of other hosts have.
///
/// Its rules have the names of the flags of `crossdock destination`.
public struct GuestPolicy: Sendable {
    /// Names that a rule lists.
    public struct Names: Sendable, Hashable {
        /// Whether all are allowed.
        public private(set) var hasAll = false
        /// Those that are allowed.
        public private(set) var names: [String] = []

        /// Whether nothing was said.
        public var isEmpty: Bool { !hasAll && names.isEmpty }

        /// Adds a name; 'all' is every one.
        public mutating func add(_ name: String) {
            if name == "all" { hasAll = true } else { names.append(name) }
        }
    }

    /// What keeps guests from addresses of this host.
    public enum Network: String, Sendable, CaseIterable {
        /// They reach no loopback and no link-local address.
        case filtered
        /// They reach what this host reaches.
        case host
    }

    /// Directories in which guests may name files.
    public var directories: [String] = []
    /// Bridges that taps of guests may be in; when nothing is listed, every tap will do.
    public var bridges = Names()
    /// Addresses besides loopback on which displays, serial ports, forwardings and the like may listen.
    public var listenAddresses = Names()
    /// What the guests of one source may take together.
    public var limits = GuestLimits()
    /// How many guests of all sources may be on their way at once; nil for no limit.
    public var mostIncoming: UInt64?
    /// The identities whose guests this host sends back when they ask for them.
    public var recallers: [String] = []
    /// The identities that may have the consoles of guests here without a grant, and whether they may write there.
    public var consoleReaders: [String: Bool] = [:]
    /// Directories below which a source, by its identity, may name images that its disks are begun with.
    public var seedDirectories: [String: [String]] = [:]
    /// What guests reach; nil when nothing was said.
    public var network: Network?

    /// The policy of an operator who has said nothing.
    public init() {}

    // MARK: judging

    /// Which rules refuse a guest, a sentence each with what to do; empty when none does. Blocks: it reads files of the kernel.
    ///
    /// - Parameters:
    ///   - demands: what the guest wants.
    ///   - filterObstacle: why the network of guests is not filtered here; nil when it is.
    ///   - tapUser: as whom its QEMU will attach to taps.
    ///   - interfaces: those of this host.
    public func problems(
        of demands: GuestDemands,
        filterObstacle: String?,
        tapUser: TapUser = .everything,
        interfaces: NetworkInterfaces = NetworkInterfaces()
    ) -> [String] {
        var problems = demands.taps.compactMap { problem(ofTap: $0, tapUser, interfaces) }
        for network in demands.networks {
            // What its operator has made is used as ever.
            let problem =
                interfaces.isFree(tap: network.tap, in: network.bridge, for: tapUser)
                ? problem(ofTap: network.tap, tapUser, interfaces)
                : problem(ofBridge: network.bridge, tapUser, interfaces)
            if let problem, !problems.contains(problem) { problems.append(problem) }
        }
        for endpoint in demands.endpoints {
            let problem =
                switch endpoint.role {
                case .listens: problem(ofListener: endpoint)
                case .connects: self.problem(ofConnection: endpoint, filterObstacle)
                }
            // Several ports of one option have the same problem.
            if let problem, !problems.contains(problem) { problems.append(problem) }
        }
        return problems
    }

    private func problem(ofTap name: String?, _ user: TapUser, _ interfaces: NetworkInterfaces) -> String? {
        guard let name else {
            return
                "A tap interface without a name would have to be made by QEMU, which a guest of another host may not do; name one "
                + "(-netdev tap,ifname=)"
        }
        guard interfaces.isTap(name) else {
            return
                "The tap interface '\(name)' is not there on this host; it has to be made before the guest comes, or the move to be started "
                + "with --network \(name)=BRIDGE"
        }
        if let obstacle = interfaces.obstacle(toTap: name, for: user) ?? user.obstacleToDevice { return obstacle }
        guard !bridges.isEmpty, !bridges.hasAll else { return nil }
        guard let bridge = interfaces.bridge(of: name) else {
            return
                "The tap interface '\(name)' is in no bridge, and this host lists bridges for guests (--allow-bridge): "
                + bridges.names.joined(separator: ", ")
        }
        if bridges.names.contains(bridge) { return nil }
        return "The tap interface '\(name)' is in the bridge '\(bridge)', which this host does not list for guests; "
            + "--allow-bridge \(bridge) allows it"
    }

    private func problem(ofBridge name: String, _ user: TapUser, _ interfaces: NetworkInterfaces) -> String? {
        guard bridges.hasAll || bridges.names.contains(name) else {
            let listed = bridges.isEmpty ? "none is" : "those are \(bridges.names.joined(separator: ", "))"
            return
                "The bridge '\(name)' is not one in which this host makes tap interfaces for guests, \(listed); --allow-bridge \(name) allows "
                + "it"
        }
        guard interfaces.isBridge(name) else { return "The network bridge '\(name)' is not there on this host" }
        guard interfaces.isUp(name) else {
            return "The network bridge '\(name)' is down on this host; 'ip link set \(name) up' puts it up"
        }
        if let obstacle = user.obstacleToDevice { return obstacle }
        guard let obstacle = GuestTap.obstacle() else { return nil }
        return "The agent of this host cannot make a tap interface in the bridge '\(name)': \(obstacle)"
    }

    private func problem(ofListener endpoint: GuestEndpoint) -> String? {
        let host = HostAddress.withoutBrackets(endpoint.host ?? "")
        if !isAllowed(listening: host) {
            let place = host.isEmpty ? "all addresses" : "'\(host)'"
            let allowed = (["loopback addresses"] + listenAddresses.names).joined(separator: ", ")
            return
                "\(endpoint.option) would listen on \(place), and the destination lets guests listen on \(allowed) only; its "
                + "--allow-listen \(host.isEmpty ? "all" : host) allows it"
        }
        // The filter knows no answers of UDP.
        guard endpoint.isDatagram, (network ?? .filtered) == .filtered, !host.isEmpty,
            HostAddress(host)?.isUnspecified != true, Self.isLocal(host)
        else { return nil }
        return
            "\(endpoint.option) would listen for UDP on '\(host)', where its answers would be filtered out; give it another address, "
            + "or allow it with --guest-network host"
    }

    private func isAllowed(listening host: String) -> Bool {
        if listenAddresses.hasAll { return true }
        if host.isEmpty { return false }
        if host == "localhost" { return true }
        guard let address = HostAddress(host) else { return listenAddresses.names.contains(host) }
        return address.isLoopback || listenAddresses.names.contains { HostAddress($0) == address }
    }

    private func problem(ofConnection endpoint: GuestEndpoint, _ filterObstacle: String?) -> String? {
        guard (network ?? .filtered) == .filtered else { return nil }
        let advice = "--guest-network host allows it"
        if let host = endpoint.host, Self.isLocal(HostAddress.withoutBrackets(host)) {
            let place = host.isEmpty ? "this host itself" : "'\(host)'"
            return
                "\(endpoint.option) would connect to \(place), and guests are kept from loopback and link-local addresses of this host; "
                + advice
        }
        guard let filterObstacle else { return nil }
        let isNetwork = endpoint.host == nil && endpoint.option.hasPrefix("-n")
        let way = isNetwork ? ", unless it has restrict=on" : ""
        return
            "\(endpoint.option) can reach loopback and link-local addresses of this host\(way), and nothing keeps it from them: "
            + "\(filterObstacle); \(advice)"
    }

    private static func isLocal(_ host: String) -> Bool {
        host.isEmpty || host == "localhost" || HostAddress(host)?.isGuarded == true
    }
}
