import FoundationEssentials
import NBD

/// What `nbd info` found out about a server.
struct NBDServerReport: Sendable {
    struct Export: Sendable {
        let requested: String
        let info: NBDExportInfo
        let contexts: [String]
    }

    let form: HeaderForm
    let tls: (version: String, cipher: String)?
    let exports: [Export]

    func can(_ ability: NBDInfoCommand.Ability) -> Bool {
        let flags = exports[0].info.flags
        return switch ability {
        case .connect, .read: true
        case .write: !flags.contains(.readOnly)
        case .readOnly: flags.contains(.readOnly)
        case .rotational: flags.contains(.rotational)
        case .cache: flags.contains(.sendCache)
        case .df: flags.contains(.sendDF)
        case .extents: exports[0].contexts.contains(MetaContext.allocation)
        case .fua: flags.contains(.sendFUA)
        case .flush: flags.contains(.sendFlush)
        case .multiConn: flags.contains(.canMultiConn)
        case .trim: flags.contains(.sendTrim)
        case .zero: flags.contains(.sendWriteZeroes)
        case .fastZero: flags.contains(.sendFastZero)
        case .structuredReply: form != .simple
        case .extendedHeaders: form == .extended
        case .blockStatusPayload: flags.contains(.blockStatusPayload)
        case .tls: tls != nil
        }
    }

    private static let flagNames: [(String, TransmissionFlags)] = [
        ("is_rotational", .rotational), ("is_read_only", .readOnly), ("can_block_status_payload", .blockStatusPayload),
        ("can_cache", .sendCache), ("can_df", .sendDF), ("can_fast_zero", .sendFastZero), ("can_flush", .sendFlush),
        ("can_fua", .sendFUA), ("can_multi_conn", .canMultiConn), ("can_trim", .sendTrim),
        ("can_zero", .sendWriteZeroes),
    ]

    /// The words are nbdinfo's, with a line about TLS besides.
    ///
    /// - Parameter uri: what was asked for; each export gets its own.
    func text(_ uri: NBDURI) -> String {
        let packets = ["simple", "structured", "extended"][form == .simple ? 0 : form == .structured ? 1 : 2]
        var lines = ["protocol: newstyle-fixed \(tls == nil ? "without" : "with") TLS, using \(packets) packets"]
        if let tls { lines.append("tls: TLS \(tls.version), \(tls.cipher)") }
        if exports.isEmpty { lines.append("There are no exports, or none for you.") }
        for export in exports {
            let info = export.info
            lines.append("export=\(JSONField.text(info.name).rendered):")
            if let summary = info.summary, !summary.isEmpty { lines.append("\tdescription: \(summary)") }
            lines.append("\texport-size: \(Self.sized(info.size))")
            lines.append("\turi: \(uri.text(of: info.name))")
            if !export.contexts.isEmpty { lines += ["\tcontexts:"] + export.contexts.map { "\t\t\($0)" } }
            for (name, flag) in Self.flagNames { lines.append("\t\(name): \(info.flags.contains(flag))") }
            for (name, size) in Self.blockSizes(info) { lines.append("\t\(name): \(Self.sized(size))") }
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private static func blockSizes(_ info: NBDExportInfo) -> [(String, UInt64)] {
        guard let sizes = info.blockSizes else { return [] }
        return [
            ("block_size_minimum", UInt64(sizes.minimum)), ("block_size_preferred", UInt64(sizes.preferred)),
            ("block_size_maximum", UInt64(sizes.maximum)),
        ]
    }

    /// nbdinfo's keys, and ours.
    ///
    /// - Parameter uri: what was asked for; each export gets its own.
    func json(_ uri: NBDURI) -> String {
        var document: [String: JSONField] = [
            "protocol": .text("newstyle-fixed"), "TLS": .flag(tls != nil), "structured": .flag(form != .simple),
            "extended": .flag(form == .extended),
        ]
        if let tls { document["tls"] = .object(["version": .text(tls.version), "cipher": .text(tls.cipher)]) }
        document["exports"] = .list(
            exports.map { export in
                var fields: [String: JSONField] = [
                    "export-name": .text(export.info.name), "export-size": .number(export.info.size),
                    "contexts": .list(export.contexts.map { .text($0) }), "uri": .text(uri.text(of: export.info.name)),
                    "export-size-str": .text(Self.human(export.info.size)),
                ]
                if let summary = export.info.summary { fields["description"] = .text(summary) }
                for (name, flag) in Self.flagNames { fields[name] = .flag(export.info.flags.contains(flag)) }
                for (name, size) in Self.blockSizes(export.info) { fields[name] = .number(size) }
                return .object(fields)
            }
        )
        return JSONField.object(document).rendered + "\n"
    }

    /// The URI of each export, a line each.
    func uris(_ uri: NBDURI) -> String { exports.map { uri.text(of: $0.info.name) + "\n" }.joined() }

    /// The same for programs: a string for the one that was asked for, an object for a list.
    func urisJSON(_ uri: NBDURI, isList: Bool) -> String {
        let texts = exports.map { JSONField.text(uri.text(of: $0.info.name)) }
        return (isList ? JSONField.object(["uris": .list(texts)]) : texts[0]).rendered + "\n"
    }

    private static func sized(_ bytes: UInt64) -> String {
        let text = human(bytes)
        return text == "\(bytes)" ? text : "\(bytes) (\(text))"
    }

    /// A size as nbdinfo writes it: in the largest unit of which it is a whole number.
    static func human(_ bytes: UInt64) -> String {
        var value = bytes
        var units = ["", "K", "M", "G", "T", "P", "E"][...]
        while value > 0, value & 1023 == 0, units.count > 1 {
            value >>= 10
            units.removeFirst()
        }
        return "\(value)\(units[units.startIndex])"
    }
}

/// A value of a JSON document.
enum JSONField {
    case text(String)
    case number(UInt64)
    case flag(Bool)
    case list([JSONField])
    case object([String: JSONField])

    /// The value in lines, as people and `grep` read it: keys in order, each with `": "` behind it.
    var rendered: String { rendered(indent: "") }

    private func rendered(indent: String) -> String {
        let inner = indent + "  "
        func lines(_ open: String, _ parts: [String], _ close: String) -> String {
            parts.isEmpty
                ? open + close : "\(open)\n\(parts.map { inner + $0 }.joined(separator: ",\n"))\n\(indent)\(close)"
        }
        switch self {
        case .text(let value): return Self.quoted(value)
        case .number(let value): return "\(value)"
        case .flag(let value): return "\(value)"
        case .list(let values): return lines("[", values.map { $0.rendered(indent: inner) }, "]")
        case .object(let fields):
            let sorted = fields.sorted { $0.key < $1.key }
            return lines("{", sorted.map { "\(Self.quoted($0.key)): \($0.value.rendered(indent: inner))" }, "}")
        }
    }

    private static func quoted(_ text: String) -> String {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.withoutEscapingSlashes]
        // A string always is one.
        return String(decoding: (try? encoder.encode(text)) ?? Data(), as: UTF8.self)
    }
}

/// What `nbd info --map` found out.
struct NBDMapReport {
    let context: String
    let extents: [Extent]
    let size: UInt64

    /// What an extent's flags mean in the words of its context; nil when nobody knows.
    private func meaning(_ flags: UInt64) -> String? {
        switch context {
        case MetaContext.allocation: flags < 4 ? ["data", "hole", "zero", "hole,zero"][Int(flags)] : nil
        case MetaContext.allocationDepth:
            flags == 0 ? "absent" : flags == 1 ? "local" : "backing depth \(flags)"
        case let name where name.hasPrefix(MetaContext.dirtyBitmapPrefix):
            flags < 2 ? ["clean", "dirty"][Int(flags)] : nil
        default: nil
        }
    }

    private func column(_ text: String, _ width: Int = 10) -> String {
        String(repeating: " ", count: max(0, width - text.utf8.count)) + text
    }

    func text() -> String {
        var position: UInt64 = 0
        var result = ""
        for extent in extents {
            let flags = column("\(extent.flags)", 3)
            let words = meaning(extent.flags).map { "  \($0)" } ?? ""
            result += "\(column("\(position)"))  \(column("\(extent.length)"))  \(flags)\(words)\n"
            position += extent.length
        }
        return result
    }

    /// The last field of an object.
    private func description(_ flags: UInt64) -> String { meaning(flags).map { ", \"description\": \"\($0)\"" } ?? "" }

    func json() -> String {
        var position: UInt64 = 0
        var lines: [String] = []
        for extent in extents {
            lines.append(
                "{\"offset\": \(position), \"length\": \(extent.length), \"type\": \(extent.flags)"
                    + description(extent.flags) + "}"
            )
            position += extent.length
        }
        return "[\(lines.joined(separator: ",\n "))]\n"
    }

    private var sums: [(flags: UInt64, bytes: UInt64)] {
        var sums: [UInt64: UInt64] = [:]
        for extent in extents { sums[extent.flags, default: 0] += extent.length }
        return sums.sorted { $0.key < $1.key }.map { ($0.key, $0.value) }
    }

    private func percent(_ bytes: UInt64) -> Double { size == 0 ? 0 : Double(bytes) / Double(size) * 100 }

    func totals() -> String {
        sums.map { sum in
            // To even, as C rounds.
            let tenths = Int((percent(sum.bytes) * 10).rounded(.toNearestOrEven))
            let share = column("\(tenths / 10).\(tenths % 10)%", 6)
            let words = meaning(sum.flags).map { " \($0)" } ?? ""
            return "\(column("\(sum.bytes)")) \(share) \(column("\(sum.flags)", 3))\(words)\n"
        }.joined()
    }

    func totalsJSON() -> String {
        let lines = sums.map { sum in
            // Six digits, as nbdinfo has them.
            let share = (percent(sum.bytes) * 10_000).rounded() / 10_000
            return "{\"size\": \(sum.bytes), \"percent\": \(share), \"type\": \(sum.flags)\(description(sum.flags))}"
        }
        return "[\(lines.joined(separator: ",\n "))]\n"
    }
}
