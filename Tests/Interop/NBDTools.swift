import Glibc
import IO
import NBD
import TestSupport
import Testing

/// `crossdock nbd serve` as a process, for peers and for our own tools.
final class NBDServerProcess: Sendable {
    let process: ChildProcess
    let socket: String
    let directory: TestDirectory
    let pki: TestPKI?
    let port: UInt16

    /// Starts a server on a Unix socket, or over TLS on localhost.
    init(_ arguments: [String], tls: Bool = false, in directory: TestDirectory? = nil) async throws {
        let directory = try directory ?? TestDirectory()
        self.directory = directory
        socket = directory.file("nbd-\(UInt32.random(in: 0...UInt32.max)).sock")
        var command = [Tool.crossdock, "nbd", "serve"]
        if tls {
            let made = try TestPKI()
            pki = made
            command += ["-b", "localhost", "-p", "0", "--tls-creds", "t"]
            command += ["--object", "tls-creds-x509,id=t,endpoint=server,dir=\(made.directory)"]
        } else {
            pki = nil
            command += ["-k", socket]
        }
        process = try ChildProcess(command + arguments)
        try await process.wait(for: "the NBD server") { [process] in process.errors.contains("listening on") }
        let line = process.errors.split(separator: "\n").first { $0.contains("listening on") } ?? ""
        port = line.split(separator: ":").last.flatMap { UInt16($0) } ?? 0
    }

    func uri(_ export: String = "") -> String {
        guard let pki else { return "nbd+unix:///\(export)?socket=\(socket)" }
        return "nbds://localhost:\(port)/\(export)?tls-certificates=\(pki.directory)"
    }

    func stop() async throws -> ToolResult {
        process.signal(SIGTERM)
        return try await process.finish(seconds: 20)
    }
}

func nbd(_ arguments: String..., seconds: Int = 60) async throws -> ToolResult {
    try await Tool.run([Tool.crossdock, "nbd"] + arguments, seconds: seconds)
}

/// A file of random data with holes.
func makeImage(_ path: String, mebibytes: Int, random: ClosedRange<Int>? = nil) async throws {
    let range = random ?? 0...(mebibytes - 1)
    let made = try await Tool.run([
        "sh", "-c",
        "truncate -s \(mebibytes)M \(path) && dd if=/dev/urandom of=\(path) bs=1M count=\(range.count) "
            + "seek=\(range.lowerBound) conv=notrunc status=none",
    ])
    #expect(made.code == 0, "\(made.all)")
}

@Suite(.timeLimit(.minutes(9)))
struct NBDServeTests {
    @Test func theSeedsCommandServesAQcow2ImageAndAGuestsDriveReadsIt() async throws {
        let directory = try TestDirectory()
        let image = directory.file("image.qcow2")
        _ = try await Tool.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"])
        _ = try await Tool.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 1M", image])
        let server = try await NBDServerProcess([image], tls: true, in: directory)
        let read = try await Tool.run([
            "qemu-io", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir=\(server.pki!.directory)", "-c",
            "read -P 0x5a 1M 1M", "-c", "read -P 0 2M 1M", "-c", "write -P 0x11 3M 64k", "-c", "flush", "--image-opts",
            "driver=nbd,host=localhost,port=\(server.port),tls-creds=tls0",
        ])
        #expect(read.code == 0 && !read.all.contains("failed"), "\(read.all)")
        // Without -t the server ends with its last client.
        #expect(try await server.process.finish(seconds: 20).code == 0)
        let check = try await Tool.run(["qemu-io", "-f", "qcow2", "-c", "read -P 0x11 3M 64k", image])
        #expect(check.code == 0 && !check.all.contains("failed"), "\(check.all)")
    }

    @Test func anImageThatOnlyLooksLikeAFormatIsNotGuessed() async throws {
        let directory = try TestDirectory()
        let image = directory.file("disk.raw")
        _ = try await Tool.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"])
        let refused = try await nbd("serve", "-k", directory.file("s"), image)
        #expect(refused.code != 0 && refused.errors.contains("--format qcow2 or --format raw"), "\(refused.all)")
        let missing = try await nbd("serve", "-k", directory.file("s"), "-f", "qcow2", directory.file("nothing"))
        #expect(missing.code != 0 && missing.errors.contains("No such file"), "\(missing.all)")
    }

    @Test func dirtyBitmapsAndDepthsOfOtherFormatsAreOffered() async throws {
        let directory = try TestDirectory()
        let (base, image) = (directory.file("base.qcow2"), directory.file("top.qcow2"))
        for command in [
            ["qemu-img", "create", "-q", "-f", "qcow2", base, "4M"],
            ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", base],
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image],
            ["qemu-img", "bitmap", "--add", image, "b0"],
            ["qemu-io", "-f", "qcow2", "-c", "write -P 2 2M 1M", image],
        ] {
            let result = try await Tool.run(command)
            #expect(result.code == 0, "\(result.all)")
        }
        let server = try await NBDServerProcess(["-t", "-r", "-A", "-f", "qcow2", "-B", "b0", image], in: directory)
        let map = try await nbd("info", "--map", "--context", "qemu:dirty-bitmap:b0", server.uri())
        #expect(map.output.contains("2097152     1048576    1  dirty"), "\(map.all)")
        let depth = try await Tool.run(["nbdinfo", "--map=qemu:allocation-depth", server.uri()])
        #expect(depth.output.contains("backing depth 2") && depth.output.contains("local"), "\(depth.all)")
        #expect(try await server.stop().code == 0)
    }

    /// A storage daemon that ends by itself leaves the bitmaps of an image that it has opened for writing damaged.
    @Test func aBitmapThatIsNotThereIsNamedAndTheOthersStayWhole() async throws {
        let directory = try TestDirectory()
        let image = directory.file("disk.qcow2")
        for command in [
            ["qemu-img", "create", "-q", "-f", "qcow2", image, "4M"], ["qemu-img", "bitmap", "--add", image, "b0"],
            ["qemu-img", "bitmap", "--add", image, "b1"],
        ] {
            let result = try await Tool.run(command)
            #expect(result.code == 0, "\(result.all)")
        }
        let before = try DurableFile.read(image)
        let refused = try await nbd("serve", "-k", directory.file("s"), "-f", "qcow2", "-B", "typo", image)
        #expect(refused.code != 0, "\(refused.all)")
        #expect(refused.errors.contains("no dirty bitmap 'typo'; it has b0, b1"), "\(refused.all)")
        #expect(try DurableFile.read(image) == before)
        let described = try await nbd(
            "serve",
            "-k",
            directory.file("s"),
            "--image-opts",
            "-B",
            "typo",
            "driver=qcow2,file.driver=file,file.filename=\(image)"
        )
        #expect(described.code != 0 && described.errors.contains("'typo'; it has b0, b1"), "\(described.all)")
        #expect(try DurableFile.read(image) == before)
    }

    /// What runs a server for one command ends it once more when that has ended.
    @Test(arguments: 0..<3)
    func aServerThatIsToldToEndWhileItEndsByItselfSucceedsAndLetsItsImageGo(_ attempt: Int) async throws {
        let directory = try TestDirectory()
        let image = directory.file("disk.qcow2")
        _ = try await Tool.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"])
        let server = try await NBDServerProcess(["-f", "qcow2", image], in: directory)
        let copied = try await Tool.run(["nbdcopy", server.uri(), directory.file("copy")])
        server.process.signal(SIGTERM)
        #expect(copied.code == 0, "\(copied.all)")
        let ended = try await server.process.finish(seconds: 20)
        #expect(ended.code == 0, "\(ended.all)")
        let free = try await Tool.run(["qemu-io", "-f", "qcow2", "-c", "write 0 4k", image])
        #expect(free.code == 0, "\(free.all)")
    }

    @Test func severalExportsHaveTheirOwnNamesPartsAndAccess() async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("a"), mebibytes: 4)
        try await makeImage(directory.file("b"), mebibytes: 4)
        let server = try await NBDServerProcess(
            [
                "-t", "--object", "authz-simple,id=me,identity=CN=host,,O=Crossdock", "--object",
                "authz-simple,id=other,identity=CN=other", "--export", "name=mine,file=\(directory.file("a")),authz=me",
                "--export", "name=part,file=\(directory.file("b")),offset=1M,size=1M,read-only=on,description=a part",
                "--export", "name=theirs,file=\(directory.file("b")),authz=other,read-only=on",
            ],
            tls: true,
            in: directory
        )
        let list = try await nbd("info", "--list", "--json", server.uri())
        #expect(list.code == 0, "\(list.all)")
        let dn = try await Tool.run([
            "openssl", "x509", "-noout", "-subject", "-nameopt", "RFC2253", "-in",
            "\(server.pki!.directory)/client-cert.pem",
        ])
        let part = try await nbd("info", server.uri("part"))
        #expect(part.output.contains("description: a part") && part.output.contains("size: 1048576"), "\(part.all)")
        let refused = try await nbd("info", server.uri("theirs"))
        #expect(refused.code != 0 && refused.errors.contains("You may not use the export 'theirs'"), "\(refused.all)")
        #expect(!list.output.contains("theirs"), "\(list.output) \(dn.all)")
        let copied = directory.file("copy")
        #expect(try await nbd("copy", server.uri("part"), copied).code == 0)
        let compared = try await Tool.run([
            "cmp", "--ignore-initial=0:1048576", "--bytes=1048576", copied, directory.file("b"),
        ])
        #expect(compared.code == 0, "\(compared.all)")
        #expect(try await server.stop().code == 0)
    }

    @Test func itGoesToTheBackgroundAndWritesItsNumber() async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("a"), mebibytes: 1)
        let (socket, pidFile) = (directory.file("s"), directory.file("pid"))
        let started = try await nbd("serve", "--fork", "--pid-file", pidFile, "-t", "-k", socket, directory.file("a"))
        #expect(started.code == 0 && started.all.isEmpty, "\(started.all)")
        let pid = Int32(String(decoding: try DurableFile.read(pidFile) ?? [], as: UTF8.self).dropLast()) ?? 0
        #expect(pid > 0)
        #expect(try await nbd("info", "--size", "nbd+unix:///?socket=\(socket)").output == "1048576\n")
        kill(pid, SIGTERM)
        try await eventually("the server has ended") { !DurableFile.exists(pidFile) && kill(pid, 0) != 0 }
        let failed = try await nbd("serve", "--fork", "-k", socket, directory.file("nothing"))
        #expect(failed.code != 0 && failed.errors.contains("No such file"), "\(failed.all)")
    }

    @Test(arguments: [true, false])
    func inTheBackgroundItComplainsWhenAskedToBeVerbose(_ isVerbose: Bool) async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("a"), mebibytes: 1)
        let (socket, pidFile, log) = (directory.file("s"), directory.file("pid"), directory.file("log"))
        let started = try await Tool.run([
            "sh", "-c", "exec \"$@\" 2>\(log)", "sh", Tool.crossdock, "nbd", "serve", "--fork", "--pid-file", pidFile,
            "-t", "-k",
            socket, directory.file("a"), isVerbose ? "-v" : "-t",
        ])
        #expect(started.code == 0, "\(started.all)")
        let pid = Int32(String(decoding: try DurableFile.read(pidFile) ?? [], as: UTF8.self).dropLast()) ?? 0
        #expect(pid > 0)
        let script = """
            import socket, sys
            s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.send(b'x' * 64); s.recv(1 << 16)
            """
        #expect(try await Tool.run(["python3", "-c", script, socket]).code == 0)
        func complaints() -> String { String(decoding: (try? DurableFile.read(log)) ?? [], as: UTF8.self) }
        if isVerbose { try await eventually("a complaint") { complaints().contains("warning: ") } }
        kill(pid, SIGTERM)
        try await eventually("the server has ended") { !DurableFile.exists(pidFile) && kill(pid, 0) != 0 }
        #expect(complaints().isEmpty == !isVerbose)
    }

    @Test func inTheBackgroundWhatFollowsTheDashesIsTheFile() async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("--fork"), mebibytes: 1)
        let (socket, pidFile) = (directory.file("s"), directory.file("pid"))
        let started = try await Tool.run([
            "sh", "-c", "cd \(directory.path) && exec \"$@\"", "sh", Tool.crossdock, "nbd", "serve", "--fork",
            "--pid-file",
            pidFile, "-t", "-k", socket, "-f", "raw", "--", "--fork",
        ])
        #expect(started.code == 0 && started.all.isEmpty, "\(started.all)")
        let pid = Int32(String(decoding: try DurableFile.read(pidFile) ?? [], as: UTF8.self).dropLast()) ?? 0
        #expect(pid > 0)
        #expect(try await nbd("info", "--size", "nbd+unix:///?socket=\(socket)").output == "1048576\n")
        kill(pid, SIGTERM)
        try await eventually("the server has ended") { !DurableFile.exists(pidFile) && kill(pid, 0) != 0 }
    }

    @Test func socketsThatSystemdOpenedAreUsed() async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("a"), mebibytes: 1)
        let socket = directory.file("s")
        let script = """
            import os, socket, sys
            s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()
            os.dup2(s.fileno(), 3); os.set_inheritable(3, True)
            os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
            os.execv(sys.argv[2], sys.argv[2:])
            """
        let server = try ChildProcess(
            ["python3", "-c", script, socket, Tool.crossdock, "nbd", "serve", "-t", directory.file("a")]
        )
        try await server.wait(for: "the server") { server.errors.contains("listening on") }
        #expect(server.errors.contains("listening on unix:\(socket)\n"), "\(server.errors)")
        let info = try await Tool.run(["nbdinfo", "--size", "nbd+unix:///?socket=\(socket)"])
        #expect(info.output == "1048576\n", "\(info.all) \(server.errors)")
        server.signal(SIGTERM)
        #expect(try await server.finish().code == 0)
    }

    @Test func aClientMayStartItOnItsStandardStreams() async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("a"), mebibytes: 4)
        let script = """
            import socket, struct, subprocess, sys
            ours, theirs = socket.socketpair()
            child = subprocess.Popen(sys.argv[1:], stdin=theirs, stdout=theirs)
            theirs.close()
            assert ours.recv(18, socket.MSG_WAITALL)[:16] == b'NBDMAGICIHAVEOPT'
            ours.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>IIIH', 7, 6, 0, 0))
            size = None
            while True:
                magic, option, kind, length = struct.unpack('>QIII', ours.recv(20, socket.MSG_WAITALL))
                data = ours.recv(length, socket.MSG_WAITALL) if length else b''
                if kind == 3 and data[:2] == bytes(2): size = struct.unpack('>Q', data[2:10])[0]
                if kind == 1: break
            ours.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 2, 0, 0, 0))
            assert ours.recv(1) == b''
            print(size, child.wait())
            """
        let streams = try await Tool.run([
            "python3", "-c", script, Tool.crossdock, "nbd", "serve", "--stdio", directory.file("a"),
        ])
        #expect(streams.output == "4194304 0\n", "\(streams.all)")
        // libnbd starts a command in brackets with a listening socket, as systemd does.
        let copied = directory.file("b")
        let copy = try await Tool.run([
            "nbdcopy", "--", "[", Tool.crossdock, "nbd", "serve", "-r", directory.file("a"), "]", copied,
        ])
        #expect(copy.code == 0, "\(copy.all)")
        #expect(try await Tool.run(["cmp", directory.file("a"), copied]).code == 0)
    }

    @Test func cacheModesZeroDetectionAndMemoryWork() async throws {
        let directory = try TestDirectory()
        let image = directory.file("a")
        try await makeImage(image, mebibytes: 4)
        for mode in ["none", "directsync", "writethrough", "unsafe", "writeback"] {
            let server = try await NBDServerProcess(
                ["-t", "--cache", mode, "--detect-zeroes", "unmap", image],
                in: directory
            )
            let io = try await Tool.run([
                "qemu-io", "-f", "raw", "-c", "write -P 0 1M 64k", "-c", "write -P 7 2M 8k", "-c", "flush", "-c",
                "read -P 7 2M 8k", "-c", "read -P 0 1M 64k", server.uri(),
            ])
            #expect(io.code == 0 && !io.all.contains("failed"), "\(mode): \(io.all)")
            if mode == "none" {
                let info = try await nbd("info", server.uri())
                #expect(info.output.contains("block_size_minimum: 4096 (4K)"), "\(info.all)")
                let conform = try await nbd("conform", "--destructive", server.uri())
                let failed = conform.output.split(separator: "\n").filter { $0.hasPrefix("fail") }
                #expect(conform.code == 0, "\(failed)")
            }
            #expect(try await server.stop().code == 0)
        }
        var status = stat()
        #expect(stat(image, &status) == 0 && status.st_blocks * 512 <= (4 << 20) - (64 << 10))
        let memory = try await NBDServerProcess(["-t", "--memory", "1T"])
        #expect(try await nbd("info", "--map", memory.uri()).output.contains("1099511627776    3  hole,zero"))
        #expect(try await memory.stop().code == 0)
    }

    @Test func anImageInUseIsRefusedAndStoppingServersLetsItGo() async throws {
        let directory = try TestDirectory()
        try await makeImage(directory.file("a"), mebibytes: 1)
        let server = try await NBDServerProcess(["-t", directory.file("a")], in: directory)
        let second = try await nbd("serve", "-k", directory.file("s2"), directory.file("a"))
        #expect(second.code != 0 && second.errors.contains("in use by another process"), "\(second.all)")
        let write = ["qemu-io", "-f", "raw", "-c", "write 0 512", directory.file("a")]
        let qemu = try await Tool.run(write)
        #expect(qemu.code != 0 && qemu.all.contains("lock"), "\(qemu.all)")
        #expect(try await server.stop().code == 0)
        #expect(try await Tool.run(write).code == 0)
    }
}

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
