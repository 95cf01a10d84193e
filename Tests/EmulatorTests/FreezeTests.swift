import Emulator
import Glibc
import IO
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(1)))
struct FreezeTests {
    private struct Emulator {
        let child: ChildProcess
        let process: EmulatorProcess
        let socket: String
        let directory: TestDirectory

        init() async throws {
            directory = try TestDirectory()
            let path = directory.file("qmp")
            socket = path
            child = try ChildProcess([
                "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp",
                "unix:\(path),server=on,wait=off",
            ])
            try await child.wait(for: "a monitor") { isListening(path) }
            process = try #require(EmulatorProcess(pid: child.pid))
        }
    }

    @Test func aFrozenQEMUAnswersNobodyUntilItIsThawed() async throws {
        let emulator = try await Emulator()
        #expect(emulator.process.maySignal && !emulator.process.isFrozen)
        #expect(try emulator.process.freeze())
        #expect(emulator.process.isFrozen && emulator.process.isRunning)
        try await onLoop { [socket = emulator.socket] loop in
            await #expect(throws: QMPError.self) {
                try await QMPClient.connect(to: socket, on: loop, timeout: .milliseconds(200))
            }
        }
        try emulator.process.thaw()
        try await onLoop { [socket = emulator.socket] loop in
            let monitor = try await QMPClient.connect(to: socket, on: loop)
            #expect(try await monitor.status() == "prelaunch")
            monitor.close()
        }
        #expect(!emulator.process.isFrozen)
    }

    @Test func whoWasStoppedBySomebodyElseIsToldApart() async throws {
        let emulator = try await Emulator()
        emulator.child.signal(SIGSTOP)
        try await eventually("it is stopped") { emulator.process.isFrozen }
        #expect(try !emulator.process.freeze())
        try emulator.process.thaw()
        try await eventually("it runs") { !emulator.process.isFrozen }
    }

    @Test func aFrozenQEMUIsEndedWithoutRunningAgain() async throws {
        let emulator = try await Emulator()
        try emulator.process.freeze()
        await emulator.process.terminate(grace: .seconds(30))
        let ended = try await emulator.child.finish(seconds: 5)
        #expect(ended.code == 128 + SIGKILL)
    }

    @Test func oneThatHasEndedIsNotFrozen() async throws {
        let emulator = try await Emulator()
        emulator.child.signal(SIGKILL)
        _ = try await emulator.child.finish()
        let error = #expect(throws: GuestError.self) { try emulator.process.freeze() }
        #expect(error?.message.contains("it has ended") == true)
        #expect(!emulator.process.isFrozen && emulator.process.maySignal)
        try emulator.process.thaw()
    }

    @Test func oneThatDoesNotStopIsNamedWithTheReason() async throws {
        let emulator = try await Emulator()
        // A debugger's stop is none: whoever traces it can let it go on.
        let tracer = try ChildProcess([
            "python3", "-c",
            """
            import ctypes, os, time
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.ptrace(16, \(emulator.process.pid), None, None) == 0, os.strerror(ctypes.get_errno())
            print("up", flush=True)
            time.sleep(60)
            """,
        ])
        try await tracer.wait(for: "the tracer") { tracer.output.contains("up") }
        let error = #expect(throws: GuestError.self) { try emulator.process.freeze(within: .milliseconds(200)) }
        #expect(error?.message.contains("is held by a debugger") == true, "\(error?.message ?? "")")
        #expect(!emulator.process.isFrozen)
    }
}
