internal import Synchronization

/// What a mirror has moved, readable from any thread.
public final class MirrorCounters: Sendable {
    private let sent = Atomic<UInt64>(0)
    private let zeroed = Atomic<UInt64>(0)
    private let present = Atomic<UInt64>(0)
    private let backlog = Atomic<UInt64>(0)
    private let repeated = Atomic<UInt64>(0)
    private let reconnections = Atomic<Int>(0)
    private let connected = Atomic<Int>(0)
    private let line = Atomic<UInt64>(0)

    /// Payload bytes that the destination has acknowledged.
    public var bytesSent: UInt64 { sent.load(ordering: .relaxed) }
    /// Bytes that were sent as "zeroes here" instead of as data.
    public var zeroBytes: UInt64 { zeroed.load(ordering: .relaxed) }
    /// Bytes that were not sent, since the destination had them already.
    public var seededBytes: UInt64 { present.load(ordering: .relaxed) }
    /// Bytes that QEMU believes to be written and the destination has not acknowledged.
    public var bytesInFlight: UInt64 { backlog.load(ordering: .relaxed) }
    /// Payload bytes that were sent again although the destination had acknowledged them: they may have been lost there.
    public var bytesResent: UInt64 { repeated.load(ordering: .relaxed) }
    /// How many connections were made in the place of lost ones.
    public var reconnects: Int { reconnections.load(ordering: .relaxed) }

    /// How many connections there are, or were last.
    public var connections: Int { connected.load(ordering: .relaxed) }

    /// What the payload that the destination has acknowledged was on the line, where it could be compressed.
    public var bytesOnLine: UInt64 { line.load(ordering: .relaxed) }

    func onLine(_ count: Int) { line.wrappingAdd(UInt64(count), ordering: .relaxed) }
    func opened(_ count: Int) { connected.store(count, ordering: .relaxed) }
    func sent(_ count: Int) { sent.wrappingAdd(UInt64(count), ordering: .relaxed) }
    func zeroed(_ count: UInt64) { zeroed.wrappingAdd(count, ordering: .relaxed) }
    func seeded(_ count: UInt64) { present.wrappingAdd(count, ordering: .relaxed) }
    func inFlight(_ count: Int) { backlog.store(UInt64(count), ordering: .relaxed) }
    func resent(_ count: Int) { repeated.wrappingAdd(UInt64(count), ordering: .relaxed) }
    func reconnected() { reconnections.wrappingAdd(1, ordering: .relaxed) }
}
