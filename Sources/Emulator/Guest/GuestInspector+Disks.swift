internal import CLinux
internal import Glibc
internal import IO
internal import TLS

extension GuestInspector {
    // MARK: secrets

    /// The values of secrets travel by themselves, and their ids stay in the command line.
    mutating func takeSecrets() async throws {
        let store = ObjectStore()
        // A guest that came here has its secrets sealed with a key that only its process holds.
        let keyPath = "/objects/\(MasterKey.id)"
        if options.contains(where: { $0.argument?.contains("keyid=\(MasterKey.id)") == true }),
            let file = try await monitor.property("file", of: keyPath)?.string,
            let number = file.split(separator: "/").last,
            let pid = emulator?.process.pid
        {
            try? store.add(
                ObjectDescription(parsing: "secret,id=\(MasterKey.id),format=raw,file=/proc/\(pid)/fd/\(number)")
            )
        }
        // A secret may be encrypted with another one.
        for index in options.indices where options[index].name == "object" {
            var settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "qom-type")
            guard settings["qom-type"] == "secret", let id = settings["id"] else { continue }
            if let file = settings["file"] { settings.set("file", .string(resolve(file))) }
            do {
                // The damage of a secret in clear is done; what is left is to carry it on in a better way.
                if let clear = settings["data"], !settings.has("keyid") {
                    let descriptor = xd_memory_file("crossdock-secret")
                    guard descriptor >= 0 else { throw FileError.system("make a file in memory", errno) }
                    try DurableFile.append(Array(clear.utf8), to: descriptor, path: "a file in memory")
                    lseek(descriptor, 0, SEEK_SET)
                    settings.remove("data")
                    settings.set("fd", .string("\(descriptor)"))
                }
                try store.add(ObjectDescription(parsing: settings.text))
                result.secrets[id] = try store.secret(id).bytes
            } catch {
                block("The secret '\(id)' of the guest cannot be read here: \(error)")
            }
            options[index].argument = "secret,id=\(id)"
            note("-object secret,id=\(id): its value travels encrypted, outside of the command line")
        }
    }

    // MARK: disks

    mutating func matchDisks(_ graph: BlockGraph) throws {
        var claimed: Set<String> = []
        let references = try result.commandLine.paths()
        for reference in references {
            let path = resolve(reference.path)
            result.resolved[reference.path] = path
            if reference.kind == .file || reference.kind == .disk {
                var status = stat()
                if stat(path, &status) == 0 { result.sizes[reference.path] = UInt64(status.st_size) }
            }
            guard reference.kind == .disk else { continue }
            guard let disk = result.disks.first(where: { $0.isLocal && $0.path == path }) else {
                if let above = result.disks.first(where: { $0.backing.contains { $0.path == path } }) {
                    throw GuestError(
                        "The disk \(reference.path) of \(reference.option) is under \(above.path) since an external snapshot, and the command "
                            + "line does not say so; commit the snapshot ('block-commit' with the device '\(above.name)'), or start the guest "
                            + "anew with \(above.path) as its disk"
                    )
                }
                throw GuestError(
                    "The disk \(reference.path) of \(reference.option) is not attached to the running guest"
                )
            }
            claimed.insert(disk.node)
            if disk.isEncrypted { result.keySecret[reference.path] = keySecret(reference.path) }
            result.diskOfPath[reference.path] = disk
            result.sizes[reference.path] = disk.size
        }
        let files = Set(references.filter { $0.kind == .file }.map { resolve($0.path) })
        for disk in result.disks
        where disk.isLocal && disk.isReadOnly && !claimed.contains(disk.node) && !files.contains(disk.path) {
            throw GuestError(
                "The disc \(disk.path) (\(disk.name)) was put in at run time and cannot be described; eject it first"
            )
        }
        for disk in result.disks where disk.isLocal && !disk.isReadOnly && !claimed.contains(disk.node) {
            throw GuestError("The disk \(disk.path) (\(disk.name)) is not in the guest's command line; detach it first")
        }
    }

    /// The secret that the definition of a disk names.
    func keySecret(_ path: String) -> String? {
        for option in options where option.name == "drive" || option.name == "blockdev" {
            guard let settings = try? BlockOptions(parsing: option.argument ?? "", implied: "driver") else { continue }
            let isMeant =
                ["file", "file.filename", "filename"].contains { settings[$0] == path }
                || settings["file"].map { child in
                    options.contains {
                        $0.name == "blockdev" && $0.value("node-name") == child && $0.value("filename") == path
                    }
                } ?? false
            guard isMeant else { continue }
            if let id = settings["encrypt.key-secret"] ?? settings["key-secret"] { return id }
        }
        return nil
    }

    mutating func checkBlockState(_ graph: BlockGraph) async throws {
        for disk in result.disks where !disk.isLocal && !disk.isNetwork && !disk.isNull {
            block("The disk \(disk.name) is of the kind '\(disk.protocolDriver)', which depends on this host")
        }
        for disk in result.disks where disk.isLocal && disk.isStacked {
            block(
                "The disk \(disk.name) has a format within a format (\(disk.format) on top), which cannot be described"
            )
        }
        for option in options where option.name == "drive" || option.name == "blockdev" {
            guard let settings = try? BlockOptions(parsing: option.argument ?? "", implied: "driver"),
                settings.leaves.contains(where: { $0.key == "offset" || $0.key.hasSuffix(".offset") })
            else { continue }
            block(
                "The disk of -\(option.name) \(option.argument ?? "") is a slice of a file, which cannot be described"
            )
        }
        for disk in result.disks where !disk.isReadOnly {
            if !disk.snapshots.isEmpty {
                block(
                    "The disk \(disk.name) has internal snapshots (\(disk.snapshots.joined(separator: ", "))), which would stay "
                        + "behind; delete them first"
                )
            }
        }
        for export in try await monitor.blockExports() {
            block(
                "The node \(export.node) is exported as '\(export.id)', and who uses that would be left behind; end the export first"
            )
        }
        for job in try await monitor.execute("query-jobs").array where job["type"]?.string != nil {
            let id = job["id"]?.string ?? ""
            if !id.hasPrefix("xd-") {
                block("A block job is under way: '\(id)' (\(job["type"]?.string ?? "")); wait for it or cancel it")
            }
        }
    }
}
