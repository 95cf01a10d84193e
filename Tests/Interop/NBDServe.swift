import Glibc
import IO
import NBD
import TestSupport
import Testing

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
        let server = try BackgroundServer(pidFile: pidFile)
        #expect(try await nbd("info", "--size", "nbd+unix:///?socket=\(socket)").output == "1048576\n")
        try await server.stop()
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
        let server = try BackgroundServer(pidFile: pidFile)
        let script = """
            import socket, sys
            s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.send(b'x' * 64); s.recv(1 << 16)
            """
        #expect(try await Tool.run(["python3", "-c", script, socket]).code == 0)
        func complaints() -> String { String(decoding: (try? DurableFile.read(log)) ?? [], as: UTF8.self) }
        if isVerbose { try await eventually("a complaint") { complaints().contains("warning: ") } }
        try await server.stop()
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
        let server = try BackgroundServer(pidFile: pidFile)
        #expect(try await nbd("info", "--size", "nbd+unix:///?socket=\(socket)").output == "1048576\n")
        try await server.stop()
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
