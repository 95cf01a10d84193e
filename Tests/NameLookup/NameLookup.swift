import IO

/// Connects to a name in one task of a loop and counts the loop's turns in another; says which of the two came to its end
/// first. The name server is to be 127.0.0.1, where this program listens and never answers: only a loop that waits itself for
/// the name lets the name win.
@main
struct NameLookup {
    static func main() async throws {
        let loop = EventLoop(name: "lookup")
        try await loop.run {
            let nameServer = try await DatagramChannel.open(local: .inet(host: "127.0.0.1", port: 53), on: loop)
            defer { nameServer.close() }
            let lookup = Lookup()
            Task(executorPreference: loop) {
                lookup.hasBegun = true
                _ = try? await SocketChannel.connect(to: .inet(host: "name.invalid", port: 1), on: loop)
                lookup.isOver = true
            }
            var turns = 0
            while turns < 20 {
                await loop.sleep(for: .milliseconds(1))
                if lookup.hasBegun { turns += 1 }
            }
            print(lookup.isOver ? "the lookup ended first" : "the loop turned meanwhile")
        }
    }
}

/// How far the lookup is; touched on the loop only.
private final class Lookup: @unchecked Sendable {
    var hasBegun = false
    var isOver = false
}
