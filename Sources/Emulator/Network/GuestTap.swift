internal import CLinux
internal import Glibc
internal import IO

/// A tap interface that Crossdock has made for a guest, in a bridge of this host.
///
/// It is made before the guest's QEMU is started and removed with the guest. A note on the interface says whose it is, so that nobody
/// else's is ever removed.
public struct GuestTap: Sendable, Hashable, Codable {
    /// What the network was on the host that the guest came from.
    public struct Former: Sendable, Hashable, Codable {
        /// The interface.
        public var tap: String
        /// The bridge that it was in; nil for none.
        public var bridge: String?

        /// Describes a network.
        public init(tap: String, bridge: String?) {
            self.tap = tap
            self.bridge = bridge
        }
    }

    /// The interface's name.
    public var name: String
    /// The bridge.
    public var bridge: String
    /// Whether it has several queues.
    public var hasQueues: Bool
    /// What it was where the guest came from.
    public var former: Former?

    /// Describes a tap.
    public init(name: String, bridge: String, hasQueues: Bool, former: Former? = nil) {
        self.name = name
        self.bridge = bridge
        self.hasQueues = hasQueues
        self.former = former
    }

    /// The note on the interface: `ip link` shows it.
    private static func note(of guest: String) -> String { "crossdock guest \(guest)" }

    /// Whether the interface is there, and was made for a guest.
    public func isThere(for guest: String, _ interfaces: NetworkInterfaces = NetworkInterfaces()) -> Bool {
        interfaces.note(on: name) == Self.note(of: guest)
    }

    /// Makes the interface, puts it up and into its bridge. One that is there for the guest already is used.
    ///
    /// - Parameters:
    ///   - guest: whose it is.
    ///   - owner: the user of its QEMU.
    ///   - interfaces: those of this host.
    /// - Throws: `GuestError` that says what is in the way.
    func make(for guest: String, owner: UInt32, _ interfaces: NetworkInterfaces = NetworkInterfaces()) throws {
        let isNew = !isThere(for: guest, interfaces)
        guard xd_tap_make(name, owner, hasQueues ? 1 : 0, isNew ? 1 : 0) == 0 else { throw failure("make", errno) }
        // The bridge takes the lowest address of its ports for its own, and the least MTU.
        var address = (0..<6).map { _ in UInt8.random(in: 0...255) }
        address[0] = 0xfe
        guard xd_link_join(name, bridge, interfaces.mtu(of: bridge) ?? 0, address, Self.note(of: guest)) == 0 else {
            let failure = failure("put into the bridge '\(bridge)'", errno)
            if isNew { xd_link_remove(name) }
            throw failure
        }
    }

    private func failure(_ action: String, _ code: Int32) -> GuestError {
        let reason =
            switch code {
            case EBUSY, EEXIST: "an interface of that name is there already"
            case ENODEV: "there is no such bridge on this host"
            case EPERM, EACCES: "only root, or who has CAP_NET_ADMIN, may do that"
            default: String(cString: strerror(code))
            }
        return GuestError("Cannot \(action) the tap interface '\(name)': \(reason)")
    }

    /// Removes the interface, if it is the guest's.
    ///
    /// - Returns: why it is still there, a sentence; nil when it is not.
    @discardableResult
    public func remove(for guest: String) -> String? {
        guard isThere(for: guest), xd_link_remove(name) != 0, errno != ENODEV else { return nil }
        return "Cannot remove the tap interface '\(name)' of guest '\(guest)': \(String(cString: strerror(errno))); "
            + "'ip link del \(name)' does"
    }

    /// Why this process cannot make tap interfaces; nil when it can.
    public static func obstacle() -> String? {
        guard access("/dev/net/tun", R_OK | W_OK) == 0 else {
            return "/dev/net/tun cannot be opened: \(String(cString: strerror(errno)))"
        }
        return ProcessCapabilities.has(ProcessCapabilities.networkAdministration)
            ? nil : "only root, or who has CAP_NET_ADMIN, may do that"
    }
}
