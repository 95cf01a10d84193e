/// Is told which ranges of a file have changed, so that what was known about them is known to be old.
///
/// The call comes after the change and before its reply, also when the change failed half-way: whoever reads a range
/// while it changes is told afterwards.
public protocol WriteObserver: AnyObject, Sendable {
    /// The range has changed. Called on any thread.
    func didChange(_ offset: UInt64, _ count: UInt64)
}
