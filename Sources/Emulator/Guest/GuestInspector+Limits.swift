internal import IO

/// I/O limits that were set at run time: with `block_set_io_throttle`, or in a throttle group.
extension GuestInspector {
    /// One limit: as `query-block` has it and `-drive` in its old form, and as `-drive` has it.
    private struct Limit {
        let state: String
        let option: String
        /// What it is when nobody has set it.
        var initial: Int64 = 0

        init(_ kind: String, _ direction: String, _ suffix: String) {
            let words = ["": "total", "_rd": "read", "_wr": "write"]
            let (long, number) = (suffix.replacing("_", with: "-"), suffix == "_max_length" ? 1 : 0)
            state = kind + direction + suffix
            option = "\(kind)-\(words[direction] ?? "")\(long)"
            initial = Int64(number)
        }

        private init(state: String, option: String) { (self.state, self.option) = (state, option) }

        static let all: [Limit] =
            ["bps", "iops"].flatMap { kind in
                ["", "_rd", "_wr"].flatMap { direction in
                    ["", "_max", "_max_length"].map { Limit(kind, direction, $0) }
                }
            } + [Limit(state: "iops_size", option: "iops-size")]
    }

    /// Writes the limits as they are now into the options.
    mutating func followLimits(_ graph: BlockGraph) async throws {
        try await followDriveLimits(graph)
        try await followGroupLimits()
    }

    private mutating func followDriveLimits(_ graph: BlockGraph) async throws {
        for drive in try await monitor.execute("query-block").array {
            guard let medium = drive["inserted"] else { continue }
            func now(_ limit: Limit) -> Int64 { medium[limit.state]?.integer ?? limit.initial }
            let set = Limit.all.filter { now($0) != $0.initial }
            let name = drive["device"]?.string ?? ""
            guard let index = try driveOption(of: name, graph) else {
                if !set.isEmpty {
                    block(
                        "The I/O limits of the disk '\(drive["qdev"]?.string ?? name)' were set at run time, and a command line has no words "
                            + "for them; put a throttle filter in, or take them off with block_set_io_throttle"
                    )
                }
                continue
            }
            var settings = try BlockOptions(parsing: options[index].argument ?? "")
            func given(_ limit: Limit) -> Int64 {
                (settings["throttling.\(limit.option)"] ?? settings[limit.state]).flatMap { Int64($0) } ?? limit.initial
            }
            let group = medium["group"]?.string
            let givenGroup = settings["throttling.group"] ?? settings["group"]
            let isSameGroup = set.isEmpty || group == nil || group == givenGroup ?? name
            if isSameGroup, Limit.all.allSatisfy({ given($0) == now($0) }) { continue }
            for limit in Limit.all {
                settings.remove("throttling.\(limit.option)")
                settings.remove(limit.state)
            }
            for key in ["throttling.group", "group"] { settings.remove(key) }
            for limit in set { settings.set("throttling.\(limit.option)", .string("\(now(limit))")) }
            if let group, group != name, !set.isEmpty { settings.set("throttling.group", .string(group)) }
            note(
                "-drive \(options[index].argument ?? ""): its I/O limits are \(Self.words(set.map { ($0.option, now($0)) }))"
            )
            options[index].argument = settings.text
        }
    }

    /// The `-drive` of a drive: the one of its name, or the one of its file, which then has no name.
    private func driveOption(of name: String, _ graph: BlockGraph) throws -> Int? {
        let disk = graph.drives.first { $0.name == name }?.node.flatMap { graph.disk(of: $0) }
        let path = disk.map { $0.isLocal ? resolve($0.path) : $0.path }
        guard !name.isEmpty else { return nil }
        return try options.indices.first { index in
            guard options[index].name == "drive" else { return false }
            let settings = try BlockOptions(parsing: options[index].argument ?? "")
            if let id = settings["id"] { return id == name }
            guard let path, let file = settings["file"] else { return false }
            return path == (DriveDefinition.isNetwork(file) ? file : resolve(file))
        }
    }

    private mutating func followGroupLimits() async throws {
        for index in options.indices where options[index].name == "object" {
            var settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "qom-type")
            guard settings["qom-type"] == "throttle-group", let id = settings["id"] else { continue }
            let limits = try await monitor.execute(
                "qom-get",
                ["path": .string("/objects/\(id)"), "property": "limits"]
            )
            func now(_ limit: Limit) -> Int64 { limits[limit.option]?.integer ?? limit.initial }
            func given(_ limit: Limit) -> Int64 {
                (settings["x-\(limit.option)"] ?? settings["limits.\(limit.option)"]).flatMap { Int64($0) }
                    ?? limit.initial
            }
            if Limit.all.allSatisfy({ given($0) == now($0) }) { continue }
            for limit in Limit.all {
                settings.remove("x-\(limit.option)")
                settings.remove("limits.\(limit.option)")
            }
            let set = Limit.all.filter { now($0) != $0.initial }
            for limit in set { settings.set("x-\(limit.option)", .string("\(now(limit))")) }
            note(
                "-object \(options[index].argument ?? ""): its limits are \(Self.words(set.map { ($0.option, now($0)) }))"
            )
            options[index].argument = settings.text
        }
    }

    private static func words(_ limits: [(String, Int64)]) -> String {
        limits.isEmpty ? "none" : limits.map { "\($0.0)=\($0.1)" }.joined(separator: ", ")
    }
}
