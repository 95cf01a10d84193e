internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import Migration
internal import NBD
internal import TLS

/// The way to one agent: whether it can be reached, who answers, and what the line carries. Confined to its loop.
struct HostProbe {
    /// The agent.
    let peer: ControlConnection.Peer
    /// A client's.
    let credentials: any TLSCredentials
    let loop: EventLoop

    /// How long a connection, a handshake or half a MiB may take.
    private static let patience = Duration.seconds(10)

    /// Connects to the control port and proves who both are.
    ///
    /// - Returns: what was found; the way is open when nothing in it fails.
    func controlPort() async -> [Finding] {
        let socket: SocketChannel
        do {
            socket = try await SocketChannel.connect(to: peer.address, on: loop)
        } catch {
            return [unreachable(peer.address, "\(error)")]
        }
        let line = Line(of: socket)
        do {
            let channel = try await TLSChannel.handshake(
                over: socket,
                credentials: credentials,
                hostname: peer.host,
                timeout: Self.patience
            )
            try? await channel.finishWriting()
            channel.close()
            if let identity = peer.identity, channel.session.peer.name != identity {
                return [
                    Finding(
                        .certificate,
                        .fail,
                        there: channel.session.peer.name.shown(most: 200),
                        message: "\(peer.address) proved to be another one than '\(identity)'",
                        remedy: "see that the name leads to the right host"
                    )
                ]
            }
            return [
                Finding(.ports, .ok, there: "\(peer.port)"),
                Finding(.certificate, .ok, there: channel.session.peer.name.shown(most: 200)),
                line.finding,
            ]
        } catch let error as ChannelError where error.code == .timedOut {
            // The connection came about, so small packets get through.
            return [
                Finding(
                    .mtu,
                    .fail,
                    here: line.text,
                    message:
                        "\(peer.address) takes connections, and a handshake does not get through: on the way there packets of the "
                        + "interface's size are dropped without a word, or the agent hangs",
                    remedy: "ping -M do -s 1472 \(peer.host); ip link set dev INTERFACE mtu 1500"
                )
            ]
        } catch {
            return [
                Finding(
                    .certificate,
                    .fail,
                    message: "\(error)",
                    remedy: "crossdock pki check /etc/pki/crossdock, on both hosts"
                )
            ]
        }
    }

    /// Connects to the NBD server and proves who both are.
    func nbdPort(_ port: UInt16) async -> Finding {
        let address = peer.address.with(port: port)
        do {
            let socket = try await SocketChannel.connect(to: address, on: loop)
            let options = NBDClientOptions(
                export: "",
                credentials: credentials,
                hostname: peer.host,
                timeout: Self.patience
            )
            let negotiation = try await NBDNegotiation.start(over: socket, options)
            await negotiation.abort()
            return Finding(.ports, .ok, there: "\(port)")
        } catch let error as ChannelError where [.tls, .timedOut].contains(error.code) {
            return Finding(
                .ports,
                .fail,
                there: "\(port)",
                message: "\(address) answers, and is no NBD server that this host may use: \(error)",
                remedy: "see --nbd-listen of the agent there, and what listens on that port"
            )
        } catch { return unreachable(address, "\(error)") }
    }

    private func unreachable(_ address: SocketAddress, _ reason: String) -> Finding {
        Finding(
            .ports,
            .fail,
            there: "\(address.port ?? 0)",
            message: "\(address) cannot be reached: \(reason)",
            remedy:
                "systemctl status crossdock-destination there; nft list ruleset: TCP 10808 and 10809 have to be open"
        )
    }

    // MARK: the line

    /// What one connection says of the way.
    private struct Line {
        /// Bytes that a packet may have on the way, as far as the kernel knows; 0 when it does not.
        var path = 0
        /// Bytes that the interface sends in one packet; 0 when it is not known.
        var interface = 0

        init(of socket: SocketChannel) {
            var value: Int32 = 0
            var size = socklen_t(MemoryLayout<Int32>.size)
            let isVersion6 = socket.peerAddress?.host?.contains(":") == true
            let (level, name) = isVersion6 ? (Int32(IPPROTO_IPV6), IPV6_MTU) : (Int32(IPPROTO_IP), IP_MTU)
            if getsockopt(socket.descriptor, level, name, &value, &size) == 0 { path = Int(value) }
            guard let host = socket.localAddress?.host, let name = Self.interface(of: host) else { return }
            let text = ((try? DurableFile.read("/sys/class/net/\(name)/mtu")) ?? nil) ?? []
            // Loopback promises more than a packet of IP can have.
            interface = min(Int(String(decoding: text.filter { $0 != 10 }, as: UTF8.self)) ?? 0, 65535)
        }

        var text: String { interface > 0 ? "\(path) of \(interface)" : "\(path)" }

        var finding: Finding {
            guard path > 0, interface > 0, path < interface else { return Finding(.mtu, .ok, here: text) }
            return Finding(
                .mtu,
                .warn,
                here: text,
                message:
                    "The way carries packets of \(path) bytes, and the interface sends \(interface): large transfers begin slowly",
                remedy: "give both ends and all between them the same MTU: ip link set dev INTERFACE mtu \(path)"
            )
        }

        private static func interface(of address: String) -> String? {
            var list: UnsafeMutablePointer<ifaddrs>?
            guard getifaddrs(&list) == 0 else { return nil }
            defer { freeifaddrs(list) }
            var next = list
            while let entry = next {
                next = entry.pointee.ifa_next
                guard let raw = entry.pointee.ifa_addr else { continue }
                let family = Int32(raw.pointee.sa_family)
                guard family == AF_INET || family == AF_INET6 else { continue }
                var text = [CChar](repeating: 0, count: 128)
                let size = family == AF_INET ? MemoryLayout<sockaddr_in>.size : MemoryLayout<sockaddr_in6>.size
                guard getnameinfo(raw, socklen_t(size), &text, 128, nil, 0, NI_NUMERICHOST) == 0 else { continue }
                let found = String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
                if found == address { return String(cString: entry.pointee.ifa_name) }
            }
            return nil
        }
    }

    /// Measures the line with the agent's help.
    ///
    /// - Parameter plan: names the agent; nothing of it is carried out.
    func rate(_ plan: MigrationPlan) async -> Finding {
        let control: ControlConnection
        do {
            control = try await ControlConnection.open(plan, credentials: credentials, on: loop).0
        } catch let error as MigrationError where error.code == .security {
            // With TLS 1.3 a client learns only now that it was refused.
            return Finding(
                .certificate,
                .fail,
                message: error.message,
                remedy: "crossdock pki check /etc/pki/crossdock, on both hosts"
            )
        } catch {
            return Finding(.agent, .fail, message: "\(error)", remedy: "crossdock doctor on the other host")
        }
        defer { control.close() }
        do {
            let measure = try await LinkMeasure.take(over: control)
            let text = Self.text(measure)
            await control.end()
            return Finding(.convergence, .ok, here: text)
        } catch {
            return Finding(
                .mtu,
                .fail,
                message: "Half a MiB does not get through to \(peer.host): \(error)",
                remedy: "ping -M do -s 1472 \(peer.host); ip link set dev INTERFACE mtu 1500"
            )
        }
    }

    /// A round trip and a rate for people.
    static func text(_ measure: LinkMeasure) -> String {
        let trip = (measure.roundTrip * 10).rounded() / 10
        return "\(trip) ms, \(Int(measure.rate) >> 20) MiB/s"
    }
}
