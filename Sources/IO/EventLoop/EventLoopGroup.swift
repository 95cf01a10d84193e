internal import Glibc
internal import Synchronization

/// A group of loops, one for each core at most; connections are spread over them in turn.
public final class EventLoopGroup: Sendable {
    /// The loops, in the order in which `next` hands them out.
    public let loops: [EventLoop]
    private let cursor = Atomic<Int>(0)

    /// Starts the loops.
    ///
    /// - Parameters:
    ///   - count: how many; the number of online cores, at most four, when it is not given.
    ///   - name: what the threads are called; a number is appended.
    public init(count: Int? = nil, name: String) {
        let cores = max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN)))
        loops = (0..<(count ?? min(cores, 4))).map { EventLoop(name: "\(name)-\($0)") }
    }

    /// Makes a group of one loop that is there already.
    public init(sharing loop: EventLoop) { loops = [loop] }

    /// The next loop, in turn.
    public func next() -> EventLoop {
        let index = cursor.wrappingAdd(1, ordering: .relaxed).oldValue
        return loops[index % loops.count]
    }

    /// Ends all the loops' threads.
    public func stop() { for loop in loops { loop.stop() } }
}
