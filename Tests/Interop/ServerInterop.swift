import Glibc
import IO
import NBD
import TLS
import TestSupport
import Testing

/// Our server over TCP and TLS with a raw image, for peers that are programs.
struct ServedImage: Sendable {
    let pki: TestPKI
    let directory: TestDirectory
    let loops: EventLoopGroup
    let listener: Listener
    let image: String

    var port: UInt16 { listener.address.port ?? 0 }
    var uri: String { "nbds://localhost:\(port)/disk?tls-certificates=\(pki.directory)" }
    var object: [String] { ["--object", "tls-creds-x509,id=tls0,endpoint=client,dir=\(pki.directory)"] }
    var target: String {
        "driver=nbd,server.type=inet,server.host=localhost,server.port=\(port),export=disk,tls-creds=tls0"
    }

    static func with(size: String, _ body: @Sendable (ServedImage) async throws -> Void) async throws {
        let pki = try TestPKI()
        let directory = try TestDirectory()
        let image = directory.file("disk.raw")
        _ = try await Tool.run(["truncate", "-s", size, image])
        let loops = EventLoopGroup(count: 2, name: "nbd")
        defer { loops.stop() }
        let exports = ExportTable()
        exports.add(Export(name: "disk", summary: "the disk", backEnd: try RawFile(path: image, readOnly: false)))
        let server = NBDServer(exports: exports, credentials: try pki.credentials(.server), loops: loops)
        let loop = loops.loops[0]
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "localhost", port: 0), loop: loop)
        }
        let serving = Task(executorPreference: loop) { await server.serve(listener) }
        let served = ServedImage(pki: pki, directory: directory, loops: loops, listener: listener, image: image)
        do {
            try await body(served)
        } catch {
            listener.abort()
            throw error
        }
        listener.abort()
        await serving.value
    }
}

@Suite(.timeLimit(.minutes(9)))
struct ServerInterop {
    @Test func nbdinfoSeesTheExportItsFlagsAndItsMap() async throws {
        try await ServedImage.with(size: "8M") { served in
            let info = try await Tool.run(["nbdinfo", "--json", served.uri])
            #expect(info.code == 0, "\(info.all)")
            #expect(info.output.contains(#""export-size": 8388608"#))
            #expect(info.output.contains(#""can_multi_conn": true"#))
            #expect(info.output.contains(#""can_zero": true"#))
            let list = try await Tool.run(["nbdinfo", "--list", served.uri])
            #expect(list.output.contains("disk"), "\(list.all)")
            let map = try await Tool.run(["nbdinfo", "--map", served.uri])
            #expect(map.output.contains("hole,zero"), "\(map.all)")
        }
    }

    @Test func nbdcopyCopiesInAndOutAndKeepsHoles() async throws {
        try await ServedImage.with(size: "64M") { served in
            let source = served.directory.file("source.raw")
            let made = try await Tool.run([
                "sh", "-c",
                "truncate -s 64M \(source) && dd if=/dev/urandom of=\(source) bs=1M count=7 seek=3 conv=notrunc status=none",
            ])
            #expect(made.code == 0)
            let copied = try await Tool.run(["nbdcopy", source, served.uri])
            #expect(copied.code == 0, "\(copied.all)")
            #expect(try await Tool.run(["cmp", source, served.image]).code == 0)
            var status = stat()
            #expect(stat(served.image, &status) == 0 && Int(status.st_blocks) * 512 <= 8 << 20)
            let back = served.directory.file("back.raw")
            #expect(try await Tool.run(["nbdcopy", served.uri, back]).code == 0)
            #expect(try await Tool.run(["cmp", source, back]).code == 0)
        }
    }

    @Test func qemuImgConvertsIntoAndComparesWithTheExport() async throws {
        try await ServedImage.with(size: "32M") { served in
            let source = served.directory.file("source.raw")
            _ = try await Tool.run(["sh", "-c", "dd if=/dev/urandom of=\(source) bs=1M count=32 status=none"])
            let convert = try await Tool.run(
                ["qemu-img", "convert", "-n", "-m", "16", "-W"] + served.object
                    + ["-f", "raw", source, "--target-image-opts", served.target]
            )
            #expect(convert.code == 0, "\(convert.all)")
            #expect(try await Tool.run(["cmp", source, served.image]).code == 0)
            let compare = try await Tool.run(
                ["qemu-img", "compare"] + served.object
                    + ["--image-opts", "driver=raw,file.driver=file,file.filename=\(source)", served.target]
            )
            #expect(compare.code == 0, "\(compare.all)")
        }
    }

    @Test func qemuIOReadsWritesZeroesDiscardsAndFlushes() async throws {
        try await ServedImage.with(size: "4M") { served in
            let io = try await Tool.run(
                ["qemu-io"] + served.object
                    + [
                        "-c", "write -P 0x5a 0 1M", "-c", "write -z 64k 64k", "-c", "discard 512k 64k",
                        "-c", "write -f -P 0x77 2M 4k", "-c", "flush", "-c", "read -P 0x5a 0 64k",
                        "-c", "read -P 0 64k 64k", "-c", "read -P 0x77 2M 4k", "-c", "map",
                        "--image-opts", served.target,
                    ]
            )
            #expect(io.code == 0 && !io.all.contains("failed"), "\(io.all)")
        }
    }

    @Test func aPlainTextClientIsToldThatTLSIsRequired() async throws {
        try await ServedImage.with(size: "1M") { served in
            let info = try await Tool.run(["nbdinfo", "nbd://localhost:\(served.port)/disk"])
            #expect(info.code != 0)
            #expect(info.all.contains("TLS"), "\(info.all)")
            let io = try await Tool.run(["qemu-img", "info", "nbd://localhost:\(served.port)/disk"])
            #expect(io.code != 0)
            #expect(io.all.contains("requires TLS"), "\(io.all)")
        }
    }

    @Test func aClientOfAnotherAuthorityIsRefused() async throws {
        try await ServedImage.with(size: "1M") { served in
            let other = try TestPKI()
            let info = try await Tool.run([
                "nbdinfo", "nbds://localhost:\(served.port)/disk?tls-certificates=\(other.directory)",
            ])
            #expect(info.code != 0, "\(info.all)")
        }
    }
}
