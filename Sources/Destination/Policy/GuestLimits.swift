public import Emulator
internal import IO
public import Migration

/// What the guests of one source may take of a host together; nil for no limit.
public struct GuestLimits: Sendable, Hashable {
    /// Bytes of memory.
    public var memory: UInt64?
    /// Processors.
    public var processors: UInt64?
    /// Bytes of disks and files.
    public var disk: UInt64?
    /// Guests.
    public var guests: UInt64?

    /// No limits.
    public init() {}

    /// Whether there is none.
    public var isEmpty: Bool { self == GuestLimits() }

    /// Which limits one more guest would exceed, a sentence each.
    ///
    /// - Parameters:
    ///   - usage: what the guest takes.
    ///   - here: what each guest of the same source takes that is here or on its way.
    public func problems(of usage: GuestUsage, besides here: [GuestUsage]) -> [String] {
        let known = here.reduce(GuestUsage(), +)
        func problem(
            _ rule: String,
            _ what: String,
            _ limit: UInt64?,
            _ has: UInt64,
            _ wants: UInt64,
            _ text: (UInt64) -> String
        )
            -> String?
        {
            guard let limit, has.addingSaturated(wants) > limit else { return nil }
            return
                "The limit of \(text(limit)) \(what) for the guests of one source (--most-\(rule)) is exceeded: those that are here, "
                + "on their way or expected have \(text(has)), and this one wants \(text(wants))"
        }
        func number(_ count: UInt64) -> String { "\(count)" }
        return [
            problem("guests", "guests", guests, UInt64(here.count), 1, number),
            problem("memory", "of memory", memory, known.memory, usage.memory, ByteSize.text),
            problem("processors", "processors", processors, known.processors, usage.processors, number),
            problem("disk", "of disks", disk, known.disk, usage.disk, ByteSize.text),
        ].compactMap { $0 }
    }

    /// What is left for one more guest.
    ///
    /// - Parameter here: what each guest of the same source takes that is here, on its way, or has room kept for it.
    public func allowance(besides here: [GuestUsage]) -> HostState.Allowance {
        let known = here.reduce(GuestUsage(), +)
        func left(_ limit: UInt64?, _ has: UInt64) -> UInt64? { limit.map { $0 - min(has, $0) } }
        var allowance = HostState.Allowance()
        allowance.memory = left(memory, known.memory)
        allowance.processors = left(processors, known.processors)
        allowance.disk = left(disk, known.disk)
        allowance.guests = left(guests, UInt64(here.count))
        return allowance
    }
}
