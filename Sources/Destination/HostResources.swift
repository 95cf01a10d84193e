internal import CLinux
internal import Emulator
internal import Glibc
internal import IO

/// What a command line wants of this host besides files: ports that must be free, interfaces that must be there.
struct HostResources: Sendable {
    private let ports: [GuestCommandLine.HostPort]
    private let interfaces: [String]
    private let hugePages: [String]

    init(_ commandLine: GuestCommandLine) throws {
        ports = try commandLine.hostPorts()
        interfaces = try commandLine.bridges()
        hugePages = try commandLine.hugePages()
    }

    /// Why the guest cannot have what it wants; empty when it can. Blocks: it resolves names.
    ///
    /// - Parameter abandonment: when that has happened nobody wants to know any more.
    func problems(until abandonment: Abandonment) -> [String] {
        var problems: [String] = []
        for port in ports where !abandonment.hasHappened {
            if let reason = Self.refusal(port) {
                problems.append("The port \(port.port) of \(port.option) cannot be opened on this host: \(reason)")
            }
        }
        for name in interfaces {
            problems.append(
                DurableFile.exists("/sys/class/net/\(name)")
                    ? "The network bridge '\(name)' would be joined by QEMU's helper, which a guest of another host may not start; "
                        + "give it a tap interface (-netdev tap,ifname=)"
                    : "The network bridge '\(name)' is not there on this host"
            )
        }
        for path in Set(hugePages).sorted() where xd_is_huge_page_file_system(path) != 1 {
            problems.append("The directory \(path) is no file system of huge pages on this host")
        }
        return problems
    }

    private static func refusal(_ port: GuestCommandLine.HostPort) -> String? {
        var hints = addrinfo()
        hints.ai_flags = AI_PASSIVE
        hints.ai_family = port.host.isEmpty ? AF_INET : AF_UNSPEC
        hints.ai_socktype = Int32((port.isDatagram ? SOCK_DGRAM : SOCK_STREAM).rawValue)
        var found: UnsafeMutablePointer<addrinfo>?
        let host = port.host.isEmpty ? "0.0.0.0" : port.host
        let code = getaddrinfo(host, "\(port.port)", &hints, &found)
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
        if !port.isDatagram, listen(descriptor, 1) != 0 { return String(cString: strerror(errno)) }
        return nil
    }
}
