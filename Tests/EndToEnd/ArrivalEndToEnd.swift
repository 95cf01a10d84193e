import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// What others can do to a guest before it belongs to the host that it comes to.
@Suite(.timeLimit(.minutes(12)))
struct ArrivalEndToEnd {
    /// The sockets below a directory on which a monitor could answer: all but the agent's own and QEMU's way in.
    private func sockets(below directory: String) -> [String] {
        var found: [String] = []
        for name in DurableFile.list(directory) where !["control.sock", "incoming.sock"].contains(name) {
            let path = "\(directory)/\(name)"
            var status = stat()
            guard lstat(path, &status) == 0 else { continue }
            switch status.st_mode & S_IFMT {
            case S_IFSOCK: found.append(path)
            case S_IFDIR: found += sockets(below: path)
            default: break
            }
        }
        return found
    }

    /// Whether QEMU answers to somebody who wants to start the guest.
    private func answers(_ path: String, _ lab: Lab) async throws -> Bool {
        let loop = lab.loop
        return try await loop.run {
            guard let channel = try? await SocketChannel.connect(to: .unix(path: path), on: loop) else { return false }
            defer { channel.close() }
            let words = #"{"execute":"qmp_capabilities"}{"execute":"cont"}"#
            return
                (try? await channel.withDeadline(.milliseconds(300), for: "an answer") {
                    try await channel.write(Array(words.utf8))
                    return try await channel.read(exactly: 4)
                }) != nil
        }
    }

    @Test func nobodyElsesMonitorReachesAGuestThatDoesNotBelongToThisHost() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 4)
        let more = [
            "-qmp", "unix:\(lab.directory.file("own.sock")),server=on,wait=off", "-chardev",
            "socket,id=m0,path=\(lab.directory.file("m0.sock")),server=on,wait=off", "-mon", "chardev=m0,mode=control",
            "-monitor", "unix:\(lab.directory.file("human.sock")),server=on,wait=off",
        ]
        try await lab.startIdleGuest(disks: [disk], more: more)
        // Long enough for all looks, also on a busy machine.
        let migration = try lab.beginMigration(more: ["--bandwidth", "200000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        let state = lab.state("b")
        let hidden = sockets(below: state).filter { $0 != "\(state)/console.sock" }
        // Ours, the quick look's, and the guest's own three.
        #expect(hidden.count == 5, "\(hidden)")
        for path in hidden { #expect(try await !answers(path, lab), "\(path)") }
        let record = try #require(try lab.guests("b").load("web1"))
        let (store, loop) = (lab.guests("b"), lab.loop)
        let shown = try await loop.run { await store.state(of: record, on: loop) }
        #expect(shown == "arriving")
        let result = try await migration.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        // Now they are where they are looked for.
        let run = "\(lab.guests("b").directory(of: "web1"))/run"
        for name in ["own.sock", "m0.sock", "human.sock"] {
            #expect(try await answers("\(run)/\(name)", lab), "\(name)")
        }
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
        #expect(!DurableFile.exists(lab.guests("b").arrivals(of: "web1")))
    }
}
