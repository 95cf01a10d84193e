/// Spans of time as people read them.
public enum SpanText {
    /// `3.2 s`, `41 s` or `3 min 12 s`.
    ///
    /// - Parameter seconds: at most some years; what is more is shown as that.
    public static func of(_ seconds: Double) -> String {
        if seconds < 10 { return "\((seconds * 10).rounded() / 10) s" }
        let whole = Int(min(seconds.rounded(), 1e9))
        if whole < 60 { return "\(whole) s" }
        return "\(whole / 60) min \(whole % 60) s"
    }
}
