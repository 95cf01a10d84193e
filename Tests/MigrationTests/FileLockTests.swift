import IO
import Migration
import Synchronization
import TestSupport
import Testing

struct FileLockTests {
    /// How many have the lock, and how many had it at once at most.
    private final class Holders: Sendable {
        private let now = Atomic<Int>(0)
        private let most = Atomic<Int>(0)
        var highest: Int { most.load(ordering: .relaxed) }

        func enter() { most.max(now.wrappingAdd(1, ordering: .relaxed).newValue, ordering: .relaxed) }
        func leave() { now.wrappingSubtract(1, ordering: .relaxed) }
    }

    @Test func aGuestsLockLeavesNoFileAndKeepsOthersOut() throws {
        let directory = try TestDirectory()
        let store = MigrationStore(stateDirectory: directory.path)
        var held = try store.lock(guest: "web1")
        #expect(held != nil && DurableFile.list(directory.path).contains("guest-web1.lock"))
        #expect(try store.lock(guest: "web1") == nil)
        #expect(FileLock.holder(of: directory.file("guest-web1.lock")) != nil)
        held = nil
        #expect(!DurableFile.list(directory.path).contains("guest-web1.lock"))
        held = try store.lock(guest: "web1")
        #expect(held != nil)
    }

    /// One who opened the file before it was removed must not hold a lock that nobody else sees.
    @Test func noTwoHaveALockThatIsRemovedAllTheTime() async throws {
        let directory = try TestDirectory()
        let path = directory.file("lock")
        let holders = Holders()
        await withTaskGroup(of: Void.self) { group in
            for _ in 0..<4 {
                group.addTask {
                    await BlockingPool.shared.value {
                        for _ in 0..<2000 {
                            guard let lock = try? FileLock(path, isRemoved: true) else { continue }
                            holders.enter()
                            holders.leave()
                            withExtendedLifetime(lock) {}
                        }
                    }
                }
            }
        }
        #expect(holders.highest == 1)
    }
}
