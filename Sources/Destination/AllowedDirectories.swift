internal import Glibc
internal import IO

/// The directories of this host in which a guest of another host may name files: everything else of its is brought along.
public struct AllowedDirectories: Sendable {
    /// Where distributions keep what every host has: firmware, boot ROMs and the device trees of boards.
    public static let firmware = [
        "/usr/share/qemu", "/usr/local/share/qemu", "/usr/share/qemu-efi-aarch64", "/usr/share/qemu-efi-arm",
        "/usr/share/qemu-efi-riscv64", "/usr/share/qemu-kvm", "/usr/share/OVMF", "/usr/share/ovmf", "/usr/share/AAVMF",
        "/usr/share/edk2", "/usr/share/edk2-ovmf", "/usr/share/seabios", "/usr/share/seavgabios", "/usr/share/vgabios",
        "/usr/share/ipxe", "/usr/lib/ipxe", "/usr/share/opensbi", "/usr/share/u-boot-qemu", "/usr/share/openbios",
        "/usr/share/slof", "/usr/share/skiboot",
    ]

    /// As they are when links are followed.
    private let roots: [String]

    /// Makes a list.
    ///
    /// - Parameter listed: absolute directories besides those with firmware.
    public init(_ listed: [String] = []) {
        roots = (Self.firmware + listed).map { DurableFile.resolve($0, in: "/") }
    }

    /// Whether a path leads into one of them, links followed. Nothing is opened.
    public func contain(_ path: String) -> Bool {
        guard path.hasPrefix("/"), !path.split(separator: "/").contains(".."), let found = realpath(path, nil) else {
            return false
        }
        defer { free(found) }
        let real = String(cString: found)
        return roots.contains { real == $0 || real.hasPrefix($0.hasSuffix("/") ? $0 : $0 + "/") }
    }

    /// What to do about something that is in none of them.
    ///
    /// - Parameter path: a directory, or a file; then its directory is advised.
    static func advice(_ path: String, isDirectory: Bool) -> String {
        let parts = path.split(separator: "/")
        let directory = (isDirectory ? parts[...] : parts.dropLast()).joined(separator: "/")
        return "no directory that this host lists for guests; if guests may read it, start the destination with "
            + "--allow-directory /\(directory)"
    }
}
