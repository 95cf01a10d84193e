public import Emulator

extension MigrationStore {
    /// Why the QEMU of a guest answers nobody, and what to do: it is frozen. Nil when it is not.
    ///
    /// Not to be asked by who has the guest's lock.
    public func frozenSentence(of record: GuestRecord) -> String? {
        guard let process = record.process, process.isFrozen else { return nil }
        let what = "QEMU of guest '\(record.name)' (process \(process.pid)) is frozen"
        do {
            if let bar = try startBar(of: record.name) { return "\(what). \(bar.sentence(guest: record.name))" }
            guard try lock(guest: record.name) != nil else {
                return "\(what) while the guest moves to another host; see 'crossdock status'"
            }
            for id in ids() {
                guard let reading = try reading(of: id), reading.guest == record.name,
                    case .source(let standing) = reading.standing, standing.mayRunHere, !standing.isOver
                else { continue }
                return
                    "\(what) by migration \(id), whose agent has ended; the guest belongs to this host, and 'crossdock recover "
                    + "\(id)' lets it go on"
            }
        } catch { return "\(what): \(error)" }
        return "\(what), by no migration that this host knows; 'kill -CONT \(process.pid)' lets it go on"
    }
}
