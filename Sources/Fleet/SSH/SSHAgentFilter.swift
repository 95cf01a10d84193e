internal import CLinux
internal import Glibc
internal import IO

/// The operator's SSH agent, with the keys of the configuration first, or alone: a server counts tries, and ends the connection after some.
///
/// A thread of its own sits between libssh, which offers all of the agent's keys in its order, and the agent. It ends with either.
enum SSHAgentFilter {
    /// The most bytes of a message, as OpenSSH has it.
    private static let limit = 256 << 10
    private static let identitiesAnswer: UInt8 = 12

    /// Connects to the agent.
    ///
    /// - Parameters:
    ///   - path: its socket.
    ///   - preferred: the keys that come first, Base64.
    ///   - isOnly: whether the others are left out.
    /// - Returns: a socket that speaks for the agent, which the caller owns; nil when there is no agent.
    static func connect(_ path: String, preferred: [String], isOnly: Bool) -> Int32? {
        let agent = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        guard agent >= 0 else { return nil }
        var ends: [Int32] = [-1, -1]
        guard xd_unix_connect(agent, path) == 0, xd_socketpair(&ends) == 0 else {
            close(agent)
            return nil
        }
        let relay = Relay(agent: agent, client: ends[0], preferred: preferred, isOnly: isOnly)
        let pointer = Unmanaged.passRetained(relay)
        var thread = pthread_t()
        let result = pthread_create(
            &thread,
            nil,
            { pointer in
                xd_block_sigpipe()
                Unmanaged<Relay>.fromOpaque(pointer!).takeRetainedValue().run()
                return nil
            },
            pointer.toOpaque()
        )
        guard result == 0 else {
            pointer.release()
            close(ends[1])
            return nil
        }
        pthread_detach(thread)
        return ends[1]
    }

    private final class Relay: @unchecked Sendable {
        // Unchecked: its thread has it alone.
        private let agent: Int32
        private let client: Int32
        private let preferred: [String]
        private let isOnly: Bool

        init(agent: Int32, client: Int32, preferred: [String], isOnly: Bool) {
            self.agent = agent
            self.client = client
            self.preferred = preferred
            self.isOnly = isOnly
        }

        deinit {
            close(agent)
            close(client)
        }

        func run() {
            // A question is answered before the next one comes.
            while let question = message(from: client), send(question, to: agent), let answer = message(from: agent) {
                guard send(sorted(answer), to: client) else { return }
            }
        }

        private func sorted(_ answer: [UInt8]) -> [UInt8] {
            guard answer.first == identitiesAnswer else { return answer }
            var rest = answer.dropFirst(5)
            func string() -> [UInt8]? {
                guard rest.count >= 4 else { return nil }
                let count = rest.prefix(4).reduce(0) { $0 << 8 | Int($1) }
                guard count <= rest.count - 4 else { return nil }
                defer { rest = rest.dropFirst(4 + count) }
                return Array(rest.dropFirst(4).prefix(count))
            }
            var keys: [(place: Int, bytes: [UInt8])] = []
            while let key = string(), let comment = string() {
                let place = preferred.firstIndex(of: Base64.encode(key))
                if place == nil, isOnly { continue }
                keys.append((place ?? Int.max, number(key.count) + key + number(comment.count) + comment))
            }
            let ordered = keys.enumerated().sorted { ($0.element.place, $0.offset) < ($1.element.place, $1.offset) }
            return [identitiesAnswer] + number(keys.count) + ordered.flatMap(\.element.bytes)
        }

        private func number(_ value: Int) -> [UInt8] {
            (0..<4).map { UInt8(truncatingIfNeeded: value >> (24 - 8 * $0)) }
        }

        private func message(from fd: Int32) -> [UInt8]? {
            guard let head = bytes(4, from: fd) else { return nil }
            let count = head.reduce(0) { $0 << 8 | Int($1) }
            return count > 0 && count <= limit ? bytes(count, from: fd) : nil
        }

        private func bytes(_ count: Int, from fd: Int32) -> [UInt8]? {
            var result = [UInt8](repeating: 0, count: count)
            var done = 0
            while done < count {
                let got = result.withUnsafeMutableBytes { recv(fd, $0.baseAddress! + done, count - done, 0) }
                if got > 0 {
                    done += got
                } else if got == 0 || errno != EAGAIN && errno != EINTR {
                    return nil
                } else {
                    wait(fd, POLLIN)
                }
            }
            return result
        }

        private func send(_ message: [UInt8], to fd: Int32) -> Bool {
            var rest = (number(message.count) + message)[...]
            while !rest.isEmpty {
                let put = rest.withUnsafeBytes { Glibc.send(fd, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
                if put > 0 {
                    rest = rest.dropFirst(put)
                } else if errno != EAGAIN, errno != EINTR {
                    return false
                } else {
                    wait(fd, POLLOUT)
                }
            }
            return true
        }

        private func wait(_ fd: Int32, _ events: Int32) {
            var polled = pollfd(fd: fd, events: Int16(events), revents: 0)
            poll(&polled, 1, -1)
        }
    }
}
