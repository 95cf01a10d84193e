internal import Destination
internal import Emulator
internal import IO
internal import Migration

/// What another host offers, up to the command line of the blank copy: whatever the offer is, what comes of it stays within the
/// guest's own directories.
enum OfferFuzz {
    private static let images = "/xd-images"
    private static let run = "/xd-run"

    /// An offer as JSON, or a line for each word of the command line; lines that begin with `@` are the rest of the offer.
    static func offer(_ text: String) {
        guard
            let offer = text.hasPrefix("{") ? JSONText.decode(Message.Offer.self, from: Array(text.utf8)) : lines(text)
        else { return }
        let guest = OfferedGuest(offer, images: images, run: run, allowed: AllowedDirectories())
        guard (try? guest.judge()) != nil, let (relocation, material) = try? guest.rehearsal(for: nil) else { return }
        check(relocation.arguments)
        let line = GuestCommandLine(arguments: relocation.arguments, directory: "/")
        _ = try? line.bridges()
        if let demands = try? GuestDemands(line, offer) {
            _ = GuestPolicy().problems(of: demands, filterObstacle: "there is no filter")
            _ = GuestLimits().problems(of: demands.usage, besides: [demands.usage, demands.usage])
        }
        // What was rewritten means the same to whoever starts it again.
        guard let again = try? line.relocated(isAtHome: true, { .init(path: $0.path) }) else {
            preconditionFailure("a command line of this host cannot be read: \(relocation.arguments)")
        }
        precondition(again.arguments == line.arguments, "a command line of this host changes: \(again.changes)")
        guard let blank = try? line.shadow(material, memory: "/xd-memory", scratch: { "/xd-scratch/\($0)" }) else {
            preconditionFailure("a guest has no blank copy: \(relocation.arguments)")
        }
        checkBlank(blank.arguments)
    }

    private static func lines(_ text: String) -> Message.Offer? {
        var words = ["qemu-system-x86_64"]
        var disks: [Message.Offer.Disk] = []
        var files: [Message.Offer.File] = []
        var memory: String?
        for line in text.split(separator: "\n", omittingEmptySubsequences: false) {
            let fields = line.split(separator: " ", maxSplits: 2).map(String.init)
            switch (fields.first, fields.count) {
            case ("@disk", 3):
                disks.append(
                    .init(name: "disk\(disks.count)", size: 1 << 20, allocated: 0, path: fields[2], format: fields[1])
                )
            case ("@file", 2...):
                let digest = String(repeating: "0", count: 64)
                files.append(.init(path: fields.dropFirst().joined(separator: " "), size: 1, digest: digest))
            case ("@memory", 2...): memory = fields.dropFirst().joined(separator: " ")
            default: words.append(String(line))
            }
        }
        var offer = Message.Offer(
            guest: "web1",
            commandLine: GuestCommandLine(arguments: words, directory: "/"),
            machine: "pc-i440fx-7.2",
            emulatorVersion: "7.2",
            disks: disks,
            files: files,
            hasUUID: false
        )
        offer.memory = 1 << 20
        offer.memoryID = memory
        return offer
    }

    // MARK: what may never come of it

    /// The values of an option's keys, as QEMU splits them.
    private static func pairs(_ argument: String) -> [(key: Substring, value: Substring)] {
        if argument.hasPrefix("{") {
            guard let value = try? JSONValue(parsing: Array(argument.utf8)) else { return [] }
            return leaves(value, "")
        }
        return KeyValue.split(argument).map { part in
            let text = part[...]
            let equals = text.firstIndex(of: "=") ?? text.endIndex
            return (text[..<equals], equals == text.endIndex ? "" : text[text.index(after: equals)...])
        }
    }

    private static func leaves(_ value: JSONValue, _ key: Substring) -> [(key: Substring, value: Substring)] {
        value.object.flatMap { leaves($0.value, $0.key[...]) } + value.array.flatMap { leaves($0, key) }
            + (value.string.map { [(key, $0[...])] } ?? [])
    }

    private static func isOwn(_ path: Substring) -> Bool {
        let isWithin = ["\(images)/web1/", "\(run)/", "/xd-"].contains(where: path.hasPrefix)
        return isWithin && !path.split(separator: "/").contains("..") || path == "/dev/null"
    }

    private static let placed: Set<Substring> = ["filename", "path", "logfile", "mem-path", "splash", "dir"]

    private static let flags = Set(OptionRule.all.filter { $0.argument == .none }.flatMap(\.names).map { "-\($0)" })

    private static func options(_ arguments: [String]) -> [(name: String, argument: String)] {
        var found: [(name: String, argument: String)] = []
        var words = arguments.dropFirst()[...]
        while let name = words.popFirst() {
            found.append((name, flags.contains(name) ? "" : words.popFirst() ?? ""))
        }
        return found
    }

    private static func check(_ arguments: [String]) {
        for (name, argument) in options(arguments) {
            precondition(argument.unicodeScalars.allSatisfy { $0.value >= 32 }, "a control character")
            switch name {
            case "-drive", "-blockdev", "-chardev", "-object":
                for (key, value) in pairs(argument) where placed.contains(key.split(separator: ".").last ?? "") {
                    let isShared = ["/dev/hugepages", "/run/hugepages", "/mnt/huge", "/hugepages"].contains(
                        where: value.hasPrefix
                    )
                    let isRandom = ["/dev/random", "/dev/urandom", "/dev/hwrng"].contains(value)
                    let isRemote = argument.contains("ssh") || argument.contains("nfs") || argument.contains("gluster")
                    let isListed = AllowedDirectories().contain(String(value))
                    precondition(
                        isOwn(value) || isListed || isShared || isRandom || isRemote && !value.hasPrefix("/xd"),
                        "\(name) \(argument) opens \(value)"
                    )
                }
            case "-netdev":
                precondition(
                    !pairs(argument).contains {
                        ["helper", "script", "smb", "tftp", "guestfwd"].contains($0.key) && $0.value != "no"
                    },
                    "-netdev \(argument) runs a program"
                )
            case "-monitor", "-qmp", "-gdb":
                precondition(
                    argument == "none" || argument == "null" || argument.hasPrefix("chardev:")
                        || argument.hasPrefix("unix:\(run)/"),
                    "\(name) \(argument) is open to others"
                )
            default: break
            }
        }
    }

    private static func checkBlank(_ arguments: [String]) {
        for (name, argument) in options(arguments) {
            switch name {
            case "-chardev":
                precondition(argument.hasPrefix("null,id=") && pairs(argument).count <= 3, "-chardev \(argument)")
            case "-netdev":
                precondition(
                    argument.hasPrefix("user,restrict=on,id=") || argument.hasPrefix("hubport,id="),
                    "-netdev \(argument)"
                )
                precondition(pairs(argument).count == 3, "-netdev \(argument)")
            case "-blockdev": precondition(argument.contains("\"driver\":\"null-co\""), "-blockdev \(argument)")
            case "-drive":
                precondition(
                    !pairs(argument).contains { $0.key == "file" || $0.key.hasPrefix("file.") },
                    "-drive \(argument)"
                )
            case "-sandbox", "-monitor", "-qmp", "-mon", "-gdb", "-vnc", "-kernel", "-runas", "-mem-path":
                preconditionFailure("\(name) in a blank copy")
            default: break
            }
        }
    }
}
