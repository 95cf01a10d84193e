internal import Glibc

/// What went wrong with a file or a directory: a sentence that names the path.
public struct FileError: Error, Sendable, CustomStringConvertible {
    /// What happened and to what, as a sentence without a final full stop.
    public let message: String
    /// The system's error number, when a system call failed.
    public let number: Int32?

    /// Makes an error.
    @inline(never)
    public init(_ message: String, number: Int32? = nil) {
        self.message = message
        self.number = number
    }

    /// The error of a failed system call.
    @inline(never)
    public static func system(_ action: String, _ number: Int32) -> FileError {
        FileError("Cannot \(action): \(String(cString: strerror(number)))", number: number)
    }

    /// The sentence.
    public var description: String { message }
}
