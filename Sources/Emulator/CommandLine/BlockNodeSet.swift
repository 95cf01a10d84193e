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

    /// A command line of another host has so many definitions at most, and so many nodes in one disk.
    private static let most = 1024
    private static let longest = 64

    private var definitions: [BlockOptions]
    private var isDropped: Set<Int> = []
    private let original: [String]
    private let isAtHome: Bool
    /// The definitions by the names of their outermost nodes.
    private let named: [String: Int]
    /// The node above each, by `file`.
    private var parents: [Place: Place] = [:]

    init(_ options: [GuestOption], isAtHome: Bool) throws {
        original = options.map { $0.argument ?? "" }
        self.isAtHome = isAtHome
        definitions = try options.map {
            try ParsedOption($0, isAtHome: isAtHome) { .init(path: $0.path) }.settings
        }
        var named: [String: Int] = [:]
        for (index, definition) in definitions.enumerated() {
            guard let name = definition["node-name"] else { continue }
            if named[name] == nil {
                named[name] = index
            } else if !isAtHome {
                throw GuestError("A guest with two -blockdev of the name '\(name)' cannot be moved")
            }
        }
        self.named = named
        guard isAtHome || definitions.count <= Self.most else {
            throw GuestError("A guest with \(definitions.count) -blockdev cannot be moved: the most are \(Self.most)")
        }
        try findParents()
    }

    private mutating func findParents() throws {
        for index in definitions.indices {
            var node = Place(definition: index, prefix: "")
            while definitions[index].has(node.key("file")) {
                let next: Place
                if let name = value(node, "file") {
                    guard let found = definition(named: name) else {
                        if isAtHome { break }
                        throw refusal(node, "no -blockdev has the name '\(name)'")
                    }
                    next = found
                } else {
                    next = Place(definition: index, prefix: node.key("file."))
                }
                if parents[next] == nil {
                    parents[next] = node
                } else if !isAtHome {
                    throw refusal(node, "what is under it is under another one too")
                }
                if next.definition != index { break }
                node = next
            }
        }
    }

    /// The argument of a definition; nil when it is left out.
    func text(_ index: Int) -> String? { isDropped.contains(index) ? nil : definitions[index].text }

    /// The names of nodes that are parts of other ones.
    var inner: Set<String> { Set(parents.keys.compactMap { value($0, "node-name") }) }

    private func value(_ place: Place, _ name: String) -> String? { definitions[place.definition][place.key(name)] }

    private func definition(named name: String) -> Place? { named[name].map { Place(definition: $0, prefix: "") } }

    /// The child of a node by its role; nil when it has none, or a definition that is not here.
    private func child(_ place: Place, _ role: String) -> Place? {
        if let name = value(place, role) { return definition(named: name) }
        guard definitions[place.definition].has(place.key(role)) else { return nil }
        return Place(definition: place.definition, prefix: place.key("\(role)."))
    }

    /// The nodes above, by `file`, the nearest first.
    private func above(_ node: Place) -> [Place] {
        var found: [Place] = []
        var seen: Set<Place> = [node]
        while let next = parents[found.last ?? node], seen.insert(next).inserted { found.append(next) }
        return found
    }

    /// A node and the nodes under it by `file`.
    private func chain(from top: Place) throws -> [Place] {
        var nodes = [top]
        var seen: Set<Place> = [top]
        while let next = child(nodes[nodes.count - 1], "file"), seen.insert(next).inserted { nodes.append(next) }
        guard isAtHome || nodes.count <= Self.longest else {
            throw refusal(top, "it has more than \(Self.longest) nodes on top of each other")
        }
        return nodes
    }

    /// Everything under a `backing` child, whose images are part of the disk above.
    private func backing(of place: Place) throws -> [Place] {
        var found: [Place] = []
        var seen: Set<Place> = []
        var next = child(place, "backing")
        while let node = next, seen.insert(node).inserted {
            let nodes = try chain(from: node)
            found += nodes
            seen.formUnion(nodes)
            guard isAtHome || found.count <= Self.longest else {
                throw refusal(place, "it has more than \(Self.longest) nodes under it")
            }
            next = nodes.lazy.compactMap { child($0, "backing") }.first
        }
        return found
    }

    /// Every node of the definitions that is reached by `file` from a definition's outermost one.
    private func nodes() throws -> [Place] {
        var found: [Place] = []
        for index in definitions.indices {
            var node = Place(definition: index, prefix: "")
            found.append(node)
            while value(node, "file") == nil, definitions[index].has(node.key("file")) {
                node.prefix = node.key("file.")
                found.append(node)
            }
        }
        return found
    }

    mutating func relocate(_ place: ParsedOption.Place) throws {
        let nodes = try nodes()
        var underneath: Set<Place> = []
        for node in nodes where definitions[node.definition].has(node.key("backing")) {
            underneath.formUnion(try backing(of: node))
        }
        try checkDefinitions(known: Set(nodes).union(underneath))
        for node in nodes where !underneath.contains(node) {
            let driver = value(node, "driver") ?? ""
            if !isAtHome {
                guard !driver.isEmpty else { throw refusal(node, "it has no driver") }
                try checkFormats(above: node, driver)
            }
            guard ImageFormat.localProtocols.contains(driver), let path = value(node, "filename") else { continue }
            try relocate(node, path, place)
        }
        for node in underneath where !isDropped.contains(node.definition) {
            // What was written into a flattened disk's own definition is gone with it.
            guard value(node, "driver") != nil else { continue }
            // An image that is under another one is never written, whoever is attached to it.
            if !isAtHome { close(node) }
            guard let path = value(node, "filename") else { continue }
            let placement = try place(.init(kind: .backing, path: path, option: "-blockdev"))
            definitions[node.definition].set(node.key("filename"), .string(placement.path))
        }
    }

    /// Nothing may be in a definition that is not looked at.
    private func checkDefinitions(known: Set<Place>) throws {
        for index in definitions.indices {
            let here = Place(definition: index, prefix: "")
            var keys: Set<String> = []
            for leaf in definitions[index].leaves {
                if let reason = DriveDefinition.reason(against: leaf) { throw refusal(here, reason) }
                guard keys.insert(leaf.key).inserted else { throw refusal(here, "'\(leaf.key)' is given twice") }
                let name = leaf.key.split(separator: ".").last ?? ""
                if !isAtHome, name == "data-file" { throw refusal(here, "its data is in a file of its own") }
                if !isAtHome, name == "node-name", !PeerText.isIdentifier(leaf.value) {
                    throw refusal(here, "'\(leaf.value)' is no name of a node")
                }
            }
            if !isAtHome { try checkFileNames(index, known: known) }
            for prefix in definitions[index].prefixes(of: "driver") {
                let node = Place(definition: index, prefix: prefix)
                let driver = value(node, "driver") ?? ""
                guard ImageFormat.isKnown(driver: driver), known.contains(node) else {
                    throw refusal(
                        node,
                        "a disk of the kind '\(driver)' in this place cannot be placed on another host"
                    )
                }
                let isSocket = definitions[index].has(node.key("path")) || value(node, "server.type") == "unix"
                if driver == "nbd", isSocket { throw refusal(node, "its disk is behind a socket of this host") }
                if value(node, "server.type") == "fd" { throw refusal(node, "its disk belongs to this host") }
            }
        }
    }

    /// A file has a name where it is placed, and nowhere else.
    private func checkFileNames(_ index: Int, known: Set<Place>) throws {
        for leaf in definitions[index].leaves where leaf.key == "filename" || leaf.key.hasSuffix(".filename") {
            let node = Place(definition: index, prefix: String(leaf.key.dropLast("filename".count)))
            guard known.contains(node), let driver = value(node, "driver"), value(node, "filename") != nil,
                ImageFormat.localProtocols.contains(driver)
            else { throw refusal(node, "'\(leaf.key)' is the name of no file that is placed") }
        }
        for leaf in definitions[index].leaves where leaf.key == "path" || leaf.key.hasSuffix(".path") {
            let node = Place(definition: index, prefix: String(leaf.key.dropLast("path".count)))
            // On other hosts, a path is that of the other host.
            guard known.contains(node), ["ssh", "nfs", "gluster"].contains(value(node, "driver")) else {
                throw refusal(node, "'\(leaf.key)' is a path of this host")
            }
        }
    }

    /// What reads the contents of a protocol: one format at most, and one that cannot make a file of this host of them.
    private func checkFormats(above node: Place, _ driver: String) throws {
        let isLocal = ImageFormat.localProtocols.contains(driver)
        guard isLocal || ImageFormat.networkProtocols.contains(driver) else { return }
        let above = above(node)
        guard above.count < Self.longest else {
            throw refusal(node, "it has more than \(Self.longest) nodes on top of each other")
        }
        let formats = above.filter { ImageFormat(rawValue: value($0, "driver") ?? "") != nil }
        guard formats.count <= 1 else { throw refusal(node, "it has a format within a format") }
        guard !isLocal, let format = formats.first.flatMap({ value($0, "driver") }) else { return }
        guard ImageFormat(rawValue: format)?.isReadFromNetwork == true else {
            throw refusal(node, "a disk on the network in the format '\(format)' may name files of this host")
        }
    }

    private func refusal(_ node: Place, _ reason: String) -> GuestError {
        GuestError("A guest with -blockdev \(original[node.definition]) cannot be moved: \(reason)")
    }

    /// Has a node opened for reading only.
    private mutating func close(_ node: Place) {
        definitions[node.definition].set(node.key("read-only"), .bool(true))
        definitions[node.definition].remove(node.key("auto-read-only"))
    }

    private func isReadOnly(_ node: Place) -> Bool { definitions[node.definition].isOn(node.key("read-only")) }

    private mutating func relocate(_ node: Place, _ path: String, _ place: ParsedOption.Place) throws {
        let above = above(node)
        let isReadOnly = isReadOnly(node) || above.contains(where: isReadOnly)
        if isReadOnly,
            let top = try above.first(where: {
                try !backing(of: $0).isEmpty || definitions[$0.definition].has($0.key("backing"))
            })
        {
            throw refusal(top, "a read-only disk with a backing file cannot be placed on another host")
        }
        var image = above.first { !ImageFormat.filters.contains(value($0, "driver") ?? "") }
        let declared = image.flatMap { value($0, "driver") } ?? "raw"
        if isReadOnly, !isAtHome { try closeFile(node, image, declared) }
        let placement = try place(
            .init(kind: isReadOnly ? .file : .disk, path: path, option: "-blockdev", format: declared)
        )
        definitions[node.definition].set(node.key("filename"), .string(placement.path))
        if ["host_device", "host_cdrom"].contains(value(node, "driver")), !placement.isDevice, placement.path != path {
            definitions[node.definition].set(node.key("driver"), "file")
        } else if placement.isDevice {
            definitions[node.definition].set(node.key("driver"), "host_device")
        }
        // What is only read stays what it is.
        guard !isReadOnly, let format = placement.format else { return }
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
        if let image { try make(image, format, placement) }
    }

    /// A file that is only read: nobody writes it through any of its nodes, and its format refers to no other file.
    private mutating func closeFile(_ node: Place, _ image: Place?, _ format: String) throws {
        guard ImageFormat(rawValue: format)?.isCarriedReadOnly == true else {
            throw refusal(node, "a file of the format '\(format)' may name other files of this host")
        }
        for part in [node] + above(node)
        where definitions[part.definition].has(part.key("offset")) || definitions[part.definition].has(part.key("size"))
        {
            throw refusal(part, "it is a slice of a file")
        }
        for part in [node] + above(node) { close(part) }
    }

    private mutating func make(_ image: Place, _ format: String, _ placement: GuestCommandLine.Placement) throws {
        if placement.isFlattened {
            for under in try backing(of: image) where under.prefix.isEmpty { isDropped.insert(under.definition) }
            definitions[image.definition].remove(image.key("backing"))
        }
        // What a slice of the old file was does not hold for the new one.
        for name in ["offset", "size"] { definitions[image.definition].remove(image.key(name)) }
        if value(image, "driver") != format {
            for name in DriveDefinition.formatOptions { definitions[image.definition].remove(image.key(name)) }
            definitions[image.definition].set(image.key("driver"), .string(format))
        }
        if let size = placement.size {
            definitions[image.definition].set(image.key("size"), .integer(Int64(clamping: size)))
        }
    }
}
