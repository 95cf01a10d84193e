internal import Emulator
internal import Glibc

/// What the first bytes of a file make QEMU believe that it is.
enum ImageHeader {
    /// What a file is, by its beginning.
    private enum Kind: Equatable {
        /// Nothing that refers to other files.
        case plain
        case luks
        /// A qcow2 image; `isAlone` when it names neither a backing file nor a data file.
        case qcow2(isAlone: Bool)
        /// A format that is not taken along.
        case other
    }

    /// Whether QEMU, which guesses a file's format, would open nothing else because of what is in it.
    static func isAlone(_ path: String) -> Bool { [.plain, .luks, .qcow2(isAlone: true)].contains(kind(path)) }

    /// The format in which QEMU is to open a file, so that it opens no other.
    ///
    /// Raw contents refer to nothing, whatever is in them. A qcow2 image may name a backing file and a data file (QEMU's
    /// `docs/interop/qcow2`); other formats that may are not taken at all.
    ///
    /// - Throws: `GuestError` for a file that refers to others, or may.
    static func format(of path: String, _ reference: GuestCommandLine.PathReference) throws -> String {
        let kind = kind(path)
        let refusal = GuestError(
            "The file \(reference.path) of \(reference.option) refers to other files of this host, or may; give the guest a raw one"
        )
        switch (reference.format, kind) {
        case ("raw", _): return "raw"
        case ("qcow2", .qcow2(isAlone: true)), (nil, .qcow2(isAlone: true)): return "qcow2"
        case ("luks", .luks), (nil, .luks): return "luks"
        case (nil, .plain): return "raw"
        default: throw refusal
        }
    }

    private static func kind(_ path: String) -> Kind {
        let fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard fd >= 0 else { return .other }
        defer { close(fd) }
        var head = [UInt8](repeating: 0, count: 104)
        let count = pread(fd, &head, head.count, 0)
        guard count >= 0 else { return .other }
        func starts(with text: String) -> Bool { head.starts(with: Array(text.utf8)) }
        func number(_ range: Range<Int>) -> UInt64 { head[range].reduce(0) { $0 << 8 | UInt64($1) } }
        if head.starts(with: [0x51, 0x46, 0x49, 0xfb]) {
            let hasBacking = number(8..<16) != 0
            // Bit 2 of the incompatible features: the data is in another file.
            let hasDataFile = number(4..<8) >= 3 && number(72..<80) & 4 != 0
            return .qcow2(isAlone: !hasBacking && !hasDataFile && number(4..<8) >= 2)
        }
        if head.starts(with: Array("LUKS".utf8) + [0xba, 0xbe]) { return .luks }
        let others = [
            "QED\0", "KDMV", "COWD", "# Disk", "vhdxfile", "conectix", "WithoutFreeSpace", "WithouFreSpacExt",
        ]
        return others.contains(where: starts) ? .other : .plain
    }
}
