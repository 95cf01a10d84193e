import ArgumentParser

/// A number of bytes, with a suffix when wanted: 512, 64K, 1.5G.
struct ByteCount: ExpressibleByArgument {
    let value: UInt64

    init(_ value: UInt64) { self.value = value }

    init?(argument: String) {
        let suffixes = ["": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50]
        let digits = argument.prefix { $0.isNumber || $0 == "." }
        guard let shift = suffixes[argument.dropFirst(digits.count).lowercased()] else { return nil }
        if let whole = UInt64(digits) {
            guard whole <= UInt64.max >> UInt64(shift) else { return nil }
            value = whole << UInt64(shift)
        } else {
            guard let number = Double(digits), number < 1e6 else { return nil }
            value = UInt64(number * Double(UInt64(1) << UInt64(shift)))
        }
    }

    var defaultValueDescription: String { "\(value)" }
}
