/// What a running agent counts itself.
struct LiveFigures: Sendable {
    var viewers: Int
    var sessions: Int
    var serialConsoles: Int
    var screens: Int
    var acceptedHandshakes: UInt64
    var failedHandshakes: UInt64
    var traffic: WebHost.Traffic?
}
