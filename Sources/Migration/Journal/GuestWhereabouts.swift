internal import Emulator

/// Where a guest is, as far as this host knows: what a last sentence about it may say.
public enum GuestWhereabouts: Sendable, Hashable {
    /// It belongs to this host.
    case here(isRunning: Bool)
    /// It belongs to this host, and a migration that nobody works on any more has left its QEMU frozen.
    case frozen(String)
    /// It must not be started here.
    case barred(MigrationStore.StartBar)
    /// A process moves it, or recovers its migration.
    case moving
    /// This host knows no such guest.
    case unknown
    /// Its journals cannot be read.
    case unreadable(String)

    /// Looks at a guest's record, lock and journals.
    public init(of guest: String, stateDirectory: String) {
        let migrations = MigrationStore(stateDirectory: stateDirectory)
        do {
            guard let record = try GuestStore(stateDirectory: stateDirectory).load(guest) else {
                self = .unknown
                return
            }
            guard try migrations.lock(guest: guest) != nil else {
                self = .moving
                return
            }
            if let bar = try migrations.startBar(of: guest) {
                self = .barred(bar)
                return
            }
            if let sentence = migrations.frozenSentence(of: record) {
                self = .frozen(sentence)
                return
            }
            self = .here(isRunning: record.process?.isRunning == true)
        } catch { self = .unreadable("\(error)") }
    }

    /// What is said of a guest that was not moved; nil when nothing is known.
    public func sentence(guest: String) -> String? {
        switch self {
        case .here(isRunning: true): "Guest '\(guest)' stays on this host"
        case .here(isRunning: false): "Guest '\(guest)' belongs to this host and does not run"
        case .frozen(let sentence): sentence
        case .barred(let bar): bar.sentence(guest: guest)
        case .moving: "Guest '\(guest)' is being migrated; see 'crossdock status'"
        case .unknown: nil
        case .unreadable(let reason): reason
        }
    }

    /// What is said after a guest's QEMU was ended by hand.
    ///
    /// - Parameter wasRunning: whether there was a QEMU to end.
    public func sentence(guest: String, afterStop wasRunning: Bool) -> String {
        let what =
            wasRunning ? "The QEMU of guest '\(guest)' on this host has ended" : "Guest '\(guest)' does not run here"
        switch self {
        case .here where wasRunning: return "Guest '\(guest)' is stopped"
        case .barred(let bar): return "\(what). \(bar.sentence(guest: guest))"
        case .here, .frozen, .moving, .unknown, .unreadable: return what
        }
    }
}
