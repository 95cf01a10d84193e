import ArgumentParser
import IO

/// A number of bytes, with a suffix when wanted: 512, 64K, 1.5G.
struct ByteCount: Hashable, CustomStringConvertible {
    let value: UInt64

    init(_ value: UInt64) { self.value = value }

    init?(argument: String) {
        guard let value = ByteSize.parse(argument) else { return nil }
        self.value = value
    }

    /// Reads what follows an option.
    ///
    /// - Throws: `ValidationError` with examples.
    @Sendable static func parse(_ text: String) throws -> ByteCount {
        guard let count = ByteCount(argument: text) else {
            throw ValidationError(
                "it takes less than 16E bytes, or a number with K, M, G, T, P or E, which are powers of 1024: 512, 64K, 1.5G"
            )
        }
        return count
    }

    /// As it would be written, in the largest unit in which it is whole.
    var description: String { ByteSize.text(value) }
}
