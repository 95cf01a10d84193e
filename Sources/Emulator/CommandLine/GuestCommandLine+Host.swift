internal import IO

extension GuestCommandLine {
    /// The directories of huge pages that the guest's memory is in.
    public func hugePages() throws -> [String] {
        try options().compactMap { option in
            if option.name == "mem-path" { return option.argument }
            guard option.name == "object" else { return nil }
            return try ParsedOption(ofOriginal: option).settings["mem-path"]
        }
    }

    /// The bridges that the guest's networks are part of.
    public func bridges() throws -> [String] {
        try options().compactMap { option in
            guard ["netdev", "nic", "net"].contains(option.name) else { return nil }
            let settings = try BlockOptions(parsing: option.argument ?? "", implied: "type")
            guard settings["type"] == "bridge" || settings["type"] == "tap" && settings.has("br") else { return nil }
            return settings["br"] ?? "br0"
        }
    }

    /// The tap interfaces that the guest's networks use; nil for one without a name, which QEMU would make.
    public func taps() throws -> [String?] {
        try options().compactMap { option -> String?? in
            guard ["netdev", "nic", "net"].contains(option.name) else { return nil }
            let settings = try BlockOptions(parsing: option.argument ?? "", implied: "type")
            guard settings["type"] == "tap", !settings.has("br"), !settings.has("fd"), !settings.has("fds") else {
                return nil
            }
            return .some(settings["ifname"])
        }
    }
}
