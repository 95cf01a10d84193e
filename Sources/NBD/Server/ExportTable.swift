internal import IO
internal import TLS

/// The exports of a server by name.
public final class ExportTable: Sendable {
    private let exports = Guarded<[String: Export]>([:])
    /// The lives of exports whose clients fence themselves, by name: how many there were, and each of them.
    private let lives = Guarded<[String: (epoch: UInt64, exports: [Export])]>([:])

    /// Makes an empty table.
    public init() {}

    /// Adds an export; one of the same name is replaced for new connections.
    public func add(_ export: Export) { exports.withLock { $0[export.name] = export } }

    /// Adds an export that has a new life under each `NAME#NUMBER` with a higher number than before.
    ///
    /// A client that has lost its connections cannot know what of their requests is still on its way. It connects again
    /// under the next number: before the server carries out anything of the new life, everything of the old one has ended, and
    /// numbers that are not the latest are refused.
    public func addFenced(_ export: Export) {
        lives.withLock { $0[export.name] = (0, [export]) }
        add(export)
    }

    /// Ends all lives of an export: when this returns no request is under way, and none is admitted any more.
    public func closeFenced(_ name: String) async {
        remove(name)
        for export in lives.withLock({ $0.removeValue(forKey: name)?.exports ?? [] }) { await export.close() }
    }

    private func life(_ name: String, for peer: TLSPeer?) -> Export? {
        guard let mark = name.lastIndex(of: "#"), let epoch = UInt64(name[name.index(after: mark)...]) else {
            return nil
        }
        let base = String(name[..<mark])
        return lives.withLock { lives in
            guard let known = lives[base], let current = known.exports.last, epoch >= known.epoch else { return nil }
            if epoch == known.epoch { return current }
            // Whoever may not write has no part in this.
            guard current.access(for: peer) == .readWrite else { return current }
            let next = current.successor(name)
            // What has ended need not be kept; what has not is waited for at the end.
            lives[base] = (epoch, known.exports.filter { $0 === current || $0.connections > 0 } + [next])
            exports.withLock { $0[base] = next }
            return next
        }
    }

    /// Removes an export from the table; `Export.close` ends its use.
    @discardableResult
    public func remove(_ name: String) -> Export? { exports.withLock { $0.removeValue(forKey: name) } }

    /// How many there are.
    public var count: Int { exports.withLock { $0.count } }

    /// All of them, in the order of their names.
    public var all: [Export] { exports.withLock { $0.values.sorted { $0.name < $1.name } } }

    /// What a peer finds under a name.
    enum Finding {
        case found(Export, ExportAccess)
        case denied(String)
        case needsTLS
        case nothing
    }

    /// Looks a name up for a peer. The empty name means the only export there is, when none has that name.
    func find(_ name: String, for peer: TLSPeer?, isSecure: Bool) -> Finding {
        let found = exports.withLock { exports in
            exports[name] ?? (name.isEmpty && exports.count == 1 ? exports.first?.value : nil)
        }
        guard let found = found ?? life(name, for: peer) else { return .nothing }
        if found.requiresTLS, !isSecure { return .needsTLS }
        switch found.access(for: peer) {
        case .denied(let reason): return found.isHidden ? .nothing : .denied(reason)
        case let access: return .found(found, access)
        }
    }

    /// What a peer may use, in the order of the names.
    func list(for peer: TLSPeer?, isSecure: Bool) -> [Export] {
        all.filter { export in
            if export.requiresTLS, !isSecure { return false }
            if case .denied = export.access(for: peer) { return false }
            return true
        }
    }
}
