public import ArgumentParser
public import Emulator
import Migration

extension GuestPlacement.Evacuation: ExpressibleByArgument {}

extension GuestCommand {
    struct Set: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Says where a guest may go and when it runs: labels, what an evacuation does with it, its start.",
            discussion: "What is said goes with the guest to its next host. What is not named stays as it is."
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String

        @Option(
            name: .customLong("label"),
            help: ArgumentHelp(
                "A label; with nothing behind the '=' it is removed. May be repeated.",
                valueName: "key=value"
            )
        )
        var labels: [String] = []

        @Option(
            help: ArgumentHelp(
                "What an evacuation of its host does: moves it while it runs (live, as when nothing was said), may stop it for that (stop), "
                    + "or leaves it where it is (leave).",
                valueName: "live|stop|leave"
            )
        )
        var evacuate: GuestPlacement.Evacuation?

        @Option(
            help: ArgumentHelp(
                "A group whose guests are kept on different hosts; '' for none.",
                valueName: "group"
            )
        )
        var antiAffinity: String?

        // A number below zero is no option.
        @Option(
            parsing: .unconditional,
            help: ArgumentHelp("Guests with a higher number go first: -1000 to 1000.", valueName: "number")
        )
        var priority: Int?

        enum Switch: String, ExpressibleByArgument, CaseIterable { case on, off }

        @Option(
            help: ArgumentHelp(
                "Whether crossdock-guests.service starts it when its host starts: the host that it belongs to then.",
                valueName: "on|off"
            )
        )
        var autostart: Switch?

        @Option(
            help: ArgumentHelp(
                "The serial socket that the agent of its host holds as its console, for 'crossdock console' and the page: serial0 is the first "
                    + "-serial, any other name a -chardev; it has to be a Unix socket with server=on. Nobody else can use it then. 'none' gives it back.",
                valueName: "serial"
            )
        )
        var console: String?

        @Option(
            help: ArgumentHelp(
                "The port at which the agent of its host gives its screen to viewers of VNC by TLS, when it runs with --vnc-tls: 5900 to "
                    + "6899; 'none' takes it back.",
                valueName: "port"
            )
        )
        var vncPort: String?

        private func applied(to placement: GuestPlacement) throws -> GuestPlacement {
            var placement = placement
            for label in labels {
                guard let equals = label.firstIndex(of: "="), equals != label.startIndex else {
                    throw ValidationError("--label takes KEY=VALUE, not '\(label)'")
                }
                let (key, value) = (String(label[..<equals]), String(label[label.index(after: equals)...]))
                placement.labels[key] = value.isEmpty ? nil : value
            }
            if let evacuate { placement.evacuation = evacuate }
            if let antiAffinity { placement.antiAffinity = antiAffinity.isEmpty ? nil : antiAffinity }
            if let priority { placement.priority = priority }
            if let console { placement.console = console == "none" || console.isEmpty ? nil : console }
            if let vncPort, vncPort != "none", !vncPort.isEmpty {
                guard let port = UInt16(vncPort) else {
                    throw ValidationError("--vnc-port takes a port, not '\(vncPort)'")
                }
                placement.vncPort = port
            } else if vncPort != nil {
                placement.vncPort = nil
            }
            if let autostart { placement.autostart = autostart == .on ? true : nil }
            do { try placement.judge() } catch { throw ValidationError("\(error)") }
            return placement
        }

        func validate() throws {
            _ = try applied(to: GuestPlacement())
            guard
                !labels.isEmpty || evacuate != nil || antiAffinity != nil || priority != nil || autostart != nil
                    || console != nil || vncPort != nil
            else {
                throw ValidationError(
                    "Nothing is said about the guest: give --label, --evacuate, --anti-affinity, --priority, --autostart, --console or --vnc-port"
                )
            }
        }

        func run() async throws {
            try await failing {
                try GuestStore.validate(name)
                guard let lock = try common.migrations.lock(guest: name) else {
                    throw MigrationError(.busy, "Guest '\(name)' is being migrated; see 'crossdock status'")
                }
                defer { withExtendedLifetime(lock) {} }
                guard var record = try common.guests.load(name) else { throw common.guests.unknown(name) }
                if let bar = try common.migrations.startBar(of: name) { throw GuestError(bar.sentence(guest: name)) }
                let placement = try applied(to: record.placement ?? GuestPlacement())
                if console != nil, let wanted = placement.console { _ = try record.commandLine.serialSocket(wanted) }
                if vncPort != nil, placement.vncPort != nil { _ = try record.commandLine.display() }
                record.placement = placement.isEmpty ? nil : placement
                try common.guests.save(record)
                output("Guest '\(name)': \(placement.isEmpty ? "nothing is said" : placement.summary).\n")
            }
        }
    }
}

extension GuestPlacement {
    /// What was said, on a line.
    var summary: String {
        var parts = labels.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" }
        if let evacuation { parts.append("evacuate \(evacuation.rawValue)") }
        if let antiAffinity { parts.append("apart from others of '\(antiAffinity)'") }
        if let priority { parts.append("priority \(priority)") }
        if let console { parts.append("console \(console)") }
        if let vncPort { parts.append("screen at port \(vncPort)") }
        if autostart == true { parts.append("starts with its host") }
        return parts.joined(separator: ", ")
    }
}
