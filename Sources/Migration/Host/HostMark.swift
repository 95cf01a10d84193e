internal import IO

/// What tells one host of a fleet from another, whatever its names and addresses are: 128 random bits, kept in its state directory. It is no
/// secret, and no proof: who says it is known by its certificate. This type alone knows the file's name and format.
public enum HostMark {
    private static let count = 16

    private static func path(_ stateDirectory: String) -> String { "\(stateDirectory)/host-mark" }

    /// The mark of a host; nil when its destination agent has never run. Blocks.
    ///
    /// - Throws: `FileError`.
    public static func read(stateDirectory: String) throws -> String? {
        guard let bytes = try DurableFile.read(path(stateDirectory), limit: 4096) else { return nil }
        let text = String(decoding: bytes, as: UTF8.self)
        return text.utf8.count == 2 * count ? text : nil
    }

    /// The mark of this host, made when there is none. Blocks.
    ///
    /// - Throws: `FileError`.
    public static func make(stateDirectory: String) throws -> String {
        if let known = try read(stateDirectory: stateDirectory) { return known }
        let mark = (0..<count).map { _ in UInt8.random(in: 0...255) }.hex
        try DurableFile.write(Array(mark.utf8), to: path(stateDirectory))
        return mark
    }
}
