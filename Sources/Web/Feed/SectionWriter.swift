internal import IO

/// Writes sections as lines, those that have changed and for whom they are: for all viewers who may know of everything once, and for those
/// who may know of one guest once for each guest.
///
/// Encoding takes processor time: used on a thread of the pool, by one at a time.
struct SectionWriter {
    private struct Written {
        var sections: Sections
        var lines: [Sections.Name: Payload]
    }

    private var written: [Audience: Written] = [:]

    private struct Line<Value: Encodable>: Encodable {
        var section: String
        var value: Value
    }

    /// Writes what is new.
    ///
    /// - Parameters:
    ///   - sections: the state.
    ///   - audiences: who looks.
    /// - Returns: for each audience the lines that are not what they were.
    mutating func write(_ sections: Sections, for audiences: Set<Audience>) -> [Audience: [Sections.Name: Payload]] {
        for audience in written.keys where !audiences.contains(audience) { written[audience] = nil }
        var result: [Audience: [Sections.Name: Payload]] = [:]
        for audience in audiences {
            let now = sections.limited(to: audience)
            let former = written[audience]
            var changed: [Sections.Name: Payload] = [:]
            for name in Sections.Name.allCases {
                if let former, former.lines[name] != nil, Self.isSame(name, former.sections, now) { continue }
                changed[name] = Self.line(name, now)
            }
            written[audience] = Written(
                sections: now,
                lines: (former?.lines ?? [:]).merging(changed) { $1 }
            )
            result[audience] = changed
        }
        return result
    }

    /// All lines as they stand, for who has come anew; nil when nothing was written for this audience yet.
    func lines(for audience: Audience) -> [Sections.Name: Payload]? { written[audience]?.lines }

    private static func isSame(_ name: Sections.Name, _ one: Sections, _ other: Sections) -> Bool {
        switch name {
        case .host: one.host == other.host
        case .trouble: one.trouble == other.trouble
        case .moves: one.moves == other.moves
        case .evacuation: one.evacuation == other.evacuation
        case .guests: one.guests == other.guests
        case .history: one.history == other.history
        }
    }

    private static func line(_ name: Sections.Name, _ sections: Sections) -> Payload {
        switch name {
        case .host: encoded(name, sections.host)
        case .trouble: encoded(name, sections.trouble)
        case .moves: encoded(name, sections.moves)
        case .evacuation: encoded(name, sections.evacuation)
        case .guests: encoded(name, sections.guests)
        case .history: encoded(name, sections.history)
        }
    }

    private static func encoded(_ name: Sections.Name, _ value: some Encodable) -> Payload {
        let bytes = (try? JSONText.encode(Line(section: name.rawValue, value: value))) ?? []
        return Payload(bytes + [UInt8(ascii: "\n")])
    }
}
