public import Emulator

extension Message.Offer {
    /// What the guest takes of a host, as policies and reservations count it.
    ///
    /// - Parameter commandLine: its command line on that host; nil for the one that is offered.
    /// - Throws: `GuestError` for an option that cannot be read.
    public func usage(as commandLine: GuestCommandLine? = nil) throws -> GuestUsage {
        let commandLine = commandLine ?? self.commandLine
        let sizes = disks.map { max($0.size, $0.containerSize ?? 0) } + files.map(\.size)
        return GuestUsage(
            memory: max(try commandLine.memory(), memory),
            processors: try commandLine.processors(),
            disk: sizes.reduce(0) { $0.addingSaturated($1) }
        )
    }

    /// Bytes of the destination's file system that the copy needs at least.
    public var allocated: UInt64 { disks.reduce(0) { $0.addingSaturated($1.allocated) } }
}

extension HostMessage.Reserve {
    /// Asks for the room that a guest needs.
    ///
    /// - Parameters:
    ///   - offer: the guest as it would be offered.
    ///   - seconds: how long the room is to be kept.
    /// - Throws: `GuestError` for an option that cannot be read.
    public init(_ offer: Message.Offer, seconds: UInt32) throws {
        self.init(guest: offer.guest, usage: try offer.usage(), allocated: offer.allocated, seconds: seconds)
    }
}
