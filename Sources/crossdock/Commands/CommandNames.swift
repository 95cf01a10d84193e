import ArgumentParser

/// The names of commands as people mistype them.
enum CommandNames {
    /// What is wrong with the command that an invocation begins with: a sentence with those that it may mean; nil when nothing is.
    static func fault(in words: [String], of command: any ParsableCommand.Type, path: [String] = []) -> String? {
        let known = command.configuration.subcommands
        guard let word = words.first, !known.isEmpty, !word.hasPrefix("-"), word != "help" else { return nil }
        if let next = known.first(where: { name(of: $0) == word }) {
            return fault(in: Array(words.dropFirst()), of: next, path: path + [word])
        }
        // A key path into a metatype ends Swift 6.3's compiler.
        let names = known.filter { $0.configuration.shouldDisplay }.map { name(of: $0) }
        let close = names.filter { distance($0, word) <= max(1, min($0.count, word.count) / 3) }
        let advice =
            close.isEmpty
            ? "there are \(names.joined(separator: ", "))"
            : "did you mean \(close.map { "'\($0)'" }.joined(separator: " or "))?"
        let place = path.isEmpty ? "" : " of 'crossdock \(path.joined(separator: " "))'"
        return "'\(word)' is no command\(place); \(advice)"
    }

    /// A QEMU command line that is not behind '--': its options would be taken for Crossdock's, '-hda' for '-h'. A sentence, or nil.
    static func strayCommandLine(in words: [String]) -> String? {
        guard words.prefix(2) == ["guest", "start"], !words.contains("--"),
            let program = words.dropFirst(3).firstIndex(where: {
                $0.split(separator: "/").last?.hasPrefix("qemu") == true
            })
        else { return nil }
        let before = words[..<program].joined(separator: " ")
        return
            "QEMU's command line comes after '--': crossdock \(before) -- \(words[program...].joined(separator: " "))"
    }

    private static func name(of command: any ParsableCommand.Type) -> String {
        command.configuration.commandName ?? "\(command)".lowercased()
    }

    /// How many letters have to be put in, taken out or changed.
    private static func distance(_ a: String, _ b: String) -> Int {
        let (left, right) = (Array(a), Array(b))
        var row = Array(0...right.count)
        for (i, letter) in left.enumerated() {
            var diagonal = row[0]
            row[0] = i + 1
            for (j, other) in right.enumerated() {
                let above = row[j + 1]
                row[j + 1] = min(above + 1, row[j] + 1, diagonal + (letter == other ? 0 : 1))
                diagonal = above
            }
        }
        return row[right.count]
    }
}
