import Glibc
import IO
import NBD
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(9)))
struct NBDInfoTests {
    @Test func whatAServerHasIsTold() async throws {
        let directory = try TestDirectory()
        let a = directory.file("a")
        try await makeImage(a, mebibytes: 8, random: 2...4)
        let server = try await NBDServerProcess(["-t", "-x", "web1", "-D", "a disk", a], tls: true, in: directory)
        let info = try await nbd("info", server.uri("web1"))
        for part in [
            "with TLS, using extended packets", "TLS 1.3", "export=\"web1\":", "description: a disk",
            "can_multi_conn: true",
            "export-size: 8388608 (8M)", "contexts:\n\t\tbase:allocation", "uri: nbds://localhost:\(server.port)/web1",
        ] {
            #expect(info.output.contains(part), "\(info.all)")
        }
        let json = try await nbd("info", "--json", server.uri("web1"))
        #expect(json.output.contains("\"export-size\": 8388608"), "\(json.all)")
        let map = try await nbd("info", "--map", server.uri("web1"))
        #expect(
            map.output == """
                         0     2097152    3  hole,zero
                   2097152     3145728    0  data
                   5242880     3145728    3  hole,zero

                """,
            "\(map.all)"
        )
        let totals = try await nbd("info", "--map", "--totals", server.uri("web1"))
        #expect(totals.output.contains("   3145728  37.5%   0 data\n"), "\(totals.all)")
        #expect(try await nbd("info", "--can", "trim", server.uri("web1")).code == 0)
        #expect(try await nbd("info", "--can", "multi_conn", server.uri("web1")).code == 0)
        #expect(try await nbd("info", "--is", "read-only", server.uri("web1")).code == 2)
        let unknown = try await nbd("info", server.uri("nothing"))
        #expect(unknown.code == 1 && unknown.errors.contains("has no export 'nothing'"), "\(unknown.all)")
        let plain = try await nbd("info", "nbd://localhost:\(server.port)/web1")
        #expect(plain.code == 1 && plain.errors.contains("requires TLS"), "\(plain.all)")
        let wrong = try TestPKI()
        let stranger = try await nbd(
            "info",
            "nbds://localhost:\(server.port)/web1?tls-certificates=\(wrong.directory)"
        )
        #expect(stranger.code != 0 && stranger.errors.contains("certificate"), "\(stranger.all)")
        let alias = try await nbd(
            "info",
            "--tls-hostname",
            "elsewhere",
            server.uri("web1")
        )
        #expect(alias.code != 0 && alias.errors.contains("elsewhere"), "\(alias.all)")
    }

    @Test func otherServersAreUnderstood() async throws {
        let directory = try TestDirectory()
        let socket = directory.file("k")
        let server = try ChildProcess(["nbdkit", "-f", "-U", socket, "memory", "16M"])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let info = try await nbd("info", "nbd+unix:///?socket=\(socket)")
        #expect(
            info.output.contains("without TLS, using structured packets") && info.output.contains("size: 16777216"),
            "\(info.all)"
        )
    }

    // MARK: habits

    @Test func whatQEMUTakesForAFileIsServed() async throws {
        let directory = try TestDirectory()
        let image = directory.file("a")
        try await makeImage(image, mebibytes: 4, random: 1...2)
        let first = try await NBDServerProcess(["-t", "-f", "raw", "-x", "one", image], in: directory)
        let description = #"json:{"driver":"raw","file":{"driver":"file","filename":"\#(image)"}}"#
        for (index, file) in [first.uri("one"), description].enumerated() {
            let copy = directory.file("copy\(index)")
            let words = index == 0 ? ["-t", file] : ["-t", "-r", file]
            if index == 1 { #expect(try await first.stop().code == 0) }
            let server = try await NBDServerProcess(words, in: directory)
            #expect(try await Tool.run(["nbdcopy", server.uri(), copy]).code == 0)
            #expect(try await Tool.run(["cmp", image, copy]).code == 0)
            #expect(try await server.stop().code == 0)
            if index == 1 { continue }
            let protected = try await NBDServerProcess(["-t", "-r", file], in: directory)
            #expect(try await nbd("info", "--can", "write", protected.uri()).code == 2)
            #expect(try await protected.stop().code == 0)
        }
        // The depth is offered to whoever asks for it, as qemu-nbd does.
        for (words, isThere) in [([], false), (["-A"], true)] {
            for what in [
                ["-f", "raw", image], ["--memory", "1M"],
                ["-r", "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"\(image)\"}}"],
            ] {
                let asked = try await NBDServerProcess(["-t"] + words + what, in: directory)
                let info = try await nbd("info", asked.uri())
                #expect(info.output.contains("qemu:allocation-depth") == isThere, "\(words) \(what): \(info.all)")
                #expect(try await asked.stop().code == 0)
            }
        }
        let null = try await NBDServerProcess(["-t", "null-co://"], in: directory)
        #expect(try await nbd("info", "--size", null.uri()).output == "1073741824\n")
        let wrong = try await nbd("serve", "-k", directory.file("k"), "json:{nothing")
        #expect(wrong.code != 0, "\(wrong.all)")
    }

    @Test func whoReadsInSpiteOfAWriterMayLookAtWhatIsServed() async throws {
        let directory = try TestDirectory()
        let image = directory.file("a")
        try await makeImage(image, mebibytes: 4, random: 1...2)
        let server = try await NBDServerProcess(["-t", "-f", "raw", image], in: directory)
        for words in [
            ["qemu-img", "map", "-U", "-f", "raw", image], ["qemu-img", "info", "-U", "-f", "raw", image],
            ["qemu-img", "convert", "-U", "-f", "raw", image, directory.file("copy")],
            ["qemu-io", "-r", "-U", "-f", "raw", "-c", "read 0 4M", image],
        ] {
            let result = try await Tool.run(words)
            #expect(result.code == 0, "\(words): \(result.all)")
        }
        let write = try await Tool.run(["qemu-io", "-f", "raw", "-c", "write 0 4k", image])
        #expect(write.code != 0 && write.all.contains("lock"), "\(write.all)")
        #expect(try await server.stop().code == 0)
    }

    @Test func optionsAreWrittenAsGetoptHasThem() async throws {
        let directory = try TestDirectory()
        let image = directory.file("a")
        try await makeImage(image, mebibytes: 4, random: 1...2)
        let server = try await NBDServerProcess(["-tr", "-fraw", "-xweb1", "-Da disk", "-e4", image], in: directory)
        let (copy, uri) = (directory.file("copy"), server.uri("web1"))
        let copied = try await nbd("copy", "-C2", "-R4", "-S4096", "--queue-size=4M", "-T2", "--synchronous", uri, copy)
        #expect(copied.code == 64 && copied.errors.contains("excludes --requests"), "\(copied.all)")
        #expect(try await nbd("copy", "-C2", "-S4096", "--queue-size=4M", "-T2", "--synchronous", uri, copy).code == 0)
        #expect(try await Tool.run(["cmp", image, copy]).code == 0)
        // In its range: the port is a number.
        let port = try await nbd("serve", "-p99999", image)
        #expect(port.code == 64 && port.errors.contains("99999"), "\(port.all)")
        for tool in ["serve", "copy", "info"] {
            let version = try await Tool.run(
                [Tool.crossdock, "nbd", tool, "-V"] + (tool == "copy" ? ["a", "b"] : ["a"])
            )
            #expect(version.code == 0 && version.output.contains("crossdock 0."), "\(tool): \(version.all)")
        }
    }

    @Test(arguments: [
        (["serve", "-L"], "nbd info --list"), (["serve", "-s", "x"], "qemu-img create"),
        (["serve", "-lsnap", "x"], "qemu-img convert -l"), (["serve", "-c/dev/nbd0", "x"], "nbd-client"),
        (["serve", "-d", "/dev/nbd0"], "nbd-client"), (["serve", "-P1", "x"], "--offset"),
        (["info", "--content", "nbd://localhost"], "file -"),
    ])
    func whatTheToolsDoAndWeDoNotIsRefusedWithWhatDoesIt(_ words: [String], _ remedy: String) async throws {
        let result = try await Tool.run([Tool.crossdock, "nbd"] + words)
        #expect(result.code == 64 && result.errors.contains(remedy), "\(result.all)")
    }

    @Test func aServerInBracketsIsStartedForTheCommandAndEndsWithIt() async throws {
        let directory = try TestDirectory()
        let (image, copy) = (directory.file("a"), directory.file("copy"))
        try await makeImage(image, mebibytes: 4, random: 1...2)
        let size = try await nbd("info", "--size", "--", "[", "nbdkit", "memory", "16M", "]")
        #expect(size.code == 0 && size.output == "16777216\n", "\(size.all)")
        let map = try await nbd("info", "--map=base:allocation", "--", "[", "qemu-nbd", "-r", "-f", "raw", image, "]")
        #expect(map.code == 0 && map.output.contains("0  data"), "\(map.all)")
        let totals = try await nbd("info", "--map=totals", "[", "qemu-nbd", "-f", "raw", image, "]")
        #expect(totals.code == 0 && totals.output.contains(" 50.0%"), "\(totals.all)")
        // Our own server at one end, of which nothing is left.
        let copied = try await nbd("copy", "--", "[", Tool.crossdock, "nbd", "serve", "-r", "-fraw", image, "]", copy)
        #expect(copied.code == 0, "\(copied.all)")
        #expect(try await Tool.run(["cmp", image, copy]).code == 0)
        let missing = try await nbd("info", "--", "[", "no-such-server", "]")
        #expect(missing.code == 1 && missing.errors.contains("'no-such-server' is not installed"), "\(missing.all)")
        #expect(try await Tool.run(["pgrep", "-f", image]).code == 1)
    }

    @Test func whatProgramsReadIsWrittenAsTheToolsWriteIt() async throws {
        let directory = try TestDirectory()
        let image = directory.file("a")
        try await makeImage(image, mebibytes: 4, random: 1...2)
        let server = try await NBDServerProcess(["-t", "-x", "a disk", image], in: directory)
        let uri = "nbd+unix:///a%20disk?socket=\(server.socket)"
        let json = try await nbd("info", "--json", "--list", "nbd+unix:///?socket=\(server.socket)")
        let theirs = try await Tool.run(["nbdinfo", "--json", uri])
        for key in ["TLS", "structured", "protocol", "export-size", "contexts", "can_trim", "is_read_only"] {
            #expect(json.output.contains("\"\(key)\"") && theirs.output.contains("\"\(key)\""), "\(key): \(json.all)")
        }
        #expect(
            json.output.contains("\"protocol\": \"newstyle-fixed\"") && json.output.contains("\"\(uri)\""),
            "\(json.all)"
        )
        let socket = "nbd+unix:///?socket=\(server.socket)"
        #expect(try await nbd("info", "--uri", uri).output == "\(uri)\n")
        #expect(try await nbd("info", "--uri", "--list", socket).output == "\(uri)\n")
        #expect(try await nbd("info", "--uri", "--json", uri).output == "\"\(uri)\"\n")
        #expect(try await nbd("info", "--list", "--uri", "--json", uri).output.contains("\"uris\": ["))
        #expect(try await nbd("info", "--uri", "--size", uri).code == 64)
        #expect(try await nbd("info", "--cannot", "rotational", uri).code == 0)
        #expect(try await nbd("info", "--isnt", "read-only", uri).code == 0)
        #expect(try await nbd("info", "--hasnt", "trim", uri).code == 2)
        let progress = directory.file("progress")
        let script = "exec \"$0\" nbd copy --progress=5 '\(uri)' \(directory.file("b")) 5>\(progress)"
        #expect(try await Tool.run(["sh", "-c", script, Tool.crossdock]).code == 0)
        #expect(String(decoding: try DurableFile.read(progress) ?? [], as: UTF8.self).hasSuffix("100/100\n"))
    }
}
