internal import CLinux
internal import Emulator
internal import IO

/// What an agent says of its host to the operator: nothing in it depends on who asks.
public struct AgentFigures: Sendable, Hashable {
    /// Bytes of memory.
    public var memory: UInt64
    /// Bytes of memory that are available.
    public var freeMemory: UInt64
    /// Bytes of that which are promised.
    public var promisedMemory: UInt64
    /// Bytes of the file system of images.
    public var disk: UInt64
    /// Bytes of it that are free.
    public var freeDisk: UInt64
    /// Bytes of that which are promised.
    public var promisedDisk: UInt64
}

extension DestinationAgent {
    /// What the host has, and what of it is promised. From any thread.
    ///
    /// - Throws: an error when the kernel does not tell.
    public func figures() async throws -> AgentFigures {
        try await loop.run {
            let (guests, images, arriving) = (
                self.guests, self.configuration.imageDirectory, self.ledger.arrivingGuests
            )
            let (figures, disk) = try await BlockingPool.idle.run {
                (try HostFigures.read(guests, images: images, arriving: arriving), xd_total_bytes(images))
            }
            self.expireReservations()
            let promises = self.ledger.promises(figures)
            return AgentFigures(
                memory: figures.memory,
                freeMemory: figures.freeMemory,
                promisedMemory: promises.memory,
                disk: disk,
                freeDisk: figures.freeDisk,
                promisedDisk: promises.disk
            )
        }
    }
}
