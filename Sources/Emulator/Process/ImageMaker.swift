internal import Glibc
internal import IO
public import TLS

/// Makes images with `qemu-img`.
public enum ImageMaker {
    /// Makes an empty image.
    ///
    /// - Parameters:
    ///   - path: the file.
    ///   - format: QEMU's name of the format.
    ///   - size: how many bytes the guest sees.
    ///   - options: options of the format, `key=value`; an encrypted one refers to its secret as `key`.
    ///   - secret: the passphrase of an encrypted image.
    ///   - policy: how the program is confined, which then needs a file that is there already; not at all when nil.
    /// - Throws: `GuestError` with the words of `qemu-img`.
    public static func make(
        _ path: String,
        format: String,
        size: UInt64,
        options: [String] = [],
        secret: SecretBytes? = nil,
        policy: ConfinementPolicy? = nil
    ) async throws {
        let key = try secret.map { try MasterKey(sealing: ["key": $0]) }
        var arguments = ["qemu-img", "create", "-q", "-f", format]
        arguments += key?.arguments(file: "/dev/stdin", option: "--object") ?? []
        if !options.isEmpty { arguments += ["-o", options.map(KeyValue.escape).joined(separator: ",")] }
        // A backing file need not be looked at again.
        arguments += ["-u", path, "\(size)"]
        let command = arguments
        try await BlockingPool.shared.run {
            var attempts = 0
            while let words = try Self.run(command, key, policy, path) {
                attempts += 1
                // For a key QEMU measures how fast this machine is, and gives up when its clock did not move meanwhile.
                if words.contains("accurate CPU usage"), attempts < 10 { continue }
                unlink(path)
                throw GuestError("qemu-img cannot make the image \(path) in the format '\(format)': \(words)")
            }
        }
    }

    /// Runs the program; returns what it complained of, or nil.
    private static func run(_ command: [String], _ key: MasterKey?, _ policy: ConfinementPolicy?, _ image: String)
        throws
        -> String?
    {
        let directory = try BoundProcess.makeDirectory()
        let process: BoundProcess
        do {
            let confinement = try policy?.tool(command[0], directory: directory, files: [.init(image, .image)])
            process = try BoundProcess(
                command,
                directory: directory,
                input: key?.descriptor,
                confinement: confinement
            )
        } catch {
            DurableFile.remove(directory)
            throw error
        }
        guard let code = process.waitForEnd(.seconds(300)) else { return "it did not end within 300 s" }
        defer { process.clear() }
        return code == 0 ? nil : process.lastWords ?? "it ended with code \(code)"
    }
}
