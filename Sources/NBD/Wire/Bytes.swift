/// Builds a message of big-endian integers.
struct MessageWriter {
    private(set) var bytes: [UInt8] = []

    init(capacity: Int = 64) { bytes.reserveCapacity(capacity) }

    mutating func append<T: FixedWidthInteger>(_ value: T) {
        withUnsafeBytes(of: value.bigEndian) { bytes.append(contentsOf: $0) }
    }
    mutating func append(_ text: String) { bytes.append(contentsOf: text.utf8) }
    mutating func append(_ more: [UInt8]) { bytes.append(contentsOf: more) }
    /// Appends a string with its length before it, as `MessageReader.string` takes it.
    mutating func append(counted text: String) {
        append(UInt32(text.utf8.count))
        append(text)
    }
}

/// Takes a message of big-endian integers apart; nil when it is too short.
struct MessageReader {
    private var rest: ArraySlice<UInt8>

    init(_ bytes: [UInt8]) { rest = bytes[...] }

    var isEmpty: Bool { rest.isEmpty }
    var count: Int { rest.count }

    mutating func integer<T: FixedWidthInteger>(_ type: T.Type = T.self) -> T? {
        guard rest.count >= MemoryLayout<T>.size else { return nil }
        var value: T = 0
        for byte in rest.prefix(MemoryLayout<T>.size) { value = value << 8 | T(truncatingIfNeeded: byte) }
        rest = rest.dropFirst(MemoryLayout<T>.size)
        return value
    }

    mutating func bytes(_ count: Int) -> [UInt8]? {
        guard count >= 0, rest.count >= count else { return nil }
        defer { rest = rest.dropFirst(count) }
        return Array(rest.prefix(count))
    }

    /// A string with its length before it, at most 4096 bytes of UTF-8 without NUL.
    mutating func string() -> String? {
        guard let count = integer(UInt32.self), count <= NBDWire.maximumString, let bytes = bytes(Int(count)) else {
            return nil
        }
        return Self.text(bytes)
    }

    static func text(_ bytes: [UInt8]) -> String? { bytes.contains(0) ? nil : String(validating: bytes, as: UTF8.self) }
}

extension UnsafeRawBufferPointer {
    func bigEndian<T: FixedWidthInteger>(_ offset: Int, _ type: T.Type = T.self) -> T {
        T(bigEndian: loadUnaligned(fromByteOffset: offset, as: T.self))
    }
}

extension UnsafeMutableRawBufferPointer {
    func storeBigEndian<T: FixedWidthInteger>(_ value: T, at offset: Int) {
        storeBytes(of: value.bigEndian, toByteOffset: offset, as: T.self)
    }
}
