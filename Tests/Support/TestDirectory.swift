internal import Glibc
internal import IO

/// A temporary directory that goes away with its last reference. Its path is short enough for Unix sockets.
public final class TestDirectory: Sendable {
    /// The path.
    public let path: String

    /// The directories that are there: what tests share is never released, and is removed when the process ends.
    private static let live = Guarded<Set<String>>([])
    private static let removesAtExit: Void = {
        atexit { for path in TestDirectory.live.withLock({ $0 }) { TestDirectory.remove(path) } }
    }()

    /// Makes a directory under `/tmp`, or under another parent.
    public init(under parent: String = "/tmp") throws {
        var template = Array("\(parent)/xdt-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else {
            throw TestFailure("mkdtemp failed: \(String(cString: strerror(errno)))")
        }
        // The users of confined guests pass through it.
        chmod(template, 0o711)
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        _ = Self.removesAtExit
        Self.live.withLock { _ = $0.insert(path) }
    }

    deinit {
        Self.live.withLock { _ = $0.remove(path) }
        var status = stat()
        if lstat(path, &status) == 0 { Self.remove(path) }
    }

    /// The path of a file in the directory.
    public func file(_ name: String) -> String { "\(path)/\(name)" }

    /// Makes a subdirectory and returns its path.
    public func directory(_ name: String) -> String {
        mkdir(file(name), 0o700)
        return file(name)
    }

    private static func remove(_ path: String) {
        if let directory = opendir(path) {
            while let entry = readdir(directory) {
                let name = withUnsafePointer(to: &entry.pointee.d_name) {
                    $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
                }
                if name == "." || name == ".." { continue }
                let child = "\(path)/\(name)"
                var status = stat()
                if lstat(child, &status) == 0, status.st_mode & S_IFMT == S_IFDIR {
                    remove(child)
                } else {
                    unlink(child)
                }
            }
            closedir(directory)
        }
        rmdir(path)
    }
}

/// A failure of a test's own machinery.
public struct TestFailure: Error, CustomStringConvertible {
    /// The sentence.
    public let description: String
    /// Makes a failure.
    public init(_ description: String) { self.description = description }
}
