internal import CLinux
public import Glibc

/// A stream to the standard input and from the standard output of a child process. QEMU's QIOChannelCommand.
public final class CommandChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let pipes: DescriptorChannel
    private let pid: pid_t
    /// The child's pidfd, which is readable once it has ended.
    private let descriptor: Int32
    private var exitCode: Int32?
    private var waiters: [UnsafeContinuation<Int32, Never>] = []

    /// The loop.
    public var loop: EventLoop { pipes.loop }
    /// The child's input can be closed while its output is read.
    public var features: ChannelFeatures { pipes.features }
    /// The command.
    public var peerName: String { pipes.peerName }

    /// How long a child may take to end once its channel is closed: then it gets SIGTERM, and after as long again SIGKILL.
    private static let patience = Duration.milliseconds(500)

    /// Starts a command. Its standard error stays ours. Called on the loop.
    ///
    /// - Parameter arguments: the program, by path or found in PATH, and its arguments; no shell is involved.
    /// - Throws: `ChannelError` naming the program that cannot be started.
    public init(_ arguments: [String], on loop: EventLoop) throws {
        precondition(!arguments.isEmpty, "a command has a program")
        var input: [Int32] = [0, 0]
        var output: [Int32] = [0, 0]
        guard xd_pipe(&input) == 0 else { throw ChannelError.system("make a pipe", errno) }
        guard xd_pipe(&output) == 0 else {
            Glibc.close(input[0])
            Glibc.close(input[1])
            throw ChannelError.system("make a pipe", errno)
        }
        var argv = arguments.map { strdup($0) } + [nil]
        let child = xd_spawn_child(&argv, environ, nil, input[0], output[1], 2)
        let number = errno
        for pointer in argv { free(pointer) }
        Glibc.close(input[0])
        Glibc.close(output[1])
        guard child > 0 else {
            Glibc.close(input[1])
            Glibc.close(output[0])
            throw ChannelError.system("start \(arguments[0])", number)
        }
        pid = child
        do {
            pipes = try DescriptorChannel(reading: output[0], writing: input[1], name: arguments[0], on: loop)
            descriptor = xd_pidfd_open(child)
            guard descriptor >= 0 else { throw ChannelError.system("watch \(arguments[0])", errno) }
            do {
                watch(try loop.register(descriptor))
            } catch {
                Glibc.close(descriptor)
                throw error
            }
        } catch {
            // Nobody would wait for it.
            kill(-child, SIGKILL)
            var status: Int32 = 0
            waitpid(child, &status, 0)
            throw error
        }
    }

    private func watch(_ registration: Registration) {
        let (pid, descriptor) = (pid, descriptor)
        // Used on the loop only, where the task runs.
        nonisolated(unsafe) let registration = registration
        Task(executorPreference: loop) { [weak self, loop] in
            var status: Int32 = 0
            while xd_wait_nohang(pid, &status) == 0 { await registration.waitReadable() }
            loop.deregister(descriptor)
            Glibc.close(descriptor)
            self?.ended(xd_exit_code(status))
        }
    }

    private func ended(_ code: Int32) {
        exitCode = code
        for waiter in waiters { waiter.resume(returning: code) }
        waiters = []
    }

    /// Waits until the child has ended: its exit code, or 128 plus the number of the signal that ended it.
    public func waitForExit() async -> Int32 {
        if let exitCode { return exitCode }
        return await withUnsafeContinuation { waiters.append($0) }
    }

    /// See `Channel.read(into:)`.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? { try pipes.read(into: buffers) }
    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? { try pipes.write(from: buffers) }
    /// Nothing is held back.
    public func flush() throws -> Bool { try pipes.flush() }
    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws { try await pipes.waitReadable() }
    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws { try await pipes.waitWritable() }
    /// Closes the child's standard input.
    public func finishWriting() async throws { try await pipes.finishWriting() }
    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) { pipes.abort(reason) }

    /// Closes both pipes; a child that does not end by itself then is ended by signals to its process group.
    public func close() {
        pipes.close()
        guard exitCode == nil else { return }
        loop.schedule(after: Self.patience) {
            guard self.exitCode == nil else { return }
            kill(-self.pid, SIGTERM)
            self.loop.schedule(after: Self.patience) { if self.exitCode == nil { kill(-self.pid, SIGKILL) } }
        }
    }
}
