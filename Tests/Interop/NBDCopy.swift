import Glibc
import IO
import NBD
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(9)))
struct NBDCopyTests {
    @Test func diskToServerToDiskIsTheSameAndSparse() async throws {
        let directory = try TestDirectory()
        let (a, b, c) = (directory.file("a"), directory.file("b"), directory.file("c"))
        try await makeImage(a, mebibytes: 64, random: 3...9)
        try await makeImage(b, mebibytes: 64)
        let server = try await NBDServerProcess(["-t", b], tls: true, in: directory)
        let up = try await nbd("copy", "--verify", "--json", a, server.uri())
        #expect(up.code == 0 && up.output.contains("\"verified\": true"), "\(up.all)")
        #expect(try await Tool.run(["cmp", a, b]).code == 0)
        let down = try await nbd("copy", "--verify", server.uri(), c)
        #expect(down.code == 0, "\(down.all)")
        #expect(try await Tool.run(["cmp", a, c]).code == 0)
        for path in [b, c] {
            var status = stat()
            #expect(stat(path, &status) == 0 && Int(status.st_blocks) * 512 <= 8 << 20, "\(path) is not sparse")
        }
        let between = try await nbd("copy", a, directory.file("d"))
        #expect(between.code == 0)
        #expect(try await Tool.run(["cmp", a, directory.file("d")]).code == 0)
    }

    @Test func holesAreNotReadForAStreamAndPipesAreEnds() async throws {
        let directory = try TestDirectory()
        let (image, copy, statistics) = (directory.file("a"), directory.file("b"), directory.file("statistics"))
        try await makeImage(image, mebibytes: 64, random: 3...4)
        let poured = try await Tool.run([
            "nbdkit", "-U", "-", "--filter=stats", "file", image, "statsfile=\(statistics)", "--run",
            "\(Tool.crossdock) nbd copy \"$uri\" - | cmp - \(image) && \(Tool.crossdock) nbd copy \"$uri\" /dev/null",
        ])
        #expect(poured.code == 0, "\(poured.all)")
        let said = String(decoding: try DurableFile.read(statistics) ?? [], as: UTF8.self)
        let read = try #require(said.split(separator: "\n").first { $0.hasPrefix("read:") })
        // Twice what is there, and nothing of the holes.
        #expect(read.contains(" 4.00 MiB,"), "\(read)")
        try await makeImage(copy, mebibytes: 64)
        let server = try await NBDServerProcess(["-t", copy], in: directory)
        let filled = try await Tool.run([
            "bash", "-c", "\(Tool.crossdock) nbd copy <(cat \(image)) '\(server.uri())' && cmp \(image) \(copy)",
        ])
        #expect(filled.code == 0, "\(filled.all)")
        let both = try await Tool.run(["bash", "-c", "\(Tool.crossdock) nbd copy <(true) /dev/null"])
        #expect(both.code != 0 && both.errors.contains("One of the ends must be a disk"), "\(both.all)")
    }

    @Test func digestsAreThoseThatMigrationsCompare() async throws {
        let directory = try TestDirectory()
        let a = directory.file("a")
        try await makeImage(a, mebibytes: 8, random: 2...4)
        _ = try await Tool.run(["truncate", "-s", "8389000", a])
        let server = try await NBDServerProcess(["-t", "-r", a], in: directory)
        let script = """
            import hashlib, sys
            h = hashlib.sha256()
            with open(sys.argv[1], 'rb') as f:
                while chunk := f.read(65536): h.update(hashlib.sha256(chunk).digest())
            print(h.hexdigest())
            """
        let expected = try await Tool.run(["python3", "-c", script, a])
        let digest = try await nbd("info", "--digest", server.uri())
        #expect(digest.output == expected.output, "\(digest.all)")
    }

    @Test func pipesWork() async throws {
        let directory = try TestDirectory()
        let (a, b) = (directory.file("a"), directory.file("b"))
        try await makeImage(a, mebibytes: 8, random: 2...4)
        try await makeImage(b, mebibytes: 8)
        let server = try await NBDServerProcess(["-t", b], in: directory)
        let fed = try await Tool.run(["sh", "-c", "\(Tool.crossdock) nbd copy - '\(server.uri())' < \(a)"])
        #expect(fed.code == 0, "\(fed.all)")
        #expect(try await Tool.run(["cmp", a, b]).code == 0)
        let read = try await Tool.run(["sh", "-c", "\(Tool.crossdock) nbd copy '\(server.uri())' - | cmp - \(a)"])
        #expect(read.code == 0, "\(read.all)")
    }

    @Test func aSourceIsNeverTakenForTheTargetAndAnImageInUseIsKept() async throws {
        let directory = try TestDirectory()
        let (a, b) = (directory.file("a"), directory.file("b"))
        try await makeImage(a, mebibytes: 2)
        let before = try DurableFile.read(a)
        link(a, b)
        for target in [a, b] {
            let refused = try await nbd("copy", a, target)
            #expect(refused.code != 0 && refused.errors.contains("the same file"), "\(refused.all)")
        }
        let state = try await nbd("copy", "--resume", a, a, directory.file("c"))
        #expect(state.code != 0 && state.errors.contains("must not be"), "\(state.all)")
        #expect(try DurableFile.read(a) == before)
        try await makeImage(directory.file("used"), mebibytes: 2)
        let server = try await NBDServerProcess(["-t", directory.file("used")], in: directory)
        let used = try await nbd("copy", a, directory.file("used"))
        #expect(used.code != 0 && used.errors.contains("in use"), "\(used.all)")
        #expect(try await server.stop().code == 0)
        try await makeImage(directory.file("small"), mebibytes: 1)
        let small = try await NBDServerProcess(["-t", directory.file("small")], in: directory)
        let large = try await nbd("copy", a, small.uri())
        #expect(large.code != 0 && large.errors.contains("does not fit"), "\(large.all)")
    }

    @Test func anInterruptedCopyGoesOnWhereItsTargetWasDurable() async throws {
        let directory = try TestDirectory()
        let (a, b, state) = (directory.file("a"), directory.file("b"), directory.file("state"))
        try await makeImage(a, mebibytes: 192)
        try await makeImage(b, mebibytes: 192, random: 0...0)
        let server = try await NBDServerProcess(["-t", b], in: directory)
        let arguments = [Tool.crossdock, "nbd", "copy", "--resume", state, "--json", a, server.uri()]
        let copying = try ChildProcess(arguments + ["--bandwidth", "60M"])
        try await copying.wait(for: "a checkpoint") { DurableFile.exists(state) }
        copying.signal(SIGKILL)
        _ = try await copying.finish()
        let journal = try #require(try CopyJournal.load(state))
        #expect(journal.position >= 16 << 20 && journal.position < 192 << 20)
        let other = try await nbd("copy", "--resume", state, b, server.uri())
        #expect(other.code != 0 && other.errors.contains("records another copy"), "\(other.all)")
        let rest = try await Tool.run(arguments + ["--verify"])
        #expect(rest.code == 0 && rest.output.contains("\"verified\": true"), "\(rest.all)")
        let read = rest.output.split(separator: "\"read\": ").last.flatMap { UInt64($0.prefix { $0.isNumber }) } ?? 0
        #expect(read <= (192 << 20) - journal.position, "\(rest.output)")
        #expect(try await Tool.run(["cmp", a, b]).code == 0)
        #expect(!DurableFile.exists(state))
    }

    @Test func aServerThatIsRestartedIsFoundAgainAndNothingIsLost() async throws {
        let directory = try TestDirectory()
        let (a, b, socket) = (directory.file("a"), directory.file("b"), directory.file("s"))
        try await makeImage(a, mebibytes: 128)
        try await makeImage(b, mebibytes: 128, random: 0...0)
        func serve() throws -> ChildProcess {
            try ChildProcess([Tool.crossdock, "nbd", "serve", "-t", "-k", socket, b])
        }
        let first = try serve()
        try await first.wait(for: "the server") { first.errors.contains("listening on") }
        let copying = try ChildProcess([
            Tool.crossdock, "nbd", "copy", "--verify", "--bandwidth", "80M", a, "nbd+unix:///?socket=\(socket)",
        ])
        try await eventually("a part is copied") {
            var status = stat()
            return stat(b, &status) == 0 && status.st_blocks * 512 > 24 << 20
        }
        first.signal(SIGKILL)
        _ = try await first.finish()
        let second = try serve()
        let result = try await copying.finish(seconds: 60)
        #expect(result.code == 0, "\(result.all)")
        #expect(try await Tool.run(["cmp", a, b]).code == 0)
        second.signal(SIGTERM)
        _ = try await second.finish()
    }

    @Test(arguments: [
        (["name=a,file=FILE", "name=a,file=FILE"], "two exports of the name 'a'"),
        (["name=a"], "needs name= and file="),
        (["name=a,file=FILE,colour=red"], "'colour' of --export is unexpected"),
        (["name=a,file=FILE,read-only=maybe"], "expects 'on' or 'off'"),
        (["name=a,file=FILE,1"], "Invalid parameter '1'"),
    ])
    func exportsThatMakeNoSenseAreWrongUsage(_ exports: [String], _ words: String) async throws {
        let directory = try TestDirectory()
        let file = directory.file("a.raw")
        try DurableFile.write([UInt8](repeating: 0, count: 4096), to: file)
        var arguments = [Tool.crossdock, "nbd", "serve", "-k", directory.file("s")]
        for export in exports { arguments += ["--export", export.replacing("FILE", with: file)] }
        let result = try await Tool.run(arguments)
        #expect(result.code == 64 && result.errors.contains(words), "\(result.all)")
    }

    @Test func everyErrorReachesTheExitCode() async throws {
        let directory = try TestDirectory()
        let a = directory.file("a")
        try await makeImage(a, mebibytes: 8)
        let socket = directory.file("k")
        let server = try ChildProcess([
            "nbdkit", "-f", "-U", socket, "--filter=error", "memory", "8M", "error-pwrite-rate=100%",
        ])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let copy = try await nbd("copy", a, "nbd+unix:///?socket=\(socket)")
        #expect(copy.code == 1 && copy.errors.contains("error"), "\(copy.all)")
        let nobody = try await nbd("copy", a, "nbd+unix:///?socket=\(directory.file("nobody"))")
        #expect(nobody.code != 0 && nobody.errors.contains("Cannot connect"), "\(nobody.all)")
    }
}
