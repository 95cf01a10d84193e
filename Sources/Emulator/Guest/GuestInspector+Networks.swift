internal import IO

/// Network back ends that were added at run time, and what was changed of them: QEMU tells it only as text for people.
extension GuestInspector {
    mutating func addNetworks() async throws {
        let known = ids("netdev").union(ids("nic")).union(ids("net"))
        let text = try await monitor.execute("human-monitor-command", ["command-line": "info network"]).string ?? ""
        for raw in text.split(whereSeparator: \.isNewline) {
            var line = raw.trimmed
            if line.hasPrefix("\\ ") { line = String(line.dropFirst(2)) }
            guard let colon = line.firstRange(of: ": index="), !line.contains("type=nic") else { continue }
            let id = String(line[..<colon.lowerBound])
            let settings = String(line[line.index(colon.lowerBound, offsetBy: 2)...])
            guard let type = BlockOptions.value(of: "type", in: settings), !known.contains(id),
                // QEMU's own networks, of -net and -nic and by default, have names that nobody can give.
                id.first?.isLetter == true, id.allSatisfy({ $0.isLetter || $0.isNumber || "._-".contains($0) })
            else { continue }
            let argument: String
            if type == "user" {
                guard BlockOptions.value(of: "net", in: settings) == Self.usualNetwork else {
                    block(
                        "The network back end '\(id)' was added at run time with another network than \(Self.usualNetwork)/24, and cannot be "
                            + "described"
                    )
                    continue
                }
                let isRestricted = BlockOptions.value(of: "restrict", in: settings) == "on"
                argument = "user,id=\(id)\(isRestricted ? ",restrict=on" : "")"
            } else if type == "tap",
                let interface = BlockOptions.value(of: "ifname", in: settings),
                let script = BlockOptions.value(of: "script", in: settings),
                let downscript = BlockOptions.value(of: "downscript", in: settings)
            {
                argument = "tap,id=\(id),ifname=\(interface),script=\(script),downscript=\(downscript)"
            } else {
                block("The network back end '\(id)' (\(type)) was added at run time and cannot be described")
                continue
            }
            options.append(GuestOption("netdev", argument))
            note("-netdev \(argument): added at run time")
        }
        try await followForwards()
    }

    /// Finds the networks that are interfaces of this host, and which they are where QEMU or its helper has named them.
    mutating func findNetworks() async throws {
        var networks = try result.commandLine.hostNetworks()
        let unnamed = networks.indices.filter { networks[$0].tap == nil }
        if !unnamed.isEmpty {
            let text = try await monitor.execute("human-monitor-command", ["command-line": "info network"]).string ?? ""
            for line in text.split(whereSeparator: \.isNewline) {
                guard let colon = line.firstRange(of: ": index=") else { continue }
                let id = line[..<colon.lowerBound].trimmed.drop { $0 == "\\" || $0 == " " }
                for index in unnamed where networks[index].id.map({ $0 == id }) ?? false {
                    networks[index].tap = BlockOptions.value(of: "ifname", in: String(line[colon.upperBound...]))
                }
            }
            // What no name leads to is what is left.
            let rest = unnamed.filter { networks[$0].tap == nil }
            let open = Set(emulator?.tapInterfaces ?? []).subtracting(networks.compactMap(\.tap))
            if rest.count == 1, let tap = open.first, open.count == 1 { networks[rest[0]].tap = tap }
        }
        let interfaces = NetworkInterfaces()
        for index in networks.indices {
            guard let tap = networks[index].tap else { continue }
            networks[index].bridge = interfaces.bridge(of: tap) ?? networks[index].bridge
        }
        result.networks = networks
    }

    /// QEMU's network of `-netdev user`, if none is given.
    private static let usualNetwork = "10.0.2.0"

    /// A port of the host that leads into the guest: `hostfwd` of `-netdev user`, and `hostfwd_add`.
    private struct Forward: Hashable {
        var transport: String
        /// `*` for all addresses.
        var address: String
        var port: String
        /// Nil for the first address that the guest may have.
        var guestAddress: String?
        var guestPort: String

        /// A row of `info usernet`, `TCP[HOST_FORWARD] FD ADDRESS PORT ADDRESS PORT RECVQ SENDQ`; nil for another row.
        init?(row: Substring) {
            let words = row.split(separator: " ").map(String.init)
            guard words.count >= 6, words[0].hasSuffix("[HOST_FORWARD]") else { return nil }
            transport = words[0].hasPrefix("UDP") ? "udp" : "tcp"
            (address, port, guestPort) = (words[2], words[3], words[5])
            guestAddress = words[4] == "10.0.2.15" ? nil : words[4]
        }

        /// `[tcp|udp]:[ADDRESS]:PORT-[ADDRESS]:PORT`; nil for what is not of this form.
        init?(rule: String) {
            let sides = rule.split(separator: "-", omittingEmptySubsequences: false)
            guard sides.count == 2 else { return nil }
            let host = sides[0].split(separator: ":", omittingEmptySubsequences: false).map(String.init)
            let guest = sides[1].split(separator: ":", omittingEmptySubsequences: false).map(String.init)
            guard host.count == 3, guest.count == 2, !host[2].isEmpty, !guest[1].isEmpty else { return nil }
            transport = host[0].isEmpty ? "tcp" : host[0]
            (address, port, guestPort) = (["", "0.0.0.0"].contains(host[1]) ? "*" : host[1], host[2], guest[1])
            guestAddress = ["", "10.0.2.15"].contains(guest[0]) ? nil : guest[0]
        }

        var rule: String {
            "\(transport):\(address == "*" ? "" : address):\(port)-\(guestAddress ?? ""):\(guestPort)"
        }
    }

    /// Forwards that were added or removed at run time (hostfwd_add, hostfwd_remove) become part of the description.
    private mutating func followForwards() async throws {
        let users = options.indices.filter {
            options[$0].name == "netdev" && options[$0].value("type", implied: "type") == "user"
        }
        if users.isEmpty { return }
        let text = try await monitor.execute("human-monitor-command", ["command-line": "info usernet"]).string ?? ""
        var found: [String: [Forward]] = [:]
        var network = ""
        for line in text.split(whereSeparator: \.isNewline) {
            if let open = line.firstIndex(of: "("), line.hasSuffix("):\r") || line.hasSuffix("):") {
                network = String(line[line.index(after: open)...].prefix { $0 != ")" })
            } else if let forward = Forward(row: line) {
                found[network, default: []].append(forward)
            }
        }
        for index in users {
            guard let argument = options[index].argument, let id = options[index].value("id", implied: "type") else {
                continue
            }
            let pieces = argument.split(separator: ",", omittingEmptySubsequences: false).map(String.init)
            let rules = pieces.filter { $0.hasPrefix("hostfwd=") }.map { String($0.dropFirst(8)) }
            let known = rules.compactMap(Forward.init(rule:))
            let now = found[id] ?? []
            // What this does not understand is left as it was written.
            guard known.count == rules.count, Set(known) != Set(now) else { continue }
            guard !argument.hasPrefix("{"), !argument.contains(",,"), !argument.contains("net=") else {
                block(
                    "The forwards of the network back end '\(id)' were changed at run time, and cannot be described; undo that with "
                        + "hostfwd_add and hostfwd_remove"
                )
                continue
            }
            let kept = pieces.filter { !$0.hasPrefix("hostfwd=") }
            let changed = (kept + now.map { "hostfwd=\($0.rule)" }).joined(separator: ",")
            options[index].argument = changed
            note("-netdev \(argument): \(changed), as it was changed at run time")
        }
    }
}
