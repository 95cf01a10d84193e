import ArgumentParser

/// A time on the command line: `90s`, `10m`, `12h`, `7d`; a number alone is in seconds.
struct TimeSpan: ExpressibleByArgument, Hashable {
    let seconds: Int

    private static let factors: [Character: Int] = ["s": 1, "m": 60, "h": 3600, "d": 86400]
    private static let limit = 100_000_000

    init?(argument text: String) {
        let factor = text.last.flatMap { Self.factors[$0] }
        guard let count = Int(factor == nil ? text : String(text.dropLast())), (0...Self.limit).contains(count) else {
            return nil
        }
        seconds = count * (factor ?? 1)
    }

    static func minutes(_ count: Int) -> TimeSpan { TimeSpan(seconds: count * 60) }
    static func days(_ count: Int) -> TimeSpan { TimeSpan(seconds: count * 86400) }

    private init(seconds: Int) { self.seconds = seconds }

    var defaultValueDescription: String {
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
