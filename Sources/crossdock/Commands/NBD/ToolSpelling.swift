import Emulator
import Glibc
import IO

/// What nbdinfo and nbdcopy take and ArgumentParser does not: options whose value may be left out, and servers in brackets.
enum ToolSpelling {
    /// The options that may have a value, by their command, and the options that the two stand for.
    private static let optional = [
        "info": ["--map": ["--map", "--context"]],
        "copy": ["--progress": ["--progress", "--progress-fd"]],
    ]
    /// The servers of this command, which end with it.
    private static let servers = Guarded<[ActivatedServer]>([])

    /// The words of a command as its parser takes them. Servers are started.
    ///
    /// - Throws: `GuestError` for a server that cannot be started.
    static func parsed(_ words: [String]) async throws -> [String] {
        guard words.count > 1, words[0] == "nbd", let spellings = optional[words[1]] else { return words }
        var result: [String] = []
        var rest = words[...]
        while let word = rest.popFirst() {
            if word == "[", let end = closing(rest) {
                result.append(try await start(Array(rest[..<end])))
                rest = rest[(end + 1)...]
                continue
            }
            let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
            if parts.count == 2, let both = spellings[parts[0]] {
                // nbdinfo has a word of its own for the sums.
                result +=
                    parts[0] == "--map" && parts[1] == "totals" ? ["--map", "--totals"] : [both[0], both[1], parts[1]]
            } else {
                result.append(word)
            }
        }
        return result
    }

    /// The bracket that closes one, where servers have brackets of their own.
    private static func closing(_ words: ArraySlice<String>) -> Int? {
        var depth = 1
        for index in words.indices {
            if words[index] == "[" { depth += 1 }
            if words[index] == "]" { depth -= 1 }
            if depth == 0 { return index }
        }
        return nil
    }

    private static func start(_ command: [String]) async throws -> String {
        let server = try await ActivatedServer.start(command)
        let isFirst = servers.withLock { servers in
            servers.append(server)
            return servers.count == 1
        }
        // However the command ends.
        if isFirst { atexit { for server in ToolSpelling.servers.withLock({ $0 }) { server.end() } } }
        return "nbd+unix:///?socket=\(server.socket)"
    }
}
