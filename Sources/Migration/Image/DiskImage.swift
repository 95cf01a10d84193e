public import Emulator
public import IO
public import NBD
public import TLS

/// An image of any format that QEMU knows, open.
///
/// Raw files and block devices are read and written by this process; everything else by QEMU's storage daemon.
public final class DiskImage: Sendable {
    /// What the guest would see.
    public let contents: any BackEnd
    private let daemon: StorageDaemon?
    private let isClosed = Guarded(false)

    /// An image that is read and written by this process.
    public convenience init(_ file: RawFile) { self.init(file, nil) }

    private init(_ contents: any BackEnd, _ daemon: StorageDaemon?) {
        self.contents = contents
        self.daemon = daemon
    }

    /// Opens an image.
    ///
    /// - Parameters:
    ///   - image: what to open, and how.
    ///   - loops: where it is used.
    /// - Throws: `FileError`, `ChannelError` or `GuestError` naming the file.
    public static func open(_ image: StorageDaemon.Image, on loops: EventLoopGroup) async throws -> DiskImage {
        if image.format == "raw" {
            let (path, readOnly) = (image.path, image.isReadOnly)
            return DiskImage(try await BlockingPool.shared.run { try RawFile(path: path, readOnly: readOnly) }, nil)
        }
        let daemon = try await StorageDaemon.start(image)
        do {
            let export = try await ClientBackEnd.open(
                .unix(path: daemon.socket),
                NBDClientOptions(export: StorageDaemon.export),
                connections: loops.loops.count,
                loops: loops
            )
            return DiskImage(export, daemon)
        } catch {
            await daemon.stop()
            throw error
        }
    }

    /// Closes it, with everything that was written in the image. Only the first call does anything.
    public func close() async {
        let isFirst = isClosed.withLock { closed in
            defer { closed = true }
            return !closed
        }
        guard isFirst else { return }
        await contents.close()
        await daemon?.stop()
    }

    /// The digest of an image that nobody writes; see `ChunkDigests`.
    ///
    /// - Parameters:
    ///   - path: the image.
    ///   - format: its format.
    ///   - size: how much of a raw one the guest sees: a device may be larger.
    ///   - secret: what opens it.
    ///   - dataFile: where the file with its data is, whatever the image says; nil for an image that has it in itself.
    ///   - loops: where it is read.
    public static func digest(
        of path: String,
        format: String,
        size: UInt64,
        secret: SecretBytes? = nil,
        dataFile: String? = nil,
        on loops: EventLoopGroup
    ) async throws -> String {
        if format == "raw" {
            return try await BlockingPool.shared.run {
                let digests = try ChunkDigests(size: size, isBlank: false)
                try digests.update(from: path)
                return digests.digest()
            }
        }
        var image = StorageDaemon.Image(path: path, format: format)
        image.isReadOnly = true
        image.secret = secret
        image.dataFile = dataFile
        let open = try await DiskImage.open(image, on: loops)
        do {
            let digest = try await loops.next().run { try await ChunkDigests.digest(of: open.contents) }
            await open.close()
            return digest
        } catch {
            await open.close()
            throw error
        }
    }
}

/// A back end that tells of every change.
final public class ObservedBackEnd: BackEnd {
    private let inner: any BackEnd
    private let observer: any WriteObserver

    /// Puts an observer on a back end, which it does not close.
    public init(_ inner: any BackEnd, observer: any WriteObserver) {
        self.inner = inner
        self.observer = observer
    }

    /// See `BackEnd`.
    public var size: UInt64 { inner.size }
    /// See `BackEnd`.
    public var isReadOnly: Bool { inner.isReadOnly }
    /// See `BackEnd`.
    public var traits: BackEndTraits { inner.traits }

    /// See `BackEnd`.
    public func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool {
        try inner.tryRead(into: buffer, at: offset)
    }
    /// See `BackEnd`.
    public func read(into payload: Payload, at offset: UInt64) async throws {
        try await inner.read(into: payload, at: offset)
    }
    /// See `BackEnd`.
    public func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
        guard try inner.tryWrite(payload, at: offset, fua: fua) else { return false }
        observer.didChange(offset, UInt64(payload.count))
        return true
    }
    /// See `BackEnd`.
    public func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {
        defer { observer.didChange(offset, UInt64(payload.count)) }
        try await inner.write(payload, at: offset, fua: fua)
    }
    /// See `BackEnd`.
    public func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws {
        defer { observer.didChange(offset, count) }
        try await inner.zero(at: offset, count: count, options)
    }
    /// See `BackEnd`.
    public func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {
        defer { observer.didChange(offset, count) }
        try await inner.trim(at: offset, count: count, fua: fua)
    }
    /// See `BackEnd`.
    public func cache(at offset: UInt64, count: UInt64) async throws { try await inner.cache(at: offset, count: count) }
    /// See `BackEnd`.
    public func flush() async throws { try await inner.flush() }
    /// See `BackEnd`.
    public func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        try await inner.extents(at: offset, count: count, limit: limit)
    }
    /// See `BackEnd`.
    public func extents(of context: String, at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        try await inner.extents(of: context, at: offset, count: count, limit: limit)
    }
}
