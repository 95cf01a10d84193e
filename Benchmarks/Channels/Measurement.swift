import Glibc

/// Processor time of the whole process, user and system, in seconds.
func processorSeconds() -> Double {
    var usage = rusage()
    getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
    func seconds(_ time: timeval) -> Double { Double(time.tv_sec) + Double(time.tv_usec) / 1e6 }
    return seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Minimum, median and maximum of some values.
struct Spread {
    let minimum: Double
    let median: Double
    let maximum: Double

    init(_ values: [Double]) {
        let sorted = values.sorted()
        minimum = sorted.first ?? 0
        median = sorted.isEmpty ? 0 : sorted[sorted.count / 2]
        maximum = sorted.last ?? 0
    }

    func text(_ digits: Int) -> String {
        "\(format(median, digits)) [\(format(minimum, digits))-\(format(maximum, digits))]"
    }
}

/// A number with a fixed number of digits after the point.
func format(_ value: Double, _ digits: Int) -> String {
    let scale = pow(10, Double(digits))
    let scaled = (value * scale).rounded()
    if digits == 0 { return String(Int(scaled)) }
    let whole = Int(scaled / scale)
    let fraction = String(Int(abs(scaled)) - abs(whole) * Int(scale))
    return "\(whole)." + String(repeating: "0", count: max(0, digits - fraction.count)) + fraction
}
