internal import Glibc
internal import IO

/// Where people and programs find a guest's sockets and logs on each host: `guests/NAME/run/FILE` of its state directory.
///
/// A guest that came from another host has them there. Of one that was described on this host, links lead to where it has them.
extension GuestStore {
    /// Makes the links of a guest that was started or adopted here; those of its earlier start are replaced.
    ///
    /// - Parameters:
    ///   - record: the guest.
    ///   - resolve: where a path of its command line leads.
    func linkOutputs(of record: GuestRecord, _ resolve: (String) -> String) {
        // A guest that came from elsewhere has them there, and no link is where its QEMU may write.
        guard record.confinement == nil, let paths = try? record.commandLine.paths() else { return }
        let run = runDirectory(of: record.name)
        removeOutputLinks(of: record.name)
        var names = OutputNames()
        for reference in paths where reference.kind == .output {
            let path = resolve(reference.path)
            guard let name = names.name(of: reference.path), !path.hasPrefix("/dev/"), !path.hasPrefix("\(run)/"),
                (try? DurableFile.makeDirectory(run)) != nil
            else { continue }
            // What is there is somebody's.
            symlink(path, "\(run)/\(name)")
        }
    }

    /// Removes such links: what a guest's QEMU makes at their place would be made where they lead.
    public func removeOutputLinks(of name: String) {
        for output in outputs(of: name) where output.status.st_mode & S_IFMT == S_IFLNK { unlink(output.path) }
    }

    /// What is in a guest's directory for that, links not followed.
    func outputs(of name: String) -> [(path: String, status: stat)] {
        let run = runDirectory(of: name)
        return DurableFile.list(run).compactMap { entry in
            var status = stat()
            return lstat("\(run)/\(entry)", &status) == 0 ? ("\(run)/\(entry)", status) : nil
        }
    }

    /// Puts the logs of a guest's stay before out of the way of a QEMU that would begin them anew: `run.before` has them then, in the place of those of
    /// a stay that was still earlier.
    ///
    /// - Throws: `FileError` when they cannot be put there.
    public func keepOutputs(of name: String) throws {
        let (run, earlier) = (runDirectory(of: name), earlierRun(of: name))
        DurableFile.remove(earlier)
        let hasFiles = outputs(of: name).contains { $0.status.st_mode & S_IFMT == S_IFREG && $0.status.st_size > 0 }
        guard hasFiles else { return }
        guard rename(run, earlier) == 0 else { throw FileError.system("rename \(run) to \(earlier)", errno) }
        try DurableFile.makeDirectory(run)
    }

    /// Undoes that.
    func restoreOutputs(of name: String) {
        let earlier = earlierRun(of: name)
        guard DurableFile.exists(earlier) else { return }
        DurableFile.remove(runDirectory(of: name))
        rename(earlier, runDirectory(of: name))
    }

    /// Where a Unix socket is that QEMU names: one that was made before the guest belonged to this host has another place since.
    ///
    /// - Parameters:
    ///   - path: as QEMU has it.
    ///   - record: the guest.
    public func socket(_ path: String, of record: GuestRecord) -> String {
        let hidden = "\(arrivals(of: record.name))/"
        let sockets = record.commandLine.sockets
        guard path.hasPrefix(hidden), let index = Int(path.dropFirst(hidden.count)), sockets.indices.contains(index)
        else { return DurableFile.resolve(path, in: record.commandLine.directory) }
        return DurableFile.resolve(sockets[index].path, in: record.commandLine.directory)
    }

    /// Under which path something of a guest is found on each host with a state directory of this name; nil when there is none.
    ///
    /// - Parameters:
    ///   - path: where it is.
    ///   - guest: whose it is.
    public func stablePath(of path: String, guest: String) -> String? {
        let run = runDirectory(of: guest)
        if path.hasPrefix("\(run)/") { return path }
        for entry in DurableFile.list(run) {
            var buffer = [CChar](repeating: 0, count: Int(PATH_MAX) + 1)
            let count = readlink("\(run)/\(entry)", &buffer, buffer.count - 1)
            guard count > 0 else { continue }
            if String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self) == path {
                return "\(run)/\(entry)"
            }
        }
        return nil
    }
}
