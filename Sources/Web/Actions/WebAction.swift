internal import IO

/// What the page may ask for, as it says it.
struct WebActionRequest: Sendable, Decodable {
    var action: String
    var migration: String?
    var evacuation: String?
    var guest: String?
    var host: String?
    var message: String?
}

/// An action with all that it needs.
enum WebAction: Sendable, Hashable {
    case cancel(migration: String)
    case cancelEvacuation(String)
    case move(guest: String, host: String)
    case cordon(message: String)
    case uncordon

    /// Reads one.
    ///
    /// - Throws: `HTTPFailure` with 400 for what is none.
    init(parsing body: [UInt8]) throws(HTTPFailure) {
        func missing(_ what: String) -> HTTPFailure { HTTPFailure(status: 400, reason: "there is no \(what)") }
        guard let request = JSONText.decode(WebActionRequest.self, from: body) else { throw missing("action") }
        switch request.action {
        case "cancel":
            guard let migration = request.migration else { throw missing("migration") }
            self = .cancel(migration: migration)
        case "cancel-evacuation":
            guard let evacuation = request.evacuation else { throw missing("evacuation") }
            self = .cancelEvacuation(evacuation)
        case "move":
            guard let guest = request.guest else { throw missing("guest") }
            guard let host = request.host else { throw missing("host") }
            self = .move(guest: guest, host: host)
        case "cordon": self = .cordon(message: request.message ?? "")
        case "uncordon": self = .uncordon
        default: throw HTTPFailure(status: 400, reason: "'\(request.action.shown(most: 40))' is no action")
        }
    }

    /// What is logged of it.
    var words: String {
        switch self {
        case .cancel(let id): "the end of migration \(id.shown(most: 40))"
        case .cancelEvacuation(let id): "the end of evacuation \(id.shown(most: 40))"
        case .move(let guest, let host): "to move guest '\(guest.shown(most: 48))' to \(host.shown(most: 255))"
        case .cordon(let message): "a cordon\(message.isEmpty ? "" : ": \(message.shown(most: 200))")"
        case .uncordon: "an end of the cordon"
        }
    }
}
