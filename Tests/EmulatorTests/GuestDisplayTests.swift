import Glibc
import IO
import TestSupport
import Testing

@testable import Emulator

/// Where a guest's screen is, as its command line says and as Linux does.
struct GuestDisplayTests {
    private static func display(_ words: String...) throws -> GuestCommandLine.DisplayAddress {
        try GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/").display()
    }

    @Test func theFirstDisplayThatCanBeUsedIsTheGuestsScreen() throws {
        #expect(try Self.display("-vnc", "unix:/run/a,,b.sock,share=force-shared") == .socket("/run/a,b.sock"))
        #expect(try Self.display("-display", "vnc=unix:/run/a") == .socket("/run/a"))
        #expect(try Self.display("-vnc", ":1") == .ports(host: "127.0.0.1", 5901...5901))
        #expect(try Self.display("-vnc", "localhost:0,to=9") == .ports(host: "127.0.0.1", 5900...5909))
        #expect(try Self.display("-vnc", "[::1]:2") == .ports(host: "::1", 5902...5902))
        #expect(
            try Self.display("-vnc", "none", "-vnc", "192.0.2.1:3", "-vnc", ":4,password=off")
                == .ports(host: "127.0.0.1", 5904...5904)
        )
        #expect(try Self.display("-vnc", ":59635,to=70000") == .ports(host: "127.0.0.1", 65535...65535))
    }

    @Test func whatTheAgentHasNoUseForIsRefusedWithAReason() {
        for (words, reason) in [
            ([], "has no VNC display"), (["-display", "none"], "has no VNC display"),
            (["-vnc", ":1,password=on"], "'password=on'"),
            (["-vnc", ":1,password-secret=s"], "'password-secret'"), (["-vnc", ":1,sasl=on"], "'sasl=on'"),
            (["-vnc", ":1,tls-creds=t"], "'tls-creds'"), (["-vnc", "host:5500,reverse=on"], "'reverse=on'"),
            (["-vnc", "192.0.2.1:1"], "neither a Unix socket nor loopback"), (["-vnc", ":x"], "has no number"),
            (["-vnc", ":-1"], "has no number"), (["-vnc", ":59636"], "has no number"),
        ] as [([String], String)] {
            let line = GuestCommandLine(arguments: ["qemu"] + words, directory: "/")
            do {
                _ = try line.display()
                Issue.record("\(words) is taken")
            } catch { #expect("\(error)".contains(reason), "\(error)") }
        }
    }

    @Test func thePortsOfAProcessAreItsOwn() async throws {
        let loop = EventLoop(name: "ports")
        defer { loop.stop() }
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        let port = try #require(listener.address.port)
        #expect(try ListeningPorts.ports(of: getpid(), among: port...port) == [port])
        #expect(try ListeningPorts.ports(of: getpid(), among: 1...2) == [])
        #expect(throws: GuestError.self) { try ListeningPorts.ports(of: Int32.max, among: port...port) }
        let parent = try ListeningPorts.ports(of: getppid(), among: port...port)
        #expect(parent == [])
        try await loop.run { listener.close() }
        let established =
            "   0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000  1000        0 12345 1"
        #expect(ListeningPorts.listener(Array(established.utf8)[...]) == nil)
        #expect(ListeningPorts.listener(Array("nonsense".utf8)[...]) == nil)
    }
}
