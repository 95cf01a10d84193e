internal import CLinux
internal import FoundationEssentials
internal import Glibc

/// Several listening sockets that hand out their connections in one place: all the addresses of a name, IPv4 and IPv6, Unix and
/// vsock, or sockets that systemd opened. QEMU's QIONetListener.
public final class NetworkListener: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// The sockets.
    public private(set) var listeners: [Listener]
    private let loop: EventLoop

    /// Gathers listeners of one loop.
    public init(_ listeners: [Listener], on loop: EventLoop) {
        self.listeners = listeners
        self.loop = loop
    }

    /// Listens on every address that each of the given ones resolves to. Called on the loop.
    ///
    /// When the system chooses the port, all addresses of one name get the same.
    ///
    /// - Throws: `ChannelError` when one of them cannot be listened on; then none is.
    public static func listen(on addresses: [SocketAddress], loop: EventLoop) async throws -> NetworkListener {
        let result = NetworkListener([], on: loop)
        do {
            for address in addresses {
                result.listeners += try await Listener.listenEverywhere(on: address, loop: loop)
            }
        } catch {
            result.close()
            throw error
        }
        return result
    }

    /// The sockets that systemd, or another supervisor, opened for this process (sd_listen_fds(3): LISTEN_PID and LISTEN_FDS),
    /// with their names from LISTEN_FDNAMES. Called on the loop, once: the descriptors belong to the result.
    ///
    /// - Parameter name: only the sockets with this name; all when it is nil.
    /// - Returns: nil when there are none.
    public static func inherited(named name: String? = nil, loop: EventLoop) throws -> NetworkListener? {
        let environment = ProcessInfo.processInfo.environment
        guard environment["LISTEN_PID"] == String(getpid()),
            let count = environment["LISTEN_FDS"].flatMap({ Int32($0) }),
            (1...1024).contains(count)
        else { return nil }
        let names = (environment["LISTEN_FDNAMES"] ?? "").split(separator: ":", omittingEmptySubsequences: false)
        var found: [Listener] = []
        for index in 0..<count {
            if let name, Int(index) >= names.count || names[Int(index)] != name { continue }
            found.append(try Listener(inheriting: 3 + index, on: loop))
        }
        return found.isEmpty ? nil : NetworkListener(found, on: loop)
    }

    /// The addresses, with the ports that the system chose.
    public var addresses: [SocketAddress] { listeners.map(\.address) }

    /// Hands each connection to `body`, on the loop, until the listener is closed.
    public func serve(_ body: @escaping @Sendable (SocketChannel) async -> Void) async {
        await withTaskGroup(of: Void.self) { group in
            for listener in listeners {
                group.addTask(executorPreference: loop) { [loop] in
                    while let channel = try? await listener.accept() {
                        FreedMemory.shared.began()
                        Task(executorPreference: loop) {
                            await body(channel)
                            FreedMemory.shared.ended(on: loop)
                        }
                    }
                }
            }
        }
    }

    /// Ends the listening from any thread.
    public func abort() { for listener in listeners { listener.abort() } }

    /// Ends the listening. Called on the loop.
    public func close() { for listener in listeners { listener.close() } }
}
