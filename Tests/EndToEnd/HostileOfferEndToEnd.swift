import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// Offers that want more than one guest, from a source with a good certificate.
extension HostileNetworkTests {
    private func offer(_ words: [String], change: (inout Message.Offer) -> Void = { _ in }) -> Message.Offer {
        let machine = ["qemu-system-x86_64", "-machine", "pc-i440fx-7.2,accel=tcg", "-m", "16", "-nodefaults"]
        var offer = Message.Offer(
            guest: "evil",
            commandLine: GuestCommandLine(arguments: machine + words, directory: "/"),
            machine: "pc-i440fx-7.2",
            emulatorVersion: "7.2.22",
            disks: [],
            files: [],
            hasUUID: false
        )
        offer.isRehearsal = true
        offer.memory = 16 << 20
        offer.memoryID = "pc.ram"
        change(&offer)
        return offer
    }

    /// What the destination says to an offer.
    private func verdict(_ lab: Lab, _ offer: Message.Offer, _ id: String) async throws -> Message? {
        try await answer(
            lab,
            as: lab.pki.directory,
            [.hello(.init(role: .control, migration: id)), .offer(offer)]
        ).last
    }

    @Test func anOfferRunsNothingOpensNothingAndEndsNothing() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let marker = lab.directory.file("marker")
        let secret = lab.directory.file("secret")
        try DurableFile.write(Array("secret".utf8), to: secret)
        let before = try lab.snapshot()
        let offers = [
            offer(["-netdev", "user,id=a,,type=bridge,,helper=/bin/sh -c 'touch \(marker)'; true #,,"]),
            offer(["-chardev", "null,id=c,,backend=file,,path=\(secret)"]),
            offer([]) { $0.memoryID = "m,mem-path=\(marker)" },
            offer(["-blockdev", "driver=file,filename=\(secret),node-name=f", "-device", "virtio-blk-pci,drive=f"]),
            offer(["-blockdev", "driver=vmdk,read-only=on,node-name=v,file.driver=file,file.filename=\(secret)"]) {
                $0.files = [.init(path: secret, size: 6, digest: String(repeating: "0", count: 64))]
            },
            offer(["-drive", "file=\(secret)\u{0},format=raw,readonly=on"]),
            offer(["-gdb", "tcp:127.0.0.1:0"]), offer(["-monitor", "tcp:127.0.0.1:0,server=on"]),
            offer(["-serial", "tcp:1234,server=on"]), offer(["-vnc", ":9223372036854775807"]),
            offer(["-object", "tls-creds-x509,id=t,endpoint=server,dir=\(lab.pki.directory)"]),
            offer(["-kernel", secret]), offer(["-mem-path", "/dev/hugepages/../../\(marker)"]),
        ]
        for (index, offer) in offers.enumerated() {
            let answer = try await verdict(lab, offer, "7-\(index)")
            guard case .ready(let ready)? = answer else {
                Issue.record("\(offer.commandLine.arguments): \(String(describing: answer))")
                continue
            }
            #expect(!ready.reasons.isEmpty, "\(offer.commandLine.arguments)")
        }
        #expect(!DurableFile.exists(marker))
        #expect(try lab.snapshot() == before)
        #expect(try lab.leftAtDestination() == [])
        #expect(lab.destination?.isRunning == true)
    }

    @Test func aBlankCopyHasItsFilterOfSystemCallsWhateverTheOfferSays() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let offers = [
            offer(["-sandbox", "off", "-name", "sandboxed-1"]),
            offer(["-name", "-sandbox", "-smbios", "type=1,serial=sandboxed-3"]),
            offer(["-sandbox", "on,spawn=allow", "-name", "sandboxed-2"]),
        ]
        for (index, one) in offers.enumerated() {
            // Those before are cleaned up in their own time.
            let offer = named("\(one.guest)-\(index)", one)
            let name = offer.commandLine.arguments.last ?? ""
            let filters = try await converse(lab, as: lab.pki.directory) { connection -> [String] in
                try await connection.send(.hello(.init(role: .control, migration: "8-\(index)")))
                _ = try await connection.receiveMessage()
                try await connection.send(.offer(offer))
                let answer = try await connection.receiveMessage()
                guard case .shadow = answer else { return ["\(answer)"] }
                return Lab.processes(containing: name).filter { $0.line.hasPrefix("/") || $0.line.hasPrefix("qemu") }
                    .filter { $0.line.contains("defer") }
                    .map { process in
                        let status = (try? DurableFile.read("/proc/\(process.pid)/status")) ?? nil ?? []
                        return String(decoding: status, as: UTF8.self).split(separator: "\n").first {
                            $0.hasPrefix("Seccomp:")
                        }.map { String($0) } ?? ""
                    }
            }
            #expect(!filters.isEmpty && filters.allSatisfy { $0 == "Seccomp:\t2" }, "\(filters)")
        }
    }

    private func named(_ name: String, _ offer: Message.Offer) -> Message.Offer {
        var offer = offer
        offer.guest = name
        return offer
    }

    @Test func aRefusedOfferRemovesNothingOfAnotherGuest() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let digest = String(repeating: "c", count: 64)
        let images = "\(lab.state("b"))/images"
        let kept = ["\(images)/.files/\(digest)", "\(images)/other/.files/1-a/\(digest)"]
        for path in kept {
            try DurableFile.makeDirectory(String(path.dropLast(digest.count + 1)))
            try DurableFile.write([1], to: path)
        }
        for isRehearsal in [true, false] {
            let evil = offer(["-hda", "/a", "-no-such-option"]) { offer in
                offer.isRehearsal = isRehearsal
                var disk = Message.Offer.Disk(name: "disk0", size: 512, allocated: 0, path: "/a", format: "luks")
                disk.keySecret = "s"
                disk.containerSize = 1024
                offer.disks = [disk]
                offer.files = [.init(path: disk.headerName, size: 1, digest: digest)]
            }
            guard case .ready(let ready)? = try await verdict(lab, evil, "9-\(isRehearsal ? 1 : 2)") else {
                Issue.record("The offer was not answered")
                continue
            }
            #expect(!ready.reasons.isEmpty)
        }
        for path in kept { #expect(DurableFile.exists(path), "\(path)") }
    }

    @Test func whatAGuestReadsIsItsOwnUnlessItsDirectoryIsListed() async throws {
        for isListed in [false, true] {
            let lab = try Lab()
            let disk = try await lab.makeImage("disk.raw", megabytes: 8, data: 1)
            let disc = try await lab.makeImage("disc.iso", megabytes: 4, data: 1)
            try await lab.startIdleGuest(
                disks: [disk],
                more: ["-drive", "file=\(disc),media=cdrom,if=none,id=c", "-device", "ide-cd,drive=c"]
            )
            try await lab.startDestination(more: isListed ? ["--allow-directory", lab.directory.path] : [])
            let moved = try await lab.migrate()
            #expect(moved.code == 0, "\(moved.all)")
            let record = try #require(try lab.guests("b").load("web1"))
            let drive = try #require(record.commandLine.arguments.first { $0.contains("media=cdrom") })
            let own = "file=\(lab.state("b"))/images/web1/.files/"
            #expect(drive.hasPrefix(isListed ? "file=\(disc)," : own), "\(drive)")
            #expect(drive.contains("format=raw") && drive.contains("file.read-only=on"), "\(drive)")
        }
    }
}
