import ArgumentParser

/// A time on the command line: `90s`, `10m`, `12h`, `7d`. Whoever leaves the unit out may mean any of them, so it is asked for.
struct TimeSpan: Hashable, CustomStringConvertible {
    let seconds: Int

    private static let factors: [Character: Int] = ["s": 1, "m": 60, "h": 3600, "d": 86400]
    private static let limit = 100_000_000

    /// Reads what follows an option.
    ///
    /// - Throws: `ValidationError` with examples.
    @Sendable static func parse(_ text: String) throws -> TimeSpan {
        if text == "0" { return TimeSpan(seconds: 0) }
        guard let factor = text.last.flatMap({ factors[$0] }), let count = Int(text.dropLast()),
            (0...limit).contains(count)
        else { throw ValidationError("it takes a whole number up to \(limit) with s, m, h or d: 90s, 10m, 12h, 7d") }
        return TimeSpan(seconds: count * factor)
    }

    static func minutes(_ count: Int) -> TimeSpan { TimeSpan(seconds: count * 60) }
    static func days(_ count: Int) -> TimeSpan { TimeSpan(seconds: count * 86400) }

    /// How long an outage is waited for.
    static let usualPatience = TimeSpan.minutes(5)

    private init(seconds: Int) { self.seconds = seconds }

    /// As it would be written.
    var description: String {
        let units = Self.factors.sorted { $0.value > $1.value }
        let unit = units.first { seconds != 0 && seconds.isMultiple(of: $0.value) }
        return unit.map { "\(seconds / $0.value)\($0.key)" } ?? "\(seconds)s"
    }

    /// Checks what `--patience` may be.
    func checkPatience() throws {
        guard (1...604_800).contains(seconds) else {
            throw ValidationError("--patience takes a time from 1s to 7d: 90s, 10m")
        }
    }
}
