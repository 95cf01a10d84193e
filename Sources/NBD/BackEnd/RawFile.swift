internal import CLinux
internal import Glibc
internal import IO
internal import Synchronization

/// A raw image file or a block device.
///
/// Hits of the page cache are served at once on the caller's loop; what would block goes to the blocking pool.
public final class RawFile: BackEnd {
    /// The path it was opened at.
    public let path: String
    /// How many bytes there are.
    public let size: UInt64
    /// Whether it was opened for reading only.
    public let isReadOnly: Bool
    private let fd: Int32
    private let isMemory: Bool
    /// After one failed fsync nothing is known about earlier writes, so everything later fails as well.
    private let failure = Mutex<NBDError?>(nil)
    private let unsupportedNoWait = Atomic<Bool>(false)
    private let observer: (any WriteObserver)?
    /// A file system writes to a file one call at a time and lets the others spin; here they sleep, and their cores can
    /// decrypt and encrypt meanwhile.
    private let writeGate = Mutex<Void>(())

    /// Opens a file or a block device.
    ///
    /// - Parameters:
    ///   - path: where it is; a symbolic link is followed.
    ///   - readOnly: whether to open it for reading only.
    ///   - observer: is told of every range that has changed.
    /// - Throws: `ChannelError` that names the path.
    public init(path: String, readOnly: Bool, observer: (any WriteObserver)? = nil) throws {
        self.path = path
        self.observer = observer
        isReadOnly = readOnly
        fd = open(path, (readOnly ? O_RDONLY : O_RDWR) | O_CLOEXEC)
        guard fd >= 0 else { throw ChannelError.system("open \(path)", errno) }
        var size: UInt64 = 0
        if xd_is_block_device(fd) != 0 {
            xd_block_device_size(fd, &size)
        } else {
            var status = stat()
            guard fstat(fd, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
                close(fd)
                throw ChannelError(.system, "Cannot serve \(path): it is neither a file nor a block device")
            }
            size = UInt64(status.st_size)
        }
        self.size = size
        isMemory = xd_is_tmpfs(fd) != 0
    }

    deinit { close(fd) }

    /// Takes the locks that tell QEMU's programs that this process uses the image for writing and shares nothing.
    ///
    /// These are the byte-range locks of QEMU's `file-posix` driver: one byte for each permission held, one for each
    /// permission that is not shared.
    ///
    /// - Throws: `ChannelError` when another process uses the image.
    public func lock() throws {
        // Permission bytes are at 100, "not shared" bytes at 200: consistent read, write, write unchanged, resize.
        for (held, unshared) in zip(UInt64(100)..<104, UInt64(200)..<204) {
            guard xd_lock_ofd(fd, off_t(held), 1, 0) == 0, xd_lock_ofd(fd, off_t(unshared), 1, 0) == 0 else {
                throw ChannelError.system("lock \(path)", errno)
            }
        }
        for byte in Array(100..<104) + Array(200..<204) {
            let pair = byte < 200 ? byte + 100 : byte - 100
            guard xd_test_ofd(fd, off_t(pair), 1, 1) == 0 else {
                unlock()
                throw ChannelError(.system, "The image \(path) is in use by another process")
            }
        }
    }

    /// Drops the locks of `lock`.
    public func unlock() { _ = xd_unlock_ofd(fd, 100, 200) }

    private func check(_ result: Int, _ action: String) throws -> Int {
        if result >= 0 { return result }
        let number = errno
        let code: NBDError.Number =
            switch number {
            case ENOSPC, EDQUOT, EFBIG: .noSpace
            case EPERM, EROFS: .notPermitted
            case EOPNOTSUPP: .notSupported
            default: .io
            }
        throw NBDError(code, "Cannot \(action) \(path): \(String(cString: strerror(number)))")
    }

    private func checkFailure() throws {
        if let failure = failure.withLock({ $0 }) { throw failure }
    }

    /// See `BackEnd.tryRead(into:at:)`.
    public func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool {
        if isMemory {
            try readAll(into: buffer, at: offset)
            return true
        }
        if unsupportedNoWait.load(ordering: .relaxed) { return false }
        var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
        let count = xd_preadv_nowait(fd, &vector, 1, off_t(offset))
        if count == buffer.count { return true }
        if count < 0, errno == EOPNOTSUPP { unsupportedNoWait.store(true, ordering: .relaxed) }
        return false
    }

    /// See `BackEnd.read(into:at:)`.
    public func read(into payload: Payload, at offset: UInt64) async throws {
        try await BlockingPool.shared.run {
            try self.readAll(into: payload.buffer.mutable(payload.range), at: offset)
        }
    }

    private func readAll(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws {
        var done = 0
        while done < buffer.count {
            let count = pread(fd, buffer.baseAddress! + done, buffer.count - done, off_t(offset) + off_t(done))
            if count < 0, errno == EINTR { continue }
            if try check(count, "read") == 0 { throw NBDError(.io, "\(path) became shorter while it was served") }
            done += count
        }
    }

    /// See `BackEnd.tryWrite(_:at:fua:)`.
    public func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
        if fua { return false }
        try checkFailure()
        if isMemory {
            try writeAll(payload, at: offset)
            return true
        }
        if unsupportedNoWait.load(ordering: .relaxed) { return false }
        defer { observer?.didChange(offset, UInt64(payload.count)) }
        let bytes = payload.bytes
        var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
        let count = writeGate.withLock { _ in xd_pwritev_nowait(fd, &vector, 1, off_t(offset)) }
        if count < 0, errno == EOPNOTSUPP { unsupportedNoWait.store(true, ordering: .relaxed) }
        return count == payload.count
    }

    /// See `BackEnd.write(_:at:fua:)`.
    public func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {
        try checkFailure()
        try await BlockingPool.shared.run { try self.writeAll(payload, at: offset) }
        if fua { try await flush() }
    }

    private func writeAll(_ payload: Payload, at offset: UInt64) throws {
        defer { observer?.didChange(offset, UInt64(payload.count)) }
        let bytes = payload.bytes
        var done = 0
        while done < bytes.count {
            let from = bytes.baseAddress! + done
            let (count, number) = writeGate.withLock { _ in
                (pwrite(fd, from, bytes.count - done, off_t(offset) + off_t(done)), errno)
            }
            if count < 0, number == EINTR { continue }
            errno = number
            done += try check(count, "write to")
        }
    }

    /// See `BackEnd.zero(at:count:mayDeallocate:fua:)`.
    public func zero(at offset: UInt64, count: UInt64, mayDeallocate: Bool, fua: Bool) async throws {
        try checkFailure()
        if count == 0 { return }
        try await BlockingPool.shared.run {
            defer { self.observer?.didChange(offset, count) }
            if mayDeallocate, xd_punch_hole(self.fd, off_t(offset), off_t(count)) == 0 { return }
            if xd_zero_range(self.fd, off_t(offset), off_t(count)) == 0 { return }
            let zeroes = IOBuffer(capacity: 1 << 20)
            memset(zeroes.mutable(0..<zeroes.capacity).baseAddress!, 0, zeroes.capacity)
            var done: UInt64 = 0
            while done < count {
                let piece = Int(min(UInt64(zeroes.capacity), count - done))
                try self.writeAll(Payload(zeroes, 0..<piece), at: offset + done)
                done += UInt64(piece)
            }
        }
        if fua { try await flush() }
    }

    /// See `BackEnd.trim(at:count:fua:)`.
    public func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {
        try checkFailure()
        if count == 0 { return }
        try await BlockingPool.shared.run {
            defer { self.observer?.didChange(offset, count) }
            // A file system without holes ignores the hint.
            _ = xd_punch_hole(self.fd, off_t(offset), off_t(count))
        }
        if fua { try await flush() }
    }

    /// See `BackEnd.flush()`.
    public func flush() async throws {
        try checkFailure()
        if isReadOnly { return }
        try await BlockingPool.shared.run {
            if fdatasync(self.fd) != 0 {
                let error = NBDError(.io, "Cannot flush \(self.path): \(String(cString: strerror(errno)))")
                self.failure.withLock { $0 = error }
                throw error
            }
        }
    }

    /// See `BackEnd.extents(at:count:limit:)`.
    public func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        try await BlockingPool.shared.run { self.extentsNow(at: offset, count: count, limit: limit) }
    }

    /// Where the next data begins, at or after an offset; the end of the file when there is none.
    public func nextData(from offset: UInt64) -> UInt64 {
        let data = xd_seek_data(fd, off_t(offset))
        // A file system that cannot tell has data everywhere.
        return data >= 0 ? UInt64(data) : errno == ENXIO ? size : offset
    }

    /// The extents, on the caller's thread.
    public func extentsNow(at offset: UInt64, count: UInt64, limit: Int) -> [Extent] {
        var result: [Extent] = []
        let end = offset + count
        var position = offset
        while position < end, result.count < limit {
            let data = xd_seek_data(fd, off_t(position))
            let next: UInt64
            let isHole: Bool
            if data < 0 {
                // ENXIO: nothing but a hole to the end. Other errors: the file system cannot tell, so it is data.
                isHole = errno == ENXIO
                next = end
            } else if UInt64(data) > position {
                isHole = true
                next = UInt64(data)
            } else {
                isHole = false
                let hole = xd_seek_hole(fd, off_t(position))
                next = hole <= data ? end : UInt64(hole)
            }
            let length = min(next, end) - position
            result.append(Extent(length: length, isHole: isHole, isZero: isHole))
            position += length
        }
        return result
    }
}

/// Is told which ranges of a file have changed, so that what was known about them is known to be old.
///
/// The call comes after the change and before its reply, also when the change failed half-way: whoever reads a range
/// while it changes is told afterwards.
public protocol WriteObserver: AnyObject, Sendable {
    /// The range has changed. Called on any thread.
    func didChange(_ offset: UInt64, _ count: UInt64)
}
