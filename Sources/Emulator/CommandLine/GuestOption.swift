internal import IO

/// One option of a QEMU command line.
struct GuestOption: Sendable, Hashable {
    /// Its name without dashes.
    var name: String
    /// What follows it; nil for a flag.
    var argument: String?

    init(_ name: String, _ argument: String? = nil) {
        self.name = name
        self.argument = argument
    }

    /// Reads the words behind the program's name. A word that is no option is a disk, as QEMU sees it: `-hda`.
    static func parse(_ words: some Sequence<String>) throws -> [GuestOption] {
        var options: [GuestOption] = []
        var iterator = words.makeIterator()
        while let word = iterator.next() {
            guard word.hasPrefix("-"), word.count > 1 else {
                options.append(GuestOption("hda", word))
                continue
            }
            let name = String(word.drop { $0 == "-" })
            if OptionRule.of(name)?.argument == OptionRule.Argument.none {
                options.append(GuestOption(name))
            } else {
                guard let argument = iterator.next() else { throw GuestError("The option \(word) has no argument") }
                options.append(GuestOption(name, argument))
            }
        }
        return options
    }

    /// The words of a command line.
    static func words(_ options: [GuestOption]) -> [String] {
        options.flatMap { ["-\($0.name)"] + ($0.argument.map { [$0] } ?? []) }
    }

    /// The value of a key of the argument, `key=value` or JSON; `id` of `-device virtio-net,id=n0`.
    func value(_ key: String, implied: String = "driver") -> String? {
        (try? BlockOptions(parsing: argument ?? "", implied: implied))?[key]
    }

    /// The options that a file of `-readconfig` stands for.
    ///
    /// The file has sections, `[device "id"]`, of lines `key = "value"` (QEMU's `docs/config`).
    static func expand(config text: String, path: String) throws -> [GuestOption] {
        let names = ["smp-opts": "smp", "memory": "m", "boot-opts": "boot"]
        var options: [GuestOption] = []
        var section: (name: String, pairs: [String])?
        func finish() {
            guard let section else { return }
            options.append(GuestOption(names[section.name] ?? section.name, section.pairs.joined(separator: ",")))
        }
        for (number, raw) in text.split(separator: "\n", omittingEmptySubsequences: false).enumerated() {
            let line = raw.trimmed
            if line.isEmpty || line.hasPrefix("#") { continue }
            let wrong = GuestError("The file \(path) of -readconfig has no option in line \(number + 1): \(line)")
            if line.hasPrefix("["), line.hasSuffix("]") {
                finish()
                let words = line.dropFirst().dropLast().split(separator: " ", maxSplits: 1)
                guard let name = words.first else { throw wrong }
                let id = words.count > 1 ? words[1].trimmed.filter { $0 != "\"" } : nil
                section = (String(name), id.map { ["id=\(KeyValue.escape($0))"] } ?? [])
                continue
            }
            guard section != nil, let equals = line.firstIndex(of: "=") else { throw wrong }
            let key = line[..<equals].trimmed
            let value = line[line.index(after: equals)...].trimmed
            guard !key.isEmpty, value.hasPrefix("\""), value.hasSuffix("\""), value.count > 1 else { throw wrong }
            section?.pairs.append("\(key)=\(KeyValue.escape(String(value.dropFirst().dropLast())))")
        }
        finish()
        return options
    }
}

extension StringProtocol {
    /// Without white space at both ends.
    var trimmed: String {
        var text = self[...]
        while let first = text.first, first.isWhitespace { text.removeFirst() }
        while let last = text.last, last.isWhitespace { text.removeLast() }
        return String(text)
    }
}
