internal import IO
public import Migration

/// What takes the list of a fleet over, if its authority has signed it and it is no earlier one. Blocks.
///
/// - Parameter members: the list as it came: whoever brings it, its signature decides.
/// - Throws: an error that says why it is not taken.
public typealias TakeMembers = @Sendable (_ members: HostMessage.Members) throws -> Void

/// What issues the next certificate of a member. Blocks.
///
/// - Parameters:
///   - identity: whose it is: who has proved to be it asks.
///   - request: the request, PEM; it says for which key.
/// - Throws: an error that says why there is none.
public typealias RenewCertificate = @Sendable (_ identity: String, _ request: String) throws -> HostMessage.Renewed

/// Whether an identity is a member of the fleet, which may ask for its next certificate even if it may send no guests. Blocks.
public typealias IsMember = @Sendable (_ identity: String) -> Bool

/// Who belongs to the fleet.
extension DestinationAgent {
    /// Answers MEMBERS.
    func take(_ members: HostMessage.Members, from identity: String) async -> HostMessage.Content {
        guard let take = configuration.takeMembers else { return .denied("This agent takes no list of a fleet") }
        do {
            try await BlockingPool.shared.run { try take(members) }
            log(.info, "'\(identity)' has brought the list of the fleet")
            return .members(members)
        } catch { return .denied("\(error)") }
    }

    /// Whether who may send no guests may still ask for its next certificate.
    func mayRenew(_ identity: String) async -> Bool {
        guard configuration.renewCertificate != nil, let isMember = configuration.isMember else { return false }
        return (try? await BlockingPool.shared.run { isMember(identity) }) ?? false
    }

    /// Answers RENEW.
    func renew(_ request: String, for identity: String) async -> HostMessage.Content {
        guard let renew = configuration.renewCertificate else {
            return .denied("This host has not the key of an authority")
        }
        do {
            try accounts.renew(identity)
            let renewed = try await BlockingPool.shared.run { try renew(identity, request) }
            log(.info, "'\(identity)' has got its next certificate")
            return .renewed(renewed)
        } catch { return .denied("\(error)") }
    }
}
