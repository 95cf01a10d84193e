internal import IO
internal import TLS

/// The files of noVNC, with which browsers show screens: those that a package has put into a directory. No right is needed for them.
struct ViewerFiles: Sendable {
    /// What is in the directory and is no part of the library: pages that would look for a server of their own.
    private static let folders: Set<String> = ["core", "vendor"]

    let directory: String

    /// Why a browser of this host's page has none; nil when it has. Blocks.
    var absence: String? {
        if DurableFile.exists("\(directory)/core/rfb.js") { return nil }
        return "browsers need noVNC to show a screen, and this host has none in \(directory): apt-get install novnc"
    }

    /// A file, by its names below the directory; nil when there is none. Blocks.
    func file(_ names: some Collection<String>) -> PageFile? {
        guard let first = names.first, Self.folders.contains(first), (2...6).contains(names.count),
            names.allSatisfy({ $0.first != "." && !$0.isEmpty && $0.utf8.count <= 64 }),
            let last = names.reversed().first, last.hasSuffix(".js"), let type = PageFile.types["js"],
            let bytes =
                (try? DurableFile.read("\(directory)/\(names.joined(separator: "/"))", limit: WebLimits.viewerFile))
                ?? nil
        else { return nil }
        return PageFile(bytes: bytes, type: type, tag: "\"\(HashAlgorithm.sha256.hash(bytes).prefix(16).hex)\"")
    }
}
