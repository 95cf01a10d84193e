import FoundationEssentials

/// Moments as people read them.
enum UTCTime {
    /// `2025-11-29 03:31:07 UTC`, of seconds since 1970.
    static func text(_ seconds: Int) -> String {
        let text = Date(timeIntervalSince1970: Double(seconds)).formatted(.iso8601)
        return text.replacing("T", with: " ").replacing("Z", with: " UTC")
    }
}
