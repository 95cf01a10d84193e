internal import IO
internal import TLS

/// A connection for QEMU's stream that is made while others get ready for what it will carry. A head start and nothing else.
final class DialledStream: Sendable {
    /// Where it lives.
    let loop: EventLoop
    private let dialling: Task<TLSChannel?, Never>

    /// Begins at once.
    init(_ plan: MigrationPlan, credentials: any TLSCredentials, on loop: EventLoop) {
        self.loop = loop
        dialling = Task(executorPreference: loop) {
            try? await ControlConnection.dialStream(plan, credentials: credentials, on: loop)
        }
    }

    /// The connection; nil when there is none.
    func channel() async -> TLSChannel? { await dialling.value }

    /// It is not wanted. From any thread.
    func giveUp() { Task(executorPreference: loop) { await self.dialling.value?.close() } }
}
