import ArgumentParser

/// A short time on the command line: `300` and `300ms` are milliseconds, `10s` and `1m` are longer.
struct Milliseconds: Hashable, CustomStringConvertible {
    let count: Int

    private static let limit = 1_000_000_000

    init(_ count: Int) { self.count = count }

    /// Reads what follows an option.
    ///
    /// - Throws: `ValidationError` with examples.
    @Sendable static func parse(_ text: String) throws -> Milliseconds {
        let digits = text.prefix { $0.isNumber }
        let factors = ["": 1, "ms": 1, "s": 1000, "m": 60_000]
        guard let count = Int(digits), count <= limit,
            let factor = factors[String(text.dropFirst(digits.count))]
        else {
            throw ValidationError(
                "it takes milliseconds, or a whole number up to \(limit) with ms, s or m: 300, 300ms, 10s"
            )
        }
        return Milliseconds(count * factor)
    }

    var description: String { "\(count)" }
}
