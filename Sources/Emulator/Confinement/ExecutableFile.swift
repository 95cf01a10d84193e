internal import Glibc
internal import IO

/// What an ELF program says of its loader and of where its libraries are (elf(5)); 64 bits, in this host's byte order.
struct ExecutableFile {
    /// The loader (PT_INTERP).
    private(set) var loader: String?
    /// The directories of its own in which libraries are looked for (DT_RPATH, DT_RUNPATH).
    private(set) var libraryDirectories: [String] = []

    private struct Segment {
        var kind: UInt32
        var offset: UInt64
        var address: UInt64
        var size: UInt64
    }
    private enum Kind {
        static let load: UInt32 = 1
        static let dynamic: UInt32 = 2
        static let loader: UInt32 = 3
    }
    private enum Tag {
        static let end: UInt64 = 0
        static let strings: UInt64 = 5
        static let path: UInt64 = 15
        static let runPath: UInt64 = 29
    }

    /// Reads a program; nil when it is no such file.
    init?(_ path: String) {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return nil }
        defer { close(descriptor) }
        let header = Self.read(descriptor, 0, 64)
        guard header.count == 64, header.starts(with: [0x7f, 0x45, 0x4c, 0x46, 2]) else { return nil }
        let start: UInt64 = Self.number(header, 32)
        let count = Int(Self.number(header, 56) as UInt16)
        guard Self.number(header, 54) as UInt16 == 56, count < 256 else { return nil }
        let table = Self.read(descriptor, start, count * 56)
        guard table.count == count * 56 else { return nil }
        let segments = (0..<count).map { index in
            let at = index * 56
            return Segment(
                kind: Self.number(table, at),
                offset: Self.number(table, at + 8),
                address: Self.number(table, at + 16),
                size: Self.number(table, at + 32)
            )
        }
        if let segment = segments.first(where: { $0.kind == Kind.loader }) {
            loader = Self.text(descriptor, segment.offset)
        }
        if let segment = segments.first(where: { $0.kind == Kind.dynamic }) {
            let own = "/" + path.split(separator: "/").dropLast().joined(separator: "/")
            libraryDirectories = Self.directories(descriptor, segment, segments).map {
                $0.replacing("$ORIGIN", with: own).replacing("${ORIGIN}", with: own)
            }
        }
    }

    private static func directories(_ descriptor: Int32, _ dynamic: Segment, _ segments: [Segment]) -> [String] {
        let bytes = read(descriptor, dynamic.offset, Int(min(dynamic.size, 1 << 16)))
        var strings: UInt64?
        var places: [UInt64] = []
        for at in stride(from: 0, to: bytes.count - 15, by: 16) {
            let tag: UInt64 = number(bytes, at)
            let value: UInt64 = number(bytes, at + 8)
            if tag == Tag.end { break }
            if tag == Tag.strings { strings = value }
            if tag == Tag.path || tag == Tag.runPath { places.append(value) }
        }
        guard let strings,
            let holder = segments.first(where: {
                $0.kind == Kind.load && $0.address <= strings && strings - $0.address < $0.size
            })
        else { return [] }
        let base = strings - holder.address &+ holder.offset
        return places.flatMap { text(descriptor, base &+ $0).split(separator: ":").map(String.init) }
            .filter { $0.hasPrefix("/") || $0.hasPrefix("$") }
    }

    private static func read(_ descriptor: Int32, _ offset: UInt64, _ count: Int) -> [UInt8] {
        guard offset < 1 << 40, count > 0 else { return [] }
        var bytes = [UInt8](repeating: 0, count: count)
        let got = pread(descriptor, &bytes, count, off_t(offset))
        return Array(bytes.prefix(max(got, 0)))
    }

    private static func text(_ descriptor: Int32, _ offset: UInt64) -> String {
        String(decoding: read(descriptor, offset, 4096).prefix { $0 != 0 }, as: UTF8.self)
    }

    private static func number<T: FixedWidthInteger>(_ bytes: [UInt8], _ at: Int) -> T {
        bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: at, as: T.self) }
    }
}
