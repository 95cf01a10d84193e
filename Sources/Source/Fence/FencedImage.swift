internal import Emulator
internal import Glibc
internal import IO
public import Migration

/// An image of a guest, as its fence knows it.
public struct FencedImage: Sendable, Codable, Hashable {
    /// The path that the guest has for it, absolute.
    public let path: String
    /// Where that leads: the file's own name, which is the one that is taken away.
    public let realPath: String
    /// Which file it is; nil when there was none.
    public let identity: ImageIdentity?
    /// The boot in which that was found out: numbers of file systems and devices may be others in the next.
    private let boot: String

    /// Finds out what a path leads to.
    public init(_ path: String) {
        self.path = path
        realPath = DurableFile.resolve(path, in: "/")
        identity = ImageIdentity(of: realPath)
        boot = EmulatorProcess.bootID
    }

    /// The image of a record that has only its path: what bore that name was what was renamed.
    init(legacy path: String) {
        self.path = path
        realPath = path
        identity = ImageIdentity(of: path).flatMap { $0.isDevice ? $0 : nil }
        boot = EmulatorProcess.bootID
    }

    /// Whether it is a block device, which has no name that could be taken away.
    public var isDevice: Bool { identity?.isDevice ?? false }
    /// The directory that has the file's name.
    var directory: String {
        let parent = realPath.lastIndex(of: "/").map { String(realPath[..<$0]) } ?? "."
        return parent.isEmpty ? "/" : parent
    }
    /// The file's name in its directory.
    var name: String { realPath.split(separator: "/").last.map(String.init) ?? "" }

    /// The file's name behind the fence.
    func fencedName(_ migration: String) -> String { "\(name).released-\(migration)" }
    /// Where the file is while it is fenced; the device itself for a device.
    public func fencedPath(_ migration: String) -> String {
        isDevice ? path : "\(realPath).released-\(migration)"
    }

    /// Whether what was found can be this image; true when that cannot be told.
    func canBe(_ found: ImageIdentity?) -> Bool {
        guard let identity else { return true }
        guard let found else { return false }
        if boot == EmulatorProcess.bootID { return identity == found }
        switch (identity, found) {
        case (.file(_, let before), .file(_, let now)): return before == now
        case (.device, .device): return true
        default: return false
        }
    }
}
