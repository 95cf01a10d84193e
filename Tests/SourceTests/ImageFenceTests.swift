import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

@testable import Source

@Suite(.timeLimit(.minutes(2)))
struct ImageFenceTests {
    let lab: FenceLab
    init() throws { lab = try FenceLab() }

    @Test func anImageIsTakenAwayAndGivenBackAsOftenAsIsAsked() async throws {
        let image = try lab.image()
        let fence = lab.fence([image], try await lab.startEmulator([image]))
        #expect(fence.check() == [])
        #expect(lab.names() == ["disk.raw"])
        try fence.raise()
        try fence.raise()
        #expect(lab.names() == ["disk.raw.released-1-a"])
        #expect(fence.fencedFiles == ["\(image).released-1-a"])
        #expect(fence.lift() == [])
        #expect(fence.lift() == [])
        #expect(lab.names() == ["disk.raw"])
    }

    @Test func theFileItselfIsFencedBehindLinksOfItAndOfItsDirectory() async throws {
        mkdir(lab.directory.file("real"), 0o700)
        _ = try lab.image("real/disk.raw")
        symlink("real", lab.directory.file("images"))
        symlink("images/disk.raw", lab.directory.file("link"))
        let link = lab.directory.file("link")
        let fence = lab.fence([link], try await lab.startEmulator([link]))
        #expect(fence.check() == [])
        try fence.raise()
        #expect(!DurableFile.exists(link))
        #expect(DurableFile.list(lab.directory.file("real")) == ["disk.raw.released-1-a"])
        #expect(fence.lift() == [])
        #expect(DurableFile.exists(link))
    }

    @Test func aFenceThatFailsIsUndoneAndNamesTheFile() async throws {
        let images = [try lab.image("a.raw"), try lab.image("b.raw")]
        let fence = lab.fence(images, try await lab.startEmulator(images))
        _ = try lab.image("b.raw.released-1-a")
        let error = #expect(throws: MigrationError.self) { try fence.raise() }
        #expect(error?.message.contains(images[1]) == true)
        #expect(lab.names() == ["a.raw", "b.raw", "b.raw.released-1-a"])
    }

    @Test func aFileThatWasMovedOrReplacedUnderQEMUIsFoundBeforehandAndByTheFence() async throws {
        let image = try lab.image()
        let process = try await lab.startEmulator([image])
        rename(image, lab.directory.file("elsewhere.raw"))
        _ = try lab.image()
        let fence = lab.fence([image], process)
        let problems = fence.check()
        #expect(
            problems.count == 1 && problems[0].contains("\(image) was moved or replaced under guest 'web1'"),
            "\(problems)"
        )
        #expect(throws: MigrationError.self) { try fence.raise() }
        #expect(lab.names() == ["disk.raw", "elsewhere.raw"])
    }

    @Test func aFileThatIsReplacedAfterTheCheckIsGivenBack() async throws {
        let image = try lab.image()
        let fence = lab.fence([image], try await lab.startEmulator([image]))
        #expect(fence.check() == [])
        rename(image, lab.directory.file("elsewhere.raw"))
        _ = try lab.image()
        let error = #expect(throws: MigrationError.self) { try fence.raise() }
        #expect(error?.message.contains("moved or replaced") == true)
        #expect(lab.names() == ["disk.raw", "elsewhere.raw"])
    }

    @Test func anotherNameOfTheFileIsFound() async throws {
        let image = try lab.image()
        let fence = lab.fence([image], try await lab.startEmulator([image]))
        link(image, lab.directory.file("second.raw"))
        let problems = fence.check()
        #expect(problems.count == 1 && problems[0].contains("has 2 names (hard links)"), "\(problems)")
        let error = #expect(throws: MigrationError.self) { try fence.raise() }
        #expect(error?.message.contains("hard link") == true)
        #expect(lab.names() == ["disk.raw", "second.raw"])
    }

    @Test func aNameThatGetsTooLongIsFound() async throws {
        let fits = try lab.image(String(repeating: "x", count: 255 - ".released-1-a".utf8.count))
        let long = try lab.image(String(repeating: "y", count: 243))
        let fence = lab.fence([fits, long], try await lab.startEmulator([fits, long]))
        let problems = fence.check()
        #expect(
            problems.count == 1 && problems[0].contains("it has 256 bytes, and 255 are possible there"),
            "\(problems)"
        )
        #expect(throws: MigrationError.self) { try fence.raise() }
        #expect(lab.names().count == 2 && DurableFile.exists(fits) && DurableFile.exists(long))
    }

    @Test func whatIsInTheWayIsFound() async throws {
        let image = try lab.image()
        _ = try lab.image("disk.raw.released-1-a")
        let problems = lab.fence([image], try await lab.startEmulator([image])).check()
        #expect(problems == ["\(image).released-1-a is in the way of the image's fence; remove it"])
    }

    @Test func aLiftSaysWhatIsInTheWay() throws {
        let image = try lab.image()
        let fence = lab.fence([image])
        try fence.raise()
        _ = try lab.image()
        #expect(fence.lift() == ["The image \(image).released-1-a cannot get its name back: \(image) is in the way"])
        unlink(image)
        #expect(fence.lift() == [])
        #expect(lab.names() == ["disk.raw"])
    }

    @Test func theFenceOfAnAgentThatDiedIsLiftedFromWhatItSaved() throws {
        _ = try lab.image("disk.raw")
        symlink("disk.raw", lab.directory.file("link"))
        try lab.record([.init(lab.directory.file("link"))], [.offered(guest: "web1", destination: "host-b", order: 0)])
        try lab.fence([lab.directory.file("link")]).raise()
        #expect(lab.names() == ["disk.raw.released-1-a", "link"])
        let later = ImageFence(recovering: "1-a", guest: "web1", process: nil, in: lab.migrations)
        try later.raise()
        #expect(later.lift() == [])
        #expect(lab.names() == ["disk.raw", "link"])
    }

    @Test func whatAnEarlierVersionSavedIsLiftedAsItWasFenced() throws {
        let image = try lab.image("disk.raw.released-1-a")
        try DurableFile.write(
            Array(
                #"[{"path":"\#(lab.directory.file("disk.raw"))","format":"raw","size":65536,"isSealed":false}]"#.utf8
            ),
            to: lab.migrations.files(of: "1-a").disks
        )
        let fence = ImageFence(recovering: "1-a", guest: "web1", process: nil, in: lab.migrations)
        #expect(fence.fencedFiles == [image])
        #expect(fence.lift() == [])
        #expect(lab.names() == ["disk.raw"])
    }

    @Test func anImageThatIsGoneForGoodNeedsNoFence() throws {
        let image = try lab.image()
        let fence = lab.fence([image])
        unlink(image)
        try fence.raise()
        #expect(fence.lift() == [])
    }

    @Test func theSameImageTwiceIsFencedOnce() throws {
        let image = try lab.image()
        symlink(image, lab.directory.file("link"))
        let fence = lab.fence([image, lab.directory.file("link")])
        #expect(fence.images.count == 1)
        try fence.raise()
        #expect(fence.lift() == [])
    }

    @Test func imagesWhoseTimeIsOverAreDeletedUnderTheirOwnNames() throws {
        _ = try lab.image("disk.raw")
        symlink("disk.raw", lab.directory.file("link"))
        try lab.record(
            [.init(lab.directory.file("link"))],
            [.offered(guest: "web1", destination: "host-b", order: 0), .released, .confirmed]
        )
        let fence = lab.fence([lab.directory.file("link")])
        try fence.raise()
        try FencedImages.remember(fence, migration: "1-a", keep: 10, lab.migrations)
        #expect(FencedImages.purge(lab.migrations) == [])
        let later = time(nil) + 20
        #expect(FencedImages.areKept("1-a", lab.migrations) && !FencedImages.areKept("1-a", lab.migrations, now: later))
        #expect(FencedImages.purge(lab.migrations, now: later) == [lab.directory.file("disk.raw.released-1-a")])
        #expect(FencedImages.purge(lab.migrations, now: later) == [])
        #expect(!FencedImages.areKept("1-a", lab.migrations, now: later))
    }

    @Test func anImageWhoseDigestDiffersIsNoSeed() throws {
        let image = try lab.image()
        let fence = lab.fence([image])
        try fence.raise()
        let files = lab.migrations.files(of: "1-a")
        let (fenced, lineage) = ("\(image).released-1-a", Lineage())
        // Without a record nobody has compared it.
        FencedImages.offer(fenced, as: lineage, files)
        #expect(FencedRecord(of: files) == nil)
        try FencedImages.remember(fence, migration: "1-a", keep: 10, lab.migrations)
        #expect(FencedRecord(of: files)?.lineages == nil)
        FencedImages.offer(fenced, as: lineage, files)
        #expect(FencedRecord(of: files)?.lineages == [fenced: lineage])
        FencedImages.keepForever("1-a", lab.migrations)
        #expect(FencedRecord(of: files)?.lineages == nil && FencedRecord(of: files)?.paths == [fenced])
    }

    // MARK: What only another user or another namespace sees

    /// What the check says to a process that runs behind `prefix`.
    private func check(_ image: String, behind prefix: [String], _ process: EmulatorProcess? = nil) async throws
        -> [String]
    {
        var environment = [
            "env", "CROSSDOCK_TEST_FENCE=\(lab.directory.file("state"))", "CROSSDOCK_TEST_IMAGE=\(image)",
        ]
        if let process { environment.append("CROSSDOCK_TEST_PROCESS=\(process.pid)") }
        let own = DurableFile.resolve("/proc/self/exe", in: "/")
        let result = try await Tool.run(
            prefix + environment + [own, "--testing-library", "swift-testing", "--filter", "saysWhatTheCheckSays"]
        )
        let lines = result.output.split(separator: "\n").filter { $0.hasPrefix("CHECK ") }.map {
            String($0.dropFirst(6))
        }
        guard lines.first == "begins" else { throw TestFailure(result.all) }
        return Array(lines.dropFirst())
    }

    /// Runs in a process of its own.
    @Test(.enabled(if: ProcessInfo.processInfo.environment["CROSSDOCK_TEST_FENCE"] != nil))
    func saysWhatTheCheckSays() {
        let environment = ProcessInfo.processInfo.environment
        let store = MigrationStore(stateDirectory: environment["CROSSDOCK_TEST_FENCE"] ?? "")
        let fence = ImageFence(
            of: [FencedImage(environment["CROSSDOCK_TEST_IMAGE"] ?? "")],
            process: environment["CROSSDOCK_TEST_PROCESS"].flatMap { Int32($0) }.flatMap { EmulatorProcess(pid: $0) },
            guest: "web1",
            migration: "1-a",
            in: store
        )
        print("CHECK begins")
        for problem in fence.check() { print("CHECK \(problem)") }
        fflush(nil)
    }

    @Test func anImageThatIsAMountPointIsFound() async throws {
        let image = try lab.image()
        let problems = try await check(
            image,
            behind: Namespace.mount + ["sh", "-c", "mount --bind \(image) \(image) && exec \"$@\"", "sh"]
        )
        #expect(problems.count == 1 && problems[0].contains("\(image) is a mount point of its own"), "\(problems)")
    }

    @Test func anImageThatIsMountedElsewhereTooIsFound() async throws {
        let image = try lab.image()
        let other = try lab.image("a b")
        let problems = try await check(
            image,
            behind: Namespace.mount + ["sh", "-c", "mount --bind \(image) '\(other)' && exec \"$@\"", "sh"]
        )
        #expect(problems.count == 1 && problems[0].contains("is mounted at \(other) too"), "\(problems)")
    }

    @Test func anImageThatIsMountedWhereQEMURunsIsFound() async throws {
        let image = try lab.image()
        let other = try lab.image("inside")
        let process = try await lab.startEmulator(
            [other],
            prefix: Namespace.mount + ["sh", "-c", "mount --bind \(image) \(other) && exec \"$@\"", "sh"]
        )
        let problems = lab.fence([image], process).check()
        #expect(problems.count == 1 && problems[0].contains("is mounted at \(other) where QEMU"), "\(problems)")
    }

    @Test func aFileSystemThatIsReadOnlyIsFound() async throws {
        let place = lab.directory.directory("place")
        let problems = try await check(
            "\(place)/disk.raw",
            behind: Namespace.mount + [
                "sh", "-c",
                "mount -t tmpfs none \(place) && echo > \(place)/disk.raw && mount -o remount,ro \(place) && exec \"$@\"",
                "sh",
            ]
        )
        #expect(problems.count == 1 && problems[0].contains("file system is read-only"), "\(problems)")
    }

    @Test(.enabled(if: geteuid() == 0)) func aDirectoryThatThisUserMayNotChangeIsFound() async throws {
        let place = lab.directory.directory("place")
        let image = try lab.image("place/disk.raw")
        for path in [lab.directory.path, place] { chmod(path, 0o755) }
        chmod(image, 0o644)
        let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        let denied = try await check(image, behind: nobody)
        #expect(denied.count == 1 && denied[0].contains("this user may not write to the directory"), "\(denied)")
        chmod(place, 0o1777)
        let sticky = try await check(image, behind: nobody)
        #expect(sticky.count == 1 && sticky[0].contains("sticky"), "\(sticky)")
        #expect(DurableFile.list(place) == ["disk.raw"])
        let process = try await lab.startEmulator([image])
        let foreign = try await check(image, behind: nobody, process)
        #expect(foreign.contains { $0.contains("may not be signalled by this user") }, "\(foreign)")
        #expect(foreign.contains { $0.contains("has open cannot be seen") }, "\(foreign)")
    }

    @Test(.enabled(if: geteuid() == 0)) func anImmutableImageOrDirectoryIsFound() async throws {
        let place = lab.directory.directory("place")
        let image = try lab.image("place/disk.raw")
        let fence = lab.fence([image], try await lab.startEmulator([image]))
        for (flag, path) in [("i", image), ("a", image), ("i", place), ("a", place)] {
            guard try await Tool.run(["chattr", "+\(flag)", path]).code == 0 else { continue }
            let problems = fence.check()
            #expect(try await Tool.run(["chattr", "-\(flag)", path]).code == 0)
            #expect(
                problems.count == 1 && problems[0].contains("immutable or append-only"),
                "\(path) \(flag) \(problems)"
            )
        }
        #expect(fence.check() == [])
        #expect(DurableFile.list(place) == ["disk.raw"])
    }
}
