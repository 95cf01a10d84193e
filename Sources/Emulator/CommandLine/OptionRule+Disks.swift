internal import IO

/// Disks and the files behind them.
extension OptionRule {
    static let disks: [OptionRule] =
        [
            OptionRule(
                "drive",
                argument: .settings(),
                blank: .emptied(emptyDrive),
                check: DriveDefinition.check,
                relocate: DriveDefinition.relocate,
                endpoints: DriveDefinition.endpoints
            ),
            // All definitions are one: see `BlockNodeSet`.
            OptionRule(
                "blockdev",
                argument: .object("driver"),
                blank: .emptied(emptyNode),
                endpoints: DriveDefinition.endpoints
            ),
            OptionRule(
                "cdrom",
                blank: .emptied(emptyDisc),
                relocate: { option in
                    let placement = try option.placement(.file, option.argument)
                    guard let format = placement.format else {
                        return .replaced([GuestOption("cdrom", placement.path)])
                    }
                    var settings = try BlockOptions(parsing: "index=2,media=cdrom")
                    settings.set("file", .string(placement.path))
                    settings.set("format", .string(format))
                    return .replaced([GuestOption("drive", settings.text)])
                },
                endpoints: DriveDefinition.endpoints
            ),
            OptionRule("hdachs", owner: .nobody("it is obsolete"), blank: .leftOut),
            OptionRule(
                "snapshot",
                argument: .none,
                owner: .nobody("its writes go to temporary files"),
                blank: .leftOut
            ),
        ]
        + each(
            "hda hdb hdc hdd fda fdb sd mtdblock pflash",
            argument: .text,
            blank: .emptied { copy, option in
                copy.addDrive(of: copy.size(option.argument), form: driveForms[option.name] ?? "")
            },
            relocate: placeDisk,
            endpoints: DriveDefinition.endpoints
        )
        + each(
            "virtfs fsdev",
            argument: .text,
            owner: .nobody("a shared directory has no counterpart on the other host"),
            blank: .leftOut
        )

    /// What `-drive` makes of the short options, where the format has to be said.
    private static let driveForms: [String: String] = [
        "hda": "index=0,media=disk", "hdb": "index=1,media=disk", "hdc": "index=2,media=disk",
        "hdd": "index=3,media=disk", "fda": "if=floppy,index=0", "fdb": "if=floppy,index=1", "sd": "if=sd,index=0",
        "mtdblock": "if=mtd", "pflash": "if=pflash",
    ]

    @Sendable private static func placeDisk(_ option: inout ParsedOption) throws -> Relocation {
        let placement = try option.placement(.disk, option.argument)
        guard let format = placement.format, let form = driveForms[option.name] else {
            return .replaced([GuestOption(option.name, placement.path)])
        }
        var settings = try BlockOptions(parsing: form)
        settings.set("file", .string(placement.path))
        DriveDefinition.apply(placement, format: format, to: &settings)
        return .replaced([GuestOption("drive", settings.text)])
    }

    // MARK: blank copies

    @Sendable private static func emptyDisc(_ copy: inout BlankCopy, _ option: ParsedOption) {
        copy.addDrive(of: copy.size(option.argument), form: "index=2,media=cdrom")
    }

    @Sendable private static func emptyDrive(_ copy: inout BlankCopy, _ option: ParsedOption) throws {
        let settings = option.settings
        let file = settings["file"] ?? settings["file.filename"]
        let kept = [
            "if", "index", "bus", "unit", "media", "id", "readonly", "read-only", "werror", "rerror", "serial",
            "node-name",
        ].compactMap { key in settings[key].map { "\(key)=\(KeyValue.escape($0))" } }.joined(separator: ",")
        if file == "" || (file == nil && !settings.has("driver") && !settings.has("file")) {
            copy.options.append(GuestOption("drive", kept))
        } else {
            copy.addDrive(of: copy.size(file, settings["id"]), form: kept)
        }
    }

    @Sendable private static func emptyNode(_ copy: inout BlankCopy, _ option: ParsedOption) throws {
        let settings = option.settings
        guard let name = settings["node-name"] else { return }
        let size = copy.size(name, settings["filename"], settings["file.filename"])
        let definition: JSONValue = [
            "driver": "null-co", "node-name": .string(name), "read-zeroes": true,
            "size": .integer(Int64(clamping: size)), "read-only": .bool(settings.isOn("read-only")),
        ]
        copy.options.append(GuestOption("blockdev", definition.text))
    }
}
