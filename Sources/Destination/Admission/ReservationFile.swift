internal import IO

/// The file in which an agent keeps its reservations: the only place that knows its name and format.
struct ReservationFile: Sendable {
    private struct Contents: Codable {
        var version: Int
        var reservations: [Reservation]
    }
    private static let version = 1

    private let path: String

    /// Names the file of a state directory.
    init(stateDirectory: String) { path = "\(stateDirectory)/reservations.json" }

    /// What is kept; empty when there is no file. Blocks.
    ///
    /// - Throws: `FileError` when it cannot be read, or is something else.
    func read() throws -> [Reservation] {
        guard let bytes = try DurableFile.read(path) else { return [] }
        guard let contents = JSONText.decode(Contents.self, from: bytes), contents.version == Self.version else {
            throw FileError(
                "\(path) is damaged, or of a later version; room that was kept for guests of others is not kept any more"
            )
        }
        return contents.reservations
    }

    /// Keeps this and nothing else, durably. Blocks.
    func write(_ reservations: [Reservation]) throws {
        let contents = Contents(version: Self.version, reservations: reservations)
        try DurableFile.write(try JSONText.encode(contents), to: path)
    }
}
