internal import Glibc

/// What the first bytes of a file make QEMU believe that it is.
enum ImageHeader {
    /// Whether QEMU, which guesses a file's format, would open nothing else because of what is in it.
    ///
    /// A raw image, a kernel or an ISO image refers to nothing. A qcow2 image may name a backing file and a data file (QEMU's
    /// `docs/interop/qcow2`); other formats that may are not taken at all.
    static func isAlone(_ path: String) -> Bool {
        let fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard fd >= 0 else { return false }
        defer { close(fd) }
        var head = [UInt8](repeating: 0, count: 104)
        let count = pread(fd, &head, head.count, 0)
        guard count >= 0 else { return false }
        func starts(with text: String) -> Bool { head.starts(with: Array(text.utf8)) }
        func number(_ range: Range<Int>) -> UInt64 { head[range].reduce(0) { $0 << 8 | UInt64($1) } }
        if head.starts(with: [0x51, 0x46, 0x49, 0xfb]) {
            let hasBacking = number(8..<16) != 0
            // Bit 2 of the incompatible features: the data is in another file.
            let hasDataFile = number(4..<8) >= 3 && number(72..<80) & 4 != 0
            return !hasBacking && !hasDataFile && number(4..<8) >= 2
        }
        let others = [
            "QED\0", "KDMV", "COWD", "# Disk", "vhdxfile", "conectix", "WithoutFreeSpace", "WithouFreSpacExt",
        ]
        return !others.contains(where: starts)
    }
}
