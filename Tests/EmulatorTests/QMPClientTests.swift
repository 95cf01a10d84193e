import Emulator
import IO
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(1)))
struct QMPClientTests {
    /// A real QEMU without a machine, and its monitor.
    func withEmulator(_ body: @escaping @Sendable (EventLoop, String) async throws -> Void) async throws {
        let directory = try TestDirectory()
        let path = directory.file("qmp")
        let emulator = try ChildProcess([
            "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp",
            "unix:\(path),server=on,wait=off",
        ])
        try await emulator.wait(for: "a monitor") { isListening(path) }
        try await onLoop { loop in
            try await body(loop, path)
        }
        withExtendedLifetime(emulator) {}
    }

    @Test func greetsExecutesAndReportsQEMUsOwnWords() async throws {
        try await withEmulator { loop, path in
            let monitor = try await QMPClient.connect(to: path, on: loop)
            #expect(monitor.version.split(separator: ".").count == 3)
            #expect(monitor.hasOutOfBand)
            #expect(try await monitor.status() == "prelaunch")
            #expect(try await monitor.machineType() == "none")
            let error = await #expect(throws: QMPError.self) { try await monitor.execute("no-such-command") }
            #expect(error?.errorClass == "CommandNotFound")
            #expect(error?.message.contains("no-such-command") == true)
            monitor.close()
        }
    }

    @Test func eventsArriveInOrder() async throws {
        try await withEmulator { loop, path in
            let monitor = try await QMPClient.connect(to: path, on: loop)
            final class Record: @unchecked Sendable { var names: [String] = [] }
            let record = Record()
            monitor.onEvent = { record.names.append($0.name) }
            try await monitor.resume()
            try await monitor.execute("stop")
            #expect(record.names == ["RESUME", "STOP"])
            monitor.close()
        }
    }

    @Test func aMonitorHeldByAnotherClientIsToldApart() async throws {
        try await withEmulator { loop, path in
            let first = try await QMPClient.connect(to: path, on: loop)
            let error = await #expect(throws: QMPError.self) {
                try await QMPClient.connect(to: path, on: loop, timeout: .milliseconds(200))
            }
            #expect(error?.code == .timedOut && error?.message.contains("another client holds it") == true)
            first.close()
        }
    }

    @Test func theEndOfQEMUFailsWhatWaitsAndIsReported() async throws {
        try await withEmulator { loop, path in
            let monitor = try await QMPClient.connect(to: path, on: loop)
            let ended = AsyncCondition()
            monitor.onDisconnect = { ended.signal() }
            async let end: Void = ended.wait()
            await monitor.quit()
            await end
            #expect(!monitor.isConnected)
            let error = await #expect(throws: QMPError.self) { try await monitor.status() }
            #expect(error?.code == .disconnected)
        }
    }

    /// What a hostile or broken peer sends instead of a greeting.
    @Test(arguments: ["{}\n", "garbage\n", "{\"QMP\"", "[1,2]\n", ""])
    func whatIsNoMonitorIsRefused(_ greeting: String) async throws {
        try await onLoop { loop in
            let directory = try TestDirectory()
            let address = SocketAddress.unix(path: directory.file("s"))
            let listener = try await Listener.listen(on: address, loop: loop)
            let serving = Task(executorPreference: loop) {
                let channel = try await listener.accept()
                try await channel.write(Array(greeting.utf8))
                channel.close()
            }
            await #expect(throws: (any Error).self) {
                try await QMPClient.connect(to: directory.file("s"), on: loop, timeout: .seconds(5))
            }
            _ = try await serving.value
            listener.close()
        }
    }

    /// What QEMU still had to say to the client before this one.
    @Test func whatWasMeantForAnEarlierClientComesBeforeTheGreeting() async throws {
        try await onLoop { loop in
            let directory = try TestDirectory()
            let address = SocketAddress.unix(path: directory.file("s"))
            let listener = try await Listener.listen(on: address, loop: loop)
            let serving = Task(executorPreference: loop) {
                let channel = try await listener.accept()
                let text = """
                    {"event": "RTC_CHANGE", "data": {"offset": 3600}, "timestamp": {"seconds": 1, "microseconds": 0}}
                    {"return": {}, "id": "of-another"}
                    {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 1}}, "capabilities": []}}

                    """
                try await channel.write(Array(text.utf8))
                let lines = LineReader(channel, limit: 100_000)
                let request = try JSONValue(parsing: try await lines.next() ?? [])
                try await channel.write(Array("{\"return\": {}, \"id\": \"\(request["id"]?.string ?? "")\"}\n".utf8))
                return channel
            }
            let client = try await QMPClient.connect(to: directory.file("s"), on: loop, timeout: .seconds(5))
            #expect(client.version == "7.2.1")
            client.close()
            try await serving.value.close()
            listener.close()
        }
    }

    @Test func aLineWithoutEndIsNotStoredWithoutBound() async throws {
        try await onLoop { loop in
            let (near, far) = MemoryChannel.pair(on: loop)
            let writing = Task(executorPreference: loop) {
                while true { try await far.write([UInt8](repeating: 65, count: 4096)) }
            }
            let error = await #expect(throws: ChannelError.self) {
                _ = try await LineReader(near, limit: 100_000).next()
            }
            #expect(error?.code == .protocolViolation)
            near.close()
            _ = await writing.result
        }
    }

    @Test func aCommandThatIsNeverAnsweredTimesOut() async throws {
        try await onLoop { loop in
            let directory = try TestDirectory()
            let listener = try await Listener.listen(on: .unix(path: directory.file("s")), loop: loop)
            let serving = Task(executorPreference: loop) {
                let channel = try await listener.accept()
                try await channel.write(Array("{\"QMP\":{\"version\":{\"qemu\":{}},\"capabilities\":[]}}\r\n".utf8))
                _ = try await LineReader(channel, limit: 1000).next()
                try await channel.write(Array("{\"return\":{},\"id\":\"xd1\"}\n".utf8))
                return channel
            }
            let monitor = try await QMPClient.connect(to: directory.file("s"), on: loop)
            let error = await #expect(throws: QMPError.self) {
                try await monitor.execute("query-status", timeout: .milliseconds(50))
            }
            #expect(error?.code == .timedOut && error?.message.contains("query-status") == true)
            monitor.close()
            try await serving.value.close()
            listener.close()
        }
    }
}
