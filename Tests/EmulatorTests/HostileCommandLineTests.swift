import IO
import Testing

@testable import Emulator

/// Command lines of a host that is an enemy: what comes of them opens nothing but what was placed for the guest.
struct HostileCommandLineTests {
    /// As a destination reads it: a disk becomes a carried image, everything else `/own/KIND/...`.
    private func relocate(_ words: [String], disk format: String = "raw") throws -> GuestCommandLine {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/home")
        let moved = try line.relocated { reference in
            let name = reference.path.split(separator: "/").last.map(String.init) ?? ""
            var placement = GuestCommandLine.Placement(path: "/own/\(reference.kind.rawValue)/\(name)")
            if reference.kind == .disk {
                placement.format = format
                placement.isFlattened = true
            }
            if reference.kind == .file { placement.format = reference.format ?? "raw" }
            return placement
        }
        return GuestCommandLine(arguments: moved.arguments, directory: "/own")
    }

    private func moved(_ words: [String]) throws -> [String] { Array(try relocate(words).arguments.dropFirst()) }

    private func blank(_ words: [String], memoryID: String? = nil) throws -> [String] {
        let material = GuestCommandLine.ShadowMaterial(sizes: [:], memory: 1 << 20, memoryID: memoryID)
        return Array(
            try relocate(words).shadow(material, memory: "/memory") { "/scratch/\($0)" }.arguments.dropFirst()
        )
    }

    private func isRefused(_ words: [String], _ reason: String = "cannot be moved") {
        let error = #expect(throws: GuestError.self, "\(words)") { try relocate(words) }
        #expect(error?.message.contains(reason) == true, "\(error?.message ?? "")")
    }

    // MARK: text that is put together

    @Test(arguments: [
        ["-netdev", "user,id=a,,type=bridge,,helper=/bin/sh -c 'reboot'; true #,,"],
        ["-netdev", "user,id=a,,restrict=off"], ["-netdev", #"{"type":"user","id":"a,type=tap"}"#],
        ["-netdev", "user,id=a b"], ["-netdev", "user,id=1a"], ["-netdev", "hubport,id=,,x,hubid=0"],
        ["-chardev", "null,id=c,,path=/etc/passwd"], ["-chardev", "file,id=c,,backend=pipe,path=/a"],
        ["-chardev", "null,id="], ["-device", "virtio-rng-pci,id=a,,b"],
        ["-drive", "if=none,id=d,,file=/etc/shadow,file=/a,format=raw"], ["-drive", "id=d/e,file=/a,format=raw"],
        ["-blockdev", #"{"driver":"null-co","node-name":"n,file=x"}"#],
        ["-object", "memory-backend-ram,id=m,,mem-path=/etc/x,size=1M"], ["-object", "iothread,id=../x"],
        ["-object", "secret,id=s,,file=/etc/shadow"], ["-audiodev", "none,id=a,,driver=wav"],
        // Keys in which QEMU would end at another place.
        ["-drive", "file=/a,format=raw,a,,b=c"], ["-device", "virtio-net-pci,x y=1"],
        ["-device", #"{"driver":"virtio-net-pci","a.b":1}"#],
        ["-blockdev", #"{"driver":"raw","node-name":"n","file.driver":"file","file.filename":"/etc/shadow"}"#],
    ])
    func anIDIsWhatQEMUTakesForOne(_ words: [String]) { isRefused(words) }

    @Test func aBlankCopyOfASizeOrAMemoryIsNothingElse() throws {
        // A size is no id: what it says stays one value.
        let sized = try blank(["-object", "memory-backend-ram,id=m,size=1M,,share=off,,mem-path=x"])
        #expect(KeyValue.split(sized[1])[2] == "size=1M,share=off,mem-path=x", "\(sized)")
        isRefused(["-object", "memory-backend-ram,id=m,size=1M,,mem-path=/etc/x"])
        let named = try blank(["-m", "1"], memoryID: "pc.ram,mem-path=/etc/x")
        #expect(named.contains("memory-backend=pc.ram,,mem-path=/etc/x"), "\(named)")
        #expect(KeyValue.split(named[3]).filter { $0.hasPrefix("mem-path=") } == ["mem-path=/memory"], "\(named)")
    }

    @Test(arguments: [
        ["-drive", "file=/a,format=raw,cache=writeback\u{0},readonly=on"], ["-append", "a\u{0}b"],
        ["-name", "web\nFORGED"], ["-smbios", "type=1,serial=\u{1b}[2J"], ["-device", "virtio-rng-pci,id=a\u{7f}"],
        ["-blockdev", "driver=file,filename=/a\u{0}b,node-name=n"], ["-append", "a\u{2028}b"],
    ])
    func controlCharactersAreRefused(_ words: [String]) { isRefused(words, "control character") }

    @Test(arguments: [
        ["-netdev", "user,id=n,restrict=on,restrict=off"], ["-chardev", "file,id=c,path=/a,path=/b"],
        ["-machine", "pc,type=q35"], ["-vnc", ":1,to=2,to=3"], ["-spice", "unix=off,unix=on,addr=/x"],
        ["-object", "iothread,id=a,id=b"],
    ])
    func aKeyThatQEMUWouldReadTwiceIsRefused(_ words: [String]) { isRefused(words, "given twice") }

    // MARK: the sandbox

    @Test(arguments: ["off", "on,spawn=allow", "enable=off", "on"])
    func theSandboxIsNotTheOffersToChoose(_ sandbox: String) throws {
        #expect(try moved(["-sandbox", sandbox, "-m", "1"]) == ["-m", "1"])
        #expect(try blank(["-sandbox", sandbox]) == ["-display", "none"])
        // The owner's own guest keeps what it was given, and its blank copy does not.
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64", "-sandbox", sandbox], directory: "/")
        #expect(try line.relocated(isAtHome: true) { .init(path: $0.path) }.arguments == line.arguments)
        let own = try line.shadow(.init(sizes: [:], memory: 0, memoryID: nil), memory: "/m") { "/s\($0)" }
        #expect(own.arguments == ["qemu-system-x86_64", "-display", "none"])
    }

    // MARK: read-only

    @Test(arguments: [
        ["driver=file,filename=/bin/true,node-name=f", "driver=raw,file=f,node-name=r,read-only=on"],
        [
            "driver=file,filename=/bin/true,node-name=f,read-only=off,auto-read-only=on",
            "driver=raw,file=f,node-name=r,read-only=on",
        ],
        [
            #"{"driver":"file","filename":"/bin/true","node-name":"f","read-only":false}"#,
            #"{"driver":"raw","file":"f","node-name":"r","read-only":true}"#,
        ],
        [
            #"{"driver":"raw","file":{"driver":"file","filename":"/bin/true","node-name":"f"},"node-name":"r","read-only":true}"#
        ],
    ])
    func whatIsReadOnlyAboveIsReadOnlyAtItsFile(_ definitions: [String]) throws {
        let words = definitions.flatMap { ["-blockdev", $0] }
        let text = try moved(words + ["-device", "virtio-blk-pci,drive=r"]).joined(separator: " ")
        #expect(
            text.split(separator: "read-only\":true").count - 1 + text.split(separator: "read-only=on").count - 1 >= 2
        )
        #expect(!text.contains("read-only=off") && !text.contains("read-only\":false") && !text.contains("auto-read"))
        // And nobody is attached below.
        for key in ["drive=f", "drive=f,write-cache=on"] {
            isRefused(words + ["-device", "virtio-blk-pci,\(key)"], "part of another disk")
        }
        isRefused(words + ["-device", #"{"driver":"virtio-blk-pci","drive":"f"}"#], "part of another disk")
    }

    @Test(arguments: [
        "file=/bin/true,format=raw,readonly=on", "file=/bin/true,format=raw,readonly=yes",
        "file=/bin/true,format=raw,read-only=true", "file=/bin/true,media=cdrom,file.read-only=off",
        "file=/bin/true,format=raw,readonly,file.auto-read-only=on",
    ])
    func aDriveThatIsReadOnlyIsSoAtItsFile(_ drive: String) throws {
        let text = try moved(["-drive", drive])[1]
        let parts = KeyValue.split(text)
        #expect(parts.contains("file.read-only=on") && parts.contains("file=/own/file/true"), "\(text)")
        #expect(!text.contains("off") && !text.contains("auto-read-only"), "\(text)")
    }

    @Test(arguments: [
        ["-drive", "if=none,id=d,file=/a,format=raw,file.node-name=f"],
        ["-blockdev", "driver=raw,node-name=r,file=nowhere"],
        [
            "-blockdev", "driver=file,filename=/a,node-name=f", "-blockdev", "driver=raw,file=f,node-name=r",
            "-blockdev", "driver=qcow2,file=f,node-name=q",
        ],
        ["-blockdev", "driver=null-co,node-name=n", "-blockdev", "driver=null-co,node-name=n"],
        ["-blockdev", "driver=qcow2,node-name=q,data-file=f,file.driver=file,file.filename=/a"],
    ])
    func nodesAreReachedInOneWay(_ words: [String]) { isRefused(words) }

    // MARK: files of this host

    @Test(arguments: [
        // A format behind the header that was checked.
        [
            "-blockdev",
            "driver=qcow2,node-name=q,read-only=on,file.driver=raw,file.offset=65536,file.file.driver=file,file.file.filename=/a",
        ],
        ["-blockdev", "driver=raw,offset=65536,node-name=q,read-only=on,file.driver=file,file.filename=/a"],
        ["-drive", "file=/a,format=raw,readonly=on,offset=65536"],
        ["-drive", "file=/a,format=raw,readonly=on,size=512"],
        // Formats that name other files.
        ["-blockdev", "driver=vmdk,node-name=v,read-only=on,file.driver=file,file.filename=/a"],
        ["-drive", "file=/a,format=vmdk,readonly=on"], ["-drive", "file=/a,driver=vhdx,media=cdrom"],
        ["-drive", "file=/a,format=vpc,readonly=y"], ["-drive", "file=/a,format=vdi,read-only=on"],
        ["-drive", "file=/a,format=qed,readonly=on"], ["-drive", "file=/a,format=dmg,readonly=on"],
        // Contents that somebody else may change into such a format.
        ["-drive", "file=nbd://h/x,format=qcow2"], ["-drive", "file=nbd://h/x"],
        ["-drive", "file=https://h/x,driver=vmdk"],
        ["-drive", "format=qcow2,file.driver=nbd,file.server.type=inet,file.server.host=h,file.server.port=1"],
        ["-drive", "file.driver=nbd,file.server.type=inet,file.server.host=h,file.server.port=1"],
        [
            "-blockdev",
            "driver=qcow2,node-name=q,file.driver=nbd,file.server.type=inet,file.server.host=h,file.server.port=1",
        ],
        ["-blockdev", "driver=vmdk,node-name=q,file.driver=https,file.url=https://h/x"],
        [
            "-blockdev", "driver=nbd,node-name=f,server.type=inet,server.host=h,server.port=1",
            "-blockdev", "driver=qcow2,node-name=q,file=f",
        ],
        // Addresses that hide what they name.
        ["-drive", #"file=rbd:p/i:c\onf=/etc/x,format=raw"#],
        ["-drive", "file=rbd:p/i:admin_socket=/etc/x,format=raw"],
        ["-drive", "file=gluster+tcp://h/v/i?so%63ket=/x,format=raw"],
        ["-drive", "file=nbd://h/x?socket=/x,format=raw"],
        ["-netdev", "socket,id=n,listen=0:0:0:0:0:0:0:1:8010"],
        ["-netdev", "socket,id=n,udp=192.0.2.9:1,localaddr=::1:8010"],
        // A path where none is expected.
        ["-blockdev", "node-name=n,filename=/etc/shadow"],
        ["-blockdev", "driver=raw,node-name=n,file.filename=/etc/shadow"],
        ["-blockdev", "driver=null-co,node-name=n,filename=/etc/shadow"],
        ["-blockdev", "driver=throttle,throttle-group=g,node-name=n,path=/etc/shadow"],
        ["-blockdev", #"{"driver":"raw","node-name":"n","x":{"filename":"/etc/shadow"}}"#],
        ["-device", "virtio-net-pci,filename=/etc/shadow"], ["-device", "virtio-net-pci,file=/etc/shadow"],
        ["-device", "vhost-user-blk-pci,chardev=c"], ["-device", "x-vfio-user-pci,socket=/x"],
        ["-object", "throttle-group,id=t,x=/etc/shadow"], ["-accel", "kvm,device=/dev/sda"],
        ["-machine", "pc,nvram=/etc/x"], ["-k", "/etc/shadow"], ["-vga", "/etc/x"], ["-usbdevice", "disk:/etc/shadow"],
        ["-chardev", "socket,id=c,path=/a,abstract=on,server=on"], ["-netdev", "user,id=n,hostfwd=unix:/x-:1"],
        ["-global", "driver=x,property=romfile,value=y"], ["-vnc", "127.0.0.1:1,websocket=unix:/x"],
    ])
    func filesOfThisHostAreOutOfReach(_ words: [String]) { isRefused(words) }

    @Test func whatNamesNoFileIsTakenFromTheNetwork() throws {
        for words in [
            ["-drive", "file=nbd://h/x,format=raw,if=none,id=d"],
            ["-drive", "file=https://h/x%20y,format=raw,if=none"],
            ["-drive", #"file=rbd:p/i:id=admin:mon_host=10.0.0.1\:6789,format=raw,if=none"#],
            [
                "-blockdev",
                "driver=luks,node-name=q,key-secret=s,file.driver=nbd,file.server.type=inet,file.server.host=h,file.server.port=1",
            ],
        ] { #expect(try moved(words) == words) }
    }

    @Test(arguments: [
        ("/dev/hugepages/rtemap_0", "/dev/hugepages"), ("/dev/hugepages/libvirt/qemu/1-web", "/dev/hugepages"),
        ("/run/hugepages/kvm/pagesize-1GB", "/run/hugepages/kvm"), ("/mnt/huge_1GB/x", "/mnt/huge_1GB"),
    ])
    func ofHugePagesOnlyTheDirectoryIsUsed(_ path: String, _ expected: String) throws {
        let object = try moved(["-object", "memory-backend-file,id=m,size=2M,mem-path=\(path),share=on"])
        #expect(object == ["-object", "memory-backend-file,id=m,size=2M,mem-path=\(expected),share=on"])
        #expect(try moved(["-mem-path", path]) == ["-mem-path", expected])
    }

    @Test(arguments: [
        "/dev/hugepagesx", "/dev/hugepages/../sda", "/hugepages2/x", "/mnt/huge-secrets/key", "hugepages",
    ])
    func whatOnlyLooksLikeHugePagesIsNone(_ path: String) {
        isRefused(["-mem-path", path])
        isRefused(["-object", "memory-backend-file,id=m,size=2M,mem-path=\(path)"])
    }

    // MARK: monitors by any name

    @Test(arguments: [
        (["-monitor", "vc", "-vnc", ":1"], ["-monitor", "none", "-vnc", ":1,to=100"]),
        (["-monitor", "vc:80Cx24C"], ["-monitor", "none"]), (["-monitor", "stdio"], ["-monitor", "none"]),
        (["-monitor", "pty"], ["-monitor", "none"]), (["-qmp", "stdio"], []), (["-qmp-pretty", "pty"], []),
        (["-serial", "mon:stdio"], ["-serial", "stdio"]), (["-serial", "mon:vc"], ["-serial", "vc"]),
        (["-parallel", "mon:pty"], ["-parallel", "pty"]), (["-gdb", "stdio"], []), (["-gdb", "pty"], []),
        (["-chardev", "vc,id=m", "-mon", "chardev=m", "-vnc", ":1"], ["-vnc", ":1,to=100"]),
        (["-chardev", "pty,id=m", "-qmp", "chardev:m"], []),
        (["-chardev", "socket,id=m,host=0.0.0.0,port=4,server=on,mux=on", "-gdb", "chardev:m"], []),
        (
            [
                "-chardev", "socket,id=m,host=::,port=4,server=on,mux=on", "-serial", "chardev:m", "-monitor",
                "chardev:m",
            ],
            ["-chardev", "socket,id=m,host=::,port=4,server=on,mux=on", "-serial", "chardev:m"]
        ),
        (
            ["-chardev", "stdio,id=m,mux=on", "-device", "isa-serial,chardev=m", "-mon", "m"],
            ["-chardev", "stdio,id=m,mux=on", "-device", "isa-serial,chardev=m"]
        ),
        (
            ["-object", "monitor-hmp,id=h,chardev=m", "-chardev", "socket,id=m,host=h,port=4,server=on"], []
        ),
        (["-gdb", "unix:/a.sock,server=on"], ["-gdb", "unix:/own/output/a.sock,server=on"]),
    ])
    func aMonitorThatOthersReachIsLeftOut(_ words: [String], _ expected: [String]) throws {
        #expect(try moved(words) == expected)
    }

    @Test(arguments: [
        ["-gdb", "tcp::1234"], ["-gdb", "tcp:0.0.0.0:1234,server=on"], ["-gdb", "udp::1"], ["-gdb", "file:/a"],
        ["-monitor", "telnet::1,server"], ["-qmp", "tcp:h:1"], ["-qmp-pretty", "websocket::1,server=on"],
        ["-serial", "mon:tcp::1,server"], ["-debugcon", "mon:udp::1"], ["-serial", "mon:chardev:c"],
        ["-s"], ["-monitor", "/dev/ttyS0"], ["-monitor", "unix:/a"], ["-serial", "fdset:1"],
    ])
    func aMonitorOnTheNetworkIsRefused(_ words: [String]) { isRefused(words) }

    // MARK: two parsers

    @Test(arguments: ["on", "yes", "true", "y"])
    func truthIsWhatQEMUTakesForIt(_ yes: String) throws {
        #expect(
            try moved(["-spice", "unix=\(yes),addr=/etc/passwd"]) == ["-spice", "unix=\(yes),addr=/own/output/passwd"]
        )
        #expect(
            try moved(["-serial", "unix:/etc/passwd,server=\(yes)"]) == [
                "-serial", "unix:/own/output/passwd,server=\(yes)",
            ]
        )
        #expect(try moved(["-drive", "file=/a,format=raw,readonly=\(yes)"])[1].contains("file=/own/file/a"))
        isRefused(["-drive", "file=/a,format=raw,snapshot=\(yes)"])
        isRefused(["-object", "memory-backend-file,id=m,size=2M,mem-path=/dev/hugepages,readonly=\(yes)"])
    }

    @Test(arguments: [
        ["-spice", "unix=1,addr=/etc/passwd"], ["-spice", "unix=ON,addr=/etc/passwd"],
        ["-spice", "unix=off,addr=/etc/passwd"], ["-spice", "addr=/etc/passwd"],
        ["-serial", "unix:/a,server=1"], ["-chardev", "socket,id=c,path=/a,server=1"],
    ])
    func whatQEMUDoesNotTakeForTruthIsNone(_ words: [String]) { isRefused(words) }

    @Test func pathsWithCommasAreOnePath() throws {
        #expect(try moved(["-vnc", "unix:/a,,b"]) == ["-vnc", "vnc=unix:/own/output/a,,b"])
        #expect(try moved(["-serial", "unix:/a,,b,server=on"]) == ["-serial", "unix:/own/output/a,,b,server=on"])
        #expect(try moved(["-serial", "file:/a,,b"]) == ["-serial", "file:/own/output/a,,b"])
        #expect(try moved(["-chardev", "file,id=c,path=/a,,b"]) == ["-chardev", "file,id=c,path=/own/output/a,,b"])
        #expect(try moved(["-option-rom", "/a,,b"]) == ["-option-rom", "romfile=/own/file/a,,b"])
    }

    // MARK: traps

    @Test(arguments: [
        ["-serial", "tcp:1234,server=on"], ["-serial", "tcp:,server=on"], ["-serial", "tcp:server=on"],
        ["-monitor", "tcp:1234,server"], ["-vnc", ":99999999999999999999"], ["-vnc", ":9223372036854775807"],
        ["-vnc", ":-1"], ["-serial", "tcp:a:99999999999999999999,server=on"], ["-serial", "udp:"],
        ["-serial", "udp:@"],
        ["-netdev", "user,id=n,hostfwd=:::"], ["-netdev", "user,id=n,hostfwd="], ["-serial", ""], ["-serial", "mon:"],
        ["-serial", ":"], ["-chardev", ""], ["-drive", ""], ["-cpu", ""], ["-global", ""], ["-set", ""], ["-k", ""],
        ["-blockdev", "{}"], ["-device", "{}"], ["-spice", "port=-1"], ["-netdev", "user,id=n,hostfwd=tcp::-1-:-1"],
    ])
    func nothingTraps(_ words: [String]) throws {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/")
        _ = try? line.endpoints()
        _ = try? (line.memory(), line.processors())
        _ = try? line.bridges()
        _ = try? line.paths()
        _ = line.sockets
        let ports = try? relocate(words).endpoints().compactMap(\.ports)
        #expect(ports?.allSatisfy { $0.lowerBound > 0 } ?? true)
        _ = try? blank(words)
    }

    @Test func manyNodesAreReadInLinearTime() throws {
        func chain(_ count: Int) -> [String] {
            (0..<count).flatMap { index in
                let more =
                    index == 0 ? "driver=file,filename=/a" : "driver=throttle,throttle-group=g,file=n\(index - 1)"
                return ["-blockdev", "\(more),node-name=n\(index)"]
            }
        }
        isRefused(chain(700))
        let flat = (0..<1000).flatMap { ["-blockdev", "driver=null-co,node-name=n\($0)"] }
        let start = ContinuousClock.now
        #expect(try moved(flat).count == 2000)
        _ = try? moved(chain(1000))
        // Minutes, when each looks at all others.
        #expect(ContinuousClock.now - start < .seconds(30))
        let deep = String(repeating: #"{"driver":"raw","file":"#, count: 300) + "1" + String(repeating: "}", count: 300)
        isRefused(["-blockdev", deep], "")
    }
}
