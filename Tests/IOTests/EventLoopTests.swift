import IO
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(1)))
struct EventLoopTests {
    @Test func runsTasksAndTheirChildrenOnItsOwnThread() async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        #expect(!loop.isCurrent)
        let onLoop = try await loop.run {
            async let child = loop.isCurrent
            return (loop.isCurrent, await child)
        }
        #expect(onLoop == (true, true))
    }

    @Test func firesTimersInTheOrderOfTheirDeadlinesAndNotOnceCancelled() async throws {
        try await onLoop { loop in
            final class Record: @unchecked Sendable { var fired: [Int] = [] }
            let record = Record()
            let done = AsyncCondition()
            for delay in [30, 10, 20] {
                loop.schedule(after: .milliseconds(delay)) { record.fired.append(delay) }
            }
            loop.schedule(after: .milliseconds(15)) { record.fired.append(15) }.cancel()
            loop.schedule(after: .milliseconds(40)) { done.signal() }
            await done.wait()
            #expect(record.fired == [10, 20, 30])
        }
    }

    @Test func anAsyncLockIsGrantedInTheOrderOfArrival() async throws {
        try await onLoop { loop in
            final class Record: @unchecked Sendable { var order: [Int] = [] }
            let record = Record()
            let lock = AsyncLock()
            await lock.acquire()
            await withTaskGroup(of: Void.self) { group in
                for index in 0..<5 {
                    group.addTask(executorPreference: loop) {
                        await lock.acquire()
                        record.order.append(index)
                        lock.release()
                    }
                    await Task.yield()
                }
                lock.release()
            }
            #expect(record.order == [0, 1, 2, 3, 4])
        }
    }

    @Test func blockingWorkLeavesTheLoopFree() async throws {
        try await onLoop { loop in
            let gate = Gate()
            async let blocked = BlockingPool.shared.run { gate.wait() }
            // The loop still runs this task, which alone can open the gate.
            gate.open()
            try await blocked
            #expect(loop.isCurrent)
        }
    }
}
