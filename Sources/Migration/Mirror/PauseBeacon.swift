internal import Glibc
internal import IO
internal import Synchronization

/// Tells the copies of other guests that one is paused, so that they leave line and processors to its switchover for that moment.
///
/// A page of memory that the processes of a host share through a file: who is paused writes until when the others yield, which bounds it
/// whatever becomes of that process. Looking costs a read of memory. From any thread.
public final class PauseBeacon: Sendable {
    // The page stays mapped as long as this is there.
    private let page: UnsafeSendable<UnsafeMutablePointer<Atomic<UInt64>>>
    private let isOwn = Atomic<Bool>(false)

    private struct UnsafeSendable<Value>: @unchecked Sendable {
        let value: Value
    }
    private static let length = 4096

    /// Opens the beacon of a file, which is made if it is not there.
    ///
    /// - Throws: `FileError`.
    public init(_ path: String) throws {
        let descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw FileError.system("open \(path)", errno) }
        defer { close(descriptor) }
        guard ftruncate(descriptor, off_t(Self.length)) == 0 else { throw FileError.system("write \(path)", errno) }
        guard let memory = mmap(nil, Self.length, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0),
            memory != MAP_FAILED
        else { throw FileError.system("map \(path)", errno) }
        // An atomic number has the form of the number; the file begins with zeroes.
        page = UnsafeSendable(value: memory.bindMemory(to: Atomic<UInt64>.self, capacity: 1))
    }

    deinit {
        lower()
        munmap(page.value, Self.length)
    }

    private static func now() -> UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }

    /// This process's guest is paused: others yield, for so long at most.
    public func raise(for milliseconds: Int) {
        isOwn.store(true, ordering: .relaxed)
        page.value.pointee.store(Self.now() + UInt64(max(milliseconds, 0)) * 1_000_000, ordering: .relaxed)
    }

    /// It is not paused any more.
    public func lower() {
        guard isOwn.exchange(false, ordering: .relaxed) else { return }
        page.value.pointee.store(0, ordering: .relaxed)
    }

    /// Whether another process's guest is paused.
    public var isRaised: Bool {
        let end = page.value.pointee.load(ordering: .relaxed)
        return end != 0 && !isOwn.load(ordering: .relaxed) && end > Self.now()
    }
}
