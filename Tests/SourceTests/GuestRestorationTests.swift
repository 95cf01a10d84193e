import Emulator
import Glibc
import IO
import TestSupport
import Testing

@testable import Source

/// A guest comes back from wherever its migration is ended.
@Suite(.timeLimit(.minutes(5)))
struct GuestRestorationTests {
    /// A QEMU of its own, whose migration thread runs when nothing else of it wants to: what it does after it has let go of QEMU's lock then
    /// comes after what has waited for that lock.
    private struct HesitantEmulator {
        let process: ChildProcess
        let monitor: QMPClient

        static func start(_ directory: TestDirectory, on loop: EventLoop) async throws -> HesitantEmulator {
            let socket = directory.file("qmp.sock")
            let process = try ChildProcess([
                "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none",
                "-name",
                "hesitant,debug-threads=on", "-qmp", "unix:\(socket),server=on,wait=off",
            ])
            try await eventually("the monitor answers") {
                (try? await QMPClient.connect(to: socket, on: loop).close()) != nil
            }
            let monitor = try await QMPClient.connect(to: socket, on: loop)
            try await monitor.setCapabilities(["events", "pause-before-switchover"], to: true)
            // All of it on one processor, where its threads have to wait for each other.
            let processor = try #require(Self.processor, "a processor that this process may use")
            let pinned = try await Tool.run(["taskset", "-a", "-c", "-p", processor, "\(process.pid)"])
            #expect(pinned.code == 0, "\(pinned.all)")
            return HesitantEmulator(process: process, monitor: monitor)
        }

        /// One of those that this process may use.
        private static var processor: String? {
            let status = String(decoding: ((try? DurableFile.read("/proc/self/status")) ?? nil) ?? [], as: UTF8.self)
            let line = status.split(separator: "\n").first { $0.hasPrefix("Cpus_allowed_list:") }
            return line?.split(whereSeparator: { !$0.isNumber }).first.map(String.init)
        }

        /// Begins a migration, and cancels it as soon as it has stopped the guest.
        func cancelAtStop() async throws {
            let stop = AsyncStream<Void>.makeStream()
            monitor.onEvent = { if $0.name == "STOP" { stop.continuation.yield() } }
            defer { monitor.onEvent = nil }
            try await monitor.setMigrationParameters(["downtime-limit": 10_000, "max-bandwidth": 1_000_000])
            try await monitor.execute("migrate", ["uri": "exec:cat > /dev/null"])
            try await eventually("the migration's thread") { try await self.slowDown() }
            try await monitor.setMigrationParameters(["max-bandwidth": .integer(1 << 40)])
            for await _ in stop.stream { break }
            try await monitor.cancelMigration()
        }

        private func slowDown() async throws -> Bool {
            let tasks = "/proc/\(process.pid)/task"
            for task in DurableFile.list(tasks) {
                let name = ((try? DurableFile.read("\(tasks)/\(task)/comm")) ?? nil) ?? []
                guard name.starts(with: "live_migration".utf8) || name.starts(with: "mig/src/main".utf8) else {
                    continue
                }
                let changed = try await Tool.run(["chrt", "--idle", "--pid", "0", task])
                #expect(changed.code == 0, "\(changed.all)")
                return changed.code == 0
            }
            return false
        }

        /// Whether the migration does not come to its end.
        func isStuck() async throws -> Bool {
            for _ in 0..<50 {
                if try await monitor.migrationState().status != "cancelling" { return false }
                await monitor.loop.sleep(for: .milliseconds(10))
            }
            return true
        }
    }

    @Test func aMigrationThatIsCancelledAsItComesToTheSwitchoverLeavesNoGuestPaused() async throws {
        let (directory, loop) = (try TestDirectory(), EventLoop(name: "restoration"))
        defer { loop.stop() }
        try await loop.run {
            let emulator = try await HesitantEmulator.start(directory, on: loop)
            defer { emulator.process.signal(SIGKILL) }
            let restoration = GuestRestoration(monitor: emulator.monitor, guest: .running)
            var stuck = 0
            for _ in 0..<20 where stuck < 3 {
                try await emulator.cancelAtStop()
                if try await emulator.isStuck() { stuck += 1 }
                #expect(await restoration.endAttempt() == nil)
                #expect(try await emulator.monitor.status() == "running")
            }
            // Other versions do not wait there.
            if emulator.monitor.version.hasPrefix("7.2") { #expect(stuck > 0) }
            emulator.monitor.close()
        }
    }
}
