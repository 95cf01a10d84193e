/// A failure on a QEMU monitor.
public struct QMPError: Error, Sendable, CustomStringConvertible {
    /// The kind of failure.
    public enum Code: Sendable {
        /// QEMU refused the command.
        case refused
        /// No answer in time.
        case timedOut
        /// The monitor's connection ended.
        case disconnected
        /// What came was not QMP.
        case malformed
    }

    /// The kind.
    public let code: Code
    /// QEMU's error class for `refused`: "GenericError", "CommandNotFound", "DeviceNotActive".
    public let errorClass: String?
    /// The sentence.
    public let message: String

    /// Makes an error.
    @inline(never)
    public init(_ code: Code, _ message: String, errorClass: String? = nil) {
        self.code = code
        self.message = message
        self.errorClass = errorClass
    }

    /// The sentence.
    public var description: String { message }
}
