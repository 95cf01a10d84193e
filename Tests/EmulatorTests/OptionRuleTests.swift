import IO
import Testing

@testable import Emulator

/// The table of options, and what the documentation says of it.
struct OptionRuleTests {
    private struct Row {
        var names: [String]
        var argument: String
        var owner: String
        var blank: String
    }

    private static let rows: [Row] = {
        // Tests/EmulatorTests/OptionRuleTests.swift
        let root = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
        let bytes = (try? DurableFile.read("\(root)/docs/guests.md")) ?? nil ?? []
        let text = String(decoding: bytes, as: UTF8.self)
        let section = text.split(separator: "\n## ").first { $0.hasPrefix("Every option") } ?? ""
        return section.split(separator: "\n").filter { $0.hasPrefix("| `-") }.map { line in
            let cells = line.split(separator: "|").map { $0.filter { $0 != "`" } }
                .map { $0.split(separator: " ").joined(separator: " ") }
            return Row(
                names: cells[0].split(separator: ", ").map { String($0.dropFirst()) },
                argument: cells[1],
                owner: cells[2],
                blank: cells[4]
            )
        }
    }()

    @Test func theDocumentationHasARowForEachRuleAndNoOther() {
        let documented = Self.rows.map(\.names)
        #expect(Set(documented.flatMap { $0 }).count == documented.flatMap { $0 }.count, "a name is there twice")
        #expect(Set(documented) == Set(OptionRule.all.map(\.names)))
    }

    @Test func theRowsSayWhatTheRulesSay() throws {
        for row in Self.rows {
            let rule = try #require(OptionRule.of(row.names[0]), "\(row.names)")
            let argument =
                switch rule.argument {
                case .none: "none"
                case .text: "text"
                case .settings(_, isJSON: false): "settings"
                case .settings: "settings, JSON"
                }
            #expect(row.argument == argument, "\(row.names)")
            let owner =
                switch rule.owner {
                case .anyone: "anyone"
                case .own: "own guests"
                case .nobody: "nobody"
                }
            #expect(row.owner == owner, "\(row.names)")
            let blank =
                switch rule.blank {
                case .kept: "kept"
                case .leftOut: "left out"
                case .emptied: "emptied"
                }
            #expect(row.blank == blank, "\(row.names)")
        }
    }

    @Test(arguments: OptionRule.all.map(\.names))
    func whatIsNotForAnyoneIsRefusedWithItsReason(_ names: [String]) throws {
        for name in names {
            let rule = try #require(OptionRule.of(name))
            let words = rule.argument == .none ? ["-\(name)"] : ["-\(name)", "x"]
            let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/")
            switch rule.owner {
            case .anyone: continue
            case .own(let reason):
                #expect(throws: GuestError.self) { try line.relocated { .init(path: $0.path) } }
                #expect(try line.relocated(isAtHome: true) { .init(path: $0.path) }.arguments == line.arguments)
                #expect(!reason.isEmpty)
            case .nobody(let reason):
                let error = #expect(throws: GuestError.self) {
                    try line.relocated(isAtHome: true) { .init(path: $0.path) }
                }
                #expect(error?.message.hasSuffix(reason) == true)
            }
        }
    }

    @Test func anOptionThatHasNoRuleIsTakenFromNobodyElse() throws {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64", "-brand-new", "x"], directory: "/")
        #expect(throws: GuestError.self) { try line.relocated { .init(path: $0.path) } }
        #expect(try line.relocated(isAtHome: true) { .init(path: $0.path) }.arguments == line.arguments)
    }
}
