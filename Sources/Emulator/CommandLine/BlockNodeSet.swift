/// The block nodes that a command line defines with `-blockdev`, and how they refer to each other.
///
/// A disk is a chain of `file` children: filters, a format, and a protocol at the bottom. The chain's parts are nested in
/// one definition, or definitions of their own that are referred to by name.
struct BlockNodeSet {
    /// A node: a definition, and where in it the node is: "" or "file.".
    private struct Place: Hashable {
        var definition: Int
        var prefix: String

        func key(_ name: String) -> String { prefix + name }
    }

    private static let filters: Set<String> = [
        "throttle", "copy-on-read", "copy-before-write", "preallocate", "compress", "blkdebug", "blklogwrites",
        "blkreplay", "blkverify", "quorum",
    ]
    private static let localProtocols: Set<String> = ["file", "host_device", "host_cdrom"]

    private var definitions: [BlockOptions]
    private var isDropped: Set<Int> = []
    private let original: [String]

    init(_ options: [GuestOption]) throws {
        original = options.map { $0.argument ?? "" }
        definitions = try original.map { try BlockOptions(parsing: $0, implied: "driver") }
    }

    /// The argument of a definition; nil when it is left out.
    func text(_ index: Int) -> String? { isDropped.contains(index) ? nil : definitions[index].text }

    private func value(_ place: Place, _ name: String) -> String? { definitions[place.definition][place.key(name)] }

    private func definition(named name: String) -> Place? {
        definitions.firstIndex { $0["node-name"] == name }.map { Place(definition: $0, prefix: "") }
    }

    /// The child of a node by its role; nil when it has none, or a definition that is not here.
    private func child(_ place: Place, _ role: String) -> Place? {
        if let name = value(place, role) { return definition(named: name) }
        guard definitions[place.definition].has(place.key(role)) else { return nil }
        return Place(definition: place.definition, prefix: place.key("\(role)."))
    }

    /// The node above, by `file`.
    private func parent(_ place: Place) -> Place? {
        if !place.prefix.isEmpty {
            return Place(definition: place.definition, prefix: String(place.prefix.dropLast("file.".count)))
        }
        guard let name = definitions[place.definition]["node-name"] else { return nil }
        for index in definitions.indices {
            var node = Place(definition: index, prefix: "")
            while true {
                if value(node, "file") == name { return node }
                guard value(node, "file") == nil, definitions[index].has(node.key("file")) else { break }
                node.prefix = node.key("file.")
            }
        }
        return nil
    }

    /// A node and the nodes under it by `file`.
    private func chain(from top: Place) -> [Place] {
        var nodes = [top]
        while let next = child(nodes[nodes.count - 1], "file"), !nodes.contains(next) { nodes.append(next) }
        return nodes
    }

    /// Everything under a `backing` child, whose images are part of the disk above.
    private func backing(of place: Place) -> [Place] {
        var found: [Place] = []
        var next = child(place, "backing")
        while let node = next, !found.contains(node) {
            let nodes = chain(from: node)
            found += nodes
            next = nodes.lazy.compactMap { child($0, "backing") }.first
        }
        return found
    }

    /// Every node of the definitions that is reached by `file` from a definition's outermost one.
    private var nodes: [Place] {
        definitions.indices.flatMap { index in
            chain(from: Place(definition: index, prefix: "")).filter { $0.definition == index }
        }
    }

    mutating func relocate(_ place: (GuestCommandLine.PathReference) throws -> GuestCommandLine.Placement) throws {
        let underneath = Set(nodes.flatMap { backing(of: $0) })
        let known = Set(nodes).union(underneath)
        for index in definitions.indices {
            var keys: Set<String> = []
            for leaf in definitions[index].leaves {
                let here = Place(definition: index, prefix: "")
                if let reason = OptionPolicy.checkLeaf(leaf) { throw refusal(here, reason) }
                guard keys.insert(leaf.key).inserted else { throw refusal(here, "'\(leaf.key)' is given twice") }
            }
            // Nothing may be in a definition that is not looked at below.
            for prefix in definitions[index].prefixes(of: "driver") {
                let node = Place(definition: index, prefix: prefix)
                let driver = value(node, "driver") ?? ""
                guard OptionPolicy.blockDrivers.contains(driver), known.contains(node) else {
                    throw refusal(node, "a disk of the kind '\(driver)' in this place cannot be placed on another host")
                }
            }
        }
        for node in nodes where !underneath.contains(node) {
            let driver = value(node, "driver") ?? ""
            if driver == "nbd",
                definitions[node.definition].has(node.key("path")) || value(node, "server.type") == "unix"
            {
                throw refusal(node, "its disk is behind a socket of this host")
            }
            if driver == "vvfat" || value(node, "server.type") == "fd" {
                throw refusal(node, "its disk belongs to this host")
            }
            guard Self.localProtocols.contains(driver), let path = value(node, "filename") else { continue }
            try relocate(node, path, place)
        }
        for node in underneath where !isDropped.contains(node.definition) {
            guard let path = value(node, "filename") else { continue }
            let placement = try place(.init(kind: .backing, path: path, option: "-blockdev"))
            definitions[node.definition].set(node.key("filename"), .string(placement.path))
        }
    }

    private func refusal(_ node: Place, _ reason: String) -> GuestError {
        GuestError("A guest with -blockdev \(original[node.definition]) cannot be moved: \(reason)")
    }

    private mutating func relocate(
        _ node: Place,
        _ path: String,
        _ place: (GuestCommandLine.PathReference) throws -> GuestCommandLine.Placement
    ) throws {
        var above: [Place] = []
        while let next = parent(above.last ?? node), !above.contains(next) { above.append(next) }
        let isReadOnly = ([node] + above).contains { definitions[$0.definition].isOn($0.key("read-only")) }
        if isReadOnly,
            let top = above.first(where: {
                !backing(of: $0).isEmpty || definitions[$0.definition].has($0.key("backing"))
            })
        {
            throw refusal(top, "a read-only disk with a backing file cannot be placed on another host")
        }
        let placement = try place(.init(kind: isReadOnly ? .file : .disk, path: path, option: "-blockdev"))
        definitions[node.definition].set(node.key("filename"), .string(placement.path))
        if value(node, "driver") == "host_device", !placement.isDevice, placement.path != path {
            definitions[node.definition].set(node.key("driver"), "file")
        } else if placement.isDevice {
            definitions[node.definition].set(node.key("driver"), "host_device")
        }
        guard let format = placement.format else { return }
        var image = above.first { !Self.filters.contains(value($0, "driver") ?? "") }
        if image == nil, format != "raw" || placement.size != nil {
            // The protocol itself was the disk: it gets a format above it, under the name that it had.
            if node.prefix.isEmpty {
                definitions[node.definition].nest(under: "file", except: ["node-name"])
                definitions[node.definition].set("driver", "raw")
                image = node
            } else {
                throw refusal(node, "a filter is right above its file; put a format in between")
            }
        }
        guard let image else { return }
        if placement.isFlattened {
            for under in backing(of: image) where under.prefix.isEmpty { isDropped.insert(under.definition) }
            definitions[image.definition].remove(image.key("backing"))
        }
        // What a slice of the old file was does not hold for the new one.
        for name in ["offset", "size"] { definitions[image.definition].remove(image.key(name)) }
        if value(image, "driver") != format {
            for name in GuestCommandLine.formatOptions { definitions[image.definition].remove(image.key(name)) }
            definitions[image.definition].set(image.key("driver"), .string(format))
        }
        if let size = placement.size { definitions[image.definition].set(image.key("size"), .integer(Int64(size))) }
    }
}
