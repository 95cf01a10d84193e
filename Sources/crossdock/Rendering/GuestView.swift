import Emulator
import IO
import Migration

/// What `crossdock guest list` and `crossdock guest show` tell about a guest.
struct GuestView: Codable {
    struct Disk: Codable {
        var name: String
        var path: String
        var format: String
        var size: UInt64
        var allocated: UInt64?
        var readOnly: Bool
        var encrypted: Bool
        var backing: [String]
        var bitmaps: [String]
    }

    var name: String
    var state: String
    var process: Int32?
    var monitor: String?
    var adopted: Bool
    var emulator: String?
    var machine: String?
    var processor: String?
    var processors: Int?
    var memory: UInt64?
    var disks: [Disk]?
    var migratable: Bool?
    var blockers: [String]?
    var changes: [String]?
    var commandLine: [String]
    var directory: String
    var detail: String

    /// A guest whose record cannot be read.
    init(damaged name: String) {
        self.name = name
        state = "damaged"
        adopted = false
        commandLine = []
        directory = ""
        detail = "its record cannot be read"
    }

    init(_ record: GuestRecord, state: String) {
        name = record.name
        self.state = state
        adopted = record.adopted != nil
        commandLine = record.commandLine.arguments
        directory = record.commandLine.directory
        let isRunning = record.process?.isRunning ?? false
        process = isRunning ? record.process?.pid : nil
        monitor = record.adopted
        let release = record.released.map { "released to \($0.destination), migration \($0.migration)" }
        detail = isRunning ? record.commandLine.program : release ?? ""
    }

    /// Asks a guest's QEMU, if it runs and answers.
    static func look(
        _ record: GuestRecord,
        _ store: GuestStore,
        _ migrations: MigrationStore,
        on loop: EventLoop
    ) async throws -> GuestView {
        if let view = frozen(record, migrations) { return view }
        guard record.process?.isRunning == true else {
            var view = GuestView(record, state: await store.state(of: record, on: loop))
            // What it waits for, or why it must not be started, is not on record.
            guard record.released == nil, let bar = (try? migrations.startBar(of: record.name)) ?? nil else {
                return view
            }
            if case .arriving = bar { view.state = "arriving" } else { view.state = "released" }
            view.detail = bar.sentence(guest: record.name)
            return view
        }
        let state = await store.state(of: record, on: loop)
        if state == "arriving" { return GuestView(record, state: state) }
        let monitor = try? await store.connect(to: record, .status, on: loop, timeout: .seconds(2))
        defer { monitor?.close() }
        if monitor == nil, let view = frozen(record, migrations) { return view }
        return try await make(record, state: "unknown", monitor: monitor)
    }

    /// What is told of a guest whose QEMU is frozen; nil for another.
    private static func frozen(_ record: GuestRecord, _ migrations: MigrationStore) -> GuestView? {
        guard let sentence = migrations.frozenSentence(of: record) else { return nil }
        var view = GuestView(record, state: "frozen")
        view.detail = sentence
        view.blockers = [sentence]
        view.migratable = false
        return view
    }

    /// Tells what a monitor says; without one only what is on record.
    static func make(_ record: GuestRecord, state: String?, monitor: QMPClient?) async throws -> GuestView {
        var view = GuestView(record, state: state ?? "unknown")
        guard let monitor else {
            view.blockers = ["its monitor is held by another client or does not answer"]
            view.migratable = false
            return view
        }
        guard let inspection = try? await GuestInspection.inspect(monitor, record) else { return view }
        view.state = inspection.status
        view.emulator = inspection.emulatorVersion
        view.machine = inspection.machine
        view.processor = inspection.processor
        view.processors = inspection.processors
        view.memory = inspection.memory
        view.disks = inspection.disks.map { disk in
            Disk(
                name: disk.name,
                path: disk.path,
                format: disk.format,
                size: disk.size,
                allocated: disk.allocated,
                readOnly: disk.isReadOnly,
                encrypted: disk.isEncrypted,
                backing: disk.backing.map(\.path),
                bitmaps: disk.bitmaps
            )
        }
        view.blockers = inspection.blockers
        view.migratable = inspection.blockers.isEmpty
        view.changes = inspection.changes
        return view
    }

    /// A row of the list.
    var row: [String] {
        let bytes = disks.map { $0.filter { !$0.readOnly }.reduce(0) { $0 + Double($1.size) } }
        return [
            name, state, process.map(String.init) ?? "-", memory.map { ProgressRenderer.bytes(Double($0)) } ?? "-",
            disks.map { "\($0.count), \(ProgressRenderer.bytes(bytes ?? 0))" } ?? "-",
            migratable.map { $0 ? "yes" : "no" } ?? "-", detail,
        ]
    }

    /// Everything, for people.
    var text: String {
        var lines = ["Guest '\(name)': \(state)\(detail.isEmpty ? "" : ", \(detail)")"]
        if let process { lines.append("  process    \(process)\(adopted ? ", started by something else" : "")") }
        if let monitor { lines.append("  monitor    \(monitor)") }
        if let machine {
            lines.append("  machine    \(machine), QEMU \(emulator ?? "")")
            lines.append("  processor  \(processors ?? 0) x \(processor ?? "")")
            lines.append("  memory     \(ProgressRenderer.bytes(Double(memory ?? 0)))")
        }
        for disk in disks ?? [] {
            var line =
                "  disk       \(disk.name): \(disk.path), \(disk.format), \(ProgressRenderer.bytes(Double(disk.size)))"
            if let allocated = disk.allocated { line += ", \(ProgressRenderer.bytes(Double(allocated))) in use" }
            if disk.readOnly { line += ", read-only" }
            if disk.encrypted { line += ", encrypted" }
            lines.append(line)
            for image in disk.backing { lines.append("               on top of \(image)") }
            if !disk.bitmaps.isEmpty {
                lines.append("               dirty bitmaps \(disk.bitmaps.joined(separator: ", "))")
            }
        }
        for change in changes ?? [] { lines.append("  described  \(change)") }
        if let migratable { lines.append("  migration  \(migratable ? "nothing is in its way" : "not as it is:")") }
        for blocker in blockers ?? [] { lines.append("               \(blocker)") }
        lines.append("  command    \(commandLine.joined(separator: " "))")
        return lines.joined(separator: "\n")
    }
}
