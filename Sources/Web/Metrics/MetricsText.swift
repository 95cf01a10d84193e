/// Figures in Prometheus' text format, version 0.0.4.
struct MetricsText: Sendable {
    private var lines: [Metric: [String]] = [:]

    init() {}

    /// Adds a sample.
    mutating func add(_ metric: Metric, _ value: Double, _ labels: KeyValuePairs<String, String> = [:]) {
        add(metric, suffix: "", value, Array(labels))
    }

    /// Adds a sample, if it is known.
    mutating func add(_ metric: Metric, _ value: Double?, _ labels: KeyValuePairs<String, String> = [:]) {
        if let value { add(metric, suffix: "", value, Array(labels)) }
    }

    /// Adds a histogram.
    mutating func add(_ metric: Metric, _ histogram: Histogram) {
        for (bound, count) in histogram.cumulative {
            add(metric, suffix: "_bucket", Double(count), [("le", Self.number(bound))])
        }
        add(metric, suffix: "_sum", histogram.sum, [])
        add(metric, suffix: "_count", Double(histogram.count), [])
    }

    private mutating func add(_ metric: Metric, suffix: String, _ value: Double, _ labels: [(String, String)]) {
        let text = labels.map { "\($0)=\"\(Self.escaped($1))\"" }.joined(separator: ",")
        let set = text.isEmpty ? "" : "{\(text)}"
        lines[metric, default: []].append("\(metric.rawValue)\(suffix)\(set) \(Self.number(value))")
    }

    private static func escaped(_ value: String) -> String {
        var text = ""
        for scalar in value.unicodeScalars {
            switch scalar {
            case "\\": text += "\\\\"
            case "\"": text += "\\\""
            case "\n": text += "\\n"
            default: text.unicodeScalars.append(scalar)
            }
        }
        return text
    }

    private static func number(_ value: Double) -> String {
        if value == .infinity { return "+Inf" }
        if value == -.infinity { return "-Inf" }
        if value.isNaN { return "NaN" }
        return value == value.rounded() && abs(value) < 1e15 ? "\(Int64(value))" : "\(value)"
    }

    /// The text: each metric with what it means and its kind, in the order of the table.
    var text: String {
        var text = ""
        for metric in Metric.allCases {
            guard let samples = lines[metric] else { continue }
            text += "# HELP \(metric.rawValue) \(metric.help)\n# TYPE \(metric.rawValue) \(metric.kind.rawValue)\n"
            for sample in samples { text += sample + "\n" }
        }
        return text
    }
}

/// How often values were within bounds.
struct Histogram: Sendable, Hashable {
    private let bounds: [Double]
    private var counts: [UInt64]
    /// All values together.
    private(set) var sum = 0.0

    /// Makes an empty one.
    ///
    /// - Parameter bounds: upper bounds that belong to their buckets, in their order.
    init(_ bounds: [Double]) {
        self.bounds = bounds
        counts = Array(repeating: 0, count: bounds.count + 1)
    }

    /// Counts a value.
    mutating func add(_ value: Double) {
        guard value.isFinite, value >= 0 else { return }
        counts[bounds.firstIndex { value <= $0 } ?? bounds.count] += 1
        sum += value
    }

    /// How many values there were.
    var count: UInt64 { counts.reduce(0, +) }

    /// How many were at most each bound; the last one is infinity.
    var cumulative: [(bound: Double, count: UInt64)] {
        var total: UInt64 = 0
        return zip(bounds + [.infinity], counts).map { bound, count in
            total += count
            return (bound, total)
        }
    }
}
