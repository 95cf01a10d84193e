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
        ("is_read_only", .readOnly), ("is_rotational", .rotational), ("can_flush", .sendFlush), ("can_fua", .sendFUA),
        ("can_trim", .sendTrim), ("can_zero", .sendWriteZeroes), ("can_fast_zero", .sendFastZero),
        ("can_cache", .sendCache), ("can_df", .sendDF), ("can_multi_conn", .canMultiConn),
        ("can_block_status_payload", .blockStatusPayload),
    ]

    private var protocolName: String {
        switch form {
        case .simple: "newstyle-fixed, simple replies"
        case .structured: "newstyle-fixed, structured replies"
        case .extended: "newstyle-fixed, extended headers"
        }
    }

    func text() -> String {
        var lines = ["protocol: \(protocolName)"]
        lines.append("tls: " + (tls.map { "TLS \($0.version), \($0.cipher)" } ?? "no"))
        if exports.isEmpty { lines.append("There are no exports, or none for you.") }
        for export in exports {
            let info = export.info
            lines.append("export \"\(info.name)\":")
            if let summary = info.summary, !summary.isEmpty { lines.append("    description: \(summary)") }
            lines.append("    size: \(info.size) (\(Self.human(info.size)))")
            lines.append("    contexts: \(export.contexts.isEmpty ? "none" : export.contexts.joined(separator: ", "))")
            for (name, flag) in Self.flagNames { lines.append("    \(name): \(info.flags.contains(flag))") }
            if let sizes = info.blockSizes {
                lines.append(
                    "    block sizes: \(sizes.minimum) minimum, \(sizes.preferred) preferred, \(sizes.maximum) maximum"
                )
            }
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private struct Document: Encodable {
        let `protocol`: String
        let TLS: Bool
        let structured: Bool
        let extended: Bool
        let tls: [String: String]?
        let exports: [[String: JSONField]]
    }

    /// nbdinfo's keys, and ours.
    ///
    /// - Parameter uri: what was asked for; each export gets its own.
    func json(_ uri: NBDURI) throws -> String {
        let document = Document(
            protocol: "newstyle-fixed",
            TLS: tls != nil,
            structured: form != .simple,
            extended: form == .extended,
            tls: tls.map { ["version": $0.version, "cipher": $0.cipher] },
            exports: exports.map { export in
                var fields: [String: JSONField] = [
                    "export-name": .text(export.info.name), "export-size": .number(export.info.size),
                    "contexts": .list(export.contexts), "uri": .text(uri.text(of: export.info.name)),
                    "export-size-str": .text(Self.human(export.info.size)),
                ]
                if let summary = export.info.summary { fields["description"] = .text(summary) }
                for (name, flag) in Self.flagNames { fields[name] = .flag(export.info.flags.contains(flag)) }
                if let sizes = export.info.blockSizes {
                    fields["block_size_minimum"] = .number(UInt64(sizes.minimum))
                    fields["block_size_preferred"] = .number(UInt64(sizes.preferred))
                    fields["block_size_maximum"] = .number(UInt64(sizes.maximum))
                }
                return fields
            }
        )
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        return String(decoding: try encoder.encode(document), as: UTF8.self) + "\n"
    }

    /// The URI of each export, a line each.
    func uris(_ uri: NBDURI) -> String { exports.map { uri.text(of: $0.info.name) + "\n" }.joined() }

    /// The same for programs.
    func urisJSON(_ uri: NBDURI) throws -> String {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .withoutEscapingSlashes]
        let texts = exports.map { uri.text(of: $0.info.name) }
        return String(decoding: try encoder.encode(["uris": texts]), as: UTF8.self) + "\n"
    }

    static func human(_ bytes: UInt64) -> String {
        let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
        var value = Double(bytes)
        var unit = 0
        while value >= 1024, unit + 1 < units.count {
            value /= 1024
            unit += 1
        }
        let rounded = (value * 10).rounded() / 10
        return "\(rounded == rounded.rounded() ? "\(UInt64(rounded))" : "\(rounded)") \(units[unit])"
    }
}

/// One value of a JSON object.
enum JSONField: Encodable {
    case text(String)
    case number(UInt64)
    case flag(Bool)
    case list([String])

    func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        switch self {
        case .text(let value): try container.encode(value)
        case .number(let value): try container.encode(value)
        case .flag(let value): try container.encode(value)
        case .list(let value): try container.encode(value)
        }
    }
}

/// What `nbd info --map` found out.
struct NBDMapReport {
    let context: String
    let extents: [Extent]
    let size: UInt64

    /// What an extent's flags mean in the words of its context.
    private func meaning(_ flags: UInt64) -> String {
        switch context {
        case MetaContext.allocation:
            return ["data", "hole", "zero", "hole,zero"][Int(flags & 3)]
        case MetaContext.allocationDepth:
            return flags == 0 ? "unallocated" : flags == 1 ? "local" : "backing depth \(flags)"
        case let name where name.hasPrefix(MetaContext.dirtyBitmapPrefix): return flags & 1 == 0 ? "clean" : "dirty"
        default: return "\(flags)"
        }
    }

    private func column(_ value: UInt64) -> String {
        let text = "\(value)"
        return String(repeating: " ", count: max(0, 14 - text.count)) + text
    }

    func text() -> String {
        var position: UInt64 = 0
        var result = ""
        for extent in extents {
            result += "\(column(position)) \(column(extent.length))  \(extent.flags)  \(meaning(extent.flags))\n"
            position += extent.length
        }
        return result
    }

    func json() -> String {
        var position: UInt64 = 0
        var lines: [String] = []
        for extent in extents {
            lines.append(
                "{\"offset\": \(position), \"length\": \(extent.length), \"type\": \(extent.flags), "
                    + "\"description\": \"\(meaning(extent.flags))\"}"
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

    private func percent(_ bytes: UInt64) -> Double {
        size == 0 ? 0 : (Double(bytes) / Double(size) * 1000).rounded() / 10
    }

    func totals() -> String {
        sums.map { "\(column($0.bytes))  \(percent($0.bytes)) %  \($0.flags)  \(meaning($0.flags))\n" }.joined()
    }

    func totalsJSON() -> String {
        let lines = sums.map {
            "{\"size\": \($0.bytes), \"percent\": \(percent($0.bytes)), \"type\": \($0.flags), "
                + "\"description\": \"\(meaning($0.flags))\"}"
        }
        return "[\(lines.joined(separator: ",\n "))]\n"
    }
}
