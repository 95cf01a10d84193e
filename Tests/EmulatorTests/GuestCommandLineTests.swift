import Emulator
import Testing

struct GuestCommandLineTests {
    func rewrite(_ arguments: String...) throws -> [String] {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + arguments, directory: "/guests")
        return Array(try line.relocated { .init(path: "<\($0.kind.rawValue):\($0.path)>") }.arguments.dropFirst())
    }

    @Test func disksFilesAndOutputsAreToldApart() throws {
        #expect(
            try rewrite("-drive", "file=a.raw,format=raw,if=virtio") == [
                "-drive", "file=<disk:a.raw>,format=raw,if=virtio",
            ]
        )
        #expect(
            try rewrite("-drive", "file=b.iso,media=cdrom") == [
                "-drive", "file=<file:b.iso>,media=cdrom,file.read-only=on",
            ]
        )
        #expect(
            try rewrite("-drive", "file=c,readonly=on,if=pflash") == [
                "-drive", "file=<file:c>,readonly=on,if=pflash,file.read-only=on",
            ]
        )
        #expect(try rewrite("-kernel", "k", "-initrd", "i") == ["-kernel", "<file:k>", "-initrd", "<file:i>"])
        #expect(try rewrite("-hda", "d") == ["-hda", "<disk:d>"])
        #expect(try rewrite("-serial", "file:log") == ["-serial", "file:<output:log>"])
        #expect(
            try rewrite("-monitor", "unix:/m,server=on,wait=off") == [
                "-monitor", "unix:<output:/m>,server=on,wait=off",
            ]
        )
        #expect(
            try rewrite("-chardev", "socket,id=c,path=/s,server=on") == [
                "-chardev", "socket,id=c,path=<output:/s>,server=on",
            ]
        )
    }

    @Test func blockdevIsReadInBothForms() throws {
        #expect(
            try rewrite("-blockdev", "raw,node-name=d,file.driver=file,file.filename=/x,,y")
                == ["-blockdev", "raw,node-name=d,file.driver=file,file.filename=<disk:/x,,y>"]
        )
        let json = try rewrite(
            "-blockdev",
            #"{"driver":"raw","node-name":"d","file":{"driver":"file","filename":"/x"}}"#
        )
        #expect(json[1].contains(#""filename":"<disk:/x>""#))
        let readOnly = try rewrite(
            "-blockdev",
            #"{"driver":"raw","read-only":true,"file":{"driver":"file","filename":"/x"}}"#
        )
        #expect(readOnly[1].contains(#""filename":"<file:/x>""#))
    }

    @Test func whatTheAgentDoesItselfIsLeftOutAndTheRestPasses() throws {
        #expect(
            try rewrite(
                "-daemonize",
                "-pidfile",
                "/p",
                "-S",
                "-m",
                "1G",
                "--enable-kvm",
                "-append",
                "console=ttyS0 quiet"
            )
                == ["-m", "1G", "-enable-kvm", "-append", "console=ttyS0 quiet"]
        )
        #expect(
            try rewrite("-drive", "file=nbd:host:10809,format=raw") == ["-drive", "file=nbd:host:10809,format=raw"]
        )
    }

    @Test(arguments: [
        ["-incoming", "defer"], ["-snapshot"], ["-loadvm", "x"], ["-virtfs", "local"], ["-readconfig", "f"],
        ["-object", "memory-backend-file,id=m,mem-path=/dev/shm/x,pmem=on"], ["-device", "vfio-pci,host=0"],
        ["-netdev", "tap,id=n,fd=3"], ["-netdev", "tap,id=n,script=/etc/ifup"], ["-nic", "bridge,helper=/x"], ["-m"],
    ])
    func whatCannotBeMovedIsRefusedByName(_ arguments: [String]) {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + arguments, directory: "/")
        let error = #expect(throws: GuestError.self) { try line.relocated { .init(path: $0.path) }.arguments }
        #expect(error?.message.contains(arguments[0]) == true, "\(error?.message ?? "")")
    }

    @Test(arguments: [
        (["-machine", "pc,accel=tcg"], ["-machine", "pc-i440fx-7.2,accel=tcg"]),
        (["-M", "type=q35"], ["-M", "type=pc-i440fx-7.2"]),
        (["-m", "1G"], ["-m", "1G", "-machine", "pc-i440fx-7.2"]),
        (["-machine", "accel=kvm"], ["-machine", "accel=kvm", "-machine", "pc-i440fx-7.2"]),
    ])
    func theMachineTypeIsPinnedToItsVersion(_ arguments: [String], _ expected: [String]) throws {
        let line = GuestCommandLine(arguments: ["qemu"] + arguments, directory: "/")
        #expect(try line.pinned(machine: "pc-i440fx-7.2").arguments == ["qemu"] + expected)
    }

    @Test(arguments: ["", ".", "-x", "a/b", "a b", String(repeating: "x", count: 49), "ä"])
    func namesThatCouldBePathsAreRefused(_ name: String) {
        #expect(throws: GuestError.self) { try GuestStore.validate(name) }
    }
}
