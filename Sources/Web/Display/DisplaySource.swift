internal import IO

/// What leads to the VNC server of a guest, wherever the guest is: from one host to the next it may lead elsewhere each time it is asked.
protocol DisplaySource: Sendable {
    /// Opens a connection to the guest's VNC server, which begins the handshake of RFC 6143.
    ///
    /// - Parameter loop: the loop of the channel.
    func open(on loop: EventLoop) async throws(DisplayAbsence) -> DisplayRoute

    /// Why nobody could be led there now; nil when nothing is in the way that could be known without trying.
    func absence() async -> DisplayAbsence?
}

/// Where a connection to a guest's VNC server leads.
struct DisplayRoute: Sendable {
    /// The connection.
    var channel: any Channel
    /// The host that has the guest; nil for this one.
    var host: String?
}

/// Why a guest's screen cannot be had.
enum DisplayAbsence: Error, Sendable, Hashable, CustomStringConvertible {
    /// It may be there in a moment: the guest is on its way, or does not run.
    case waiting(String)
    /// The guest has gone to a host to which nothing leads from here.
    case moved(to: String)
    /// The guest has gone to a host that does not give its screen now, for a reason.
    case withheld(by: String, String)
    /// There is none, whatever is waited for.
    case never(String)

    /// Whether it makes sense to ask again.
    var mayPass: Bool {
        switch self {
        case .waiting, .withheld: true
        case .moved, .never: false
        }
    }

    /// What a person is told, half a sentence.
    var description: String {
        switch self {
        case .waiting(let reason), .never(let reason), .withheld(_, let reason): reason
        case .moved(let host): "the guest has moved to \(host)"
        }
    }
}

/// A connection to a guest's VNC server, behind the handshake. Confined to its loop.
struct DisplayConnection: Sendable {
    let channel: any Channel
    /// The host that has the guest; nil for this one.
    let host: String?
    let screen: ServerInit
    /// What came behind the handshake.
    let rest: [UInt8]

    /// How long a server may take for its handshake: one that stands still, with the guest gone, never answers.
    private static let patience = Duration.seconds(3)

    /// Connects, and performs the handshake.
    static func open(_ source: any DisplaySource, on loop: EventLoop) async throws(DisplayAbsence) -> DisplayConnection
    {
        let route = try await source.open(on: loop)
        let channel = route.channel
        do {
            return try await channel.withDeadline(patience, for: "The handshake of the guest's display") {
                let buffer = IOBuffer(capacity: 4096)
                var handshake = RFBClientHandshake()
                while true {
                    let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                    guard count > 0 else {
                        throw ChannelError(.truncated, "QEMU has closed the connection in the handshake")
                    }
                    let answer = try handshake.receive(buffer.bytes(0..<count))
                    if !answer.isEmpty { try await channel.write(answer) }
                    guard let screen = handshake.outcome else { continue }
                    return DisplayConnection(
                        channel: channel,
                        host: route.host,
                        screen: screen,
                        rest: handshake.takeRest()
                    )
                }
            }
        } catch {
            channel.close()
            throw .waiting("the guest's display cannot be had: \(error)")
        }
    }
}
