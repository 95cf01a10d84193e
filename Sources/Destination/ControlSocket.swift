public import Emulator
internal import Glibc
public import IO
public import Migration
public import TLS

/// A running agent's local control socket, in the words of QMP, so that QEMU's own tools can talk to it: QEMU's `object-add`,
/// `object-del` and `qom-list`, `object-reload` for credentials, and `take-ownership` of a guest that waits here.
///
/// Only the owner of the state directory can connect: the socket has mode 0600.
public final class ControlSocket: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let objects: ObjectStore
    private let listener: Listener
    private let log: Log
    private let take: Take
    private let commands: [String: Command]
    private var clients = 0
    /// How many may be connected at once.
    private static let limit = 16

    /// Lets a guest run here by an operator's word: the migration's id, who says so, and why that can be known. Returns the guest's
    /// name.
    public typealias Take = @Sendable (String, String, Vouching) async throws -> String

    /// A command that belongs to another part of the agent's program: gets the arguments, and returns what is returned. It throws an error with
    /// a sentence.
    public typealias Command = @Sendable (JSONValue) async throws -> JSONValue

    /// Where the socket of an agent is.
    public static func path(stateDirectory: String) -> String { "\(stateDirectory)/control.sock" }

    /// Listens. Called on the loop.
    public static func start(
        path: String,
        objects: ObjectStore,
        log: Log,
        loop: EventLoop,
        commands: [String: Command] = [:],
        take: @escaping Take
    ) async throws -> ControlSocket {
        let listener = try await Listener.listen(on: .unix(path: path), loop: loop)
        let monitor = ControlSocket(objects: objects, listener: listener, log: log, commands: commands, take: take)
        Task(executorPreference: loop) { await monitor.accept() }
        return monitor
    }

    private init(
        objects: ObjectStore,
        listener: Listener,
        log: Log,
        commands: [String: Command],
        take: @escaping Take
    ) {
        self.take = take
        self.commands = commands
        self.objects = objects
        self.listener = listener
        self.log = log
    }

    /// Ends the listening. Called on the loop.
    public func close() { listener.close() }

    private func accept() async {
        while let channel = try? await listener.accept() {
            // A guest's QEMU may have this user, and must not have a word here.
            let isEmulator = channel.peerCredentials.map { RunningEmulator.isEmulator($0.process) } ?? false
            guard clients < Self.limit, channel.isFrom(process: nil), !isEmulator else {
                channel.close()
                continue
            }
            clients += 1
            Task(executorPreference: listener.loop) {
                defer {
                    self.clients -= 1
                    channel.close()
                }
                try? await self.serve(channel)
            }
        }
    }

    private func serve(_ channel: any Channel) async throws {
        let version: JSONValue = ["qemu": ["major": 0, "minor": 1, "micro": 0], "package": "crossdock"]
        try await send(["QMP": ["version": version, "capabilities": []]], channel)
        let lines = LineReader(channel, limit: 1 << 20)
        var isNegotiated = false
        while let line = try await lines.next() {
            if line.allSatisfy({ $0 == UInt8(ascii: " ") }) { continue }
            guard let request = try? JSONValue(parsing: line), let command = request["execute"]?.string else {
                try await send(
                    Self.failure("GenericError", "QMP input must be a JSON object with member 'execute'"),
                    channel
                )
                continue
            }
            var answer: [String: JSONValue]
            if command == "qmp_capabilities" {
                isNegotiated = true
                answer = ["return": [:]]
            } else if !isNegotiated {
                answer =
                    Self.failure(
                        "CommandNotFound",
                        "Expecting capabilities negotiation with 'qmp_capabilities'"
                    ).object
            } else {
                answer = await execute(command, request["arguments"] ?? [:]).object
            }
            if let id = request["id"] { answer["id"] = id }
            try await send(.object(answer), channel)
        }
    }

    private func send(_ message: JSONValue, _ channel: any Channel) async throws {
        try await channel.write(Array((message.text + "\r\n").utf8))
    }

    private static func failure(_ kind: String, _ text: String) -> JSONValue {
        ["error": ["class": .string(kind), "desc": .string(text)]]
    }

    private func execute(_ command: String, _ arguments: JSONValue) async -> JSONValue {
        do {
            switch command {
            case "object-add":
                let description = try ObjectDescription(arguments.object.mapValues(Self.value))
                // Files are read, and a pipe may keep its reader waiting.
                try await BlockingPool.shared.run { [objects] in try objects.add(description, from: .control) }
                log(.info, "added object '\(description.id)' of type \(description.type)")
                return ["return": [:]]
            case "object-del":
                guard let id = arguments["id"]?.string else {
                    return Self.failure("GenericError", "Parameter 'id' is missing")
                }
                try objects.remove(id)
                log(.info, "removed object '\(id)'")
                return ["return": [:]]
            case "qom-list":
                if let path = arguments["path"]?.string, path != "/objects" {
                    return Self.failure("GenericError", "Device '\(path)' not found; the objects are in /objects")
                }
                let items = objects.listings.map { listing -> JSONValue in
                    [
                        "name": .string(listing.id), "type": .string("child<\(listing.type)>"),
                        "users": .array(listing.users.map { .string($0) }),
                    ]
                }
                return ["return": .array(items)]
            case "object-reload":
                let id = arguments["id"]?.string
                let result = try await BlockingPool.shared.run { [objects] in try objects.reload(id) }
                for id in result.reloaded { log(.info, "reloaded '\(id)'") }
                for failure in result.failures { log(.error, "\(failure)") }
                if let failure = result.failures.first { throw failure }
                return ["return": ["reloaded": .array(result.reloaded.map { .string($0) })]]
            case "take-ownership":
                guard let id = arguments["migration"]?.string, let by = arguments["by"]?.string else {
                    return Self.failure("GenericError", "Parameters 'migration' and 'by' are needed")
                }
                return ["return": ["guest": .string(try await take(id, by, try Vouching(arguments)))]]
            case "query-commands":
                let names = [
                    "object-add", "object-del", "object-reload", "qmp_capabilities", "qom-list", "query-commands",
                    "take-ownership",
                ]
                return ["return": .array((names + commands.keys).sorted().map { ["name": .string($0)] })]
            default:
                if let other = commands[command] { return ["return": try await other(arguments)] }
                return Self.failure("CommandNotFound", "The command \(command) has not been found")
            }
        } catch {
            return Self.failure("GenericError", "\(error)")
        }
    }

    private static func value(_ json: JSONValue) throws -> ObjectValue {
        switch json {
        case .bool(let flag): .flag(flag)
        case .integer(let number): .number(Int(number))
        case .string(let text): .text(text)
        case .array(let items): .list(try items.map(value))
        case .object(let members): .record(try members.mapValues(value))
        case .null, .number:
            throw CredentialError("A property is a string, a boolean, an integer, an array or an object")
        }
    }
}
