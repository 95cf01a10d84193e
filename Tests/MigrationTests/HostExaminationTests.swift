import Glibc
import IO
import Migration
import TestSupport
import Testing

/// What a host says of itself: each check, and how it fails.
struct HostExaminationTests {
    /// A host with a state directory of its own, and nothing wrong that it can help.
    private static func host(_ directory: TestDirectory) -> HostExamination {
        var host = HostExamination(stateDirectory: directory.directory("state"))
        chmod(host.stateDirectory, 0o711)
        host.hostname = "host-a"
        return host
    }

    private static func found(_ check: Check, _ host: HostExamination) -> [Finding] {
        host.findings().filter { $0.check == check }
    }

    @Test func everyFailureHasAMessageAndARemedy() throws {
        let directory = try TestDirectory()
        var host = Self.host(directory)
        host.hostname = "localhost"
        host.devices = directory.directory("devices")
        host.processes = directory.directory("processes")
        host.credentials = directory.file("nothing")
        host.measuresDisk = true
        for finding in host.findings() where finding.result != .ok {
            #expect(finding.message != nil, "\(finding)")
            #expect(finding.remedy != nil, "\(finding)")
        }
    }

    @Test func aHostWithoutANameOfItsOwnIsNamed() throws {
        let directory = try TestDirectory()
        var host = Self.host(directory)
        #expect(Self.found(.name, host).map(\.result) == [.ok])
        host.hostname = "localhost"
        #expect(Self.found(.name, host).map(\.result) == [.warn])
    }

    @Test func certificatesThatAreNotGoodAnyMoreFail() throws {
        let directory = try TestDirectory()
        let pki = try TestPKI()
        var host = Self.host(directory)
        host.credentials = try pki.issue("good", hosts: ["host-a"], ends: 365 * 86400)
        let good = Self.found(.certificate, host)
        #expect(good.map(\.result) == [.ok], "\(good)")
        #expect(good.first?.here?.hasPrefix("until 20") == true)
        host.credentials = try pki.issue("soon", hosts: ["host-a"], ends: 10 * 86400)
        #expect(Set(Self.found(.certificate, host).map(\.result)) == [.warn])
        host.credentials = try pki.issue("over", hosts: ["host-a"], starts: -7200, ends: -3600)
        #expect(
            Self.found(.certificate, host).contains { $0.result == .fail && $0.message?.contains("expired") == true }
        )
        host.credentials = directory.file("nothing")
        #expect(Self.found(.certificate, host).map(\.remedy) == ["crossdock pair [USER@]HOST"])
        #expect(Self.found(.certificate, host).map(\.result) == [.fail])
    }

    @Test func aKeyThatOthersCanReadIsMended() throws {
        let directory = try TestDirectory()
        let pki = try TestPKI()
        var host = Self.host(directory)
        let credentials = try pki.issue("good", hosts: ["host-a"], ends: 365 * 86400)
        host.credentials = credentials
        chmod("\(credentials)/server-key.pem", 0o640)
        let found = Self.found(.certificate, host)
        #expect(found.map(\.result) == [.warn] && found[0].remedy == "crossdock doctor --fix", "\(found)")
        #expect(host.mend() == ["Only its owner can read \(credentials)/server-key.pem now"])
        #expect(Self.found(.certificate, host).map(\.result) == [.ok])
        #expect(host.mend().isEmpty)
    }

    @Test func anImageDirectoryInMemoryIsNamed() throws {
        let memory = try TestDirectory(under: "/dev/shm")
        let host = HostExamination(stateDirectory: memory.path, imageDirectory: memory.directory("images"))
        let found = Self.found(.space, host)
        #expect(found.map(\.result) == [.warn] && found[0].message?.contains("tmpfs") == true, "\(found)")
    }

    @Test func tooLittleMemoryFails() throws {
        let directory = try TestDirectory()
        var host = Self.host(directory)
        #expect(Self.found(.memory, host).map(\.result) == [.ok])
        host.processes = directory.directory("processes")
        try DurableFile.write(Array("MemTotal: 9 kB\nMemAvailable: 1024 kB\n".utf8), to: "\(host.processes)/meminfo")
        #expect(Self.found(.memory, host).map(\.result) == [.fail])
    }

    @Test func aHostWithoutKVMIsNamed() throws {
        let directory = try TestDirectory()
        var host = Self.host(directory)
        host.devices = directory.directory("devices")
        #expect(Self.found(.kernel, host).map(\.result) == [.warn])
    }

    @Test func aDirectoryThatOthersCannotPassSpoilsConfinement() throws {
        let directory = try TestDirectory()
        let host = HostExamination(stateDirectory: "\(directory.directory("closed"))/state")
        let found = Self.found(.confinement, host)
        #expect(found.map(\.result) == [.warn], "\(found)")
    }

    @Test func theRateOfADiskIsMeasuredOnlyWhenAsked() throws {
        let directory = try TestDirectory()
        var host = Self.host(directory)
        #expect(Self.found(.diskRate, host).isEmpty)
        host.measuresDisk = true
        #expect(Self.found(.diskRate, host).first?.here?.hasSuffix("MiB/s") == true)
        #expect(DurableFile.list(host.stateDirectory).isEmpty)
        host.imageDirectory = "/proc/sys"
        #expect(Self.found(.diskRate, host).map(\.result) == [.warn])
    }

    @Test func whatIsNotDecidedIsNamedWithTheCommandThatEndsIt() throws {
        let directory = try TestDirectory()
        let host = Self.host(directory)
        #expect(Self.found(.leftovers, host).map(\.result) == [.ok])
        let migrations = MigrationStore(stateDirectory: host.stateDirectory)
        try DurableFile.makeDirectory(migrations.directory(of: "1-ab"))
        let journal = try Journal(creating: migrations.journal(of: "1-ab"))
        try journal.append(.offered(guest: "web1", destination: "host-b:10808", order: 0))
        try journal.append(.released)
        let found = Self.found(.leftovers, host)
        #expect(found.map(\.result) == [.fail] && found[0].remedy == "crossdock recover 1-ab", "\(found)")
        try journal.append(.confirmed)
        #expect(Self.found(.leftovers, host).map(\.result) == [.ok])
    }

    @Test func aSocketThatNobodyListensOnIsRemovedAndAnotherIsNot() async throws {
        let directory = try TestDirectory()
        let host = Self.host(directory)
        let path = "\(host.stateDirectory)/control.sock"
        let made = try await Tool.run([
            "python3", "-c", "import socket,sys; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1)",
            path,
        ])
        #expect(made.code == 0, "\(made.all)")
        let found = Self.found(.leftovers, host)
        #expect(found.map(\.result) == [.warn] && found[0].here == path, "\(found)")
        #expect(host.mend() == ["Removed the socket \(path)"])
        let listener = try ChildProcess([
            "python3", "-uc",
            "import socket,sys,time; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(9); print('up'); time.sleep(600)",
            path,
        ])
        try await listener.wait(for: "a listener") { listener.output.contains("up") }
        #expect(Self.found(.leftovers, host).map(\.result) == [.ok])
        #expect(host.mend().isEmpty)
        #expect(Self.found(.agent, host).map(\.result) == [.ok])
    }

    @Test func anImageOfNobodyIsNamed() throws {
        let directory = try TestDirectory()
        let host = Self.host(directory)
        try DurableFile.makeDirectory("\(host.imageDirectory)/stranger")
        let found = Self.found(.leftovers, host)
        #expect(found.map(\.result) == [.warn] && found[0].message?.contains("stranger") == true, "\(found)")
    }

    @Test func aCordonIsNamed() throws {
        let directory = try TestDirectory()
        let host = Self.host(directory)
        #expect(Self.found(.agent, host).map(\.result) == [.warn])
        try DurableFile.write([], to: "\(host.stateDirectory)/control.sock")
        #expect(Self.found(.agent, host).map(\.result) == [.ok])
        try Cordon(by: "root", message: "new memory").write(stateDirectory: host.stateDirectory)
        let found = Self.found(.agent, host)
        #expect(found.map(\.result) == [.warn] && found[0].message?.contains("new memory") == true)
    }
}

/// Reasons and the checks that found them, on their way between two agents.
struct ObstacleTests {
    @Test func reasonsKeepTheirChecks() {
        let obstacles = [Obstacle(.space, "no room"), Obstacle(.machine, "another machine")]
        let checks = Obstacle.checks(of: obstacles.map(\.reason), in: obstacles)
        #expect(checks == ["space", "machine"])
        #expect(Obstacle.paired(obstacles.map(\.reason), checks) == obstacles)
    }

    @Test func reasonsWithoutAKnownCheckAreTheRehearsals() {
        #expect(Obstacle.paired(["a"], nil) == [Obstacle(.rehearsal, "a")])
        #expect(Obstacle.paired(["a", "b"], ["moon"]) == [Obstacle(.rehearsal, "a"), Obstacle(.rehearsal, "b")])
    }

    @Test func aFindingOfTheOtherHostIsShownAsTheirs() {
        let finding = Finding(.space, .fail, here: "1 MiB\u{1b}[31m", message: "full", remedy: "make room")
        let seen = finding.seen(on: "host-b")
        #expect(seen.here == nil && seen.there?.contains("\u{1b}") == false)
        let named = Finding(.space, .fail, message: "full", guest: "web\u{1b}[31m\u{202e}1\u{9b}").seen(on: "host-b")
            .guest
        #expect(named?.unicodeScalars.contains { ["\u{1b}", "\u{202e}", "\u{9b}"].contains($0) } == false)
        #expect(seen.message == "On host-b: full" && seen.remedy == "on host-b: make room")
    }
}
