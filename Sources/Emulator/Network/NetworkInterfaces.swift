internal import Glibc
internal import IO

/// The network interfaces of a host, as the kernel shows them.
public struct NetworkInterfaces: Sendable {
    private let directory: String

    /// Looks at a host's interfaces.
    ///
    /// - Parameter directory: where each has a directory.
    public init(_ directory: String = "/sys/class/net") { self.directory = directory }

    private func path(_ name: String, _ file: String) -> String? {
        // As the kernel takes names (dev_valid_name): what is longer or has a slash is none.
        guard !name.isEmpty, name.utf8.count < 16, !name.contains("/"), name != ".", name != ".." else { return nil }
        return "\(directory)/\(name)/\(file)"
    }

    private func text(_ name: String, _ file: String) -> String? {
        guard let path = path(name, file), let bytes = (try? DurableFile.read(path)) ?? nil else { return nil }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").first.map(String.init)
    }

    /// Whether there is an interface of a name.
    public func isThere(_ name: String) -> Bool { path(name, "ifindex").map(DurableFile.exists) ?? false }

    /// Whether there is a bridge of a name.
    public func isBridge(_ name: String) -> Bool { path(name, "bridge").map(DurableFile.exists) ?? false }

    /// What its operator has noted on an interface; nil for nothing.
    func note(on name: String) -> String? { text(name, "ifalias") }

    /// The most that an interface sends in one packet; nil when that is not known.
    func mtu(of name: String) -> UInt32? { text(name, "mtu").flatMap { UInt32($0) } }

    /// Whether somebody has attached to a tap that is up.
    func isAttached(_ name: String) -> Bool { text(name, "carrier") == "1" }

    /// Whether an interface that is a port of a bridge carries nothing yet: a bridge waits (`forward_delay`) with a new port.
    public func isWaiting(_ name: String) -> Bool {
        // Listening and learning; one that is disabled or blocked stays so.
        ["1", "2"].contains(text(name, "brport/state"))
    }

    /// Whether an interface was put up.
    public func isUp(_ name: String) -> Bool {
        // IFF_UP is 1.
        text(name, "flags").flatMap { ByteSize.parse($0) }.map { $0 & 1 != 0 } ?? true
    }

    /// Whether a QEMU can attach to a tap that is there, in a bridge, and that nobody uses.
    public func isFree(tap name: String, in bridge: String, for user: TapUser) -> Bool {
        isTap(name) && self.bridge(of: name) == bridge && !isAttached(name) && obstacle(toTap: name, for: user) == nil
    }

    /// Whether there is a tap interface of a name.
    public func isTap(_ name: String) -> Bool {
        // IFF_TUN is 1, IFF_TAP 2.
        text(name, "tun_flags").flatMap { ByteSize.parse($0) }.map { $0 & 2 != 0 } ?? false
    }

    /// Who besides root may attach to a tap interface; nil for everybody.
    private func number(_ name: String, _ file: String) -> UInt32? {
        text(name, file).flatMap { UInt32($0) }
    }

    /// Why a QEMU may not attach to a tap interface, whose owner or group lets others only; nil when it may.
    public func obstacle(toTap name: String, for user: TapUser) -> String? {
        let (owner, group) = (number(name, "owner"), number(name, "group"))
        switch user {
        case .everything: return nil
        case .itsOwn where owner != nil || group != nil:
            let who = owner.map { "user \($0)" } ?? "group \(group ?? 0)"
            return
                "The tap interface '\(name)' is for \(who) only, and guests have users of their own on this host; make it without an owner "
                + "(ip tuntap add \(name) mode tap)"
        case .user(let number) where owner.map({ $0 != number }) ?? false:
            return
                "The tap interface '\(name)' is for user \(owner ?? 0) only, and guests run as user \(number) on this host; make it for "
                + "that one (ip tuntap add \(name) mode tap user \(number))"
        case .itsOwn, .user: return nil
        }
    }

    /// The bridge that an interface is a port of; nil when it is none.
    public func bridge(of name: String) -> String? {
        guard let path = path(name, "master") else { return nil }
        var buffer = [CChar](repeating: 0, count: 4096)
        let count = readlink(path, &buffer, buffer.count)
        guard count > 0 else { return nil }
        let link = String(decoding: buffer.prefix(count).map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return link.split(separator: "/").last.map(String.init)
    }
}
