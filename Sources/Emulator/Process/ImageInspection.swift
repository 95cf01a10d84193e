internal import IO

/// What `qemu-img info` says of an image, which is not opened for writing.
enum ImageInspection {
    /// The names of the persistent dirty bitmaps of an image.
    ///
    /// Blocks: run it on the pool.
    ///
    /// - Throws: `GuestError` with the words of `qemu-img`.
    static func bitmaps(of image: StorageDaemon.Image) throws -> [String] {
        var arguments = ["qemu-img", "info", "-U", "--output=json"]
        if image.isDescription {
            arguments.append("--image-opts")
        } else if let format = image.format {
            arguments += ["-f", format]
        }
        let process = try BoundProcess(
            arguments + [image.path],
            directory: try BoundProcess.makeDirectory()
        )
        guard let code = process.waitForEnd(.seconds(30)) else {
            throw GuestError("qemu-img did not say within 30 s what is in \(image.path)")
        }
        defer { process.clear() }
        let said = (try DurableFile.read("\(process.directory)/log")) ?? []
        guard code == 0, let start = said.firstIndex(of: UInt8(ascii: "{")) else {
            throw GuestError("qemu-img cannot read \(image.path): \(process.words)")
        }
        let information = try JSONValue(parsing: Array(said[start...]))
        return (information["format-specific"]?["data"]?["bitmaps"]?.array ?? []).compactMap { $0["name"]?.string }
    }

    /// Looks whether an image has the bitmaps that are asked for.
    ///
    /// A storage daemon that finds out itself ends without closing the image, which then takes all of its bitmaps for damaged.
    ///
    /// - Throws: `GuestError` that names the one that is not there, and those that are.
    static func check(_ image: StorageDaemon.Image) throws {
        guard !image.bitmaps.isEmpty else { return }
        let names = try bitmaps(of: image)
        guard let missing = image.bitmaps.first(where: { !names.contains($0) }) else { return }
        let there = names.isEmpty ? "none" : names.joined(separator: ", ")
        throw GuestError("The image \(image.path) has no dirty bitmap '\(missing)'; it has \(there)")
    }
}
