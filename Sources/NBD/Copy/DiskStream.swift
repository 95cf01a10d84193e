internal import CLinux
internal import Glibc
internal import IO

/// Copies between a disk and a descriptor that can only be read or written in order: a pipe, a terminal, a file.
public struct DiskStream: Sendable {
    private let piece: Int

    /// Makes a copier.
    ///
    /// - Parameter piece: how many bytes are moved at once.
    public init(piece: Int) { self.piece = piece }

    /// Writes what a descriptor has to the beginning of a disk, then makes that durable. Zeroes are written as such.
    ///
    /// - Throws: `ChannelError` when the disk is too small, or reading fails; `NBDError` when writing does.
    public func fill(_ target: any BackEnd, from fd: Int32) async throws {
        // Two buffers: one is filled while the other is written.
        var position: UInt64 = 0
        let buffers = [IOBuffer(capacity: piece), IOBuffer(capacity: piece)]
        var turn = 0
        var count = try await read(fd, buffers[0])
        while count > 0 {
            guard UInt64(count) <= target.size - position else {
                throw ChannelError(.system, "The input is longer than the target, which has \(target.size) bytes")
            }
            let spare = buffers[1 - turn]
            // Not a child: when writing fails, nobody waits for input that may never come.
            let next = Task { try await read(fd, spare) }
            let data = Payload(buffers[turn], 0..<count)
            if xd_is_zero(data.bytes.baseAddress, count) != 0 {
                try await target.zero(at: position, count: UInt64(count), [.mayDeallocate])
            } else {
                try await target.write(data, at: position, fua: false)
            }
            position += UInt64(count)
            count = try await next.value
            turn = 1 - turn
        }
        try await target.flush()
    }

    /// Writes a whole disk to a descriptor. What the disk says to be zeroes is not read.
    ///
    /// - Throws: `ChannelError` when writing fails; `NBDError` when reading does.
    public func pour(_ source: any BackEnd, into fd: Int32) async throws {
        let (buffer, zeroes) = (IOBuffer(capacity: piece), IOBuffer(capacity: piece))
        zeroes.mutable(0..<piece).initializeMemory(as: UInt8.self, repeating: 0)
        var position: UInt64 = 0
        while position < source.size {
            for extent in try await source.extents(at: position, count: source.size - position, limit: 4096) {
                let end = min(position + extent.length, source.size)
                while position < end {
                    let count = Int(min(UInt64(piece), end - position))
                    let data = Payload(extent.isZero ? zeroes : buffer, 0..<count)
                    if !extent.isZero { try await source.readFully(into: data, at: position) }
                    try await write(data, to: fd)
                    position += UInt64(count)
                }
            }
        }
    }

    private func write(_ data: Payload, to fd: Int32) async throws {
        try await BlockingPool.shared.run {
            var done = 0
            while done < data.count {
                let written = Glibc.write(fd, data.bytes.baseAddress! + done, data.count - done)
                if written < 0, errno == EINTR { continue }
                guard written > 0 else { throw ChannelError.system("write the output", errno) }
                done += written
            }
        }
    }

    private func read(_ fd: Int32, _ buffer: IOBuffer) async throws -> Int {
        try await BlockingPool.shared.run {
            var done = 0
            while done < buffer.capacity {
                let bytes = buffer.mutable(done..<buffer.capacity)
                let count = Glibc.read(fd, bytes.baseAddress, bytes.count)
                if count < 0, errno == EINTR { continue }
                guard count >= 0 else { throw ChannelError.system("read the input", errno) }
                if count == 0 { break }
                done += count
            }
            return done
        }
    }
}
