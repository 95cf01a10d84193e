/// Why a guest cannot move: the check that found it, and a sentence.
public struct Obstacle: Sendable, Hashable, Codable {
    /// The check.
    public var check: Check
    /// What is wrong, with what, and what to do, without a full stop.
    public var reason: String

    /// Describes an obstacle.
    public init(_ check: Check, _ reason: String) {
        self.check = check
        self.reason = reason
    }

    /// The names of the checks that found reasons, in the order of these, for READY.
    public static func checks(of reasons: [String], in obstacles: [Obstacle]) -> [String] {
        reasons.map { reason in (obstacles.first { $0.reason == reason }?.check ?? .rehearsal).rawValue }
    }

    /// What a peer says: reasons, and the names of the checks in the same order, if it gives them.
    public static func paired(_ reasons: [String], _ checks: [String]?) -> [Obstacle] {
        reasons.enumerated().map { index, reason in
            let name = checks.flatMap { $0.indices.contains(index) ? $0[index] : nil }
            return Obstacle(name.flatMap(Check.init(rawValue:)) ?? .rehearsal, reason)
        }
    }
}
