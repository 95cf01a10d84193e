internal import CLinux
public import Glibc

/// A stream over one descriptor for each direction: two pipes, a terminal, standard input and output.
public final class DescriptorChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// One direction: a descriptor, and its readiness when the kernel can tell it. Files are always ready.
    private struct Side {
        var fd: Int32
        let registration: Registration?

        init(_ fd: Int32, on loop: EventLoop) throws {
            self.fd = fd
            guard xd_set_nonblocking(fd) == 0 else { throw ChannelError.system("use descriptor \(fd)", errno) }
            do {
                registration = try loop.register(fd)
            } catch let error as ChannelError where error.number == EPERM {
                registration = nil
            }
        }

        mutating func close(_ loop: EventLoop) {
            guard fd >= 0 else { return }
            if registration != nil { loop.deregister(fd) }
            registration?.fail()
            Glibc.close(fd)
            fd = -1
        }
    }

    /// The loop.
    public let loop: EventLoop
    /// The outgoing descriptor can be closed while the other goes on.
    public let features: ChannelFeatures = [.halfClose]
    /// What the channel was called.
    public let peerName: String
    private var incoming: Side
    private var outgoing: Side
    private var failure: ChannelError?

    /// Takes over two different descriptors, which become non-blocking. Called on the loop.
    ///
    /// They are owned by the channel from here on, also when this throws.
    public init(reading: Int32, writing: Int32, name: String, on loop: EventLoop) throws {
        self.loop = loop
        peerName = name
        var first: Side?
        do {
            first = try Side(reading, on: loop)
            outgoing = try Side(writing, on: loop)
        } catch {
            if first == nil { Glibc.close(reading) } else { first?.close(loop) }
            Glibc.close(writing)
            throw error
        }
        incoming = first!
    }

    deinit {
        let (first, second, loop) = (incoming.fd, outgoing.fd, loop)
        if first < 0, second < 0 { return }
        let watched = (incoming.registration != nil, outgoing.registration != nil)
        let release: @Sendable () -> Void = {
            for (fd, isWatched) in [(first, watched.0), (second, watched.1)] where fd >= 0 {
                if isWatched { loop.deregister(fd) }
                Glibc.close(fd)
            }
        }
        if loop.isCurrent { release() } else { loop.execute(release) }
    }

    /// The process's standard input and output, for programs that inetd, ssh or a shell pipe starts. Called on the loop, once:
    /// descriptors 0 and 1 are /dev/null afterwards.
    ///
    /// Whoever shares the terminal or the pipe with us does not see that it is non-blocking here.
    public static func standard(on loop: EventLoop) throws -> DescriptorChannel {
        let null = Glibc.open("/dev/null", O_RDWR | O_CLOEXEC)
        guard null >= 0 else { throw ChannelError.system("open /dev/null", errno) }
        defer { Glibc.close(null) }
        func own(_ fd: Int32, writing: Bool) throws -> Int32 {
            // The original must not stay open: our end of a pipe would not be the last one, and the other end would wait.
            defer { dup2(null, fd) }
            var status = stat()
            let isFile = fstat(fd, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
            // A file has a position, which a second opening would not share.
            let reopened = isFile ? -1 : xd_reopen(fd, writing ? 1 : 0)
            if reopened >= 0 { return reopened }
            // A socket cannot be opened again; whoever starts a program on a socket hands it over.
            let copy = fcntl(fd, F_DUPFD_CLOEXEC, 3)
            guard copy >= 0 else { throw ChannelError.system("use descriptor \(fd)", errno) }
            return copy
        }
        let input = try own(0, writing: false)
        let output: Int32
        do {
            output = try own(1, writing: true)
        } catch {
            Glibc.close(input)
            throw error
        }
        return try DescriptorChannel(reading: input, writing: output, name: "standard input and output", on: loop)
    }

    /// Makes two channels that are connected by two pipes. Called on the loop.
    public static func pair(on loop: EventLoop) throws -> (DescriptorChannel, DescriptorChannel) {
        var forth: [Int32] = [0, 0]
        var back: [Int32] = [0, 0]
        guard xd_pipe(&forth) == 0 else { throw ChannelError.system("make a pipe", errno) }
        guard xd_pipe(&back) == 0 else {
            let number = errno
            for fd in forth { Glibc.close(fd) }
            throw ChannelError.system("make a pipe", number)
        }
        return (
            try DescriptorChannel(reading: back[0], writing: forth[1], name: "pipe:b", on: loop),
            try DescriptorChannel(reading: forth[0], writing: back[1], name: "pipe:a", on: loop)
        )
    }

    /// See `Channel.read(into:)`.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        while true {
            if let failure { throw failure }
            let count = readv(incoming.fd, buffers.baseAddress, Int32(buffers.count))
            if count >= 0 { return count }
            let number = errno
            if number == EAGAIN { return nil }
            // A terminal whose other end has gone.
            if number == EIO, isatty(incoming.fd) == 1 { return 0 }
            if number != EINTR { throw ChannelError.system("read from \(peerName)", number) }
        }
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        while true {
            if let failure { throw failure }
            guard outgoing.fd >= 0 else { throw ChannelError.system("write to \(peerName)", EPIPE) }
            let count = writev(outgoing.fd, buffers.baseAddress, Int32(buffers.count))
            if count >= 0 { return count }
            let number = errno
            if number == EAGAIN { return nil }
            if number != EINTR { throw ChannelError.system("write to \(peerName)", number) }
        }
    }

    /// Nothing is held back.
    public func flush() throws -> Bool {
        if let failure { throw failure }
        return true
    }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws {
        if let failure { throw failure }
        await incoming.registration?.waitReadable()
        if let failure { throw failure }
    }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws {
        if let failure { throw failure }
        await outgoing.registration?.waitWritable()
        if let failure { throw failure }
    }

    /// Closes the outgoing descriptor.
    public func finishWriting() async throws {
        if let failure { throw failure }
        // Closing is not enough for a socket that both directions share.
        if outgoing.fd >= 0 { Glibc.shutdown(outgoing.fd, Int32(SHUT_WR)) }
        outgoing.close(loop)
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) {
        loop.execute {
            guard self.failure == nil else { return }
            self.failure = reason
            self.incoming.registration?.fail()
            self.outgoing.registration?.fail()
        }
    }

    /// Closes both descriptors.
    public func close() {
        if failure == nil { failure = ChannelError(.closed, "The connection to \(peerName) is closed") }
        incoming.close(loop)
        outgoing.close(loop)
    }
}
