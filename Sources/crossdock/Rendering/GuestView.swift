import Emulator
import IO
import Migration
import Source
import Web

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
    var placement: GuestPlacement?
    var origin: GuestRecord.Origin?
    var commandLine: [String]
    var directory: String
    var detail: String
    var kept: [KeptImage]?
    var listeners: [GuestListener]?
    var console: ConsoleStanding?
    /// The host that the guest has gone to.
    var movedTo: String?

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
        placement = record.placement
        origin = record.origin
        movedTo = record.released?.destination
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
            view.keeps(FencedImages.kept(migrations, of: record.name))
            // As an evacuation counts it.
            view.memory = try? record.commandLine.memory()
            view.processors = (try? record.commandLine.processors()).map { Int(clamping: $0) }
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
        return try await make(record, state: "unknown", monitor: monitor, store)
    }

    /// Tells which old images are kept of a guest that has moved away.
    private mutating func keeps(_ images: [KeptImage]) {
        guard !images.isEmpty else { return }
        kept = images
        let bytes = images.reduce(0) { $0 + Double($1.bytes) }
        if bytes == 0 { return }
        let last =
            images.first { !$0.isConfirmed || $0.until == nil } ?? images.max { ($0.until ?? 0) < ($1.until ?? 0) }
        detail +=
            "\(detail.isEmpty ? "" : "; ")\(ProgressRenderer.bytes(bytes)) of old images are kept until \(last?.term ?? "")"
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
    static func make(
        _ record: GuestRecord,
        state: String?,
        monitor: QMPClient?,
        _ store: GuestStore
    ) async throws -> GuestView {
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
        var listeners = await monitor.listeners()
        for index in listeners.indices where !listeners[index].isOnNetwork {
            let path = store.socket(String(listeners[index].address.dropFirst("unix:".count)), of: record)
            listeners[index].address = "unix:\(path)"
            listeners[index].stablePath = store.stablePath(of: path, guest: record.name)
        }
        if !listeners.isEmpty { view.listeners = listeners }
        view.blockers = inspection.blockers
        view.migratable = inspection.blockers.isEmpty
        view.changes = inspection.changes
        return view
    }

    /// Adds what keeps the images from being taken out of reach when the guest leaves: a migration refuses that before it begins.
    mutating func judgeFence(_ record: GuestRecord, _ guests: GuestStore, _ migrations: MigrationStore) async {
        guard let disks, record.process?.isRunning == true else { return }
        let images = disks.filter { !$0.readOnly }.map(\.path)
        let obstacles = await BlockingPool.shared.value {
            ImageFence.obstacles(to: record, images: images, guests: guests, in: migrations)
        }
        guard !obstacles.isEmpty else { return }
        blockers = (blockers ?? []) + obstacles
        migratable = false
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
        for listener in listeners ?? [] {
            lines.append("  listens    \(listener.what): \(listener.address)")
            if let path = listener.stablePath, listener.address != "unix:\(path)" {
                lines.append("               on each host \(path)")
            }
        }
        for image in kept ?? [] {
            lines.append("  kept       \(image.path), \(ProgressRenderer.bytes(Double(image.bytes)))")
        }
        if let name = placement?.console {
            lines.append("  console    \(name): \(ConsoleQuery.words(console, of: self.name, on: movedTo))")
        }
        if let placement { lines.append("  set        \(placement.summary)") }
        if let origin {
            let teller = origin.toldBy.map { ", as \($0) says" } ?? ""
            lines.append("  home       \(origin.identity)\(origin.address.map { " at \($0)" } ?? "")\(teller)")
        }
        lines.append("  command    \(commandLine.joined(separator: " "))")
        return lines.joined(separator: "\n")
    }
}
