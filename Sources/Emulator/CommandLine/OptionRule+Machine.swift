internal import IO

/// The machine, its processors and memory, how it starts, and QEMU's process.
extension OptionRule {
    static let machine: [OptionRule] =
        [
            OptionRule(
                "machine",
                "M",
                argument: .settings("type"),
                check: checkMachine,
                hostFiles: accelerator
            ),
            OptionRule("cpu", check: checkProcessor),
            OptionRule("accel", argument: .settings("accel"), check: checkAccelerator, hostFiles: accelerator),
            OptionRule("enable-kvm", argument: .none, hostFiles: { _ in [kvm] }),
            OptionRule("icount", argument: .settings("shift"), check: checkInstructionCount),
            OptionRule(
                "option-rom",
                argument: .settings("romfile"),
                blank: .emptied(emptyROM),
                relocate: {
                    try $0.place(.file, keys: "romfile")
                    return .written
                }
            ),
            OptionRule(
                "fw_cfg",
                argument: .settings("name"),
                blank: .emptied(dropWithFile),
                relocate: {
                    try $0.place(.file, keys: "file")
                    return .written
                }
            ),
            OptionRule(
                "smbios",
                argument: .settings(),
                repeatable: ["value"],
                blank: .emptied(dropWithFile),
                relocate: {
                    try $0.place(.file, keys: "file", "path")
                    return .written
                }
            ),
            OptionRule(
                "acpitable",
                argument: .settings(),
                blank: .leftOut,
                relocate: {
                    if $0.settings["file"]?.contains(":") == true || $0.settings["data"]?.contains(":") == true {
                        throw $0.refusal("it joins several files; give one -acpitable for each")
                    }
                    try $0.place(.file, keys: "file", "data")
                    return .written
                }
            ),
            OptionRule(
                "boot",
                argument: .settings("order"),
                blank: .emptied(dropWithFile),
                relocate: {
                    try $0.place(.file, keys: "splash")
                    return .written
                }
            ),
            OptionRule("D", blank: .leftOut, relocate: { try $0.placedText(.output) }),
            OptionRule(
                "trace",
                argument: .settings("enable"),
                blank: .leftOut,
                relocate: {
                    try $0.place(.output, keys: "file")
                    return $0.settings.has("events") && !$0.isAtHome ? .leftOut : .written
                }
            ),
            OptionRule("run-with", argument: .settings(), blank: .leftOut, relocate: leaveBehind),
            // The destination's own agent says as whom, and how confined, QEMU runs.
            OptionRule("sandbox", argument: .settings("enable"), blank: .leftOut, relocate: leaveBehind),
            OptionRule("runas", blank: .leftOut, relocate: leaveBehind),
            OptionRule(
                "mem-path",
                blank: .leftOut,
                check: checkHugePages,
                relocate: { option in
                    if option.isAtHome { return .written }
                    return .replaced([GuestOption("mem-path", HugePages.root(of: option.argument) ?? "")])
                },
                hostFiles: { [.init($0.argument, .directory, isOptional: true)] }
            ),
            OptionRule("msg", argument: .settings()),
            OptionRule("iscsi", argument: .settings()) {
                if $0.settings.has("password") { throw $0.refusal("it has a password in clear; use password-secret") }
                try $0.allow(["initiator-name", "header-digest", "user", "password-secret", "timeout", "id"])
            },
        ]
        + each("kernel initrd dtb shim", argument: .text, blank: .leftOut, relocate: { try $0.placedText(.file) })
        + each("bios", argument: .text, blank: .emptied(emptyROM), relocate: { try $0.placedText(.file) })
        + each("append", argument: .text, blank: .leftOut)
        + each("m", argument: .settings("size"))
        + each("smp", argument: .settings("cpus"))
        + each("numa", argument: .object("type"))
        + each("name", argument: .settings("guest"))
        + each("compat", argument: .object())
        + each("rtc action", argument: .settings())
        + each("overcommit", argument: .settings(), blank: .leftOut)
        + each("uuid seed tb-size echr", argument: .text, check: checkWord)
        + each("prom-env id", argument: .text)
        + each(
            "nodefaults no-user-config no-reboot no-shutdown no-acpi no-hpet no-fd-bootchk only-migratable singlestep "
                + "win2k-hack enable-fips async-teardown old-param",
            argument: .none
        )
        + each("mem-prealloc", argument: .none, blank: .leftOut)
        + each("daemonize S", argument: .none, blank: .leftOut, relocate: leaveOut)
        + each("pidfile", argument: .text, blank: .leftOut, relocate: leaveOut)
        + ownMachine + unmovableMachine

    private static let ownMachine: [OptionRule] =
        each(
            "s h help version semihosting xen-attach xen-domid-restrict enable-sync-profile perfmap jitdump",
            argument: .none,
            owner: .own(unknown),
            blank: .leftOut
        )
        + each(
            "L d dfilter plugin dump-vmstate writeconfig semihosting-config realtime qtest qtest-log",
            argument: .text,
            owner: .own(unknown),
            blank: .leftOut
        )

    private static let unmovableMachine: [OptionRule] = [
        OptionRule("incoming", owner: .nobody("the guest itself waits for a migration"), blank: .leftOut),
        OptionRule("loadvm", owner: .nobody("it starts from an internal snapshot"), blank: .leftOut),
        OptionRule("readconfig", owner: .nobody("its options are in another file"), blank: .leftOut),
        OptionRule("xen-domid", owner: .nobody("Xen guests are not supported"), blank: .leftOut),
        OptionRule("chroot", owner: .nobody("the other host has another directory tree"), blank: .leftOut),
        OptionRule("add-fd", owner: .nobody("it passes a descriptor"), blank: .leftOut),
        OptionRule(
            "preconfig",
            argument: .none,
            owner: .nobody("it waits for a monitor to configure it"),
            blank: .leftOut
        ),
    ]

    // MARK: devices of the host

    private static let kvm = Confinement.Rule("/dev/kvm", .device, isOptional: true)

    @Sendable private static func accelerator(_ option: ParsedOption) -> [Confinement.Rule] {
        option.argument.contains("kvm") ? [kvm] : []
    }

    // MARK: checks

    @Sendable private static func checkMachine(_ option: ParsedOption) throws {
        for key in ["kernel", "initrd", "dtb", "dumpdtb", "firmware", "shim"] where option.settings.has(key) {
            throw option.refusal("'\(key)' names a file; give it as an option of its own")
        }
        for leaf in option.settings.leaves
        where leaf.value.contains("/") && !leaf.value.hasPrefix("/objects/") && !leaf.value.hasPrefix("/machine/") {
            throw option.refusal("'\(leaf.key)' is a path of this host")
        }
    }

    /// QEMU splits it at every comma, and knows no way to write one.
    @Sendable private static func checkProcessor(_ option: ParsedOption) throws {
        if option.argument.contains(",,") { throw option.refusal("its values cannot have commas") }
    }

    @Sendable private static func checkAccelerator(_ option: ParsedOption) throws {
        if option.settings.has("device") { throw option.refusal("'device' is a path of this host") }
    }

    @Sendable private static func checkInstructionCount(_ option: ParsedOption) throws {
        if option.settings.has("rrfile") || option.settings.has("rr") || option.settings.has("rrsnapshot") {
            throw option.refusal("it records or replays the guest in a file")
        }
    }

    @Sendable static func checkHugePages(_ option: ParsedOption) throws {
        guard HugePages.root(of: option.argument) != nil else {
            throw option.refusal("only directories of huge pages are the same elsewhere")
        }
    }

    @Sendable static func checkWord(_ option: ParsedOption) throws {
        guard PeerText.isWord(option.argument) else {
            throw option.refusal("it is more than a word of letters and digits")
        }
    }

    // MARK: blank copies

    @Sendable private static func emptyROM(_ copy: inout BlankCopy, _ option: ParsedOption) throws {
        var settings = option.settings
        let path = option.rule.argument == .text ? option.argument : settings["romfile"] ?? ""
        let scratch = try copy.scratch(copy.size(path))
        settings.set("romfile", .string(scratch))
        copy.options.append(GuestOption(option.name, option.rule.argument == .text ? scratch : settings.text))
    }

    @Sendable private static func dropWithFile(_ copy: inout BlankCopy, _ option: ParsedOption) {
        for key in ["file", "path", "splash"] where option.settings.has(key) { return }
        copy.options.append(option.written)
    }
}
