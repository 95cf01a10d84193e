import FoundationEssentials
import Migration
import Testing

@testable import Source

/// What doctor makes of what it is told.
struct DoctorTests {
    private static func clocks(_ there: Double) -> Finding {
        let now = Date(timeIntervalSince1970: 1_000_000)
        return Doctor.clocks(Int64((1_000_000 + there) * 1000), now, now.addingTimeInterval(0.2))
    }

    @Test func clocksThatDifferAreNamedAndADayFails() {
        #expect(Self.clocks(0.1).result == .ok)
        #expect(Self.clocks(0.9).result == .ok)
        #expect(Self.clocks(-3).result == .warn)
        #expect(Self.clocks(86400).result == .fail)
        #expect(Self.clocks(-86400).result == .fail)
    }

    private static func report(changing: Double, rate: Double) -> MigrationReport {
        var report = MigrationReport(migration: "1-ab", guest: "web1", destination: "host-b:10808")
        report.outcome = .rehearsed
        var rehearsal = MigrationReport.Rehearsal()
        rehearsal.bytesPerSecond = rate
        rehearsal.memoryDirtyRate = changing
        report.rehearsal = rehearsal
        return report
    }

    private static let plan = MigrationPlan(
        id: "1-ab",
        guest: "web1",
        host: "host-b",
        port: 10808,
        stateDirectory: "/nowhere"
    )

    @Test func aGuestThatChangesMoreThanTheLineCarriesIsNamed() {
        let calm = GuestFindings(Self.report(changing: 60, rate: 100), [], Self.plan).findings
        #expect(calm.first { $0.check == .convergence }?.result == .ok)
        let wild = GuestFindings(Self.report(changing: 80, rate: 100), [], Self.plan).findings
        #expect(wild.first { $0.check == .convergence }?.result == .warn)
    }

    @Test func everyObstacleIsAFailureOfItsCheck() {
        var report = Self.report(changing: 0, rate: 100)
        report.outcome = .rolledBack
        report.obstacles = [Obstacle(.space, "no room"), Obstacle(.policy, "too many")]
        let found = GuestFindings(report, ["look"], Self.plan).findings.filter { $0.result != .ok }
        #expect(found.map(\.check) == [.space, .policy, .rehearsal])
        #expect(found.map(\.result) == [.fail, .fail, .warn])
        report.obstacles = nil
        report.reason = "There is no guest"
        #expect(GuestFindings(report, [], Self.plan).findings.first?.check == .rehearsal)
    }

    @Test func whatIsWellOnBothSidesIsOneRow() {
        let here = [Finding(.space, .ok, here: "1 GiB"), Finding(.kernel, .ok, here: "KVM")]
        let there = [
            Finding(.space, .fail, there: "0", message: "full"), Finding(.kernel, .ok, there: "KVM"),
        ]
        let rows = Doctor.merged(here, there)
        #expect(rows.map(\.check) == [.space, .kernel])
        #expect(rows.map(\.result) == [.fail, .ok])
        #expect(rows[0].here == "1 GiB" && rows[0].there == "0" && rows[0].message == "full")
        #expect(Doctor.merged([Finding(.space, .warn)], [Finding(.space, .fail)]).count == 2)
    }
}
