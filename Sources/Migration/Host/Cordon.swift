internal import FoundationEssentials
internal import IO

/// That a host takes no new guests, by the word of its operator: a durable file of the state directory, which its destination agent
/// reads whenever it is asked. What is on its way goes on. This type alone knows the file's name and format.
public struct Cordon: Sendable, Hashable, Codable {
    /// Who said so.
    public var by: String
    /// When, in milliseconds since 1970.
    public var since: Int64
    /// Why; empty when nothing was said.
    public var message: String

    /// The most bytes of a message.
    public static let longestMessage = 1000

    /// Describes a cordon that begins now.
    ///
    /// - Parameters:
    ///   - by: who says so.
    ///   - message: why; what cannot be shown on a line is replaced, and what is too long is cut.
    public init(by: String, message: String = "") {
        self.by = by.shown(most: 200)
        self.message = message.shown(most: Self.longestMessage)
        since = Int64(Date.now.timeIntervalSince1970 * 1000)
    }

    private static func path(_ stateDirectory: String) -> String { "\(stateDirectory)/cordon.json" }

    /// The cordon of a host; nil when there is none. Blocks.
    ///
    /// - Throws: `FileError` when the file cannot be read or is damaged: who asks should take the host for cordoned then.
    public static func read(stateDirectory: String) throws -> Cordon? {
        let path = path(stateDirectory)
        guard let bytes = try DurableFile.read(path, limit: 1 << 20) else { return nil }
        guard let cordon = JSONText.decode(Cordon.self, from: bytes) else {
            throw FileError(
                "\(path) is damaged: whether this host takes guests is not known; 'crossdock uncordon' removes it"
            )
        }
        return cordon
    }

    /// Makes it so, durably, in the place of an earlier one. Blocks.
    ///
    /// - Throws: `FileError`.
    public func write(stateDirectory: String) throws {
        try DurableFile.makeDirectory(stateDirectory)
        try DurableFile.write(try JSONText.encode(self), to: Self.path(stateDirectory))
    }

    /// Ends the cordon of a host, durably. Blocks.
    ///
    /// - Returns: whether there was one.
    /// - Throws: `FileError`.
    @discardableResult
    public static func remove(stateDirectory: String) throws -> Bool {
        let path = path(stateDirectory)
        guard DurableFile.exists(path) else { return false }
        DurableFile.remove(path)
        guard !DurableFile.exists(path) else { throw FileError("\(path) cannot be removed") }
        try DurableFile.syncDirectory(of: path)
        return true
    }

    /// When it began, in UTC: `2025-11-29 03:31:07 UTC`.
    private var time: String {
        let text = Date(timeIntervalSince1970: Double(since / 1000)).formatted(.iso8601)
        return text.replacing("T", with: " ").replacing("Z", with: " UTC")
    }

    /// Who said so, when and why: `by root since 2025-11-29 03:31:07 UTC: a new kernel`.
    public var words: String { "by \(by) since \(time)\(message.isEmpty ? "" : ": \(message)")" }

    /// What is said of the host: who, when and why, without a full stop.
    public var sentence: String { "cordoned \(words)" }

    /// What a source is told that would bring a guest.
    public var refusal: String {
        "This host takes no new guests, it is \(sentence); 'crossdock uncordon' there ends that"
    }
}
