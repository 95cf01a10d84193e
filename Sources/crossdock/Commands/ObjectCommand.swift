import ArgumentParser
import Emulator
import IO
import TLS

/// The objects of a running agent.
struct ObjectCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "object",
        abstract: "Adds, lists, removes and reloads the objects of the running destination agent.",
        discussion: "The agent's control socket, STATE-DIR/control.sock, speaks QMP.",
        subcommands: [Add.self, List.self, Remove.self, Reload.self]
    )

    struct Add: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Adds an object.",
            discussion: "A secret is read from a file, or given encrypted: see 'crossdock secret encrypt'."
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The object, as QEMU writes it: authz-simple,id=a,identity=CN=host.")
        var object: String

        func run() async throws {
            try await failing {
                let description = try ObjectDescription(parsing: object)
                // The command line can be read by everybody, so what is refused there is refused here.
                if description.type == "secret", description.properties["data"] != nil,
                    description.properties["keyid"] == nil
                {
                    throw CredentialError("A secret's data in clear can be read by every user of this host; use file=")
                }
                var arguments = try description.typedProperties.mapValues { JSONValue($0) }
                arguments["qom-type"] = .string(description.type)
                arguments["id"] = .string(description.id)
                if case .string(let path)? = arguments["file"] {
                    arguments["file"] = .string(DurableFile.resolve(path, in: currentDirectory))
                }
                if case .string(let path)? = arguments["dir"] {
                    arguments["dir"] = .string(DurableFile.resolve(path, in: currentDirectory))
                }
                _ = try await ask(common, "object-add", .object(arguments))
            }
        }
    }

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Lists the objects.")
        @OptionGroup var common: CommonOptions
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            try await failing {
                let items = try await ask(common, "qom-list", ["path": "/objects"]).array
                if json {
                    output(JSONValue.array(items).text + "\n")
                } else {
                    let rows = items.map { item in
                        [
                            item["name"]?.string ?? "", String((item["type"]?.string ?? "").dropFirst(6).dropLast()),
                            item["users"]?.array.compactMap(\.string).joined(separator: ", ") ?? "",
                        ]
                    }
                    output(Table.render(["ID", "TYPE", "USED BY"], rows))
                }
            }
        }
    }

    struct Remove: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Removes an object that nothing uses.")
        @OptionGroup var common: CommonOptions
        @Argument(help: "The object's id.") var id: String

        func run() async throws {
            try await failing { _ = try await ask(common, "object-del", ["id": .string(id)]) }
        }
    }

    struct Reload: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Loads the files of credentials again; when one is bad, what was loaded before stays in use."
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The object's id; all credentials when it is not given.") var id: String?

        func run() async throws {
            try await failing {
                let arguments: JSONValue = id.map { ["id": .string($0)] } ?? [:]
                let reloaded = try await ask(common, "object-reload", arguments)["reloaded"]?.array ?? []
                output("Reloaded \(reloaded.compactMap(\.string).joined(separator: ", ")).\n")
            }
        }
    }

    /// The agent's answer; what it refuses, it refuses of an object.
    static func ask(_ common: CommonOptions, _ command: String, _ arguments: JSONValue) async throws -> JSONValue {
        do {
            return try await DestinationMonitor.ask(common.stateDirectory, command, arguments)
        } catch let error as QMPError {
            throw CredentialError(error.message)
        }
    }
}

extension JSONValue {
    /// The JSON form of an object's property.
    init(_ value: ObjectValue) {
        switch value {
        case .text(let text): self = .string(text)
        case .flag(let flag): self = .bool(flag)
        case .number(let number): self = .integer(Int64(number))
        case .list(let items): self = .array(items.map(JSONValue.init))
        case .record(let members): self = .object(members.mapValues(JSONValue.init))
        }
    }
}
