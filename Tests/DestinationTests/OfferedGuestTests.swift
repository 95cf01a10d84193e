import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

@testable import Destination

/// Offers of a host that is an enemy, and the files that they name.
struct OfferedGuestTests {
    let directory: TestDirectory

    init() throws { directory = try TestDirectory() }

    private func offer(_ words: [String] = [], change: (inout Message.Offer) -> Void = { _ in }) -> Message.Offer {
        var offer = Message.Offer(
            guest: "web1",
            commandLine: GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/"),
            machine: "pc-i440fx-7.2",
            emulatorVersion: "7.2.22",
            disks: [],
            files: [],
            hasUUID: false
        )
        change(&offer)
        return offer
    }

    private func guest(_ offer: Message.Offer, allowed: [String] = []) -> OfferedGuest {
        OfferedGuest(offer, images: "/images", run: "/run", allowed: AllowedDirectories(allowed))
    }

    private static let digest = String(repeating: "a", count: 64)

    // MARK: what an offer says

    @Test func aPlainOfferIsJudgedWell() throws {
        let plain = offer { offer in
            offer.memoryID = "pc.ram"
            offer.disks = [.init(name: "disk0", size: 512, allocated: 0, path: "/a b,c.raw")]
        }
        try guest(plain).judge()
    }

    private static func placement(_ change: (inout GuestPlacement) -> Void) -> GuestPlacement {
        var placement = GuestPlacement()
        change(&placement)
        return placement
    }

    static let flaws: [@Sendable (inout Message.Offer) -> Void] = [
        { $0.memoryID = "pc.ram,mem-path=/etc/x" }, { $0.memoryID = "" }, { $0.memoryID = "a\u{0}" },
        { $0.networks = [.init(tap: "tap0", bridge: "br0")] },
        { offer in
            offer.commandLine.arguments += ["-netdev", "tap,id=n,ifname=tap0"]
            offer.networks = [.init(tap: "tap0", bridge: "../br0")]
        },
        { offer in
            offer.commandLine.arguments += ["-netdev", "tap,id=n,ifname=tap0"]
            offer.networks = [.init(tap: "tap0", bridge: "br0"), .init(tap: "tap0", bridge: "br1")]
        },
        { offer in
            offer.commandLine.arguments += ["-netdev", "tap,id=n,ifname=tap0", "-netdev", "tap,id=m,ifname=tap0"]
            offer.networks = [.init(tap: "tap0", bridge: "br0")]
        },
        { $0.machine = "pc\u{0}" }, { $0.emulatorVersion = "7\n2" }, { $0.guest = "../x" },
        { $0.commandLine.directory = "/\u{0}" }, { $0.commandLine.arguments.append("-append\u{0}") },
        { $0.commandLine.arguments = [] }, { $0.sizes = ["a\u{0}": 1] }, { $0.sizes = ["a": .max] },
        { $0.standards = ["nic mac": "\u{1}"] }, { $0.memory = .max }, { $0.memory = 1 << 46 },
        { $0.files = [.init(path: "/a\u{0}b", size: 1, digest: digest)] },
        { $0.files = [.init(path: "/a", size: 1, digest: "../../etc/shadow")] },
        { $0.files = [.init(path: "/a", size: 1, digest: digest), .init(path: "/a", size: 1, digest: digest)] },
        { $0.disks = [.init(name: "disk,0", size: 1, allocated: 0, path: "/a")] },
        { $0.disks = [.init(name: "disk0", size: 1, allocated: 0, path: "/a\u{0}.raw")] },
        { $0.disks = [.init(name: "disk0", size: .max, allocated: 0, path: "/a")] },
        { $0.disks = [.init(name: "disk0", size: 1, allocated: 0, path: "/.files")] },
        { $0.reservation = String(repeating: "a", count: 65) }, { $0.home = .init(identity: "") },
        { $0.home = .init(identity: "CN=a\nb") }, { $0.home = .init(identity: "CN=a", address: "\u{1b}") },
        { $0.home = .init(identity: String(repeating: "a", count: 1025)) },
        { $0.placement = placement { $0.priority = .max } }, { $0.placement = placement { $0.antiAffinity = "" } },
        { $0.placement = placement { $0.vncPort = 22 } }, { $0.placement = placement { $0.vncPort = 6900 } },
        { $0.placement = placement { $0.labels = ["a b": "c"] } },
        { $0.placement = placement { $0.labels = ["a": "\n"] } },
        { $0.placement = placement { $0.labels = ["a": String(repeating: "b", count: 256)] } },
        {
            $0.placement = placement { placement in
                for index in 0...GuestPlacement.mostLabels { placement.labels["\(index)"] = "" }
            }
        },
        { offer in
            var disk = Message.Offer.Disk(name: "disk0", size: 1, allocated: 0, path: "/a", format: "qcow2")
            disk.keySecret = "s,file=/etc/shadow"
            offer.disks = [disk]
        },
        { offer in
            var disk = Message.Offer.Disk(name: "disk0", size: 1, allocated: 0, path: "/a", format: "qcow2")
            disk.backing = [.init(path: "/b\u{0}", size: 1, digest: "")]
            disk.backingFormat = "raw"
            offer.disks = [disk]
        },
    ]

    @Test(arguments: flaws.indices)
    func anOfferWithAFlawIsRefusedBeforeAnythingIsMade(_ index: Int) {
        let error = #expect(throws: GuestError.self) { try guest(offer(change: Self.flaws[index])).judge() }
        #expect(error?.message.isEmpty == false)
    }

    @Test(arguments: ["vdi", "vmdk", "vpc", "vhdx", "dmg", "file", "nbd", "raw,driver=qcow2", ""])
    func onlyFormatsThatBothAgentsMakeAreTaken(_ format: String) {
        let disk = Message.Offer.Disk(name: "disk0", size: 512, allocated: 0, path: "/a", format: format)
        #expect(throws: GuestError.self) { try guest(offer { $0.disks = [disk] }).judge() }
        #expect(!ImageFormat.isCarried(format))
    }

    @Test func whatIsNotInTheOfferIsNotOpened() {
        for words in [
            ["-hda", "/etc/shadow"], ["-cdrom", "/etc/shadow"], ["-kernel", "/etc/shadow"],
            ["-drive", "file=/etc/shadow,format=raw"], ["-drive", "file=/etc/shadow,readonly=on"],
            ["-blockdev", "driver=file,filename=/etc/shadow,node-name=n"],
        ] { #expect(throws: GuestError.self, "\(words)") { try guest(offer(words)).rehearsal(for: nil) } }
    }

    @Test func allPathsLeadToPlacesOfTheGuest() throws {
        let words = [
            "-drive", "file=/srv/a.raw,format=raw", "-kernel", "/boot/k", "-serial", "file:/etc/passwd", "-parallel",
            "file:/x/passwd", "-D", "/dev/null", "-chardev", "socket,id=c,path=../../etc/x,server=on", "-serial",
            "file:..",
        ]
        let all = offer(words) { offer in
            offer.disks = [.init(name: "disk0", size: 512, allocated: 0, path: "/srv/a.raw")]
            offer.files = [.init(path: "/boot/k", size: 1, digest: Self.digest)]
        }
        #expect(
            try guest(all).rehearsal(for: nil).0.arguments.dropFirst() == [
                "-drive", "file=/images/web1/a.raw,format=raw", "-kernel", "/images/web1/.files/\(Self.digest)",
                "-serial", "file:/run/passwd", "-parallel", "file:/run/x-passwd", "-D", "/dev/null", "-chardev",
                "socket,id=c,path=/run/x,server=on", "-serial", "file:/run/unnamed",
            ]
        )
    }

    // MARK: directories of this host

    @Test func credentialsOfThisHostNeedAListedDirectory() throws {
        let pki = directory.directory("pki")
        let words = ["-object", "tls-creds-x509,id=t,endpoint=client,dir=\(pki)"]
        let error = #expect(throws: GuestError.self) { try guest(offer(words)).rehearsal(for: nil) }
        #expect(error?.message.contains("--allow-directory \(pki)") == true, "\(error?.message ?? "")")
        #expect(try guest(offer(words), allowed: [directory.path]).rehearsal(for: nil).0.arguments.last == words.last)
        let spice = ["-spice", "port=5900,x509-key-file=\(pki)/key.pem"]
        #expect(throws: GuestError.self) { try guest(offer(spice)).rehearsal(for: nil) }
    }

    @Test func linksDoNotLeadOutOfAListedDirectory() throws {
        let listed = directory.directory("listed")
        let outside = directory.file("outside")
        try DurableFile.write([1], to: outside)
        try DurableFile.write([1], to: "\(listed)/inside")
        #expect(symlink(outside, "\(listed)/link") == 0)
        let allowed = AllowedDirectories([listed])
        #expect(allowed.contain("\(listed)/inside") && allowed.contain(listed))
        for path in [
            "\(listed)/link", "\(listed)/../outside", outside, "\(listed)-more", "\(listed)/missing", "inside", "", "/",
        ] { #expect(!allowed.contain(path), "\(path)") }
        #expect(!AllowedDirectories().contain("\(listed)/inside"))
    }

    // MARK: what files are

    private func file(_ bytes: [UInt8]) throws -> String {
        let path = directory.file("file")
        try DurableFile.write(bytes + [UInt8](repeating: 0, count: 512), to: path)
        return path
    }

    private func reference(_ words: [String]) throws -> GuestCommandLine.PathReference {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/")
        return try #require(try line.paths().first)
    }

    private static let qcow2: [UInt8] = [0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3]

    @Test func aFileIsOpenedAsWhatItIs() throws {
        let guessed = try reference(["-cdrom", "/x"])
        #expect(try ImageHeader.format(of: file([1, 2, 3]), guessed) == "raw")
        #expect(try ImageHeader.format(of: file(Self.qcow2), guessed) == "qcow2")
        let raw = try reference(["-drive", "file=/x,format=raw,readonly=on"])
        // Raw bytes refer to nothing, whatever they are.
        #expect(try ImageHeader.format(of: file(Self.qcow2 + [1, 1, 1, 1, 1, 1, 1, 1]), raw) == "raw")
        #expect(try ImageHeader.format(of: file(Array("# Disk DescriptorFile".utf8)), raw) == "raw")
    }

    @Test(arguments: [
        qcow2 + [0, 0, 0, 0, 0, 0, 1, 0], qcow2 + [UInt8](repeating: 0, count: 71) + [4],
        [0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 1], Array("# Disk DescriptorFile".utf8), Array("KDMV".utf8),
        Array("vhdxfile".utf8), Array("conectix".utf8), Array("QED\0".utf8),
    ])
    func aFileThatMayNameOthersIsRefused(_ head: [UInt8]) throws {
        let path = try file(head)
        for words in [
            ["-cdrom", "/x"], ["-drive", "file=/x,media=cdrom"], ["-drive", "file=/x,format=qcow2,readonly=on"],
        ] {
            let reference = try reference(words)
            #expect(throws: GuestError.self, "\(words)") { try ImageHeader.format(of: path, reference) }
        }
        #expect(!ImageHeader.isAlone(path))
    }
}
