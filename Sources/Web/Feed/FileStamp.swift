internal import Glibc

/// What tells one state of a file from another without reading it.
struct FileStamp: Sendable, Hashable {
    private let inode: UInt64
    private let size: Int64
    private let seconds: Int
    private let nanoseconds: Int

    /// The file's state; nil when there is none. Blocks.
    init?(_ path: String) {
        var status = stat()
        guard stat(path, &status) == 0 else { return nil }
        (inode, size) = (UInt64(status.st_ino), Int64(status.st_size))
        (seconds, nanoseconds) = (status.st_mtim.tv_sec, status.st_mtim.tv_nsec)
    }

    /// Bytes.
    var length: Int64 { size }
    /// How long ago it was written, in seconds.
    func age(at now: Int) -> Int { now - seconds }
}

/// A file that is read again only when it has changed.
struct StampedFile<Value> {
    private var stamp: FileStamp?
    private var value: Value?

    init() {}

    /// What the file says; nil without one, and for one that says nothing. Blocks.
    mutating func read(_ path: String, _ parse: ([UInt8]) -> Value?, bytes: (String) -> [UInt8]?) -> Value? {
        let now = FileStamp(path)
        if now == stamp, stamp != nil { return value }
        value = now == nil ? nil : bytes(path).flatMap(parse)
        stamp = now
        return value
    }
}
