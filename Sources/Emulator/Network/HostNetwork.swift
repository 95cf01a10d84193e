internal import IO

/// A network of a guest that is an interface of its host: a tap, or a port of a bridge that QEMU's helper makes.
public struct HostNetwork: Sendable, Hashable {
    /// Its place among the options of the command line.
    let position: Int
    /// The option, as it is written.
    public let option: String
    /// What the back end is called; nil for one without a name.
    public let id: String?
    /// The interface; nil when it is not known.
    public var tap: String?
    /// The bridge that it is in; nil when it is in none, or that is not known.
    public var bridge: String?
    /// Whether QEMU runs a program of the host for it: `script=`, `downscript=`, `helper=`.
    public let runsProgram: Bool
    /// Whether it has several queues.
    public let hasQueues: Bool

    /// What an operator may call it by.
    public var names: [String] { [tap, bridge].compactMap { $0 } }

    /// How it is shown: `tap0 (in the bridge br0)`.
    public var shown: String {
        switch (tap, bridge) {
        case (let tap?, let bridge?): "\(tap) (in the bridge \(bridge))"
        case (let tap?, nil): "\(tap) (in no bridge)"
        case (nil, let bridge?): "one in the bridge \(bridge)"
        case (nil, nil): "one without a name"
        }
    }
}

extension GuestCommandLine {
    /// The networks that are interfaces of the host, without those that came as descriptors.
    public func hostNetworks() throws -> [HostNetwork] {
        try options().enumerated().compactMap { position, option in
            guard Self.isNetwork(option) else { return nil }
            let settings = try BlockOptions(parsing: option.argument ?? "", implied: "type")
            guard Self.joinsHost(settings) else { return nil }
            let isBridge = settings["type"] == "bridge"
            return HostNetwork(
                position: position,
                option: "-\(option.name) \(option.argument ?? "")",
                id: settings["id"],
                tap: settings["ifname"],
                bridge: settings["br"] ?? (isBridge ? "br0" : nil),
                runsProgram: ["script", "downscript", "helper"].contains { key in
                    settings[key].map { $0 != "no" } ?? false
                },
                hasQueues: (settings["queues"].flatMap { Int($0) } ?? 1) > 1
            )
        }
    }

    /// The command line with networks whose taps are there, under these names, when QEMU starts.
    ///
    /// - Parameter taps: the interface of each network, by the network's place among the options.
    public func joining(_ taps: [HostNetwork: String]) throws -> GuestCommandLine {
        if taps.isEmpty { return self }
        let names = Dictionary(taps.map { ($0.key.position, $0.value) }) { first, _ in first }
        let options = try options().enumerated().map { position, option in
            guard let tap = names[position] else { return option }
            var settings = try BlockOptions(parsing: option.argument ?? "", implied: "type")
            settings.set("type", .string("tap"))
            for key in ["br", "helper"] { settings.remove(key) }
            settings.set("ifname", .string(tap))
            for key in ["script", "downscript"] { settings.set(key, .string("no")) }
            return GuestOption(option.name, settings.text)
        }
        return GuestCommandLine(program: program, options: options, directory: directory)
    }

    /// The command line with other names of taps.
    public func renamingTaps(_ names: [String: String]) throws -> GuestCommandLine {
        let networks = try hostNetworks().compactMap { network in
            network.tap.flatMap { names[$0] }.map { (network, $0) }
        }
        return try joining(Dictionary(networks) { first, _ in first })
    }

    /// The command line without the programs of the host that QEMU runs for networks: whether those can be mapped is judged when it is
    /// known to which bridges.
    var withoutNetworkPrograms: GuestCommandLine {
        guard let networks = try? hostNetworks() else { return self }
        let running = networks.filter(\.runsProgram).map { ($0, $0.tap ?? "unnamed") }
        return (try? joining(Dictionary(running) { first, _ in first })) ?? self
    }

    private static func isNetwork(_ option: GuestOption) -> Bool { ["netdev", "nic", "net"].contains(option.name) }

    private static func joinsHost(_ settings: BlockOptions) -> Bool {
        guard settings["type"] == "bridge" || settings["type"] == "tap" else { return false }
        return !settings.has("fd") && !settings.has("fds")
    }
}
