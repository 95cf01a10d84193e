import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// Images of every kind, and where their bytes end up.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct FormatEndToEnd {
    private func shell(_ script: String) async throws -> String {
        let result = try await Tool.run(["sh", "-ec", script])
        guard result.code == 0 else { throw TestFailure(result.all) }
        return result.output
    }

    /// What `qemu-img info` says of an image that may be in use.
    private func info(_ path: String) async throws -> JSONValue {
        try JSONValue(parsing: Array(try await shell("qemu-img info -U --output=json \(path)").utf8))
    }

    private func base(_ more: [String]) -> [String] { ["-machine", "pc,accel=tcg", "-m", "64", "-nodefaults"] + more }

    /// Migrates a foreign guest and returns the report.
    private func move(_ lab: Lab, _ arguments: [String], more: [String] = []) async throws -> MigrationReport {
        _ = try await lab.startForeignGuest(base(arguments))
        if lab.destination == nil { try await lab.startDestination() }
        let report = lab.directory.file("report.json")
        let result = try await lab.migrate(
            more: more + ["--qmp", lab.directory.file("foreign.sock"), "--report", report]
        )
        guard result.code == 0 else { throw TestFailure(result.all) }
        let parsed = try lab.report(report)
        for disk in parsed.disks {
            #expect(disk.digestSource != nil && disk.digestSource == disk.digestDestination, "\(disk)")
        }
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
        return parsed
    }

    private func image(_ lab: Lab, _ name: String) -> String { "\(lab.state("b"))/images/web1/\(name)" }

    /// The map is one file and the data another one: both count, both are taken out of reach, and both are deleted.
    @Test func aFileWithTheDataOfAnImageGoesWithIt() async throws {
        let lab = try Lab()
        let (path, data) = (lab.directory.file("disk.qcow2"), lab.directory.file("data.raw"))
        let images = lab.directory.directory("images")
        _ = try await shell(
            """
            qemu-img create -q -f qcow2 -o data_file=\(data),data_file_raw=on \(path) 64M
            qemu-io -f qcow2 -c 'write -P 5 8M 24M' \(path) >/dev/null
            """
        )
        try await lab.mount("mount -t tmpfs -o size=16m,mode=711 none \(images)")
        let command =
            ["qemu-system-x86_64"] + base(["-drive", "file=\(path),format=qcow2,if=virtio", "-display", "none"])
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + lab.portable(command)
        )
        #expect(started.code == 0, "\(started.all)")
        try await lab.startDestination(more: ["--image-dir", images])
        let full = try await lab.migrate()
        #expect(full.code == 13 && full.errors.contains("free, the disks need at least"), "\(full.all)")
        #expect(try await Tool.run(lab.prefix + ["mount", "-o", "remount,size=64m", images]).code == 0)
        let report = lab.directory.file("report.json")
        let moved = try await lab.migrate(more: ["--report", report])
        #expect(moved.code == 0, "\(moved.all)")
        let disk = try #require(try lab.report(report).disks.first)
        #expect(disk.digestSource != nil && disk.digestSource == disk.digestDestination, "\(disk)")
        #expect(!DurableFile.exists(path) && !DurableFile.exists(data))
        let old = DurableFile.list(lab.directory.path).filter { $0.contains(".released-") }
        #expect(old.count == 2, "\(old)")
        let pruned = try await lab.crossdock(["guest", "prune", "--all", "--state-dir", lab.state("a")])
        #expect(pruned.code == 0 && pruned.output.contains("deleted \(data).released-"), "\(pruned.all)")
        #expect(DurableFile.list(lab.directory.path).filter { $0.contains(".released-") } == [])
    }

    @Test(arguments: ["qcow2", "qed"])
    func anImageKeepsItsFormatAndStaysThin(_ format: String) async throws {
        let lab = try Lab()
        let path = lab.directory.file("disk.\(format)")
        _ = try await shell(
            """
            qemu-img create -q -f \(format) \(path) 512M
            qemu-io -f \(format) -c 'write -P 5 300M 3M' -c 'write -P 6 0 64k' \(path) >/dev/null
            """
        )
        let report = try await move(lab, ["-drive", "file=\(path),format=\(format),if=virtio"])
        let there = try await info(image(lab, "disk.\(format)"))
        #expect(there["format"]?.string == format, "\(there)")
        #expect(there["virtual-size"]?.integer == 512 << 20)
        #expect(there["actual-size"]?.integer.map { $0 < 24 << 20 } == true, "\(there)")
        #expect(report.disks[0].bytesSent < 16 << 20)
        let record = try #require(try lab.guests("b").load("web1"))
        #expect(record.commandLine.arguments.contains { $0.contains("format=\(format)") })
    }

    /// QEMU gives the guest whole sectors.
    @Test(arguments: [1, 1_000_003])
    func aRawImageThatIsNoWholeNumberOfSectorsMoves(_ bytes: Int) async throws {
        let lab = try Lab()
        let path = lab.directory.file("disk.raw")
        _ = try await shell("head -c \(bytes) /dev/urandom > \(path)")
        let contents = try DurableFile.read(path) ?? []
        _ = try await move(lab, ["-drive", "file=\(path),format=raw,if=virtio"])
        let there = try #require(try DurableFile.read(image(lab, "disk.raw")))
        #expect(there.count == (bytes + 511) / 512 * 512)
        #expect(there.starts(with: contents) && there[bytes...].allSatisfy { $0 == 0 })
    }

    @Test(arguments: ["vdi", "vmdk", "vhdx", "vpc"])
    func aFormatThatQEMUCannotMigrateIsRefusedInQEMUsWords(_ format: String) async throws {
        let lab = try Lab()
        let path = lab.directory.file("disk.\(format)")
        _ = try await shell("qemu-img create -q -f \(format) \(path) 64M")
        _ = try await lab.startForeignGuest(base(["-drive", "file=\(path),format=\(format),if=virtio"]))
        try await lab.startDestination()
        let result = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(result.code == 10 && result.errors.contains("The \(format) format used by node"), "\(result.all)")
    }

    @Test(arguments: [("raw", "qcow2"), ("qcow2", "raw")])
    func theFormatThereCanBeChosen(_ from: String, _ to: String) async throws {
        let lab = try Lab()
        let path = lab.directory.file("disk.img")
        _ = try await shell(
            "qemu-img create -q -f \(from) \(path) 64M; qemu-io -f \(from) -c 'write -P 5 1M 3M' \(path) >/dev/null"
        )
        let definition = #"{"driver":"\#(from)","node-name":"n0","file":{"driver":"file","filename":"\#(path)"}}"#
        _ = try await move(
            lab,
            ["-blockdev", definition, "-device", "virtio-blk-pci,drive=n0,id=disk0"],
            more: ["--format", to]
        )
        let there = try await info(image(lab, "disk.img"))
        #expect(there["format"]?.string == to, "\(there)")
        #expect(there["actual-size"]?.integer.map { $0 < 8 << 20 } == true)
        let disks = try await lab.monitor("b") { try await $0.disks() }
        #expect(disks.first?.format == to && disks.first?.node == "n0", "\(disks)")
    }

    @Test func aBackingImageIsKeptWhereItIsTheSameAndFlattenedWhereItIsNot() async throws {
        let lab = try Lab()
        let (bottom, middle, top) = (
            lab.directory.file("bottom.raw"), lab.directory.file("middle.qcow2"), lab.directory.file("top.qcow2")
        )
        _ = try await shell(
            """
            truncate -s 64M \(bottom); qemu-io -f raw -c 'write -P 1 0 8M' \(bottom) >/dev/null
            qemu-img create -q -f qcow2 -b \(bottom) -F raw \(middle); qemu-io -c 'write -P 2 4M 2M' \(middle) >/dev/null
            qemu-img create -q -f qcow2 -b \(middle) -F qcow2 \(top); qemu-io -c 'write -P 3 5M 1M' \(top) >/dev/null
            """
        )
        let listed = ["--allow-directory", lab.directory.path]
        try await lab.startDestination(more: listed)
        let report = try await move(lab, ["-drive", "file=\(top),format=qcow2,if=virtio"])
        let kept = try await info(image(lab, "top.qcow2"))
        #expect(kept["full-backing-filename"]?.string == middle, "\(kept)")
        #expect(report.disks[0].bytesSent < 2 << 20, "only what is above the backing image is sent")

        // Back, to a host where the middle image is another one: it sees other contents at the same path.
        let changed = lab.directory.directory("other")
        _ = try await shell(
            "cp \(bottom) \(middle) \(changed); qemu-io -f raw -c 'write -P 9 0 1k' \(changed)/bottom.raw >/dev/null"
        )
        try await lab.startDestination(
            "a",
            before: Namespace.mount + [
                "sh", "-c", "mount --bind \(changed)/bottom.raw \(bottom) && exec \"$@\"", "sh",
            ],
            more: listed
        )
        let path = lab.directory.file("back.json")
        let back = try await lab.migrate(from: "b", more: ["--report", path])
        #expect(back.code == 0, "\(back.all)")
        let disk = try lab.report(path).disks[0]
        #expect(disk.digestSource == disk.digestDestination && disk.digestSource == report.disks[0].digestSource)
        let flat = try await info("\(lab.state("a"))/images/web1/top.qcow2")
        #expect(flat["full-backing-filename"] == nil && flat["format"]?.string == "qcow2", "\(flat)")
    }

    @Test func aBackingImageInADirectoryThatIsNotListedIsCopiedWithTheDisk() async throws {
        let lab = try Lab()
        let (bottom, top) = (lab.directory.file("bottom.raw"), lab.directory.file("top.qcow2"))
        _ = try await shell(
            """
            truncate -s 16M \(bottom); qemu-io -f raw -c 'write -P 1 0 8M' \(bottom) >/dev/null
            qemu-img create -q -f qcow2 -b \(bottom) -F raw \(top)
            """
        )
        _ = try await lab.startForeignGuest(base(["-drive", "file=\(top),format=qcow2,if=virtio"]))
        try await lab.startDestination()
        let result = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(result.code == 0, "\(result.all)")
        #expect(result.all.contains("--allow-directory \(lab.directory.path)"), "\(result.all)")
        let flat = try await info(image(lab, "top.qcow2"))
        #expect(flat["full-backing-filename"] == nil && flat["format"]?.string == "qcow2", "\(flat)")
    }

    @Test func aLargerBlockDeviceIsUsedAndTheGuestSeesItsOwnSize() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 2)
        let backing = lab.directory.file("device.img")
        let device = try await shell(
            "dd if=/dev/urandom of=\(backing) bs=1M count=24 status=none; losetup -f --show \(backing)"
        ).trimmingSuffix("\n")
        do {
            try DurableFile.makeDirectory("\(lab.state("b"))/images/web1")
            #expect(symlink(device, image(lab, "disk.raw")) == 0)
            _ = try await move(lab, ["-drive", "file=\(disk),format=raw,if=virtio"])
            let disks = try await lab.monitor("b") { try await $0.disks() }
            #expect(disks.first?.size == 16 << 20, "\(disks)")
            let digest = try await shell("head -c 16777216 \(device) | sha256sum; cat \(disk).released-* | sha256sum")
            #expect(Set(digest.split(separator: "\n")).count == 1, "\(digest)")
            // A device that is too small is refused before anything is touched.
            try await lab.monitor("b") { await $0.quit() }
        } catch {
            _ = try? await shell("losetup -d \(device)")
            throw error
        }
        _ = try await shell("losetup -d \(device)")
    }

    // MARK: sealed disks and disks on the network

    @Test func sealedDisksMoveWithTheirSecretsWhichTouchNoDisk() async throws {
        let lab = try Lab()
        let (luks, qcow, key, other) = (
            lab.directory.file("sealed.luks"), lab.directory.file("sealed.qcow2"), lab.directory.file("key"),
            lab.directory.file("master")
        )
        let (passphrase, second) = ("Pass-4711-phrase-of-luks", "Pass-4712-phrase-of-qcow")
        try DurableFile.write(Array(passphrase.utf8), to: key)
        _ = try await shell(
            """
            head -c 32 /dev/urandom > \(other)
            # QEMU measures how fast it derives keys, and fails when its clock did not move meanwhile.
            again() { for i in 1 2 3 4 5 6 7 8 9; do "$@" 2>/dev/null && return; done; "$@"; }
            again qemu-img create -q -f luks --object secret,id=k,file=\(key) -o key-secret=k,iter-time=10 \(luks) 16M
            again qemu-img create -q -f qcow2 --object secret,id=k,data=\(second) \
                -o encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10 \(qcow) 16M
            qemu-io --object secret,id=k,file=\(key) --image-opts \
                driver=luks,key-secret=k,file.filename=\(luks) -c 'write -P 5 1M 1M' >/dev/null
            qemu-io --object secret,id=k,data=\(second) --image-opts \
                driver=qcow2,encrypt.key-secret=k,file.filename=\(qcow) -c 'write -P 6 2M 1M' >/dev/null
            """
        )
        // The second secret is encrypted with a master key, as management tools give it.
        let sealed = try await shell(
            "printf %s \(second) | \(Lab.crossdock) secret encrypt --key \(other) --id sec1 --keyid master0"
        )
        let object = sealed.filter { !$0.isNewline }
        let report = try await move(
            lab,
            [
                "-object", "secret,id=sec0,file=\(key)", "-object", "secret,id=master0,format=raw,file=\(other)",
                "-object", object,
                "-drive", "file=\(luks),format=luks,key-secret=sec0,if=virtio",
                "-blockdev",
                "driver=qcow2,node-name=q0,encrypt.key-secret=sec1,encrypt.format=luks,file.driver=file,file.filename=\(qcow)",
                "-device", "virtio-blk-pci,drive=q0,id=disk1",
            ]
        )
        #expect(report.disks.count == 2)
        // The images are as sealed there as they were here.
        for (name, format) in [("sealed.luks", "luks"), ("sealed.qcow2", "qcow2")] {
            let there = try await info(image(lab, name))
            #expect(there["format"]?.string == format && there["encrypted"]?.bool == true, "\(there)")
        }
        let disks = try await lab.monitor("b") { try await $0.disks() }
        #expect(disks.count == 2 && disks.allSatisfy(\.isEncrypted), "\(disks)")
        // No file of either agent, and no command line, has a passphrase.
        for word in [passphrase, second] {
            let found = try await Tool.run(["grep", "-rlF", word, lab.state("a"), lab.state("b")])
            #expect(found.output == "", "\(found.output)")
            #expect(Lab.processes(containing: word).allSatisfy { $0.line.contains("grep") })
        }
        // It can move on, although its secrets are kept nowhere but in its process.
        try await lab.startDestination("a")
        let back = try await lab.migrate(from: "b")
        #expect(back.code == 0, "\(back.all)")
        // The contents are what was written.
        try await lab.monitor("a") { await $0.quit() }
        func returned(_ name: String) -> String { "\(lab.state("a"))/images/web1/\(name)" }
        let read = try await shell(
            """
            qemu-io --object secret,id=k,file=\(key) -r --image-opts \
                driver=luks,key-secret=k,file.filename=\(returned("sealed.luks")) -c 'read -P 5 1M 1M'
            qemu-io --object secret,id=k,data=\(second) -r --image-opts \
                driver=qcow2,encrypt.key-secret=k,file.filename=\(returned("sealed.qcow2")) -c 'read -P 6 2M 1M'
            """
        )
        #expect(!read.contains("verification failed"), "\(read)")
        // A later start says what is missing.
        let again = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("a")])
        #expect(again.code == 10 && again.errors.contains("sec0"), "\(again.all)")
    }

    @Test func disksOnTheNetworkAreAttachedAgainAndOnlyTheLocalOneIsCopied() async throws {
        let lab = try Lab()
        let local = try await lab.makeImage("local.raw", megabytes: 16, data: 2)
        let shared = try await lab.makeImage("shared.raw", megabytes: 32, data: 4)
        let web = lab.directory.directory("web")
        _ = try await shell("dd if=/dev/urandom of=\(web)/media.iso bs=1M count=2 status=none")
        let nbd = try ChildProcess([
            Lab.crossdock, "nbd", "serve", "-t", "-b", "localhost", "-p", "0", "-x", "shared", "-f", "raw",
            "--object", "tls-creds-x509,id=tls0,endpoint=server,dir=\(lab.pki.directory)", "--tls-creds", "tls0",
            shared,
        ])
        try await nbd.wait(for: "an NBD server") { nbd.errors.contains("listening on") }
        let port = nbd.errors.split(separator: ":").last.map { $0.prefix { $0.isNumber } } ?? ""
        let https = try ChildProcess([
            "python3", "\(Lab.repository)/Tests/EndToEnd/https.py", web, lab.pki.directory, "reader", "open-sesame",
        ])
        try await https.wait(for: "a web server") { https.output.contains("port ") }
        let webPort = https.output.split(separator: " ").last?.trimmingCharacters() ?? ""
        let password = lab.directory.file("password")
        try DurableFile.write(Array("open-sesame".utf8), to: password)
        let credentials = lab.directory.directory("credentials")
        _ = try await shell(
            "cp \(lab.pki.directory)/*.pem \(credentials) && cd \(credentials) && chmod 711 . && chmod 644 *-cert.pem && chmod 640 *-key.pem"
                + (geteuid() == 0 ? " && chgrp nogroup *-key.pem" : "")
        )
        try await lab.startDestination(more: ["--allow-directory", credentials])
        let report = try await move(
            lab,
            [
                "-object", "tls-creds-x509,id=tls0,endpoint=client,dir=\(credentials)",
                "-object", "secret,id=web-password,file=\(password)",
                "-drive", "file=\(local),format=raw,if=virtio",
                "-blockdev",
                "driver=nbd,node-name=net0,server.type=inet,server.host=localhost,server.port=\(port),export=shared,tls-creds=tls0",
                "-device", "virtio-blk-pci,drive=net0,id=net-disk,share-rw=on",
                "-blockdev",
                "driver=https,node-name=web0,url=https://localhost:\(webPort)/media.iso,sslverify=off,username=reader,password-secret=web-password,read-only=on",
                "-device", "ide-cd,drive=web0,id=web-disk",
            ]
        )
        #expect(report.disks.count == 1 && report.disks[0].size == 16 << 20)
        let disks = try await lab.monitor("b") { try await $0.disks() }
        #expect(Set(disks.map(\.protocolDriver)) == ["file", "nbd", "https"], "\(disks)")
        #expect(!DurableFile.exists(image(lab, "shared.raw")))
        let found = try await Tool.run(["grep", "-rlF", "open-sesame", lab.state("a"), lab.state("b")])
        #expect(found.output == "", "\(found.output)")
    }
}

extension StringProtocol {
    fileprivate func trimmingSuffix(_ suffix: Character) -> String { String(self.filter { $0 != suffix }) }
    fileprivate func trimmingCharacters() -> String { String(self.filter { !$0.isWhitespace }) }
}
