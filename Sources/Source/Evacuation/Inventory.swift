internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// What is on a host that is to be emptied: the guests that are known here, and every other QEMU.
struct Inventory: Sendable {
    /// A guest that belongs to this host, or may.
    struct Guest: Sendable {
        var name: String
        var record: GuestRecord
        /// Whether there is a QEMU for it.
        var isRunning: Bool
        /// Why it cannot be moved now, whatever the other host is; nil when nothing is known that keeps it.
        var obstacle: String?

        var placement: GuestPlacement { record.placement ?? GuestPlacement() }
    }

    /// A QEMU that this host does not know as a guest.
    struct Stranger: Sendable {
        var name: String
        var process: Int32
        /// Who manages it; nil when nobody is known to.
        var manager: String?
        /// How it would be moved.
        var remedy: String
    }

    private(set) var guests: [Guest] = []
    private(set) var strangers: [Stranger] = []

    /// Looks at a host. Blocks for as long as its files and `/proc` take.
    ///
    /// - Parameters:
    ///   - stateDirectory: where the guests are recorded.
    ///   - knownOnly: whether other QEMUs are not looked for.
    /// - Throws: `JournalError` when nobody knows whose a guest is.
    init(stateDirectory: String, knownOnly: Bool) throws {
        let store = GuestStore(stateDirectory: stateDirectory)
        let migrations = MigrationStore(stateDirectory: stateDirectory)
        var known: Set<Int32> = []
        for name in store.names() {
            let record: GuestRecord?
            do { record = try store.load(name) } catch {
                guests.append(
                    Guest(
                        name: name,
                        record: GuestRecord(name: name, commandLine: GuestCommandLine(arguments: [], directory: "/")),
                        isRunning: false,
                        obstacle: "\(error)"
                    )
                )
                continue
            }
            guard let record else { continue }
            let isRunning = record.process?.isRunning == true
            if isRunning, let process = record.process { known.insert(process.pid) }
            let bar = try migrations.startBar(of: name)
            if let bar, bar.isDecided { continue }
            var obstacle = bar?.sentence(guest: name)
            if obstacle == nil, try migrations.lock(guest: name) == nil {
                obstacle = "Guest '\(name)' is being migrated already; see 'crossdock status'"
            }
            guests.append(Guest(name: name, record: record, isRunning: isRunning, obstacle: obstacle))
        }
        if knownOnly { return }
        for pid in DurableFile.list("/proc").compactMap({ Int32($0) }) {
            guard !known.contains(pid), RunningEmulator.isEmulator(pid), let stranger = Self.stranger(pid) else {
                continue
            }
            strangers.append(stranger)
        }
    }

    /// A QEMU that nobody here has started; nil for one that serves Crossdock itself, and for one that has ended.
    private static func stranger(_ pid: Int32) -> Stranger? {
        guard let emulator = try? RunningEmulator(pid: pid) else {
            return Stranger(
                name: "process \(pid)",
                process: pid,
                manager: nil,
                remedy: "this user may not look at it; run this as root"
            )
        }
        // Blank copies, and guests on their way here.
        if emulator.arguments.contains(where: { $0.contains("crossdock") }) { return nil }
        let name = emulator.guestName ?? "process \(pid)"
        if emulator.arguments.contains(where: { $0.contains("/libvirt/") }) {
            return Stranger(
                name: name,
                process: pid,
                manager: "libvirt",
                remedy: "it belongs to libvirt: virsh migrate"
            )
        }
        let remedy =
            emulator.monitors.first.map { "'crossdock guest adopt NAME --qmp \($0)' makes it known here" }
            ?? "it has no QMP monitor; start it with -qmp unix:PATH,server=on,wait=off"
        return Stranger(name: name, process: pid, manager: nil, remedy: remedy)
    }

    /// Whether a guest or a QEMU is still here that could run: what "this host is empty" is held against.
    ///
    /// - Parameter ignored: names that do not count.
    func left(ignoring ignored: Set<String>) -> [String] {
        guests.map(\.name).filter { !ignored.contains($0) } + strangers.map(\.name).filter { !ignored.contains($0) }
    }
}
