import IO
import TestSupport
import Testing

struct KeyedSemaphoreTests {
    /// Who had a turn, in order. Confined to the test's loop.
    private final class Order: @unchecked Sendable {
        var list: [Int] = []
    }

    @Test func whatOneKeyHoldsKeepsNoOtherKeyWaitingAndTurnsComeInOrder() async throws {
        try await onLoop { loop in
            let semaphore = KeyedSemaphore(limit: 2)
            let held = [semaphore.request("a"), semaphore.request("a")]
            for permit in held { try await permit.wait() }
            let order = Order()
            let waiting = (0..<3).map { _ in semaphore.request("a") }
            let tasks = waiting.enumerated().map { index, permit in
                Task(executorPreference: loop) {
                    try await permit.wait()
                    order.list.append(index)
                    permit.end()
                }
            }
            try await semaphore.request("b").wait()
            #expect(order.list == [])
            #expect(semaphore.held("a") == 2 && semaphore.waiting("a") == 3 && semaphore.held("b") == 1)
            held[0].end()
            for task in tasks { try await task.value }
            #expect(order.list == [0, 1, 2])
            // Only what is held is given back, and only once.
            held[0].end()
            #expect(semaphore.held("a") == 1 && semaphore.waiting("a") == 0)
            held[1].end()
            #expect(semaphore.held("a") == 0)
        }
    }

    /// Each step costs the same however many wait: a queue of a hundred thousand would take minutes otherwise.
    @Test(.timeLimit(.minutes(1)))
    func aLongQueueCostsNobodyMoreAndKeepsItsOrder() async throws {
        try await onLoop { loop in
            let semaphore = KeyedSemaphore(limit: 1)
            let count = 100_000
            let permits = (0..<count).map { _ in semaphore.request("a") }
            #expect(semaphore.waiting("a") == count - 1)
            // Most of them leave, from everywhere in the queue.
            for (index, permit) in permits.enumerated() where !index.isMultiple(of: 10) { permit.leave() }
            #expect(semaphore.waiting("a") == count / 10 - 1)
            for (index, permit) in permits.enumerated() where index.isMultiple(of: 10) {
                try await permit.wait()
                #expect(semaphore.held("a") == 1)
                permit.end()
            }
            #expect(semaphore.held("a") == 0 && semaphore.waiting("a") == 0)
        }
    }

    @Test func whoLeavesTheQueueIsToldAndWhoHoldsAPermitKeepsIt() async throws {
        try await onLoop { loop in
            let semaphore = KeyedSemaphore(limit: 1)
            let first = semaphore.request("a")
            let second = semaphore.request("a")
            let third = semaphore.request("a")
            let wait = Task(executorPreference: loop) { try await second.wait() }
            // The task has its turn on the loop before this goes on.
            await loop.sleep(for: .milliseconds(1))
            first.leave()
            #expect(semaphore.held("a") == 1 && semaphore.waiting("a") == 2)
            second.leave()
            await #expect(throws: ChannelError.self) { try await wait.value }
            await #expect(throws: ChannelError.self) { try await second.wait() }
            first.end()
            try await third.wait()
            #expect(semaphore.held("a") == 1 && semaphore.waiting("a") == 0)
        }
    }
}
