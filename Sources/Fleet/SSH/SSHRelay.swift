internal import CLinux
internal import CSSH
internal import Glibc
internal import IO

/// A way through a host to another one: a direct-tcpip channel of its session, of which a socket is the near end.
///
/// A thread of its own carries the bytes; it ends with either end, and the session with it.
final class SSHRelay: @unchecked Sendable {
    // Unchecked: after `start` the thread has it alone.
    private let login: SSHLogin
    private let channel: ssh_channel
    private let local: Int32

    private init(_ login: SSHLogin, _ channel: ssh_channel, _ local: Int32) {
        self.login = login
        self.channel = channel
        self.local = local
    }

    deinit {
        close(local)
        ssh_channel_free(channel)
    }

    /// Opens the way.
    ///
    /// - Returns: the near end, which the caller closes.
    /// - Throws: `FleetError` when the host between does not open it.
    static func start(through login: SSHLogin, to host: String, port: UInt16) throws -> Int32 {
        guard let channel = ssh_channel_new(login.session) else {
            throw FleetError("There is no memory for a channel through \(login.name)")
        }
        do {
            try login.drive("open a connection to \(host):\(port)") {
                ssh_channel_open_forward(channel, host, Int32(port), "127.0.0.1", 0)
            }
        } catch {
            ssh_channel_free(channel)
            throw error
        }
        var ends: [Int32] = [-1, -1]
        guard xd_socketpair(&ends) == 0 else {
            ssh_channel_free(channel)
            throw FleetError("There is no socket for \(login.name): \(String(cString: strerror(errno)))")
        }
        let relay = Unmanaged.passRetained(SSHRelay(login, channel, ends[0]))
        var thread = pthread_t()
        let result = pthread_create(
            &thread,
            nil,
            { pointer in
                xd_block_sigpipe()
                let relay = Unmanaged<SSHRelay>.fromOpaque(pointer!).takeRetainedValue()
                relay.run()
                return nil
            },
            relay.toOpaque()
        )
        guard result == 0 else {
            relay.release()
            close(ends[1])
            throw FleetError("The system refused a thread for the way through \(login.name)")
        }
        pthread_detach(thread)
        return ends[1]
    }

    private func run() {
        var inward: [UInt8] = []
        var outward: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 32 << 10)
        while true {
            var moved = false
            if inward.isEmpty {
                let count = ssh_channel_read_nonblocking(channel, &buffer, UInt32(buffer.count), 0)
                if count > 0 { inward = Array(buffer.prefix(Int(count))) }
                if count == SSH_ERROR || count == SSH_EOF || ssh_channel_is_eof(channel) != 0 && count == 0 { return }
            }
            if !inward.isEmpty {
                let count = send(local, inward, inward.count, Int32(MSG_NOSIGNAL))
                if count < 0, errno != EAGAIN, errno != EINTR { return }
                if count > 0 {
                    inward.removeFirst(count)
                    moved = true
                }
            }
            if outward.isEmpty {
                let count = recv(local, &buffer, buffer.count, 0)
                if count == 0 || count < 0 && errno != EAGAIN && errno != EINTR { return }
                if count > 0 { outward = Array(buffer.prefix(count)) }
            }
            if !outward.isEmpty {
                let count = ssh_channel_write(channel, outward, UInt32(outward.count))
                if count < 0, count != SSH_AGAIN { return }
                if count > 0 {
                    outward.removeFirst(Int(count))
                    moved = true
                }
            }
            if moved { continue }
            // What waits for room is tried again soon.
            let isStuck = !inward.isEmpty || !outward.isEmpty
            guard (try? login.wait(and: outward.isEmpty ? local : -1, milliseconds: isStuck ? 10 : 500)) != nil else {
                return
            }
        }
    }
}
