internal import Emulator

/// Room of a host that is kept for a guest of an evacuation, until the guest is offered or the time is over.
struct Reservation: Sendable, Hashable, Codable {
    /// What an offer names.
    var id: String
    /// Whose it is, as authorisation knows them.
    var source: String
    /// The evacuation that it was asked for by.
    var evacuation: String
    /// The guest.
    var guest: String
    /// What is kept, as policies count it.
    var usage: GuestUsage
    /// Bytes of the image directory that are kept.
    var allocated: UInt64
    /// When its time is over, in milliseconds since 1970.
    var expires: Int64

    /// Whether a guest with these demands is what the room is for.
    func covers(_ usage: GuestUsage, allocated: UInt64) -> Bool {
        usage.memory <= self.usage.memory && usage.processors <= self.usage.processors && usage.disk <= self.usage.disk
            && allocated <= self.allocated
    }
}
