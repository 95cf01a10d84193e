import IO
import Synchronization
import TestSupport
import Testing

@testable import Emulator

struct BlankCopyTests {
    private final class Questions: Sendable {
        private let count = Atomic<Int>(0)
        var asked: Int { count.load(ordering: .relaxed) }

        func ask() -> Int { count.wrappingAdd(1, ordering: .relaxed).newValue }
    }

    /// A peer that leaves does not keep its work going.
    @Test func aBlankCopyThatNobodyWaitsForAnyMoreIsEndedWhileItStarts() async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        let line = GuestCommandLine(
            arguments: [
                "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-name",
                "blank-\(UInt64.random(in: 0 ... .max))",
            ],
            directory: "/"
        )
        let questions = Questions()
        let error = await #expect(throws: GuestError.self) {
            try await loop.run {
                _ = try await ShadowEmulator.start(
                    line,
                    .init(sizes: [:], memory: 1 << 20, memoryID: "ram"),
                    isIncoming: false,
                    isFiltered: false,
                    isWanted: { questions.ask() == 1 },
                    on: loop
                )
            }
        }
        #expect(error?.message.contains("nobody waits for it any more") == true, "\(String(describing: error))")
        #expect(questions.asked == 2)
    }
}
