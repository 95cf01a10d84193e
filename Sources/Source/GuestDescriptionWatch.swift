internal import Emulator
internal import Migration

/// What the guest was offered as, in QEMU's own words, to find what was changed since: a disc, a device, a limit.
///
/// The other host makes the guest that was described to it. Whatever is changed here afterwards would be undone there without a
/// word, so it ends the migration instead.
struct GuestDescriptionWatch {
    /// How much is asked.
    enum Extent {
        /// Drives, media and their limits: all that can be changed while QEMU migrates.
        case drives
        /// Devices, memory, processors and objects as well.
        case everything
    }

    private let monitor: QMPClient
    private let drives: [String: String]
    private let others: [String: String]

    /// Notes how the guest is.
    init(_ monitor: QMPClient) async throws {
        self.monitor = monitor
        drives = try await Self.drives(monitor)
        others = try await Self.others(monitor)
    }

    /// What is different from then; a sentence each.
    func differences(_ extent: Extent) async throws -> [String] {
        var found = Self.differences(drives, try await Self.drives(monitor))
        if extent == .everything { found += Self.differences(others, try await Self.others(monitor)) }
        return found
    }

    private static func differences(_ before: [String: String], _ now: [String: String]) -> [String] {
        Set(before.keys).union(now.keys).sorted().compactMap { key in
            switch (before[key], now[key]) {
            case (let old?, let new?): old == new ? nil : "\(key) was \(old) and is \(new)"
            case (nil, let new?): "\(key) (\(new)) is new"
            case (let old?, nil): "\(key) (\(old)) is gone"
            case (nil, nil): nil
            }
        }
    }

    /// The members of a drive's description that somebody has set. What the mirror and the guest's own work change is none.
    private static let settings = [
        "ro", "encrypted", "detect_zeroes", "bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "bps_max",
        "bps_rd_max",
        "bps_wr_max", "iops_max", "iops_rd_max", "iops_wr_max", "iops_size", "group",
    ]

    private static func drives(_ monitor: QMPClient) async throws -> [String: String] {
        var found: [String: String] = [:]
        for drive in try await monitor.execute("query-block").array {
            let names = [drive["qdev"]?.string, drive["device"]?.string].compactMap { $0 }.filter { !$0.isEmpty }
            guard let name = names.first else { continue }
            if let isOpen = drive["tray_open"]?.bool {
                found["the tray of drive '\(name)'"] = isOpen ? "open" : "closed"
            }
            guard let medium = drive["inserted"] else {
                found["the medium of drive '\(name)'"] = "none"
                continue
            }
            found["the medium of drive '\(name)'"] =
                medium["image"]?["filename"]?.string ?? medium["file"]?.string ?? "?"
            if let size = medium["image"]?["virtual-size"]?.integer { found["the size of drive '\(name)'"] = "\(size)" }
            for setting in settings {
                guard let value = medium[setting] else { continue }
                found["\(setting) of drive '\(name)'"] = value.text
            }
        }
        for group in try await members(monitor, "/objects") where group.type == "throttle-group" {
            let limits = try await monitor.execute(
                "qom-get",
                ["path": .string("/objects/\(group.name)"), "property": "limits"]
            )
            found["the limits of throttle group '\(group.name)'"] = limits.text
        }
        return found
    }

    private static func members(
        _ monitor: QMPClient,
        _ path: String
    ) async throws -> [(name: String, type: String)] {
        try await monitor.execute("qom-list", ["path": .string(path)]).array.compactMap { member in
            guard let name = member["name"]?.string, let type = member["type"]?.string, type.hasPrefix("child<") else {
                return nil
            }
            return (name, String(type.dropFirst("child<".count).dropLast()))
        }
    }

    private static func others(_ monitor: QMPClient) async throws -> [String: String] {
        var found: [String: String] = [:]
        for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
            for device in try await members(monitor, path) {
                // A device without a name is told by its type; its number says nothing.
                found["device '\(path.hasSuffix("anon") ? "of number " : "")\(device.name)'"] = device.type
            }
        }
        // What readers of `crossdock export` and the migration itself need comes and goes.
        for object in try await members(monitor, "/objects") where !object.name.hasPrefix("xd") {
            found["object '\(object.name)'"] = object.type
        }
        for device in try await monitor.execute("query-memory-devices").array {
            let data = device["data"]
            let name = data?["id"]?.string ?? data?["memdev"]?.string ?? "?"
            found["memory '\(name)'"] = (data?["size"] ?? .null).text
        }
        found["the number of processors"] = "\(try await monitor.execute("query-cpus-fast").array.count)"
        return found
    }
}
