import IO
import Testing

@testable import Emulator

/// The same guest, as QEMUs of different versions tell of it and read it.
struct VersionTests {
    // MARK: what is compared

    /// A machine with one device and a few processor features.
    private func machine(
        processor: [String: String] = ["fpu": "true", "aes": "false", "level": "13"],
        settings: [String: String] = ["addr": "11", "queues": "4", "stats": "{}"],
        _ change: (inout MachineFingerprint) -> Void = { _ in }
    ) -> MachineFingerprint {
        var machine = MachineFingerprint()
        machine.machine = "pc-i440fx-7.2"
        machine.topology = ["sockets": "1", "cores": "1", "threads": "1"]
        machine.processor = processor
        machine.kinds = [
            "processor fpu": "bool", "processor aes": "bool", "processor level": "uint32", "processor knob": "bool",
            "processor new": "bool", "nic addr": "int32", "nic queues": "uint16", "nic stats": "statistics",
        ]
        machine.standards = [
            "processor level": "4294967295", "processor knob": "true", "nic addr": "-1", "nic queues": "1",
        ]
        machine.devices = ["/machine/peripheral/nic0": "nic", "/machine/i440fx": "i440FX-pcihost"]
        machine.settings = Dictionary(uniqueKeysWithValues: settings.map { ("/machine/peripheral/nic0 \($0)", $1) })
        machine.builtIn = ["i440FX-pcihost": 1, "i8257": 2]
        change(&machine)
        return machine
    }

    @Test func whatBothKnowMustBeEqualAndIsNamedWithBothValuesAndARemedy() {
        let here = machine()
        #expect(here.differences(from: machine()) == [])
        let other = machine(
            processor: ["fpu": "true", "aes": "true", "level": "22"],
            settings: ["addr": "12", "queues": "2", "stats": "{}"]
        )
        let reasons = here.differences(from: other)
        #expect(reasons.count == 4, "\(reasons)")
        for words in [
            "'aes' is off here and on there", "'level' is 13 here and 22 there",
            "The nic 'nic0' has addr=1.3 here and 1.4 there", "has queues=4 here and 2 there",
        ] { #expect(reasons.contains { $0.contains(words) && $0.contains(";") }, "\(words): \(reasons)") }
    }

    @Test func whatADeviceReportsIsNotWhatItIs() {
        let busy = machine(settings: ["addr": "11", "queues": "4", "stats": #"{"last-update":17}"#])
        #expect(busy.differences(from: machine()) == [] && machine().differences(from: busy) == [])
    }

    @Test func whatOnlyOneKnowsIsADifferenceOnlyWhenTheGuestWouldSeeIt() {
        let old = machine()
        // A knob of its machine type, a feature that is off, a level of the topology that has one, a property of a device.
        let new = machine(
            processor: ["fpu": "true", "aes": "false", "level": "13", "knob": "false", "new": "false", "count": "0"],
            settings: ["addr": "11", "queues": "4", "stats": "{}", "in_order": "false"]
        ) { $0.topology["modules"] = "1" }
        #expect(old.differences(from: new) == [] && new.differences(from: old) == [])
        let on = machine(processor: ["fpu": "true", "aes": "false", "level": "13", "new": "true"])
        #expect(old.differences(from: on).first?.contains("'new' is not known to QEMU here and on there") == true)
        #expect(
            on.differences(from: old).first?.contains("'new' is on here and not known to QEMU there; start") == true
        )
        let modules = machine { $0.topology["modules"] = "2" }
        #expect(old.differences(from: modules).first?.contains("modules=1 here and 2 there") == true)
    }

    @Test func theSameDefaultWrittenInAnotherWayIsTheSame() {
        let old = machine(settings: ["rombar": "1"]) {
            $0.kinds["nic rombar"] = "uint32"
            $0.standards["nic rombar"] = "1"
        }
        let new = machine(settings: ["rombar": "-1"]) {
            $0.kinds["nic rombar"] = "int32"
            $0.standards["nic rombar"] = "-1"
        }
        #expect(old.differences(from: new) == [])
        let off = machine(settings: ["rombar": "0"]) {
            $0.kinds["nic rombar"] = "int32"
            $0.standards["nic rombar"] = "-1"
        }
        #expect(old.differences(from: off).count == 1)
    }

    @Test func builtInDevicesAreCountedWhereverTheyAre() {
        let moved = machine { $0.devices["/machine/piix3/dma"] = "i8257" }
        #expect(machine().differences(from: moved) == [])
        let fewer = machine { $0.builtIn["i8257"] = 1 }
        #expect(
            machine().differences(from: fewer).first?.contains("2 built-in devices of type i8257 here and 1") == true
        )
    }

    @Test func theCachesOfTheHostMustBeTheSameWhereTheGuestSeesThem() {
        func host(_ caches: String?) -> MachineFingerprint { machine { $0.hostCaches = caches } }
        let reasons = host("1 Data 32K 8 64").differences(from: host("1 Data 48K 12 64"))
        #expect(reasons.first?.contains("host-cache-info=off") == true)
        #expect(host("1 Data 32K 8 64").differences(from: host("1 Data 32K 8 64")) == [])
        // An agent of an earlier release does not tell.
        #expect(host("1 Data 32K 8 64").differences(from: host(nil)) == [])
    }

    @Test func featuresThatFollowFromTheTopologyAreComparedWithIt() {
        func pair(_ ht: String, _ cores: String) -> MachineFingerprint {
            machine(processor: ["ht": ht]) {
                $0.topology["cores"] = cores
                $0.kinds["processor ht"] = "bool"
            }
        }
        #expect(pair("false", "2").differences(from: pair("true", "2")) == [])
        #expect(pair("false", "1").differences(from: pair("true", "1")).count == 1)
    }

    @Test func theFingerprintOfAnEarlierReleaseIsRead() throws {
        let text = """
            {"machine":"pc","memory":1,"processors":1,"topology":{},"processor":{"fpu":"true"},"model":{"fpu":"true"},
            "devices":{"unattached i8257":"2"},"settings":{}}
            """
        let old = try #require(JSONText.decode(MachineFingerprint.self, from: Array(text.utf8)))
        #expect(old.builtIn.isEmpty && old.devices["unattached i8257"] == "2")
        let written = String(decoding: try JSONText.encode(machine()), as: UTF8.self)
        #expect(written.contains(#""model":{}"#))
    }

    // MARK: how it is written

    private let old = EmulatorFacts(
        version: "7.2.22",
        processor: [
            DeviceProperty(name: "fpu", type: "bool"), DeviceProperty(name: "aes", type: "bool"),
            DeviceProperty(name: "newer", type: "bool"), DeviceProperty(name: "pmu", type: "bool", standard: false),
        ],
        devices: ["nic": [DeviceProperty(name: "mac", type: "str"), DeviceProperty(name: "queues", type: "uint16")]],
        members: ["reconnect"]
    )
    private let new = EmulatorFacts(version: "11.1.3", members: ["reconnect-ms"])

    private func adapted(
        _ words: [String],
        to facts: EmulatorFacts,
        _ origin: GuestCommandLine.Origin = .init()
    ) throws -> [String] {
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/")
        let moved = try line.relocated(for: facts, origin: origin) { .init(path: $0.path) }
        return Array(moved.arguments.dropFirst())
    }

    @Test func processorFeaturesThatAreOffNeedNotBeKnownAndTheRestIsSwitchedOff() throws {
        let fixed = GuestCommandLine.Origin(hasFixedProcessor: true)
        #expect(
            try adapted(["-cpu", "max,fpu=on,aes=off,amx=off,avx10-version=0,pmu=on"], to: old, fixed)
                == ["-cpu", "max,fpu=on,aes=off,pmu=on,newer=off"]
        )
        // What it has anyway need not be known either.
        let knob = GuestCommandLine.Origin(hasFixedProcessor: true, standards: ["processor knob": "on"])
        #expect(
            try adapted(["-cpu", "max,fpu=on,aes=off,newer=off,knob=on"], to: old, knob).last?.contains("knob") == false
        )
        // A list that is not complete says nothing about the others.
        #expect(try adapted(["-cpu", "max,+fpu"], to: old) == ["-cpu", "max,+fpu"])
        let error = #expect(throws: GuestError.self) { try adapted(["-cpu", "max,amx=on"], to: old, fixed) }
        #expect(
            error?.message.contains("amx=on, which QEMU 7.2.22 on this host does not know; start the guest") == true
        )
    }

    @Test func devicePropertiesThatAreDefaultsOrOffNeedNotBeKnown() throws {
        let origin = GuestCommandLine.Origin(standards: ["nic depth": "8"], emulatorVersion: "10.0.13")
        #expect(
            try adapted(["-device", "nic,id=n,mac=1,depth=8,in_order=off,queues=2"], to: old, origin)
                == ["-device", "nic,id=n,mac=1,queues=2"]
        )
        let error = #expect(throws: GuestError.self) { try adapted(["-device", "nic,id=n,depth=9"], to: old, origin) }
        #expect(error?.message.contains("The nic 'n' has depth=9, which QEMU 7.2.22") == true)
        // What an older QEMU could switch off, a newer one may have come to have always.
        let older = GuestCommandLine.Origin(standards: [:], emulatorVersion: "6.2.0")
        #expect(throws: GuestError.self) { try adapted(["-device", "nic,id=n,mitigation=off"], to: old, older) }
        let many = (0..<1025).map { "a\($0)=off" }.joined(separator: ",")
        #expect(throws: GuestError.self) { try adapted(["-device", "nic,\(many)"], to: old, origin) }
        // What an agent of an earlier release sends is left to QEMU itself.
        #expect(try adapted(["-device", "nic,depth=9"], to: old) == ["-device", "nic,depth=9"])
    }

    @Test func delaysOfSocketsAreInTheUnitOfTheirReader() throws {
        let seconds = ["-chardev", "socket,id=c,host=h,port=1,reconnect=5", "-serial", "tcp:h:1,reconnect=1"]
        let milliseconds = [
            "-chardev", "socket,id=c,host=h,port=1,reconnect-ms=4500", "-serial", "tcp:h:1,reconnect-ms=1",
        ]
        #expect(try adapted(seconds, to: old) == seconds)
        #expect(
            try adapted(seconds, to: new) == [
                "-chardev", "socket,id=c,host=h,port=1,reconnect-ms=5000", "-serial", "tcp:h:1,reconnect-ms=1000",
            ]
        )
        #expect(try adapted(milliseconds, to: old) == seconds)
        let object = ["-netdev", #"{"id":"n","reconnect":2,"type":"stream"}"#]
        #expect(try adapted(object, to: new) == ["-netdev", #"{"id":"n","reconnect-ms":2000,"type":"stream"}"#])
        #expect(try adapted(milliseconds, to: new) == milliseconds)
    }

    @Test func optionsThatAreGoneAreSaidInAFormThatEveryQEMUTakes() throws {
        #expect(
            try adapted(["-no-hpet", "-no-acpi", "-portrait", "-async-teardown"], to: new)
                == ["-machine", "hpet=off", "-machine", "acpi=off"]
        )
    }

    /// Monitors became objects in 11.1, and `-mon` is deprecated there.
    @Test func monitorsHaveAFormThatEveryQEMUTakes() throws {
        let device = ["-chardev", "socket,id=c,path=/s,server=on,wait=off"]
        for (option, form) in [
            (["-mon", "chardev=c,mode=control"], ["-qmp", "chardev:c"]), (["-mon", "c"], ["-monitor", "chardev:c"]),
            (["-mon", "chardev=c,mode=control,pretty=on"], ["-qmp-pretty", "chardev:c"]),
            (["-object", "monitor-qmp,id=m,chardev=c"], ["-qmp", "chardev:c"]),
            (["-object", "monitor-hmp,id=m,chardev=c"], ["-monitor", "chardev:c"]),
            (["-qmp", "chardev:c"], ["-qmp", "chardev:c"]),
        ] { #expect(try adapted(device + option, to: new) == device + form) }
        // There a monitor takes the name of its character device; an object of that name would be in the way.
        let taken = ["-object", "iothread,id=c"] + device + ["-mon", "chardev=c,mode=control"]
        #expect(try adapted(taken, to: new) == taken)
        // QEMU cuts the name in the other form, and would open another device.
        let name = String(repeating: "a", count: 31)
        let long = ["-chardev", "null,id=\(name)b"]
        #expect(try adapted(long + ["-mon", "\(name)b"], to: new) == long + ["-mon", "\(name)b"])
        let cut = ["-chardev", "socket,id=\(name),host=::,port=1,server=on"] + long
        #expect(try adapted(cut + ["-qmp", "chardev:\(name)b"], to: new) == long)
        #expect(throws: GuestError.self) { try adapted(["-gdb", "tcp::1234"], to: new) }
        // One that others reach is left out, in each form.
        let open = ["-chardev", "socket,id=c,host=::,port=1,server=on"]
        for option in [["-mon", "c"], ["-qmp", "chardev:c"], ["-object", "monitor-qmp,id=m,chardev=c"]] {
            #expect(try adapted(open + option, to: new) == [])
        }
    }

    @Test func addressesAreSlotsAndFunctions() {
        #expect(GuestInspector.isPCIAddress("int32") && GuestInspector.isPCIAddress("str"))
        #expect(!GuestInspector.isPCIAddress("uint64"))
        #expect(GuestInspector.address(16) == "2.0" && GuestInspector.address(0x1c << 3 | 1) == "1c.1")
    }

    @Test func aTableOfDefaultsMeansWhatItSays() {
        for (text, value, isSame) in [
            ("on", true, true), ("off", false, true), ("on", false, false), ("false", false, true), ("0", 0, true),
            ("0x10", 16, true), ("7", 8, false), ("4k", "4k", true), ("maybe", true, false),
        ] as [(String, JSONValue, Bool)] {
            #expect(MachineDefaults.means(text, value) == isSame, "\(text) \(value)")
        }
    }
}
