internal import IO

/// The VNC server of a guest that is here, or, once it has gone, that of its next host, through whatever leads there.
struct FollowingDisplay: DisplaySource {
    /// What leads to other hosts.
    struct Passage: Sendable {
        /// Opens the display of a guest that has gone, on the loop that it gets: its bytes, and the host; nil when nothing is known that leads to it. An
        /// error says why the host does not give it.
        var open: @Sendable (_ guest: String, _ loop: EventLoop) async throws -> (channel: any Channel, host: String)?
        /// Whether anything is known that leads to the guest.
        var isKnown: @Sendable (_ guest: String) async -> Bool
    }

    let guest: String
    /// Its display on this host.
    let local: any DisplaySource
    let passage: Passage

    func absence() async -> DisplayAbsence? {
        let absence = await local.absence()
        guard case .moved? = absence, await passage.isKnown(guest) else { return absence }
        return nil
    }

    func open(on loop: EventLoop) async throws(DisplayAbsence) -> DisplayRoute {
        let moved: DisplayAbsence
        do throws(DisplayAbsence) { return try await local.open(on: loop) } catch { moved = error }
        guard case .moved(let host) = moved else { throw moved }
        let found: (channel: any Channel, host: String)?
        do { found = try await passage.open(guest, loop) } catch {
            throw .withheld(by: host, "\(host) does not give the screen of the guest: \(error)")
        }
        guard let (channel, host) = found else { throw moved }
        return DisplayRoute(channel: channel, host: host)
    }
}
