public import Emulator

/// An operator's word that the guest of a migration belongs to this host, and what is vouched for.
public struct OwnershipClaim: Sendable, Hashable {
    /// Who says so.
    public let user: String
    /// That the other host is switched off and its copy will never run.
    public let isOtherHostOff: Bool
    /// The name of the other host, when it was installed anew and has nothing of the guest any more.
    public let erasedHost: String?

    /// Makes a claim.
    public init(user: String, isOtherHostOff: Bool = false, erasedHost: String? = nil) {
        self.user = user
        self.isOtherHostOff = isOtherHostOff
        self.erasedHost = erasedHost
    }

    /// Who took the guest and how, for the journals of both hosts.
    public var author: String {
        var command = "crossdock recover --take-ownership"
        if isOtherHostOff { command += " --other-host-is-off" }
        if let erasedHost { command += " --other-host-was-erased \(erasedHost)" }
        return "\(user), with '\(command)'"
    }

    /// The arguments of a destination agent's `take-ownership`.
    ///
    /// - Parameter migration: the migration's id.
    public func arguments(migration: String) -> JSONValue {
        var arguments: [String: JSONValue] = ["migration": .string(migration), "by": .string(author)]
        if isOtherHostOff { arguments["other-host-is-off"] = .bool(true) }
        if let erasedHost { arguments["other-host-was-erased"] = .string(erasedHost) }
        return .object(arguments)
    }
}
