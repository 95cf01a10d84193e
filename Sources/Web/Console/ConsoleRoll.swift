internal import Emulator
internal import IO
internal import Migration

/// Where the serial socket is that an operator has given to the agent.
struct ConsolePlace: Sendable, Hashable {
    /// What the operator has called it.
    var name: String
    /// The path; nil when the command line names none any more.
    var path: String?
    /// The guest's QEMU; nil when it does not run.
    var process: EmulatorProcess?
    /// Why nobody can connect now; nil when nothing is in the way.
    var obstacle: String?

    /// Whether it is the same socket of the same QEMU: one that was connected to is still connected wherever its name is now.
    func isSameSocket(as other: ConsolePlace) -> Bool {
        name == other.name && process != nil && process == other.process && obstacle == nil && other.obstacle == nil
    }
}

/// Which guests' consoles the agent has to hold. Reads records again only when they have changed. Blocks; used by one thread at a time.
struct ConsoleRoll {
    /// What a guest's record says.
    enum Entry: Sendable, Hashable {
        /// The agent holds its console.
        case held(ConsolePlace)
        /// The guest is on its way here, and belongs to another host; to the one of a departure when it was here before.
        case arriving(ConsolePlace, ConsoleDeparture?)
        /// The guest has left for another host, where its console can be had when its departure is known.
        case left(String, ConsoleDeparture?)
    }

    private let store: GuestStore
    private let stateDirectory: String
    private var known: [String: (stamp: FileStamp, record: GuestRecord?)] = [:]
    private var departures: [String: (stamp: FileStamp, departure: ConsoleDeparture?)] = [:]

    init(stateDirectory: String) {
        self.stateDirectory = stateDirectory
        store = GuestStore(stateDirectory: stateDirectory)
    }

    /// Looks again: guests whose consoles nobody has given to the agent are left out.
    mutating func look() -> [String: Entry] {
        let names = DurableFile.list(store.directory)
        let there = Set(names)
        for name in known.keys where !there.contains(name) { (known[name], departures[name]) = (nil, nil) }
        var entries: [String: Entry] = [:]
        for name in names {
            guard let stamp = FileStamp("\(store.directory(of: name))/guest.json") else {
                known[name] = nil
                continue
            }
            if known[name]?.stamp != stamp {
                let record = (try? store.load(name)) ?? nil
                known[name] = (stamp, record?.placement?.console == nil ? nil : record)
            }
            guard let record = known[name]?.record, let console = record.placement?.console else { continue }
            let departure = departure(of: name)
            if let released = record.released {
                entries[name] = .left(released.destination, departure)
            } else if DurableFile.exists(store.arrivals(of: name)),
                record.process?.isRunning == true || departure != nil
            {
                entries[name] = .arriving(arrivingPlace(console, record), departure)
            } else {
                entries[name] = .held(place(console, record))
            }
        }
        return entries
    }

    private mutating func departure(of name: String) -> ConsoleDeparture? {
        guard let stamp = FileStamp(ConsoleDeparture.path(of: name, stateDirectory: stateDirectory)) else {
            departures[name] = nil
            return nil
        }
        if departures[name]?.stamp != stamp {
            departures[name] = (stamp, (try? ConsoleDeparture.read(name, stateDirectory: stateDirectory)) ?? nil)
        }
        return departures[name]?.departure
    }

    /// Before a guest belongs to this host its sockets are elsewhere.
    private func arrivingPlace(_ name: String, _ record: GuestRecord) -> ConsolePlace {
        var place = ConsolePlace(name: name, process: record.process)
        guard record.process?.isRunning == true else {
            place.obstacle = "the guest's QEMU is not there yet"
            return place
        }
        do {
            let path = try record.commandLine.serialSocket(name).path
            guard let index = record.commandLine.sockets.firstIndex(where: { $0.path == path }) else {
                throw GuestError("the guest's command line names no such socket")
            }
            place.path = "\(store.arrivals(of: record.name))/\(index)"
        } catch { place.obstacle = "\(error)" }
        return place
    }

    private func place(_ name: String, _ record: GuestRecord) -> ConsolePlace {
        var place = ConsolePlace(name: name)
        do { place.path = store.socket(try record.commandLine.serialSocket(name).path, of: record) } catch {
            place.obstacle = "\(error)"
        }
        guard let process = record.process, process.isRunning, record.isOff != true else {
            place.obstacle = "the guest does not run"
            return place
        }
        place.process = process
        return place
    }
}
