internal import CLinux
public import IO

/// A client of a QEMU monitor (QEMU Machine Protocol, `docs/interop/qmp-spec`).
///
/// A monitor serves one client at a time: a second one gets no greeting until the first has gone. Confined to a loop.
public final class QMPClient: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private static let maximumLine = 32 << 20

    /// The loop.
    public var loop: EventLoop { channel.loop }
    /// QEMU's version as it said in the greeting: "7.2.22".
    public private(set) var version = ""
    /// Whether commands can be executed out of band.
    public private(set) var hasOutOfBand = false
    /// Is told of every event, in order, on the loop.
    public var onEvent: ((QMPEvent) -> Void)?
    /// Is told once when the connection ends, on the loop.
    public var onDisconnect: (() -> Void)?
    /// The connection's descriptor, for a watchdog that outlives this process.
    public var descriptor: Int32 { (channel as? SocketChannel)?.descriptor ?? -1 }
    /// Whether the connection still stands.
    public var isConnected: Bool { failure == nil }
    private let channel: any Channel
    private var lines: LineReader
    private var failure: QMPError?
    private var pending: [String: (Result<JSONValue, any Error>) -> Void] = [:]
    private var nextID = 1
    private var prefix = "xd"
    /// Who answers, in what is said of a refusal: an agent's control socket speaks as QEMU's monitors do.
    private let speaker: String
    /// Whether the first line may be the rest of one that somebody else had begun to read.
    private var mayBeginInALine = false
    private let writeLock = AsyncLock()
    /// What was read of processors, which never changes while they are there: by path, then by property.
    var processorProperties: [String: [String: JSONValue?]] = [:]

    private init(_ channel: any Channel, speaker: String = "QEMU") {
        self.channel = channel
        self.speaker = speaker
        lines = LineReader(channel, limit: Self.maximumLine)
    }

    /// Connects to a monitor's Unix socket, reads the greeting and negotiates the capabilities. Called on the loop.
    ///
    /// - Parameters:
    ///   - path: the socket.
    ///   - loop: the loop.
    ///   - timeout: the time allowed for the greeting; it passes when another client holds the monitor.
    ///   - speaker: who answers there, for messages: an agent's control socket speaks as QEMU's monitors do.
    public static func connect(
        to path: String,
        on loop: EventLoop,
        timeout: Duration = .seconds(10),
        speaker: String = "QEMU"
    ) async throws -> QMPClient {
        do {
            let channel = try await SocketChannel.connect(to: .unix(path: path), on: loop, timeout: timeout)
            return try await connect(over: channel, timeout: timeout, speaker: speaker)
        } catch let error as ChannelError where error.code == .timedOut {
            throw QMPError(
                .timedOut,
                "The monitor \(path) sent no greeting within \(timeout): another client holds it, or QEMU hangs"
            )
        }
    }

    /// Reads the greeting on a channel and negotiates the capabilities. Called on the channel's loop.
    ///
    /// - Parameters:
    ///   - channel: the connection to a monitor; closed when this fails.
    ///   - timeout: the time allowed for the greeting, and then for the answer.
    ///   - speaker: who answers there, for messages.
    public static func connect(
        over channel: any Channel,
        timeout: Duration = .seconds(10),
        speaker: String = "QEMU"
    ) async throws -> QMPClient {
        let client = QMPClient(channel, speaker: speaker)
        do {
            try await channel.withDeadline(timeout, for: "The monitor's greeting") { try await client.greet() }
        } catch {
            client.close()
            throw error
        }
        Task(executorPreference: client.loop) { await client.receive() }
        let capabilities: JSONValue = client.hasOutOfBand ? ["enable": ["oob"]] : [:]
        do {
            try await client.execute("qmp_capabilities", capabilities, timeout: timeout)
        } catch {
            client.close()
            throw error
        }
        return client
    }

    /// Goes on with a conversation that another process, which has ended, had negotiated out of band commands for. Called on
    /// the channel's loop.
    public static func resume(over channel: any Channel) async throws -> QMPClient {
        let client = QMPClient(channel)
        client.hasOutOfBand = true
        client.prefix = "xd-next"
        client.mayBeginInALine = true
        Task(executorPreference: client.loop) { await client.receive() }
        // QEMU drops what was half written when it sees a byte that is no JSON, and says so in an error without an id.
        try await channel.write([0xff, UInt8(ascii: "\n")])
        return client
    }

    private func greet() async throws {
        var found: JSONValue?
        // When another client has just left, QEMU may send what was meant for that one, before it notices the new one.
        for index in 0..<64 where found == nil {
            guard let line = try await lines.next() else {
                throw QMPError(.disconnected, "\(channel.peerName) closed the connection instead of greeting")
            }
            let message = try? JSONValue(parsing: line)
            found = message?["QMP"]
            let isOfAnother = ["event", "return", "error"].contains { message?[$0] != nil }
            // The first may be the rest of a line.
            if found == nil, !isOfAnother, message != nil || index > 0 { break }
        }
        guard let qmp = found else {
            throw QMPError(.malformed, "\(channel.peerName) is not a QEMU monitor: it sent no QMP greeting")
        }
        let qemu = qmp["version"]?["qemu"]
        version = ["major", "minor", "micro"].compactMap { qemu?[$0]?.integer }.map(String.init).joined(separator: ".")
        hasOutOfBand = qmp["capabilities"]?.array.contains("oob") ?? false
    }

    /// Executes a command.
    ///
    /// - Parameters:
    ///   - command: its name.
    ///   - arguments: an object.
    ///   - timeout: the time allowed for the answer.
    ///   - outOfBand: whether QEMU runs it at once, beside a command that hangs.
    ///   - descriptor: an open file that goes with it; the caller keeps its own.
    /// - Returns: what QEMU returned.
    /// - Throws: `QMPError`; its message has the command and QEMU's words.
    @discardableResult
    public func execute(
        _ command: String,
        _ arguments: JSONValue = [:],
        timeout: Duration = .seconds(30),
        outOfBand: Bool = false,
        passing descriptor: Int32? = nil
    ) async throws -> JSONValue {
        if let failure { throw failure }
        let (id, bytes) = line(command, arguments, outOfBand: outOfBand && hasOutOfBand)
        let timer = loop.schedule(after: timeout) { self.expire([id], command, timeout) }
        defer { timer.cancel() }
        return try await withUnsafeThrowingContinuation { continuation in
            pending[id] = { result in
                continuation.resume(with: result.mapError { self.naming(command, $0) })
            }
            send(bytes, passing: descriptor)
        }
    }

    /// How many commands QEMU takes before it stops reading (its queue of requests).
    private static let queueLength = 8

    /// Executes one command with several arguments, several under way at a time: an answer costs less than a turn for each.
    ///
    /// - Parameters:
    ///   - command: its name.
    ///   - arguments: an object for each execution.
    ///   - timeout: the time allowed for a few answers.
    /// - Returns: what QEMU returned, in the order of the arguments; nil where it refused.
    /// - Throws: `QMPError` when the monitor is lost or does not answer.
    func executeEach(
        _ command: String,
        _ arguments: [JSONValue],
        timeout: Duration = .seconds(30)
    ) async throws -> [JSONValue?] {
        var answers: [JSONValue?] = []
        answers.reserveCapacity(arguments.count)
        for start in stride(from: 0, to: arguments.count, by: Self.queueLength) {
            let part = arguments[start..<min(start + Self.queueLength, arguments.count)]
            answers += try await executeTogether(command, part, timeout)
        }
        return answers
    }

    private func executeTogether(
        _ command: String,
        _ arguments: ArraySlice<JSONValue>,
        _ timeout: Duration
    ) async throws -> [JSONValue?] {
        if let failure { throw failure }
        let messages = arguments.map { line(command, $0, outOfBand: false) }
        let ids = messages.map(\.id)
        let timer = loop.schedule(after: timeout) { self.expire(ids, command, timeout) }
        defer { timer.cancel() }
        var answers = [JSONValue?](repeating: nil, count: ids.count)
        var lost: (any Error)?
        await withUnsafeContinuation { continuation in
            var left = ids.count
            for (index, id) in ids.enumerated() {
                pending[id] = { result in
                    switch result {
                    case .success(let value): answers[index] = value
                    case .failure(let error):
                        if (error as? QMPError)?.code != .refused { lost = self.naming(command, error) }
                    }
                    left -= 1
                    if left == 0 { continuation.resume() }
                }
            }
            send(messages.flatMap(\.bytes))
        }
        if let lost { throw lost }
        return answers
    }

    /// A command as it goes out. QEMU reads its monitor a byte at a time, some 6 µs each: what need not be said is not.
    private func line(
        _ command: String,
        _ arguments: JSONValue,
        outOfBand: Bool
    ) -> (id: String, bytes: [UInt8]) {
        let id = "\(prefix)\(nextID)"
        nextID += 1
        var message: [String: JSONValue] = [outOfBand ? "exec-oob" : "execute": .string(command), "id": .string(id)]
        if !arguments.object.isEmpty { message["arguments"] = arguments }
        return (id, Array((JSONValue.object(message).text + "\n").utf8))
    }

    private func send(_ bytes: [UInt8], passing descriptor: Int32? = nil) {
        Task(executorPreference: loop) {
            await self.writeLock.acquire()
            defer { self.writeLock.release() }
            do {
                if let descriptor, let socket = self.channel as? SocketChannel {
                    try await socket.write(bytes, passing: [descriptor])
                } else {
                    try await self.channel.write(bytes)
                }
            } catch { self.fail("\(error)") }
        }
    }

    private func expire(_ ids: [String], _ command: String, _ timeout: Duration) {
        for id in ids {
            pending.removeValue(forKey: id)?(
                .failure(QMPError(.timedOut, "\(speaker) did not answer '\(command)' within \(timeout)"))
            )
        }
    }

    private func naming(_ command: String, _ error: any Error) -> any Error {
        guard let error = error as? QMPError, error.code == .refused else { return error }
        return QMPError(.refused, "\(speaker) refused '\(command)': \(error.message)", errorClass: error.errorClass)
    }

    /// Waits until everything that QEMU has said so far was passed on. Of use when QEMU says nothing more: when it is frozen.
    public func drain() async {
        repeat { await loop.sleep(for: .milliseconds(1)) } while isConnected && xd_unread(descriptor) > 0
    }

    private func receive() async {
        do {
            while let line = try await lines.next() {
                guard let message = try? JSONValue(parsing: line) else {
                    if mayBeginInALine {
                        mayBeginInALine = false
                        continue
                    }
                    return fail("\(channel.peerName) sent something that is not QMP", .malformed)
                }
                mayBeginInALine = false
                if let name = message["event"]?.string {
                    onEvent?(QMPEvent(name: name, data: message["data"] ?? [:], received: .now))
                } else if let id = message["id"]?.string {
                    let answer = pending.removeValue(forKey: id)
                    if let error = message["error"] {
                        let text = error["desc"]?.string ?? "no reason given"
                        answer?(.failure(QMPError(.refused, text, errorClass: error["class"]?.string)))
                    } else {
                        answer?(.success(message["return"] ?? .null))
                    }
                }
            }
            fail("\(speaker) closed its monitor \(channel.peerName)")
        } catch {
            fail("\(error)")
        }
    }

    private func fail(_ reason: String, _ code: QMPError.Code = .disconnected) {
        guard failure == nil else { return }
        let error = QMPError(code, reason)
        failure = error
        channel.close()
        let waiting = pending
        pending.removeAll()
        for answer in waiting.values { answer(.failure(error)) }
        onDisconnect?()
        onEvent = nil
        onDisconnect = nil
    }

    /// Ends the connection; QEMU goes on.
    public func close() { fail("The monitor's connection was closed") }
}
