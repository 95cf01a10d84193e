import Emulator
import Testing

/// How a command line is rewritten for another host: the rows of the matrix in `docs/guests.md`.
struct RelocationTests {
    /// Rewrites options; a disk becomes `/images/FILE` in a format, everything else `<kind:path>`.
    private func relocate(
        _ words: [String],
        format: String? = nil,
        flattened: Bool = true,
        size: UInt64? = nil
    ) throws -> [String] {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/home")
        let moved = try line.relocated { reference in
            guard reference.kind == .disk else { return .init(path: "<\(reference.kind.rawValue):\(reference.path)>") }
            let name = reference.path.split(separator: "/").last.map(String.init) ?? ""
            var placement = GuestCommandLine.Placement(path: "/images/\(name)", format: format)
            placement.changesFormat = format == "raw" && name.hasSuffix("qcow2")
            placement.isFlattened = flattened
            placement.size = size
            placement.isDevice = size != nil
            return placement
        }
        return Array(moved.arguments.dropFirst())
    }

    @Test(arguments: [
        (["-drive", "file=/a.raw,format=raw,if=virtio"], ["-drive", "file=/images/a.raw,format=raw,if=virtio"]),
        (["-drive", "file=file:/a.raw,format=raw"], ["-drive", "file=/images/a.raw,format=raw"]),
        (
            ["-drive", "file.filename=/a,,b,if=none,id=d"],
            ["-drive", "file.filename=/images/a,,b,if=none,id=d,format=raw"]
        ),
        (["-drive", "file=/a.iso,media=cdrom"], ["-drive", "file=<file:/a.iso>,media=cdrom,file.read-only=on"]),
        (["-drive", "file=nbds://h/x,if=none,format=raw"], ["-drive", "file=nbds://h/x,if=none,format=raw"]),
        (["-drive", "if=none,id=empty,media=cdrom"], ["-drive", "if=none,id=empty,media=cdrom"]),
        (["-hda", "/a.raw"], ["-drive", "index=0,media=disk,file=/images/a.raw,format=raw"]),
        (["/a.raw"], ["-drive", "index=0,media=disk,file=/images/a.raw,format=raw"]),
        (["-pflash", "/v.fd"], ["-drive", "if=pflash,file=/images/v.fd,format=raw"]),
        (["-vnc", "127.0.0.1:3"], ["-vnc", "127.0.0.1:3,to=102"]),
        (["-vnc", ":3,to=20"], ["-vnc", ":3,to=20"]),
        (["-vnc", "unix:/run/v.sock,password=on"], ["-vnc", "unix:<output:/run/v.sock>,password=on"]),
        (["-vnc", "none"], ["-vnc", "none"]),
        (["-spice", "unix=on,addr=/run/s.sock"], ["-spice", "unix=on,addr=<output:/run/s.sock>"]),
        (["-object", "secret,id=s0"], []),
        (
            ["-object", "filter-dump,id=f,netdev=n,file=/d.pcap"],
            ["-object", "filter-dump,id=f,netdev=n,file=<output:/d.pcap>"]
        ),
        (["-fw_cfg", "opt/x,file=/c.txt"], ["-fw_cfg", "opt/x,file=<file:/c.txt>"]),
        (["-smbios", "type=1,serial=7"], ["-smbios", "type=1,serial=7"]),
        (["-device", "virtio-net-pci,romfile=/r.rom"], ["-device", "virtio-net-pci,romfile=<file:/r.rom>"]),
        (["-device", "virtio-net-pci,romfile="], ["-device", "virtio-net-pci,romfile="]),
        (
            ["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no"],
            ["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no"]
        ),
    ])
    func anOptionBecomes(_ words: [String], _ expected: [String]) throws {
        #expect(try relocate(words, format: "raw") == expected)
    }

    @Test func aDiskOfAnotherFormatLosesTheOptionsOfTheOldOne() throws {
        #expect(
            try relocate(["-drive", "file=/a.qcow2,format=qcow2,l2-cache-size=1M,cache=none,if=virtio"], format: "raw")
                == ["-drive", "file=/images/a.qcow2,format=raw,cache=none,if=virtio"]
        )
        #expect(
            try relocate(
                [
                    "-blockdev",
                    "driver=raw,offset=512,node-name=n,discard=unmap,file.driver=host_device,file.filename=/dev/vg/a",
                ],
                format: "qcow2"
            ) == ["-blockdev", "driver=qcow2,node-name=n,discard=unmap,file.driver=file,file.filename=/images/a"]
        )
    }

    @Test func nodesThatReferToEachOtherAreOneDisk() throws {
        let words = [
            "-blockdev", "driver=file,filename=/b.qcow2,node-name=fb", "-blockdev",
            "driver=qcow2,file=fb,node-name=b,read-only=on",
            "-blockdev", #"{"driver":"file","filename":"/t.qcow2","node-name":"ft"}"#,
            "-blockdev", #"{"backing":"b","driver":"qcow2","file":"ft","node-name":"t"}"#,
            "-blockdev", "driver=throttle,throttle-group=g,file=t,node-name=top",
        ]
        // Flattened, the backing nodes are gone; the filter stays.
        #expect(
            try relocate(words, format: "qcow2") == [
                "-blockdev", #"{"driver":"file","filename":"/images/t.qcow2","node-name":"ft"}"#,
                "-blockdev", #"{"driver":"qcow2","file":"ft","node-name":"t"}"#,
                "-blockdev", "driver=throttle,throttle-group=g,file=t,node-name=top",
            ]
        )
        // Kept, they are what they were.
        #expect(
            try relocate(words, format: "qcow2", flattened: false).prefix(4) == [
                "-blockdev", "driver=file,filename=<backing:/b.qcow2>,node-name=fb,read-only=on",
                "-blockdev", "driver=qcow2,file=fb,node-name=b,read-only=on",
            ]
        )
    }

    @Test func aBackingImageWithinTheDefinitionGoesWithIt() throws {
        let inner = #"{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}"#
        let top = #"{"backing":\#(inner),"driver":"qcow2","file":{"driver":"file","filename":"/t"},"node-name":"t"}"#
        #expect(
            try relocate(["-blockdev", top], format: "qcow2") == [
                "-blockdev", #"{"driver":"qcow2","file":{"driver":"file","filename":"/images/t"},"node-name":"t"}"#,
            ]
        )
        #expect(
            try relocate(["-blockdev", top], format: "qcow2", flattened: false)[1].contains(
                #""filename":"<backing:/b>","read-only":true},"read-only":true}"#
            )
        )
    }

    @Test func aProtocolThatWasTheDiskGetsAFormatUnderItsName() throws {
        #expect(
            try relocate(["-blockdev", "driver=file,filename=/a.raw,node-name=n,cache.direct=on"], format: "qcow2")
                == [
                    "-blockdev",
                    "file.driver=file,file.filename=/images/a.raw,node-name=n,file.cache.direct=on,driver=qcow2",
                ]
        )
    }

    @Test func aLargerDeviceShowsTheGuestItsOwnSize() throws {
        #expect(
            try relocate(["-drive", "file=/a.raw,format=raw,if=virtio"], format: "raw", size: 4096)
                == ["-drive", "file=/images/a.raw,format=raw,if=virtio,size=4096"]
        )
        #expect(
            try relocate(
                ["-blockdev", #"{"driver":"raw","file":{"driver":"file","filename":"/a"},"node-name":"n"}"#],
                format: "raw",
                size: 4096
            )
                == [
                    "-blockdev",
                    #"{"driver":"raw","file":{"driver":"host_device","filename":"/images/a"},"node-name":"n","size":4096}"#,
                ]
        )
    }

    @Test(arguments: [
        ["-drive", "file=/a.raw,snapshot=on"], ["-drive", "file=nbd:unix:/s,if=none"], ["-drive", "file=fat:rw:/d"],
        ["-blockdev", "driver=nbd,node-name=n,server.type=unix,server.path=/s"],
        ["-blockdev", "driver=vvfat,dir=/d,node-name=n"],
        ["-chardev", "socket,id=c,fd=7"], ["-chardev", "serial,id=c,path=/dev/ttyS0"], ["-serial", "/dev/ttyS0"],
        ["-tpmdev", "emulator,id=t,chardev=c"], ["-object", "input-linux,id=k,evdev=/dev/input/event0"],
        ["-object", "secret,id=s,file=/k"], ["-device", "usb-host,hostbus=1"],
        ["-device", "vhost-scsi-pci,wwpn=naa.1"],
        ["-device", "vhost-user-fs-pci,chardev=c"], ["-netdev", "vhost-vdpa,id=n,vhostdev=/dev/v"],
        ["-device", #"{"driver":"vfio-pci","host":"0:1.0"}"#], ["-blockdev", "{"],
        // What another host could use to run its programs or reach its files here.
        ["-plugin", "file=/x.so"], ["-dump-vmstate", "/etc/x"], ["-icount", "shift=1,rr=record,rrfile=/etc/x"],
        ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.9:1-cmd:reboot"], ["-netdev", "user,id=n,smb=/etc"],
        ["-netdev", "user,id=n,tftp=/etc"],
        ["-set", "netdev.n0.script=/x"], ["-set", "drive.d0.file=/etc/shadow"],
        ["-set", "device.d.romfile=/etc/shadow"],
        ["-machine", "pc,initrd=/etc/shadow"], ["-object", "rng-random,id=r,filename=/etc/shadow"],
        ["-object", "memory-backend-file,id=m,size=1M,share=on,mem-path=/dev/sda"],
        ["-audiodev", "wav,id=a,path=/etc/x"],
        ["-chardev", "file,id=c,path=/a,input-path=/etc/shadow"], ["-global", "virtio-net-pci.romfile=/etc/shadow"],
        ["-blockdev", #"{"driver":"quorum","node-name":"q","children":[{"driver":"file","filename":"/etc/shadow"}]}"#],
        [
            "-blockdev",
            "driver=blkverify,node-name=b,test.driver=file,test.filename=/a,raw.driver=file,raw.filename=/b",
        ],
        ["-drive", "file=json:{}"], ["-drive", "file=blkdebug:/x:/etc/shadow"],
        ["-drive", "driver=quorum,children.0.file.filename=/a"],
        ["-device", "x,sysfsdev=/sys/x"], ["-netdev", "stream,id=n,addr.type=unix,addr.path=/s"],
        ["-chardev", "socket,id=c,path=/run/dbus.sock"], ["-no-such-option", "x"], ["-L", "/root"], ["-s"],
        ["-monitor", "tcp:0.0.0.0:4444,server=on,wait=off"], ["-qmp", "tcp::1,server"],
        ["-serial", "mon:telnet::1,server"],
        ["-netdev", #"{"type":"user","id":"n","guestfwd":[{"str":"tcp:10.0.2.9:80-\u0063md:x"}]}"#],
        ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.9:80-file:/etc/x"],
        ["-netdev", "dgram,id=n,local.type=unix,local.path=/etc/x"],
        ["-serial", "tcp::0,server=on,wait=off,logfile=/etc/x"], ["-serial", "unix:a,server=on,path=/etc/passwd"],
        ["-serial", "unix:a"], ["-serial", "unix:a,server,backend=file"], ["-serial", "unix:a,server=on,server=off"],
        ["-drive", "if=none,driver=host_device,filename=/dev/sda"], ["-drive", "file=/a,file.filename=/b"],
        ["-drive", "format=raw,file.driver=raw,file.file.driver=file,file.file.filename=/etc/shadow"],
        ["-drive", "file.driver=nbd,file.server.type=unix,file.server.path=/s"],
        ["-drive", "file=rbd:p/i:conf=/etc/x"],
        ["-drive", "file=/a,file=/b"], ["-drive", "file=/a,readonly=on,backing.file.filename=/etc/shadow"],
        ["-mem-path", "/etc/x"], ["-object", "memory-backend-file,id=m,size=1M,mem-path=/dev/hugepages/../../etc/x"],
        ["-display", "vnc=unix:/etc/passwd"], ["-display", "dbus,addr=x"], ["-vnc", "password=off,vnc=unix:/etc/x"],
        ["-device", "ipmi-bmc-sim,frudatafile=../../etc/x"], ["-device", "virtio-input-host-pci,evdev=x"],
        ["-set", "device.x.driver=usb-host"],
        ["-smbios", "type=11,path=/a,path=/b"], ["-audiodev", #"{"driver":"\u0077av","id":"a","path":"\u002fetc"}"#],
        ["-blockdev", "driver=qcow2,node-name=r,read-only=on,file.driver=file,file.filename=/a,backing=b"],
    ])
    func whatBelongsToThisHostIsRefusedByName(_ words: [String]) {
        let error = #expect(throws: GuestError.self) { try relocate(words) }
        #expect(error?.message.isEmpty == false)
    }

    @Test func aBlankCopyHasTheSameDevicesAndNothingBehindThem() throws {
        let line = GuestCommandLine(
            arguments: [
                "qemu-system-x86_64", "-machine", "pc", "-m", "64", "-kernel", "/k", "-append", "x", "-drive",
                "file=/a.raw,format=raw,if=virtio",
                "-blockdev", "driver=qcow2,node-name=n,file.driver=file,file.filename=/b", "-device",
                "virtio-blk-pci,drive=n",
                "-netdev", "tap,id=t,ifname=tap0", "-device", "e1000,netdev=t", "-chardev", "socket,id=c,path=/s",
                "-mon", "chardev=c",
                "-serial", "file:/log", "-vnc", ":1", "-object",
                "memory-backend-file,id=m,size=64M,mem-path=/m,prealloc=on",
                "-object", "secret,id=s", "-object", "iothread,id=i", "-bios", "/bios", "-pidfile", "/pid",
                "-daemonize",
            ],
            directory: "/"
        )
        let shadow = try line.shadow(
            .init(sizes: ["/a.raw": 4096, "n": 8192, "/bios": 65536], memory: 1, memoryID: "pc.ram"),
            memory: "/dev/shm"
        ) {
            "/scratch/\($0)"
        }
        #expect(
            shadow.arguments.dropFirst() == [
                "-machine", "pc", "-m", "64", "-drive", "if=virtio,driver=null-co,size=4096,read-zeroes=on",
                "-blockdev", #"{"driver":"null-co","node-name":"n","read-only":false,"read-zeroes":true,"size":8192}"#,
                "-device", "virtio-blk-pci,drive=n", "-netdev", "hubport,id=t,hubid=1", "-device", "e1000,netdev=t",
                "-chardev", "null,id=c", "-serial", "null", "-object",
                "memory-backend-file,id=m,size=64M,share=on,mem-path=/dev/shm",
                "-object", "iothread,id=i", "-bios", "/scratch/65536", "-display", "none",
            ]
        )
    }

    @Test func monitorsOfOthersAreLeftOutWithTheirDevices() throws {
        #expect(
            try relocate([
                "-chardev", "socket,id=charmonitor,fd=23,server=on,wait=off", "-mon",
                "chardev=charmonitor,mode=control",
                "-chardev", "socket,id=qmp-event,path=/var/run/events.sock,reconnect=5", "-mon",
                "chardev=qmp-event,mode=control",
                "-chardev", "socket,id=own,path=/run/own.sock,server=on,wait=off", "-mon", "chardev=own,mode=control",
            ]) == [
                "-chardev", "socket,id=own,path=<output:/run/own.sock>,server=on,wait=off", "-qmp", "chardev:own",
            ]
        )
    }

    /// What management programs write.
    @Test(arguments: [
        [
            "-id", "100", "-name", "vm,debug-threads=on", "-no-shutdown", "-pidfile", "/var/run/100.pid", "-daemonize",
            "-chardev", "socket,id=qmp,path=/var/run/100.qmp,server=on,wait=off", "-mon", "chardev=qmp,mode=control",
            "-chardev", "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5", "-mon",
            "chardev=qmp-event,mode=control",
            "-smbios", "type=1,uuid=f3b4d5e6-0000-4000-8000-000000000000", "-smp", "2,sockets=1,cores=2,maxcpus=2",
            "-nodefaults",
            "-boot", "menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/bootsplash.jpg",
            "-vnc", "unix:/var/run/100.vnc,password=on", "-cpu", "kvm64,enforce,+kvm_pv_eoi,+sep", "-m", "2048",
            "-object", "iothread,id=iothread-virtioscsi0", "-device",
            "pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e",
            "-device", "vmgenid,guid=53b1c1a8-0000-4000-8000-000000000000", "-device",
            "usb-tablet,id=tablet,bus=uhci.0,port=1",
            "-chardev", "socket,path=/var/run/100.qga,server=on,wait=off,id=qga0", "-device",
            "virtio-serial,id=qga0,bus=pci.0,addr=0x8",
            "-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
            "-iscsi", "initiator-name=iqn.1993-08.org.debian:01:abc", "-drive",
            "if=none,id=drive-ide2,media=cdrom,aio=io_uring",
            "-device", "ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2,bootindex=101",
            "-drive",
            "file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,format=raw,cache=none,aio=io_uring,detect-zeroes=on",
            "-device", "scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100",
            "-netdev", "type=tap,id=net0,ifname=tap100i0,script=no,downscript=no,vhost=on", "-machine",
            "type=pc-i440fx-7.2",
            "-device", "virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0",
        ],
        [
            "-name", "guest=web,debug-threads=on", "-S", "-object", #"{"qom-type":"secret","id":"masterKey0"}"#,
            "-machine", "pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram", "-accel", "kvm",
            "-cpu", "host,migratable=on", "-m", "2048", "-overcommit", "mem-lock=off", "-smp",
            "2,sockets=2,cores=1,threads=1",
            "-object", #"{"qom-type":"memory-backend-ram","id":"pc.ram","size":2147483648}"#, "-no-user-config",
            "-nodefaults",
            "-chardev", "socket,id=charmonitor,fd=23,server=on,wait=off", "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
            "-rtc", "base=utc,driftfix=slew", "-global", "kvm-pit.lost_tick_policy=delay", "-no-hpet", "-no-shutdown",
            "-global", "ICH9-LPC.disable_s3=1", "-boot", "strict=on",
            "-device",
            #"{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}"#,
            "-blockdev",
            #"{"driver":"file","filename":"/images/web.qcow2","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}"#,
            "-blockdev",
            #"{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage","backing":null}"#,
            "-device",
            #"{"driver":"virtio-blk-pci","bus":"pci.4","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}"#,
            "-netdev", "tap,ifname=vnet0,script=no,downscript=no,vhost=on,id=hostnet0",
            "-device",
            #"{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:00:00:01","bus":"pci.1","addr":"0x0"}"#,
            "-chardev", "pty,id=charserial0", "-device",
            #"{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}"#,
            "-chardev", "spicevmc,id=charchannel1,name=vdagent", "-audiodev", #"{"id":"audio1","driver":"spice"}"#,
            "-spice", "port=5900,addr=127.0.0.1,disable-ticketing=on,image-compression=off,seamless-migration=on",
            "-device",
            #"{"driver":"qxl-vga","id":"video0","max_outputs":1,"ram_size":67108864,"bus":"pcie.0","addr":"0x1"}"#,
            "-device", #"{"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.5","addr":"0x0"}"#,
            "-object", #"{"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}"#,
            "-device", #"{"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pci.6","addr":"0x0"}"#,
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny", "-msg",
            "timestamp=on",
        ],
    ])
    func theLinesOfManagementProgramsAreTaken(_ words: [String]) throws {
        let moved = try relocate(words, format: words.contains { $0.contains("qcow2") } ? "qcow2" : "raw")
        #expect(!moved.contains { $0.contains("qmp-event") || $0.contains("charmonitor") }, "\(moved)")
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + moved, directory: "/")
        _ = try line.shadow(.init(sizes: [:], memory: 1 << 20, memoryID: "pc.ram"), memory: "/tmp") { "/scratch/\($0)" }
    }

    @Test func secretsInClearAreLeftOutOfWhatIsKept() {
        let line = GuestCommandLine(
            arguments: [
                "qemu-system-x86_64", "-object", "secret,id=a,data=open", "-object", "secret,id=b,keyid=k,iv=x,data=y",
            ],
            directory: "/"
        )
        #expect(line.clearSecrets == ["a"])
        #expect(
            line.withoutClearSecrets.arguments == [
                "qemu-system-x86_64", "-object", "secret,id=a", "-object", "secret,id=b,keyid=k,iv=x,data=y",
            ]
        )
    }
}
