internal import CLinux
internal import Glibc

/// Bytes that nobody else should see: on pages of their own that are left out of core dumps, locked into memory when the
/// system allows it, and wiped when the last reference goes.
public final class SecretBytes: @unchecked Sendable, CustomStringConvertible, CustomReflectable {
    // Unchecked: the contents do not change once the initialiser is done.
    private let pages: UnsafeMutableRawPointer
    private let length: Int
    /// How many bytes there are.
    public private(set) var count: Int

    /// Makes `capacity` bytes, filled by `body`, which returns how many of them it used.
    public init(capacity: Int, _ body: (UnsafeMutableRawBufferPointer) throws -> Int) throws {
        length = max(4096, (capacity + 4095) & ~4095)
        guard let pages = xd_secret_pages(length) else { throw CryptoError("There is no memory for a secret") }
        self.pages = pages
        count = 0
        count = try body(UnsafeMutableRawBufferPointer(start: pages, count: capacity))
    }

    /// Copies an array and wipes it.
    public convenience init(wiping bytes: inout [UInt8]) throws {
        defer { bytes.withUnsafeMutableBytes { xd_wipe($0.baseAddress, $0.count) } }
        try self.init(capacity: bytes.count) { target in
            target.copyBytes(from: bytes)
            return bytes.count
        }
    }

    deinit { xd_secret_pages_free(pages, length) }

    /// Lends the bytes for the duration of `body`.
    public func withBytes<T>(_ body: (UnsafeRawBufferPointer) throws -> T) rethrows -> T {
        try body(UnsafeRawBufferPointer(start: pages, count: count))
    }

    /// Never the contents.
    public var description: String { "(secret)" }
    /// Never the contents.
    public var customMirror: Mirror { Mirror(self, children: []) }
}
