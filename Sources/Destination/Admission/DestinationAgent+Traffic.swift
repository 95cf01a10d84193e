internal import IO
internal import NBD

/// What guests on their way to this host have to do with its network.
public struct AgentTraffic: Sendable, Hashable {
    /// Connections that bring disks.
    public var exportConnections: Int
    /// Bytes of disks that have come since the agent began, without those that were only said to be zero.
    public var diskBytes: UInt64
    /// Bytes of memory that have come since then, as QEMU gets them.
    public var memoryBytes: UInt64
}

extension DestinationAgent {
    /// What has come, and what it comes on. From any thread.
    public func traffic() async -> AgentTraffic {
        let server = (try? await loop.run { self.diskServer }) ?? nil
        return AgentTraffic(
            exportConnections: server?.exportConnectionCount ?? 0,
            diskBytes: server?.receivedBytes ?? 0,
            memoryBytes: memoryBytes
        )
    }
}
