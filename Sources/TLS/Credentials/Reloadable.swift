internal import IO

/// What was loaded from files, and can be loaded again while it is in use. Whoever took the value keeps it.
final class Reloadable<Value: AnyObject & Sendable>: Sendable {
    private let current: Guarded<Value>
    /// Orders reloads, so that what was read earlier never replaces what was read later.
    private let reloading = Guarded(())

    init(_ value: Value) { current = Guarded(value) }

    /// What was loaded last.
    var value: Value { current.withLock { $0 } }

    /// Loads a new value; when that throws, the old one stays.
    func reload(_ load: () throws -> Value) throws {
        try reloading.withLock { _ in
            let next = try load()
            current.withLock { $0 = next }
        }
    }
}
