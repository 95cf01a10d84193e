internal import CLinux
internal import Emulator
internal import Glibc
internal import IO

/// What a host says of itself at a moment.
struct HostFigures: Sendable, Hashable {
    /// The memory of a guest whose QEMU runs.
    struct Memory: Sendable, Hashable {
        /// The most that it may have, in bytes.
        var most: UInt64
        /// What its QEMU has of the host, in bytes.
        var taken: UInt64
    }

    /// Bytes of memory.
    var memory: UInt64 = 0
    /// Bytes of memory that are available.
    var freeMemory: UInt64 = 0
    /// Free bytes of the file system of images.
    var freeDisk: UInt64 = 0
    /// Processors that are online.
    var processors: UInt64 = 0
    /// The guests whose QEMU runs, by their names.
    var memories: [String: Memory] = [:]
    /// Bytes that are allocated of the images of guests on their way, by their names.
    var written: [String: UInt64] = [:]

    /// Reads all of it. Blocks.
    ///
    /// - Parameters:
    ///   - guests: the guests of the host.
    ///   - images: where their images are.
    ///   - arriving: the guests that are on their way.
    static func read(_ guests: GuestStore, images: String, arriving: [String]) throws -> HostFigures {
        var figures = HostFigures()
        let memory = fields(String(decoding: try DurableFile.read("/proc/meminfo") ?? [], as: UTF8.self))
        figures.memory = memory["MemTotal"] ?? 0
        figures.freeMemory = memory["MemAvailable"] ?? 0
        figures.freeDisk = xd_free_bytes(images)
        figures.processors = UInt64(max(sysconf(Int32(_SC_NPROCESSORS_ONLN)), 1))
        for name in guests.names() {
            // A damaged record is its own guest's affair.
            guard let record = (try? guests.load(name)) ?? nil, let process = record.process, process.isRunning else {
                continue
            }
            let most = try? record.arrival?.usage.memory ?? record.commandLine.memory()
            let status = (try? DurableFile.read("/proc/\(process.pid)/status")) ?? nil
            let held = fields(String(decoding: status ?? [], as: UTF8.self))
            figures.memories[name] = Memory(
                most: most ?? 0,
                taken: (held["VmRSS"] ?? 0).addingSaturated(held["HugetlbPages"] ?? 0)
            )
        }
        for name in arriving { figures.written[name] = allocated(in: "\(images)/\(name)") }
        return figures
    }

    /// The sizes in a text of the kernel: `Name:   123 kB` in each line, in bytes.
    static func fields(_ text: String) -> [String: UInt64] {
        var fields: [String: UInt64] = [:]
        for line in text.split(separator: "\n") {
            let words = line.split { $0 == " " || $0 == "\t" }
            guard words.count == 3, words[2] == "kB", words[0].hasSuffix(":"), let size = UInt64(words[1]) else {
                continue
            }
            fields[String(words[0].dropLast())] = size <= UInt64.max >> 10 ? size << 10 : .max
        }
        return fields
    }

    private static func allocated(in directory: String) -> UInt64 {
        var bytes: UInt64 = 0
        for name in DurableFile.list(directory) {
            var status = stat()
            guard lstat("\(directory)/\(name)", &status) == 0, status.st_mode & S_IFMT == S_IFREG else { continue }
            bytes = bytes.addingSaturated(UInt64(max(status.st_blocks, 0)) * 512)
        }
        return bytes
    }

    // MARK: judging

    /// Why a guest does not fit into what is left, a sentence each.
    ///
    /// - Parameters:
    ///   - memory: bytes that it may take; nil to judge the disk only.
    ///   - allocated: bytes that its copy needs; nil to judge the memory only.
    ///   - promises: what others have been promised.
    func problems(memory wanted: UInt64?, allocated: UInt64?, besides promises: GuestLedger.Promises) -> [String] {
        func problem(_ what: String, _ rule: String, _ wanted: UInt64, _ free: UInt64, _ promised: UInt64) -> String? {
            guard wanted > free - min(promised, free) else { return nil }
            return
                "This host has \(Self.text(free)) of \(what) free (\(rule)), of which \(Self.text(promised)) is promised to others, and "
                + "this guest wants \(Self.text(wanted))"
        }
        return [
            wanted.flatMap { problem("memory", "MemAvailable", $0, freeMemory, promises.memory) },
            allocated.flatMap {
                problem("disk", "the file system of its image directory", $0, freeDisk, promises.disk)
            },
        ].compactMap { $0 }
    }

    /// A size for people: whole MiB when there are any.
    static func text(_ bytes: UInt64) -> String { ByteSize.text(bytes < 1 << 20 ? bytes : bytes & ~((1 << 20) - 1)) }
}
