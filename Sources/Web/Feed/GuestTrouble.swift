internal import IO
internal import Source

/// Why a guest stands still until somebody does something: its migration is not over, and nobody works on it.
public struct GuestTrouble: Sendable, Hashable, Codable {
    /// What is true, a sentence without its end.
    public var sentence: String
    /// The command that mends it; nil when there is none, or somebody has given it.
    public var command: String?
    /// The host on which that is given, which has the guest.
    public var host: String

    /// All of it in a sentence without its end.
    public var words: String { sentence + (command.map { "; '\($0)' on \(host) mends that" } ?? "") }

    /// The same where little room is: what mends it first.
    var title: String { (command.map { "'\($0)' on \(host) is needed: " } ?? "") + sentence }

    /// As another host has told it, in the length that is shown of it.
    var shown: GuestTrouble {
        GuestTrouble(
            sentence: sentence.shown(most: 500),
            command: command?.shown(most: 100),
            host: host.shown(most: 255)
        )
    }

    /// What a migration says of its guest, for who looks at that.
    ///
    /// - Parameters:
    ///   - status: one that is in trouble.
    ///   - runState: how the guest's QEMU says that it stands; nil when that cannot be asked.
    ///   - host: this host.
    /// - Returns: nil when the guest goes on all the same.
    init?(_ status: MigrationStatus, runState: String?, host: String) {
        let guest = "Guest '\(status.guest)'"
        (self.host, command) = (host, status.command)
        switch status.trouble {
        case .undecided where status.state == "undecided":
            sentence =
                "\(guest) is paused and undecided: \(host) has released it to \(status.peer), which has not confirmed that it has it"
                + (status.command == nil ? "; it is being asked" : "")
        case .undecided, .interrupted:
            if runState == "running" { return nil }
            let stand = runState.map { "stands still ('\($0)')" } ?? "may stand still"
            sentence = "\(guest) \(stand): its migration to \(status.peer) was interrupted, and nobody works on it"
        case .doubled: sentence = "\(guest) may run twice: it \(status.detail)"
        case .unreadable, nil: return nil
        }
    }

    private init(sentence: String, command: String?, host: String) {
        (self.sentence, self.command, self.host) = (sentence, command, host)
    }

    /// Whether it is only known by asking the guest's QEMU.
    static func dependsOnEmulator(_ status: MigrationStatus) -> Bool {
        switch status.trouble {
        case .undecided: status.state != "undecided"
        case .interrupted: true
        case .doubled, .unreadable, nil: false
        }
    }
}
