internal import IO

/// Network backends.
extension OptionRule {
    static let network: [OptionRule] = [
        OptionRule(
            "netdev",
            argument: .object("type"),
            repeatable: forwards,
            blank: .emptied(emptyBackend),
            check: checkNetwork,
            relocate: placeNetwork,
            endpoints: endpointsOfNetwork,
            hostFiles: devicesOfNetwork
        ),
        OptionRule(
            "nic",
            "net",
            argument: .settings("type"),
            repeatable: forwards,
            blank: .emptied(emptyCard),
            check: checkNetwork,
            relocate: placeNetwork,
            endpoints: endpointsOfNetwork,
            hostFiles: devicesOfNetwork
        ),
    ]

    private static let forwards: Set<String> = ["hostfwd", "dnssearch", "dns"]

    /// What each kind of network may say.
    private static let networks: [String: Set<String>] = [
        "user": [
            "ipv4", "net", "host", "ipv6", "ipv6-net", "ipv6-prefix", "ipv6-prefixlen", "ipv6-host", "ipv6-dns",
            "restrict", "hostname", "dhcpstart", "dns", "dnssearch", "domainname", "hostfwd",
        ],
        "tap": [
            "ifname", "script", "downscript", "br", "helper", "sndbuf", "vnet_hdr", "vhost", "vhostforce", "queues",
            "poll-us",
        ],
        "bridge": ["br", "helper"], "socket": ["listen", "connect", "mcast", "localaddr", "udp"],
        "stream": ["server", "addr", "reconnect", "reconnect-ms"], "dgram": ["local", "remote"],
        "hubport": ["hubid", "netdev"], "none": [], "nic": ["netdev"],
        "l2tpv3": [
            "src", "dst", "srcport", "dstport", "ipv6", "udp", "cookie64", "counter", "pincounter", "txcookie",
            "rxcookie", "txsession", "rxsession", "offset",
        ],
    ]
    /// What the card at its end may say, where both are one option.
    private static let cards: Set<String> = ["mac", "macaddr", "model", "name", "addr", "vectors"]

    @Sendable private static func checkNetwork(_ option: ParsedOption) throws {
        let settings = option.settings
        for key in ["fd", "fds", "vhostfd", "vhostfds", "sock"] where settings.has(key) {
            throw option.refusal("it passes a descriptor")
        }
        for key in ["smb", "tftp", "bootfile", "guestfwd"] where settings.has(key) {
            throw option.refusal("'\(key)' shows files or services of this host, or runs its programs")
        }
        guard let keys = networks[settings["type"] ?? ""] else { throw option.refusal("it depends on this host") }
        try option.allow(keys.union(option.name == "netdev" ? [] : cards).union(["type", "id"]))
        // QEMU ends a host at the first colon.
        for key in ["listen", "connect", "mcast", "udp", "localaddr"] where settings["type"] == "socket" {
            guard let address = settings[key] else { continue }
            guard address.count(where: { $0 == ":" }) == 1 else {
                throw option.refusal("'\(address)' is not 'address:port' with one colon")
            }
        }
        for leaf in settings.leaves {
            let name = leaf.key.split(separator: ".").last.map(String.init) ?? leaf.key
            if ["path", "fd", "str"].contains(name) && !leaf.key.hasPrefix("hostfwd.")
                && !leaf.key.hasPrefix("dnssearch.") && !leaf.key.hasPrefix("dns.")
                || name == "type" && leaf.key != "type" && leaf.value != "inet"
            {
                throw option.refusal("it connects to a socket of this host")
            }
            let isForward = leaf.key == "hostfwd" || leaf.key.hasPrefix("hostfwd.")
            if isForward, !isForwarding(leaf.value) {
                throw option.refusal("'\(leaf.value)' is not [tcp|udp]:[ADDRESS]:PORT-[ADDRESS]:PORT")
            }
        }
    }

    private static func isForwarding(_ text: String) -> Bool {
        let ends = text.split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
        guard ends.count == 2 else { return false }
        let here = ends[0].split(separator: ":", omittingEmptySubsequences: false)
        let there = ends[1].split(separator: ":", omittingEmptySubsequences: false)
        return here.count == 3 && ["", "tcp", "udp"].contains(here[0]) && PeerText.isHost(here[1])
            && PeerText.isPort(here[2]) && there.count == 2 && PeerText.isHost(there[0]) && PeerText.isPort(there[1])
    }

    @Sendable private static func endpointsOfNetwork(_ option: ParsedOption) -> [GuestEndpoint] {
        let settings = option.settings
        func address(_ key: String, _ number: String) -> (host: String, ports: ClosedRange<UInt16>?, port: Int?)? {
            guard settings.has(key) else { return nil }
            let port = settings[number].flatMap { Int($0) }
            return (settings[key] ?? "", GuestEndpoint.ports(port), port)
        }
        switch settings["type"] {
        case "user": return (settings.isOn("restrict") ? [] : [option.connecting(to: nil)]) + forwards(of: option)
        case "socket":
            let isDatagram = !settings.has("listen") && !settings.has("connect")
            // Whoever joins a group takes what is sent to it.
            return ["listen", "mcast", "localaddr"].compactMap { settings[$0] }.map {
                option.listening(on: $0, isDatagram: isDatagram)
            }
                + ["connect", "mcast", "udp"].compactMap { settings[$0] }.map {
                    option.connecting(toAddress: $0, isDatagram: isDatagram)
                }
        case "stream":
            guard let (host, _, port) = address("addr.host", "addr.port") else { return [] }
            guard settings.isOn("server") else { return [option.connecting(to: host, port: port)] }
            let last = settings["addr.to"].flatMap { Int($0) }
            return [option.listening(on: host, GuestEndpoint.ports(port, through: last))]
        case "dgram":
            return [address("local.host", "local.port")].compactMap { $0 }.map {
                option.listening(on: $0.host, $0.ports, isDatagram: true)
            }
                + [address("remote.host", "remote.port")].compactMap { $0 }.map {
                    option.connecting(to: $0.host, port: $0.port, isDatagram: true)
                }
        case "l2tpv3":
            return [address("src", "srcport")].compactMap { $0 }.map {
                option.listening(on: $0.host, $0.ports, isDatagram: true)
            }
                + [address("dst", "dstport")].compactMap { $0 }.map {
                    option.connecting(to: $0.host, port: $0.port, isDatagram: true)
                }
        default: return []
        }
    }

    @Sendable private static func devicesOfNetwork(_ option: ParsedOption) -> [Confinement.Rule] {
        let settings = option.settings
        guard ["tap", "bridge"].contains(settings["type"]) else { return [] }
        let tun = Confinement.Rule("/dev/net/tun", .device, isOptional: true)
        guard settings.has("vhost") || settings.has("vhostforce") else { return [tun] }
        return [tun, .init("/dev/vhost-net", .device, isOptional: true)]
    }

    /// `hostfwd=[tcp|udp]:[ADDRESS]:PORT-[ADDRESS]:PORT`, as often as one likes.
    private static func forwards(of option: ParsedOption) -> [GuestEndpoint] {
        option.settings.leaves.filter { $0.key == "hostfwd" || $0.key.hasPrefix("hostfwd.") }.compactMap { forward in
            let here = forward.value.prefix { $0 != "-" }
            guard let colon = here.firstIndex(of: ":") else { return nil }
            return option.listening(on: here[here.index(after: colon)...], isDatagram: here[..<colon] == "udp")
        }
    }

    @Sendable private static func placeNetwork(_ option: inout ParsedOption) throws -> Relocation {
        let settings = option.settings
        if settings["type"]?.hasPrefix("vhost-") == true { throw option.refusal("it depends on this host") }
        for key in ["fd", "fds", "vhostfd", "vhostfds", "sock"] where settings.has(key) {
            throw option.refusal("it passes a descriptor")
        }
        // Here they are run as ever; a move says which bridge takes their place.
        for key in ["script", "downscript", "helper"]
        where !option.isAtHome && settings[key].map({ $0 != "no" }) ?? false {
            throw option.refusal("it runs a script of this host")
        }
        return .written
    }

    // MARK: blank copies

    @Sendable private static func emptyBackend(_ copy: inout BlankCopy, _ option: ParsedOption) {
        guard let id = option.settings["id"].map(KeyValue.escape) else { return }
        if option.settings["type"] == "user" {
            // It has a state of its own in the stream, which an older library may not take.
            copy.options.append(GuestOption("netdev", "user,restrict=on,id=\(id)"))
        } else {
            copy.hubs += 1
            copy.options.append(GuestOption("netdev", "hubport,id=\(id),hubid=\(copy.hubs)"))
        }
    }

    @Sendable private static func emptyCard(_ copy: inout BlankCopy, _ option: ParsedOption) {
        let settings = option.settings
        if ["none", "nic"].contains(settings["type"] ?? "") { return copy.options.append(option.written) }
        let kept = ["model", "mac", "macaddr", "id", "addr"].compactMap { key in
            settings[key].map { ",\(key)=\(KeyValue.escape($0))" }
        }
        copy.options.append(GuestOption(option.name, "user,restrict=on" + kept.joined()))
    }
}
