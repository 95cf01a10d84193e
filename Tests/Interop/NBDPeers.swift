import Glibc
import IO
import NBD
import TestSupport
import Testing

/// Our NBD server and client with more of the programs that people use.
@Suite(.timeLimit(.minutes(9)))
struct NBDPeers {
    /// A boot sector that reads the disk's second sector, writes it to the third, and tells QEMU's debug-exit device.
    private static let bootSector: [UInt8] = [
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c,  // registers and stack
        0xb8, 0x01, 0x02, 0xb9, 0x02, 0x00, 0xba, 0x80, 0x00, 0xbb, 0x00, 0x80, 0xcd, 0x13, 0x72, 0x15,  // read
        0xb8, 0x01, 0x03, 0xb9, 0x03, 0x00, 0xba, 0x80, 0x00, 0xbb, 0x00, 0x80, 0xcd, 0x13, 0x72, 0x05,  // write
        0xb0, 0x10, 0xe6, 0xf4, 0xf4,  // done: 0x10, and stop: QEMU 10.0 ends a moment later
        0xb0, 0x11, 0xe6, 0xf4, 0xf4,  // failed: 0x11
    ]

    @Test func anEmulatorBootsFromAnExportOverTLS() async throws {
        let directory = try TestDirectory()
        let image = directory.file("boot.raw")
        var disk = Self.bootSector + [UInt8](repeating: 0, count: 510 - Self.bootSector.count) + [0x55, 0xaa]
        disk += (0..<512).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ 7) }
        try DurableFile.write(disk, to: image)
        _ = try await Tool.run(["truncate", "-s", "16M", image])
        let server = try await NBDServerProcess(["-x", "boot", "-f", "raw", image], tls: true, in: directory)
        let guest = try await Tool.run([
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none", "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04", "-object",
            "tls-creds-x509,id=tls0,endpoint=client,dir=\(server.pki!.directory)", "-drive",
            "driver=nbd,host=localhost,port=\(server.port),export=boot,tls-creds=tls0,if=ide",
        ])
        // The device ends QEMU with twice the value plus one.
        #expect(guest.code == 0x10 * 2 + 1, "\(guest.all) \(server.process.errors)")
        #expect(try await server.process.finish(seconds: 20).code == 0)
        let after = try #require(try DurableFile.read(image))
        #expect(after[1024..<1536].elementsEqual(after[512..<1024]))
    }

    @Test func nbdClientListsTheExports() async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("a"), mebibytes: 1)
        let server = try ChildProcess([
            Tool.crossdock, "nbd", "serve", "-t", "-b", "127.0.0.1", "-p", "0", "--export",
            "name=one,file=\(directory.file("a"))",
            "--export", "name=two,file=\(directory.file("a")),read-only=on", "-r",
        ])
        try await server.wait(for: "the server") { server.errors.contains("listening on") }
        let port = server.errors.split(separator: ":").last.map { String($0.prefix { $0.isNumber }) } ?? ""
        let list = try await Tool.run(["/usr/sbin/nbd-client", "-l", "127.0.0.1", port])
        #expect(list.code == 0 && list.output.contains("one") && list.output.contains("two"), "\(list.all)")
    }

    @Test func nbdkitPassesAnExportOnAsAClientOverTLS() async throws {
        let directory = try TestDirectory()
        let (a, b) = (directory.file("a"), directory.file("b"))
        try await makeImage(a, mebibytes: 8, random: 2...4)
        let server = try await NBDServerProcess(["-t", "-x", "web1", a], tls: true, in: directory)
        let copied = try await Tool.run([
            "nbdkit", "-U", "-", "nbd", "hostname=localhost", "port=\(server.port)", "export=web1", "tls=require",
            "tls-certificates=\(server.pki!.directory)", "--run", "nbdcopy \"$uri\" \(b)",
        ])
        #expect(copied.code == 0, "\(copied.all)")
        #expect(try await Tool.run(["cmp", a, b]).code == 0)
    }

    @Test func fioReadsBackWhatItWrote() async throws {
        let server = try await NBDServerProcess(["-t", "--memory", "64M"])
        let fio = try await Tool.run([
            "fio", "--name=verify", "--ioengine=nbd", "--uri=\(server.uri())", "--rw=randwrite", "--bsrange=512-64k",
            "--iodepth=32", "--size=32m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
            "--verify_state_save=0", "--randrepeat=0",
        ])
        #expect(fio.code == 0 && fio.output.contains("err= 0"), "\(fio.all)")
    }

    /// Servers that lack this or that: our client must manage with what there is.
    @Test(arguments: [
        [], ["--no-sr"], ["--mask-handshake=0"], ["--mask-handshake=1"], ["--filter=nozero"], ["--filter=noextents"],
        ["--filter=nocache", "cachemode=none"], ["--filter=fua", "fuamode=emulate"], ["--filter=nofilter"],
        ["--filter=nozero", "--filter=noextents", "--filter=multi-conn", "multi-conn-mode=disable"],
        ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"],
        ["--filter=nozero", "--filter=fua", "--no-sr", "zeromode=none", "fuamode=emulate"],
    ])
    func copiesToAndFromACrippledServer(_ options: [String]) async throws {
        let directory = try TestDirectory()
        let (a, b, socket) = (directory.file("a"), directory.file("b"), directory.file("k"))
        try await makeImage(a, mebibytes: 8, random: 1...3)
        let flags = options.filter { $0.hasPrefix("--") }
        let parameters = options.filter { !$0.hasPrefix("--") }
        let server = try ChildProcess(["nbdkit", "-f", "-U", socket] + flags + ["memory", "8M"] + parameters)
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let uri = "nbd+unix:///?socket=\(socket)"
        let up = try await nbd("copy", "--verify", a, uri)
        #expect(up.code == 0, "\(options): \(up.all)")
        let down = try await nbd("copy", uri, b)
        #expect(down.code == 0, "\(options): \(down.all)")
        #expect(try await Tool.run(["cmp", a, b]).code == 0)
    }

    @Test func anImageThatIsNoWholeNumberOfSectorsIsCopiedIntoALargerDiskOfWhichNoBlockSizeIsKnown() async throws {
        let directory = try TestDirectory()
        let (a, b, socket) = (directory.file("a"), directory.file("b"), directory.file("k"))
        try await makeImage(a, mebibytes: 1, random: 0...0)
        _ = try await Tool.run(["sh", "-c", "printf x >>\(a)"])
        let server = try ChildProcess(["nbdkit", "-f", "-U", socket, "memory", "8M"])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let uri = "nbd+unix:///?socket=\(socket)"
        let info = try await nbd("info", uri)
        #expect(info.code == 0 && !info.output.contains("block_size"), "\(info.all)")
        let up = try await nbd("copy", "--verify", a, uri)
        #expect(up.code == 0, "\(up.all)")
        #expect(try await nbd("copy", uri, b).code == 0)
        #expect(try await Tool.run(["cmp", "--bytes=1048577", a, b]).code == 0)
        #expect(try await Tool.run(["cmp", "--ignore-initial=1048577:0", "--bytes=7340031", b, "/dev/zero"]).code == 0)
    }

    @Test func aReadOnlyServerAndOneThatRequiresTLSAreClearErrors() async throws {
        let directory = try TestDirectory()
        let (a, socket) = (directory.file("a"), directory.file("k"))
        try await makeImage(a, mebibytes: 1)
        let server = try ChildProcess(["nbdkit", "-f", "-U", socket, "-r", "memory", "8M"])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let copy = try await nbd("copy", a, "nbd+unix:///?socket=\(socket)")
        #expect(copy.code == 1 && copy.errors.contains("The target is read-only"), "\(copy.all)")
        let pki = try TestPKI()
        let secure = directory.file("t")
        let tls = try ChildProcess([
            "nbdkit", "-f", "-U", secure, "--tls=require", "--tls-certificates=\(pki.directory)", "memory", "8M",
        ])
        try await tls.wait(for: "nbdkit") { DurableFile.exists(secure) }
        let plain = try await nbd("copy", a, "nbd+unix:///?socket=\(secure)")
        #expect(plain.code == 1 && plain.errors.contains("requires TLS"), "\(plain.all)")
        // The name in the certificate cannot be known from a Unix socket.
        let nameless = try await nbd("copy", a, "nbds+unix:///?socket=\(secure)&tls-certificates=\(pki.directory)")
        #expect(nameless.code == 12 && nameless.errors.contains("hostname"), "\(nameless.all)")
        let named = try await nbd(
            "copy",
            a,
            "nbds+unix:///?socket=\(secure)&tls-certificates=\(pki.directory)&tls-hostname=localhost"
        )
        #expect(named.code == 0, "\(named.all)")
    }

    @Test func aPreSharedKeyIsEnough() async throws {
        let directory = try TestDirectory()
        let a = directory.file("a")
        try await makeImage(a, mebibytes: 1)
        try DurableFile.write(Array("alice:0123456789abcdef0123456789abcdef\n".utf8), to: directory.file("keys.psk"))
        let server = try ChildProcess([
            Tool.crossdock, "nbd", "serve", "-t", "-b", "127.0.0.1", "-p", "0", "--object",
            "tls-creds-psk,id=p,endpoint=server,dir=\(directory.path)", "--tls-creds", "p", a,
        ])
        try await server.wait(for: "the server") { server.errors.contains("listening on") }
        let port = server.errors.split(separator: ":").last.map { String($0.prefix { $0.isNumber }) } ?? ""
        let uri = "nbds://alice@127.0.0.1:\(port)/?tls-psk-file=\(directory.file("keys.psk"))"
        #expect(try await nbd("info", "--size", uri).output == "1048576\n")
        let theirs = try await Tool.run(["nbdinfo", "--size", uri])
        #expect(theirs.output == "1048576\n", "\(theirs.all)")
        let stranger = try await nbd("info", uri.replacing("alice@", with: "mallory@"))
        #expect(stranger.code == 12 && stranger.errors.contains("mallory"), "\(stranger.all)")
    }

    /// The same bytes to our server and to QEMU's: the same class of answer. `Differential` says what is left out, and why.
    @Test func randomConversationsGetTheSameAnswersFromOursAndQEMUs() async throws {
        let directory = try TestDirectory()
        let (a, b, theirs) = (directory.file("a"), directory.file("b"), directory.file("q"))
        try await makeImage(a, mebibytes: 1)
        try await makeImage(b, mebibytes: 1)
        let ours = try await NBDServerProcess(["-t", "-A", "-f", "raw", "-x", "disk", a], in: directory)
        let peer = try ChildProcess(["qemu-nbd", "-k", theirs, "-t", "-e", "0", "-f", "raw", "-A", "-x", "disk", b])
        try await peer.wait(for: "qemu-nbd") { DurableFile.exists(theirs) }
        try await onLoop { loop in
            var generator = Differential.Generator(seed: 20_250)
            for round in 0..<400 {
                let script = Differential.script(&generator)
                let mine = try await Differential.play(script, at: ours.socket, on: loop)
                let others = try await Differential.play(script, at: theirs, on: loop)
                #expect(mine == others, "round \(round): \(script)")
            }
        }
    }

    @Test func aServerThatThinksLongBeforeItOpensItsDiskIsWaitedFor() async throws {
        let directory = try TestDirectory()
        let socket = directory.file("k")
        let server = try ChildProcess(["nbdkit", "-f", "-U", socket, "--filter=delay", "memory", "1M", "delay-open=11"])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let size = try await nbd("info", "--size", "nbd+unix:///?socket=\(socket)")
        #expect(size.output == "1048576\n", "\(size.all)")
    }

    @Test func whatAListSaysOfAnExportIsToldWhereTheExportSaysNothing() async throws {
        let directory = try TestDirectory()
        let socket = directory.file("k")
        // As long as the protocol allows.
        let summary = String(repeating: "long ", count: 819) + "."
        let server = try ChildProcess([
            "nbdkit", "-f", "-U", socket, "eval", "get_size=echo 512",
            "list_exports=echo INTERLEAVED; echo one; echo a disk; echo two; echo '\(summary)'",
        ])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let list = try await nbd("info", "--list", "nbd+unix:///?socket=\(socket)")
        #expect(list.code == 0 && list.output.contains("export=\"one\":\n\tdescription: a disk\n"), "\(list.all)")
        let json = try await nbd("info", "--list", "--json", "nbd+unix:///?socket=\(socket)")
        #expect(json.output.contains("\"description\": \"a disk\""), "\(json.all)")
        #expect(json.output.contains("\"description\": \"\(summary)\""), "\(json.all)")
    }

    /// What scripts read of nbdinfo's output, they find in ours.
    @Test(arguments: [["--map"], ["--map", "--totals"], ["--size"]])
    func mapsAndSizesAreWrittenAsNbdinfoWritesThem(_ options: [String]) async throws {
        let directory = try TestDirectory()
        let socket = directory.file("k")
        let server = try ChildProcess(["nbdkit", "-f", "-U", socket, "data", "1 @131072 2 @6442450944 3", "size=8G"])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let uri = "nbd+unix:///?socket=\(socket)"
        let theirs = try await Tool.run(["nbdinfo"] + options + [uri])
        let ours = try await Tool.run([Tool.crossdock, "nbd", "info"] + options + [uri])
        #expect(theirs.code == 0 && ours.code == 0, "\(theirs.all) \(ours.all)")
        #expect(ours.output == theirs.output)
    }
}
