internal import CLinux
internal import Glibc
internal import IO

/// A file that is read as the disk has it, past the page cache where that can be done.
final class UncachedFile {
    private let path: String
    private let fd: Int32
    /// Reads past the cache; -1 when the file system has no such thing.
    private let direct: Int32
    private let block: UInt64

    init(_ path: String) throws {
        self.path = path
        fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw FileError.system("read \(path)", errno) }
        direct = open(path, O_RDONLY | O_CLOEXEC | xd_o_direct())
        block = UInt64(max(4096, direct >= 0 ? Int(xd_direct_block(direct)) : 0))
    }

    deinit {
        close(fd)
        if direct >= 0 { close(direct) }
    }

    /// Reads all of a range. The buffer begins at a page.
    ///
    /// A guest has whole sectors: what an image lacks of its last one reads as zeroes, as in QEMU.
    func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws {
        let isAligned = direct >= 0 && offset % block == 0 && UInt64(buffer.count) % block == 0
        if !isAligned { posix_fadvise(fd, off_t(offset), off_t(buffer.count), POSIX_FADV_DONTNEED) }
        var done = 0
        while done < buffer.count {
            // A file that ends within a block comes short, and the rest of it the other way.
            let source = isAligned && UInt64(done) % block == 0 ? direct : fd
            let count = pread(source, buffer.baseAddress! + done, buffer.count - done, off_t(offset) + off_t(done))
            if count < 0, errno == EINTR { continue }
            if count < 0, source == direct, errno == EINVAL {
                let rest = pread(fd, buffer.baseAddress! + done, buffer.count - done, off_t(offset) + off_t(done))
                guard rest >= 0 else { throw FileError.system("read \(path)", errno) }
                if rest == 0 { return try fill(buffer, from: done, at: offset) }
                done += rest
                continue
            }
            guard count >= 0 else { throw FileError.system("read \(path)", errno) }
            if count == 0 { return try fill(buffer, from: done, at: offset) }
            done += count
        }
    }

    /// Fills the rest of the last sector with zeroes.
    ///
    /// - Throws: `FileError` when more is missing: the file is shorter than it was said to be.
    private func fill(_ buffer: UnsafeMutableRawBufferPointer, from done: Int, at offset: UInt64) throws {
        let end = offset + UInt64(done)
        guard end % 512 != 0, buffer.count - done <= 512 - Int(end % 512) else {
            throw FileError.system("read \(path)", EIO)
        }
        UnsafeMutableRawBufferPointer(rebasing: buffer[done...]).initializeMemory(as: UInt8.self, repeating: 0)
    }
}
