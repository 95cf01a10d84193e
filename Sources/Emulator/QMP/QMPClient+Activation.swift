internal import CLinux
internal import Glibc
internal import IO

extension QMPClient {
    /// Takes control of the images of a guest that a migration has brought and that stands still: a guest that runs on does so with `cont`.
    ///
    /// Until then their nodes are as the migration has left them: QEMU 10.0 refuses jobs on them, and 7.2 aborts when the guest migrates
    /// again (`bdrv_inactivate_recurse`). From 10.0 on there is a command for that (`blockdev-set-active`); an older QEMU takes control of a
    /// node that it exports (`block-export-add`), so each is exported for a moment, read-only, on a socket that nobody can connect to.
    /// Images that QEMU has control of already stay as they are.
    ///
    /// - Throws: `QMPError` with QEMU's reason: somebody else has an image locked.
    public func activateImages() async throws {
        do {
            return _ = try await execute("blockdev-set-active", ["active": true])
        } catch let error as QMPError where error.errorClass == "CommandNotFound" {}
        let tops = Set(try await blockGraph().drives.compactMap(\.node))
        guard !tops.isEmpty else { return }
        let name = "xdt-active"
        let socket = try Self.hiddenSocket()
        defer { Glibc.close(socket) }
        try await execute("getfd", ["fdname": .string(name)], passing: socket)
        // One that the guest's owner has started does as well.
        var isOwn = true
        do {
            try await execute("nbd-server-start", ["addr": ["type": "fd", "data": ["str": .string(name)]]])
        } catch let error as QMPError where error.code == .refused {
            isOwn = false
            _ = try? await execute("closefd", ["fdname": .string(name)])
        }
        do {
            for node in tops.sorted() {
                // One that was interrupted may have left its own.
                let id = "\(name)-\(UInt64.random(in: 0 ... .max))"
                try await addNBDExport(id, node: node, name: id, isWritable: false)
                try await removeNBDExport(id)
            }
        } catch {
            if isOwn { try? await stopNBDServer() }
            throw error
        }
        if isOwn { try await stopNBDServer() }
    }

    /// A Unix socket without a name any more.
    private static func hiddenSocket() throws -> Int32 {
        let directory = try DurableFile.makePrivateDirectory(in: "/tmp")
        defer { rmdir(directory) }
        let socket = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        guard socket >= 0, xd_unix_bind(socket, "\(directory)/s") == 0 else {
            let reason = String(cString: strerror(errno))
            if socket >= 0 { Glibc.close(socket) }
            throw FileError("Cannot make a socket in \(directory): \(reason)")
        }
        unlink("\(directory)/s")
        return socket
    }
}
