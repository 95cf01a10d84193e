import TestSupport
import Testing

/// A few runs of the fault matrix; `make faults` has all of them.
@Suite(.serialized, .timeLimit(.minutes(30)))
struct FaultMatrixTests {
    @Test func brokenMigrationsLoseNoGuestAndRunNoneTwice() async throws {
        let result = try await Tool.run(
            [
                "python3", "\(Lab.repository)/Tests/Faults/faults.py", Lab.crossdock, Lab.guestFiles, "--fast",
            ],
            seconds: 500
        )
        #expect(result.code == 0, "\(result.all)")
    }

    /// The judge complains about evidence that was tampered with.
    @Test func theJudgeOfTheMatrixIsNotBlind() async throws {
        let result = try await Tool.run(
            [
                "python3", "\(Lab.repository)/Tests/Faults/faults.py", Lab.crossdock, Lab.guestFiles, "--selftest",
            ],
            seconds: 120
        )
        #expect(result.code == 0, "\(result.all)")
    }
}
