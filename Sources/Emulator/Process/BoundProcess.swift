internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO

/// A process that helps this one and ends with it, with a private directory for its sockets and its words.
final class BoundProcess: Sendable {
    /// Where its sockets are; nobody else may enter.
    let directory: String
    private let pid: pid_t

    /// A directory for a process that is about to be started.
    static func makeDirectory() throws -> String {
        let parent = ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp"
        var template = Array("\(parent)/crossdock-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw ChannelError.system("make a directory under \(parent)", errno) }
        return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Starts it. Blocks: run it on the pool, whose threads stay as long as this process, which is what the child's life
    /// hangs on.
    ///
    /// - Parameters:
    ///   - arguments: the program, looked up in PATH, and its arguments.
    ///   - directory: from `makeDirectory`; removed here when the program cannot be started.
    ///   - input: what it reads; nothing when nil.
    init(_ arguments: [String], directory: String, input: Int32? = nil) throws {
        self.directory = directory
        let null = open("/dev/null", O_RDONLY | O_CLOEXEC)
        let output = open("\(directory)/log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        var argv = arguments.map { strdup($0) } + [nil]
        defer {
            close(null)
            close(output)
            for pointer in argv { free(pointer) }
        }
        pid = xd_spawn_bound(&argv, environ, nil, input ?? null, output, output)
        guard pid > 0 else {
            let number = errno
            DurableFile.remove(directory)
            throw GuestError("Cannot start \(arguments[0]): \(String(cString: strerror(number)))")
        }
    }

    /// Whether it has ended by itself; its end is then noted, and `stop` must not be called.
    func hasEnded() -> Bool {
        var status: Int32 = 0
        return xd_wait_nohang(pid, &status) == pid
    }

    /// The last thing that it said; nil when it said nothing.
    var lastWords: String? {
        let words =
            ((try? DurableFile.read("\(directory)/log")) ?? nil).map { String(decoding: $0, as: UTF8.self) } ?? ""
        // QEMU puts its name and the option before what it has to say.
        return words.split(separator: "\n").last.map(String.init)
    }

    /// Everything that it said, as one line.
    var words: String { EmulatorProcess.tail(of: "\(directory)/log") }

    /// Removes what a process that has ended left.
    func clear() { DurableFile.remove(directory) }

    /// Ends it at once. Blocks.
    func kill() {
        Glibc.kill(pid, SIGKILL)
        var status: Int32 = 0
        while waitpid(pid, &status, 0) < 0, errno == EINTR {}
        clear()
    }

    /// Ends it in order, and by force after a while.
    func stop(grace: Duration = .seconds(10)) async {
        _ = await BlockingPool.shared.value { [self] in
            Glibc.kill(pid, SIGTERM)
            var status: Int32 = 0
            let end = ContinuousClock.now + grace
            while xd_wait_nohang(pid, &status) == 0 {
                if ContinuousClock.now > end { Glibc.kill(pid, SIGKILL) }
                usleep(2_000)
            }
            clear()
        }
    }
}
