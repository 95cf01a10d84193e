internal import IO

/// The names that what a guest's QEMU makes (sockets, logs) has in the guest's own directory, on each host the same.
public struct OutputNames {
    private var names: Set<String> = []

    /// Makes names for one guest; they have to be asked for in the order of its command line.
    public init() {}

    /// The name for a path: its last part, and another one when an earlier path has that already. Nil for what is nowhere.
    public mutating func name(of path: String) -> String? {
        if path == "/dev/null" { return nil }
        var name = path.split(separator: "/").last.map(String.init) ?? ""
        if name.isEmpty || name == "." || name == ".." || name.utf8.count > 200 { name = "unnamed" }
        while !names.insert(name).inserted {
            name = name.utf8.count < 200 ? "x-\(name)" : "x-\(names.count)"
        }
        return name
    }
}
