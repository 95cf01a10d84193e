import Emulator
import IO
import Migration
import TestSupport
import Testing

/// The other host has the release before this one; `deploy/previous-release` builds it.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct PreviousReleaseEndToEnd {
    static let program = "\(Lab.repository)/.cache/release-944f949/crossdock"

    /// A lab with an idle guest on host a; one of the hosts has the previous release.
    private func lab(destinationIsOld: Bool) async throws -> Lab {
        let lab = try Lab()
        try await lab.startDestination(program: destinationIsOld ? Self.program : Lab.crossdock)
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 4)
        try await lab.startIdleGuest(disks: [disk])
        return lab
    }

    private func migrate(_ lab: Lab, sourceIsOld: Bool) async throws -> ToolResult {
        guard sourceIsOld else { return try await lab.migrate() }
        return try await Tool.run([Self.program] + lab.migrateCommand(), seconds: 120)
    }

    @Test(arguments: [true, false])
    func aRunningGuestMovesToAndFromThePreviousRelease(_ destinationIsOld: Bool) async throws {
        let lab = try await lab(destinationIsOld: destinationIsOld)
        let result = try await migrate(lab, sourceIsOld: !destinationIsOld)
        #expect(result.code == 0, "\(result.all)")
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
        try await eventually("the old copy has ended") {
            Lab.processes(containing: "\(lab.state("a"))/").allSatisfy { !$0.line.contains("qemu-system") }
        }
    }

    /// A host with the previous release would let it go on: nobody can tell it that the guest was paused.
    @Test func aPausedGuestIsNotOfferedToThePreviousRelease() async throws {
        let lab = try await lab(destinationIsOld: true)
        try await lab.monitor("a") { try await $0.pause() }
        let result = try await lab.migrate()
        #expect(result.code != 0, "\(result.all)")
        #expect(result.errors.contains("too old") && result.errors.contains("paused"), "\(result.all)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "paused")
        try await eventually("the destination has nothing of it") { try lab.leftAtDestination() == [] }
        // Once it runs it can move.
        try await lab.monitor("a") { try await $0.resume() }
        #expect(try await lab.migrate().code == 0)
    }

    @Test func aGuestThatIsPausedInTheMiddleIsNotReleasedToThePreviousRelease() async throws {
        let lab = try Lab()
        try await lab.startDestination(program: Self.program)
        let disk = try await lab.makeImage("disk.raw", megabytes: 48, data: 16)
        try await lab.startIdleGuest(disks: [disk])
        let migration = try lab.beginMigration(more: ["--bandwidth", "1500000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        try await lab.monitor("a") { try await $0.pause() }
        let result = try await migration.finish(seconds: 120)
        #expect(result.code != 0, "\(result.all)")
        #expect(result.errors.contains("too old") && result.errors.contains("paused"), "\(result.all)")
        #expect(try await lab.monitor("a") { try await $0.status() } == "paused")
        try await eventually("the destination has nothing of it") { try lab.leftAtDestination() == [] }
    }
}
