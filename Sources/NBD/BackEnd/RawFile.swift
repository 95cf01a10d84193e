internal import CLinux
internal import Glibc
internal import IO
internal import Synchronization

/// A raw image file, a block device, or memory.
///
/// Hits of the page cache are served at once on the caller's loop; what would block goes to the blocking pool.
public final class RawFile: BackEnd {
    /// How an image is opened.
    public struct Options: Sendable {
        /// Whether a write of zeroes becomes something cheaper.
        public enum ZeroDetection: String, Sendable, CaseIterable {
            /// Data is data.
            case off
            /// Zeroes are written as zeroes.
            case on
            /// Zeroes become holes.
            case unmap
        }
        /// Open for reading only.
        public var isReadOnly = false
        /// Bypass the page cache (O_DIRECT); requests must be in whole blocks.
        public var isDirect = false
        /// Make each write durable before its reply.
        public var writesThrough = false
        /// Do nothing for a flush: what is written may be lost with the host.
        public var ignoresFlush = false
        /// Do nothing for a trim, and allocate what is zeroed.
        public var ignoresDiscard = false
        /// What to do with zeroes.
        public var zeroDetection = ZeroDetection.off
        /// Whether clients may ask for `qemu:allocation-depth`.
        public var offersDepth = true
        /// Where the served part begins, in bytes.
        public var offset: UInt64 = 0
        /// How many bytes are served; up to the end when it is nil.
        public var length: UInt64?
        /// Is told of every range that has changed.
        public var observer: (any WriteObserver)?

        /// The defaults.
        public init() {}
    }

    /// The path it was opened at.
    public let path: String
    /// How many bytes there are.
    public let size: UInt64
    /// Whether it was opened for reading only.
    public var isReadOnly: Bool { options.isReadOnly }
    /// See `BackEnd.traits`.
    public let traits: BackEndTraits
    private let options: Options
    private let fd: Int32
    private let start: UInt64
    private let isMemory: Bool
    /// After one failed fsync nothing is known about earlier writes, so everything later fails as well.
    private let failure = Guarded<NBDError?>(nil)
    /// File systems differ in what they can do without waiting.
    private let cannotReadAtOnce = Atomic<Bool>(false)
    private let cannotWriteAtOnce = Atomic<Bool>(false)
    private let isDevice: Bool
    /// The kernel reports a failed write-back once: to the first of several calls, which must tell the others.
    private let syncGate = Guarded<Void>(())
    /// A file system writes to a file one call at a time and lets the others spin; here they sleep, and their cores can
    /// decrypt and encrypt meanwhile.
    private let writeGate = SleepingLock()
    /// A range of the file that was found to be data and not deallocated since. Asking a file system where the next hole is
    /// makes it walk over all that is allocated up to there; a client that asks piece by piece would pay that each time.
    private let knownData = Guarded<Range<UInt64>>(0..<0)

    /// Opens a file or a block device.
    ///
    /// - Parameters:
    ///   - path: where it is; a symbolic link is followed.
    ///   - readOnly: whether to open it for reading only.
    ///   - observer: is told of every range that has changed.
    /// - Throws: `FileError` that names the path.
    public convenience init(path: String, readOnly: Bool, observer: (any WriteObserver)? = nil) throws {
        var options = Options()
        options.isReadOnly = readOnly
        options.observer = observer
        try self.init(path: path, options)
    }

    /// Opens a file or a block device with options.
    ///
    /// - Throws: `FileError` that names the path.
    public convenience init(path: String, _ options: Options) throws {
        let flags = (options.isReadOnly ? O_RDONLY : O_RDWR) | O_CLOEXEC | (options.isDirect ? xd_o_direct() : 0)
        let fd = open(path, flags)
        guard fd >= 0 else {
            let number = errno
            if number == EINVAL, options.isDirect {
                throw FileError(
                    "Cannot open \(path) without the page cache: its file system does not offer that; use another cache mode"
                )
            }
            throw FileError.system("open \(path)", number)
        }
        do {
            try self.init(fd: fd, path: path, options)
        } catch {
            Glibc.close(fd)
            throw error
        }
    }

    /// Makes a disk in memory, sparse, that goes away with its last user.
    ///
    /// - Throws: `FileError` when the system refuses the memory.
    public convenience init(memory size: UInt64, readOnly: Bool = false, offersDepth: Bool = true) throws {
        let fd = xd_memory_file("crossdock")
        guard fd >= 0 else { throw FileError.system("make a disk in memory", errno) }
        do {
            guard size <= UInt64(Int64.max), ftruncate(fd, off_t(size)) == 0 else {
                throw FileError.system(
                    "make a disk of \(size) bytes in memory",
                    size > UInt64(Int64.max) ? EFBIG : errno
                )
            }
            var options = Options()
            options.isReadOnly = readOnly
            options.offersDepth = offersDepth
            try self.init(fd: fd, path: "memory", options)
        } catch {
            Glibc.close(fd)
            throw error
        }
    }

    private init(fd: Int32, path: String, _ options: Options) throws {
        var size: UInt64 = 0
        var traits = BackEndTraits()
        let isDevice = xd_is_block_device(fd) != 0
        if isDevice {
            guard xd_block_device_size(fd, &size) == 0 else {
                throw FileError.system("find out the size of \(path)", errno)
            }
            traits.isRotational = xd_is_rotational(fd) != 0
        } else {
            var status = stat()
            guard fstat(fd, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
                throw FileError("Cannot serve \(path): it is neither a file nor a block device")
            }
            size = UInt64(status.st_size)
        }
        guard options.offset <= size, (options.length ?? 0) <= size - options.offset else {
            throw FileError(
                "Cannot serve \(path): it has \(size) bytes, and the part that was asked for lies beyond them"
            )
        }
        size = options.length ?? (size - options.offset)
        if options.isDirect {
            let block = max(512, xd_direct_block(fd))
            guard size % UInt64(block) == 0, options.offset % UInt64(block) == 0 else {
                throw FileError(
                    "Cannot serve \(path) without the page cache: its size is no multiple of \(block) bytes"
                )
            }
            traits.blockSizes.minimum = UInt32(block)
        }
        traits.hasFastZero = !options.ignoresDiscard
        traits.hasCache = !options.isDirect
        traits.contexts = [MetaContext.allocation] + (options.offersDepth ? [MetaContext.allocationDepth] : [])
        self.path = path
        self.size = size
        self.options = options
        self.traits = traits
        self.fd = fd
        self.isDevice = isDevice
        start = options.offset
        isMemory = xd_is_tmpfs(fd) != 0
    }

    deinit { Glibc.close(fd) }
    /// Takes the locks that tell QEMU's programs that this process uses the image for writing and shares nothing.
    ///
    /// These are the byte-range locks of QEMU's `file-posix` driver: one byte for each permission held, one for each
    /// permission that is not shared.
    ///
    /// - Parameter letsReadersLook: whether who reads in spite of a writer may (`qemu-img map -U`), as with a guest's disk; nobody
    ///   else otherwise.
    /// - Throws: `FileError` when another process uses the image.
    public func lock(letsReadersLook: Bool = false) throws {
        // Permission bytes are at 100, "not shared" bytes at 200: consistent read, write, write unchanged, resize.
        let bytes = Array(100..<104) + (letsReadersLook ? [201, 203] : Array(200..<204))
        for byte in bytes {
            guard xd_lock_ofd(fd, off_t(byte), 1, 0) == 0 else { throw FileError.system("lock \(path)", errno) }
        }
        for byte in bytes {
            let pair = byte < 200 ? byte + 100 : byte - 100
            guard xd_test_ofd(fd, off_t(pair), 1, 1) == 0 else {
                unlock()
                throw FileError("The image \(path) is in use by another process")
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
            case ENOMEM: .noMemory
            default: .io
            }
        throw NBDError(code, "Cannot \(action) \(path): \(String(cString: strerror(number)))")
    }

    private func checkFailure() throws {
        if let failure = failure.withLock({ $0 }) { throw failure }
    }

    private func position(_ offset: UInt64) -> off_t { off_t(start + offset) }

    /// See `BackEnd.tryRead(into:at:)`.
    public func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool {
        if isMemory {
            try readAll(into: buffer, at: offset)
            return true
        }
        if options.isDirect || cannotReadAtOnce.load(ordering: .relaxed) { return false }
        var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
        let count = xd_preadv_nowait(fd, &vector, 1, position(offset))
        if count == buffer.count { return true }
        if count < 0, errno == EOPNOTSUPP { cannotReadAtOnce.store(true, ordering: .relaxed) }
        return false
    }

    /// See `BackEnd.read(into:at:)`.
    public func read(into payload: Payload, at offset: UInt64) async throws {
        try await BlockingPool.shared.run { try self.readAll(into: payload.mutable, at: offset) }
    }

    private func readAll(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws {
        var done = 0
        while done < buffer.count {
            let count = pread(fd, buffer.baseAddress! + done, buffer.count - done, position(offset) + off_t(done))
            if count < 0, errno == EINTR { continue }
            if try check(count, "read") == 0 { throw NBDError(.io, "\(path) became shorter while it was served") }
            done += count
        }
    }

    /// See `BackEnd.tryWrite(_:at:fua:)`.
    public func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
        try checkFailure()
        if isMemory {
            try writeAll(payload, at: offset)
            return true
        }
        if fua || options.writesThrough || options.isDirect || options.zeroDetection != .off { return false }
        if cannotWriteAtOnce.load(ordering: .relaxed) { return false }
        defer { options.observer?.didChange(offset, UInt64(payload.count)) }
        let bytes = payload.bytes
        var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
        // A writer on the pool may hold the gate for as long as a disk takes; the loop does not wait for it.
        let result = writeGate.withLockIfAvailable {
            (xd_pwritev_nowait(fd, &vector, 1, position(offset)), errno)
        }
        guard let (count, number) = result else { return false }
        if count < 0, number == EOPNOTSUPP { cannotWriteAtOnce.store(true, ordering: .relaxed) }
        return count == payload.count
    }

    /// See `BackEnd.write(_:at:fua:)`.
    public func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {
        try checkFailure()
        try await BlockingPool.shared.run {
            try self.writeAll(payload, at: offset)
            if fua || self.options.writesThrough { try self.sync() }
        }
    }

    private func writeAll(_ payload: Payload, at offset: UInt64) throws {
        let bytes = payload.bytes
        if options.zeroDetection != .off, xd_is_zero(bytes.baseAddress, bytes.count) != 0 {
            return try zeroNow(
                at: offset,
                count: UInt64(bytes.count),
                options.zeroDetection == .unmap ? [.mayDeallocate] : []
            )
        }
        try writeBytes(bytes, at: offset)
    }

    private func writeBytes(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws {
        defer { options.observer?.didChange(offset, UInt64(bytes.count)) }
        var done = 0
        while done < bytes.count {
            let from = bytes.baseAddress! + done
            let write = { (pwrite(self.fd, from, bytes.count - done, self.position(offset) + off_t(done)), errno) }
            // Direct writes and devices have no such lock.
            let (count, number) = options.isDirect || isDevice ? write() : writeGate.withLock { write() }
            if count < 0, number == EINTR { continue }
            errno = number
            done += try check(count, "write to")
        }
    }

    /// See `BackEnd.zero(at:count:_:)`.
    public func zero(at offset: UInt64, count: UInt64, _ zeroOptions: ZeroOptions) async throws {
        try checkFailure()
        if count == 0 { return }
        try await BlockingPool.shared.run {
            try self.zeroNow(at: offset, count: count, zeroOptions)
            if zeroOptions.contains(.fua) || self.options.writesThrough { try self.sync() }
        }
    }

    private func zeroNow(at offset: UInt64, count: UInt64, _ zeroOptions: ZeroOptions) throws {
        defer {
            options.observer?.didChange(offset, count)
            forgetData()
        }
        if zeroOptions.contains(.mayDeallocate), !options.ignoresDiscard {
            if try punch(xd_punch_hole(fd, position(offset), off_t(count))) { return }
        }
        // Zeroing a device without deallocation falls back to writing, silently.
        if zeroOptions.contains(.fast), isDevice {
            throw NBDError(.notSupported, "\(path) cannot be zeroed faster than written")
        }
        if try punch(xd_zero_range(fd, position(offset), off_t(count))) { return }
        if zeroOptions.contains(.fast) {
            throw NBDError(.notSupported, "\(path) cannot be zeroed faster than written")
        }
        let zeroes = IOBuffer(capacity: 1 << 20)
        memset(zeroes.mutable(0..<zeroes.capacity).baseAddress!, 0, zeroes.capacity)
        var done: UInt64 = 0
        while done < count {
            let piece = Int(min(UInt64(zeroes.capacity), count - done))
            try writeBytes(zeroes.bytes(0..<piece), at: offset + done)
            done += UInt64(piece)
        }
    }

    /// After a deallocation nothing is known; a search that runs meanwhile may report data where there is a hole, which is
    /// only less than could be said.
    private func forgetData() { knownData.withLock { $0 = 0..<0 } }

    /// Whether a deallocation was done; false when the file system has no such thing.
    private func punch(_ result: Int32) throws -> Bool {
        if result == 0 { return true }
        if errno == EOPNOTSUPP || errno == ENODEV || errno == EINVAL || errno == ENOSYS { return false }
        _ = try check(Int(result), "zero a part of")
        return false
    }

    /// See `BackEnd.trim(at:count:fua:)`.
    public func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {
        try checkFailure()
        if count == 0 || options.ignoresDiscard { return }
        try await BlockingPool.shared.run {
            do {
                defer {
                    self.options.observer?.didChange(offset, count)
                    self.forgetData()
                }
                // A file system without holes ignores the hint.
                _ = xd_punch_hole(self.fd, self.position(offset), off_t(count))
            }
            if fua || self.options.writesThrough { try self.sync() }
        }
    }

    /// See `BackEnd.cache(at:count:)`.
    public func cache(at offset: UInt64, count: UInt64) async throws {
        if isMemory { return }
        _ = await BlockingPool.shared.value {
            posix_fadvise(self.fd, self.position(offset), off_t(count), POSIX_FADV_WILLNEED)
        }
    }

    /// See `BackEnd.flush()`.
    public func flush() async throws {
        try checkFailure()
        if isReadOnly || options.ignoresFlush { return }
        try await BlockingPool.shared.run { try self.sync() }
    }

    private func sync() throws {
        try syncGate.withLock { _ in
            try checkFailure()
            if fdatasync(fd) != 0 {
                let error = NBDError(.io, "Cannot flush \(path): \(String(cString: strerror(errno)))")
                failure.withLock { $0 = error }
                throw error
            }
        }
    }

    /// See `BackEnd.extents(at:count:limit:)`.
    public func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        try await BlockingPool.shared.run { self.extentsNow(at: offset, count: count, limit: limit) }
    }

    /// See `BackEnd.extents(of:at:count:limit:)`. A raw image is the only layer there is: its depth is 1.
    public func extents(of context: String, at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        if context == MetaContext.allocationDepth { return [Extent(length: count, flags: 1)] }
        return try await extents(at: offset, count: count, limit: limit)
    }

    /// Where the next data begins, at or after an offset; the end of the file when there is none.
    public func nextData(from offset: UInt64) -> UInt64 {
        let data = xd_seek_data(fd, position(offset))
        // A file system that cannot tell has data everywhere.
        return data >= 0 ? min(UInt64(data) - start, size) : errno == ENXIO ? size : offset
    }

    /// The extents, on the caller's thread.
    public func extentsNow(at offset: UInt64, count: UInt64, limit: Int) -> [Extent] {
        var result: [Extent] = []
        let end = start + offset + count
        var position = start + offset
        while position < end, result.count < limit {
            let isKnown = knownData.withLock { $0.contains(position) }
            let data = isKnown ? off_t(position) : xd_seek_data(fd, off_t(position))
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
                let known = knownData.withLock { $0 }
                if known.contains(position) {
                    next = known.upperBound
                } else {
                    let hole = xd_seek_hole(fd, off_t(position))
                    next = hole <= data ? end : UInt64(hole)
                    knownData.withLock { $0 = position..<next }
                }
            }
            let length = min(next, end) - position
            result.append(Extent(length: length, isHole: isHole, isZero: isHole))
            position += length
        }
        return result
    }
}
