import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

@testable import Source

@Suite(.timeLimit(.minutes(2)))
struct ImageUsersTests {
    let lab: FenceLab
    init() throws { lab = try FenceLab() }

    @Test func aSecondGuestThatLocksNothingIsNamed() async throws {
        let image = try lab.image()
        symlink(image, lab.directory.file("link"))
        let first = try await lab.startEmulator([image])
        let fence = lab.fence([image], first)
        #expect(fence.users(lab.guests).users == [])
        let second = try await lab.startEmulator([lab.directory.file("link")], isDetached: true)
        let users = fence.users(lab.guests)
        #expect(users.users == [.init(process: second.pid, program: "qemu-system-x86", guest: nil, image: image)])
        var record = GuestRecord(name: "web2", commandLine: GuestCommandLine(arguments: ["qemu"], directory: "/"))
        record.process = second
        try lab.guests.save(record)
        let named = fence.users(lab.guests).obstacles
        #expect(named.count == 1 && named[0].contains("open in guest 'web2' (process \(second.pid)) too"), "\(named)")
    }

    @Test func aReaderIsAUserAndSomeoneWhoHasAnotherFileIsNot() async throws {
        let (image, other) = (try lab.image(), try lab.image("other.raw"))
        let fence = lab.fence([image], try await lab.startEmulator([image]))
        let bystander = try ChildProcess(["setsid", "-f", "sh", "-c", "exec sleep 60 < \(other)"])
        _ = try await bystander.finish()
        #expect(fence.users(lab.guests).users == [])
        // Neither a child of this process nor in its session.
        let pid = lab.directory.file("pid")
        _ = try await Tool.run(["setsid", "-f", "sh", "-c", "echo $$ > \(pid); exec sleep 60 < \(image)"])
        try await eventually("it reads") { !fence.users(lab.guests).users.isEmpty }
        let reader = Int32(String(decoding: try DurableFile.read(pid) ?? [], as: UTF8.self).filter(\.isNumber)) ?? 0
        let users = fence.users(lab.guests)
        #expect(users.users.map(\.process) == [reader])
        #expect(users.obstacles[0].contains("(process \(reader)) too"), "\(users.obstacles)")
        kill(reader, SIGKILL)
    }

    @Test func whoOnlyLooksIsWaitedForAndWhoStaysIsNamed() async throws {
        let image = try lab.image()
        let guests = lab.guests
        let fence = lab.fence([image], nil)
        _ = try await Tool.run(["setsid", "-f", "sh", "-c", "exec sleep 2 < \(image)"])
        try await eventually("it reads") { !fence.users(guests).users.isEmpty }
        let later = await BlockingPool.shared.value { fence.users(guests, patience: .seconds(60)) }
        #expect(later.users == [])
        let pid = lab.directory.file("pid")
        _ = try await Tool.run(["setsid", "-f", "sh", "-c", "echo $$ > \(pid); exec sleep 600 < \(image)"])
        try await eventually("it reads") { !fence.users(guests).users.isEmpty }
        let reader = Int32(String(decoding: try DurableFile.read(pid) ?? [], as: UTF8.self).filter(\.isNumber)) ?? 0
        defer { kill(reader, SIGKILL) }
        let lasting = await BlockingPool.shared.value { fence.users(guests, patience: .milliseconds(300)) }
        #expect(lasting.users.map(\.process) == [reader])
    }

    @Test func thisProcessAndWhatItHasStartedMayRead() async throws {
        let image = try lab.image()
        let fence = lab.fence([image], nil)
        let descriptor = open(image, O_RDONLY | O_CLOEXEC)
        defer { close(descriptor) }
        let reader = try ChildProcess(["sh", "-c", "exec 3< \(image); echo up; sleep 60"])
        try await reader.wait(for: "a reader") { reader.output.contains("up") }
        #expect(fence.users(lab.guests).users == [])
    }

    @Test func whoCannotBeSeenIsNamed() {
        var users = ImageUsers()
        #expect(users.note == nil)
        users.unseen = [(1, "systemd")]
        #expect(users.note?.contains("Whether systemd (process 1) has the guest's images open") == true)
        users.unseen += [(2, "b"), (3, "c"), (4, "d"), (5, "e")]
        #expect(users.note?.contains("systemd (process 1), b (process 2), c (process 3) and 2 other processes") == true)
    }

    @Test func itIsFastEnoughForThePause() async throws {
        let image = try lab.image()
        let fence = lab.fence([image], try await lab.startEmulator([image]))
        let clock = ContinuousClock()
        var best = Duration.seconds(10)
        for _ in 0..<5 { best = min(best, clock.measure { _ = fence.users(lab.guests) }) }
        let descriptors = DurableFile.list("/proc").filter { Int32($0) != nil }.reduce(0) {
            $0 + DurableFile.list("/proc/\($1)/fd").count
        }
        print("ImageUsers: \(best) for \(descriptors) descriptors")
        #expect(best < .milliseconds(500))
    }
}
