extension SocketAddress {
    /// The addresses that the host's name stands for, each in its numeric form and once, in the system's order.
    ///
    /// - Returns: this address alone when it has no name to resolve.
    /// - Throws: `ChannelError` with `Code.unresolved`.
    public func resolved() async throws -> [SocketAddress] {
        guard case .inet(let host, let port) = self else { return [self] }
        let found = try await BlockingPool.shared.run {
            try RawAddress.resolve(host: host, port: port, passive: false).map(\.address)
        }
        var seen: Set<SocketAddress> = []
        return found.filter { seen.insert($0).inserted }
    }
}
