internal import CLinux
public import Glibc

/// A regular file or block device with a position. QEMU's QIOChannelFile.
///
/// Files are always ready, and a read that misses the page cache waits for the disk: use it where a loop may wait, such as
/// for configuration and for saved states, or on a loop of its own.
public final class FileChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// The loop.
    public let loop: EventLoop
    /// The position can be changed.
    public let features: ChannelFeatures = [.seekable, .halfClose]
    /// The path.
    public let peerName: String
    private var fd: Int32
    private var failure: ChannelError?

    /// Opens a file.
    ///
    /// - Parameters:
    ///   - path: the file; pipes, sockets and terminals are refused, `DescriptorChannel` is for them.
    ///   - flags: as for open(2); O_CLOEXEC is added.
    ///   - mode: the permissions of a file that is created.
    ///   - loop: the loop.
    public init(path: String, flags: Int32, mode: UInt32 = 0o600, on loop: EventLoop) throws {
        peerName = path
        self.loop = loop
        // O_NONBLOCK: a FIFO in the file's place must not make the open wait.
        fd = Glibc.open(path, flags | O_CLOEXEC | O_NONBLOCK, mode)
        guard fd >= 0 else { throw ChannelError.system("open \(path)", errno) }
        var status = stat()
        guard fstat(fd, &status) == 0,
            status.st_mode & S_IFMT == S_IFREG || status.st_mode & S_IFMT == S_IFBLK
        else {
            Glibc.close(fd)
            fd = -1
            throw ChannelError(.system, "Cannot use \(path) as a file: it is neither a plain file nor a block device")
        }
    }

    deinit { if fd >= 0 { Glibc.close(fd) } }

    /// Moves the position and returns the new one, from the file's beginning.
    @discardableResult
    public func seek(_ offset: Int, from whence: Int32 = SEEK_SET) throws -> Int {
        if let failure { throw failure }
        let position = lseek(fd, off_t(offset), whence)
        guard position >= 0 else { throw ChannelError.system("seek in \(peerName)", errno) }
        return Int(position)
    }

    /// See `Channel.read(into:)`; 0 at the end of the file.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        while true {
            if let failure { throw failure }
            let count = readv(fd, buffers.baseAddress, Int32(buffers.count))
            if count >= 0 { return count }
            if errno != EINTR { throw ChannelError.system("read \(peerName)", errno) }
        }
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        while true {
            if let failure { throw failure }
            let count = writev(fd, buffers.baseAddress, Int32(buffers.count))
            if count >= 0 { return count }
            if errno != EINTR { throw ChannelError.system("write \(peerName)", errno) }
        }
    }

    /// Nothing is held back; this is not an fsync.
    public func flush() throws -> Bool {
        if let failure { throw failure }
        return true
    }

    /// Returns at once.
    public func waitReadable() async throws { if let failure { throw failure } }
    /// Returns at once.
    public func waitWritable() async throws { if let failure { throw failure } }
    /// Nothing happens.
    public func finishWriting() async throws { if let failure { throw failure } }
    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) { loop.execute { self.failure = self.failure ?? reason } }
    /// Closes the file.
    public func close() {
        guard fd >= 0 else { return }
        failure = failure ?? ChannelError(.closed, "\(peerName) is closed")
        Glibc.close(fd)
        fd = -1
    }
}
