internal import Glibc

/// As whom the QEMUs of guests attach to tap interfaces.
public enum TapUser: Sendable, Hashable {
    /// As root, with its capabilities.
    case everything
    /// As users of their own, without capabilities.
    case itsOwn
    /// As a user without capabilities.
    case user(UInt32)

    /// The device through which interfaces are reached.
    private static let device = "/dev/net/tun"

    /// Why these users cannot open the device of tap interfaces; nil when they can. Its group is given to who has a user of its own.
    public var obstacleToDevice: String? {
        var status = stat()
        guard self == .itsOwn else {
            return self == .everything || access(Self.device, R_OK | W_OK) == 0
                ? nil
                : "The users of guests may not open \(Self.device) on this host: \(String(cString: strerror(errno)))"
        }
        guard stat(Self.device, &status) == 0 else {
            return
                "There is no \(Self.device) on this host, through which QEMU attaches to tap interfaces; 'modprobe tun' makes it"
        }
        let isOpen = status.st_mode & 0o006 == 0o006 || status.st_mode & 0o060 == 0o060 && status.st_gid != 0
        return isOpen
            ? nil
            : "The users of guests may not open \(Self.device) on this host, through which QEMU attaches to tap interfaces; as udev makes "
                + "it they may (chmod 0666 \(Self.device))"
    }
}
