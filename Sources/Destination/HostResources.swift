internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// What a command line wants of this host besides files: ports that must be free, interfaces that must be there.
struct HostResources: Sendable {
    private let listeners: [GuestEndpoint]
    private let interfaces: [String]
    private let hugePages: [String]

    init(_ commandLine: GuestCommandLine) throws {
        listeners = try commandLine.endpoints().filter { $0.role == .listens }
        interfaces = try commandLine.bridges()
        hugePages = try commandLine.hugePages()
    }

    /// Why the guest cannot have what it wants; empty when it can. Blocks: it resolves names.
    ///
    /// - Parameter abandonment: when that has happened nobody wants to know any more.
    func problems(until abandonment: Abandonment) -> [Obstacle] {
        var problems: [Obstacle] = []
        for endpoint in listeners where !abandonment.hasHappened {
            // Where QEMU may have one of several ports, it looks for a free one itself.
            guard let ports = endpoint.ports, ports.count == 1, let port = ports.first else { continue }
            if let reason = Self.refusal(endpoint, port) {
                problems.append(
                    .init(.listeners, "The port \(port) of \(endpoint.option) cannot be opened on this host: \(reason)")
                )
            }
        }
        for name in interfaces {
            let reason =
                DurableFile.exists("/sys/class/net/\(name)")
                ? "The network bridge '\(name)' would be joined by QEMU's helper, which a guest of another host may not start; "
                    + "give it a tap interface (-netdev tap,ifname=), or start the move with --network \(name)=BRIDGE"
                : "The network bridge '\(name)' is not there on this host; the move can be started with --network \(name)=BRIDGE"
            problems.append(.init(.network, reason))
        }
        for path in Set(hugePages).sorted() where xd_is_huge_page_file_system(path) != 1 {
            problems.append(.init(.memory, "The directory \(path) is no file system of huge pages on this host"))
        }
        return problems
    }

    private static func refusal(_ endpoint: GuestEndpoint, _ port: UInt16) -> String? {
        var hints = addrinfo()
        let name = HostAddress.withoutBrackets(endpoint.host ?? "")
        hints.ai_flags = AI_PASSIVE
        hints.ai_family = name.isEmpty ? AF_INET : AF_UNSPEC
        hints.ai_socktype = Int32((endpoint.isDatagram ? SOCK_DGRAM : SOCK_STREAM).rawValue)
        var found: UnsafeMutablePointer<addrinfo>?
        let code = getaddrinfo(name.isEmpty ? "0.0.0.0" : name, "\(port)", &hints, &found)
        guard code == 0, let address = found else { return String(cString: gai_strerror(code)) }
        defer { freeaddrinfo(found) }
        let descriptor = xd_socket(address.pointee.ai_family, hints.ai_socktype)
        guard descriptor >= 0 else { return String(cString: strerror(errno)) }
        defer { close(descriptor) }
        var on: Int32 = 1
        setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &on, socklen_t(MemoryLayout<Int32>.size))
        if bind(descriptor, address.pointee.ai_addr, address.pointee.ai_addrlen) != 0 {
            return String(cString: strerror(errno))
        }
        // Only who listens needs the port alone.
        if !endpoint.isDatagram, listen(descriptor, 1) != 0 { return String(cString: strerror(errno)) }
        return nil
    }
}
