import ArgumentParser
import IO

/// A number of bytes, with a suffix when wanted: 512, 64K, 1.5G.
struct ByteCount: ExpressibleByArgument {
    let value: UInt64

    init(_ value: UInt64) { self.value = value }

    init?(argument: String) {
        guard let value = ByteSize.parse(argument) else { return nil }
        self.value = value
    }

    var defaultValueDescription: String { "\(value)" }
}
