import IO

/// Sends back on standard output what comes on standard input, and ends when it ends: what a program does that inetd, ssh or a
/// pipe starts.
@main
struct StandardEcho {
    static func main() async throws {
        let loop = EventLoop(name: "echo")
        try await loop.run {
            let channel = try DescriptorChannel.standard(on: loop)
            let buffer = IOBuffer(capacity: 65536)
            while true {
                let count = try await channel.readSome(into: buffer.mutable(0..<65536))
                if count == 0 { break }
                try await channel.writeAll(buffer.bytes(0..<count))
            }
            try await channel.finishWriting()
        }
    }
}
