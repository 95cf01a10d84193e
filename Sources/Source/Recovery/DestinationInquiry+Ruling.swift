public import Migration

extension DestinationInquiry {
    /// What follows from the answers for an operator who wants to take the guest.
    public enum Ruling: Sendable {
        /// The destination has decided, so there is nothing to override.
        case decided
        /// The guest is taken; what the operator is warned of.
        case taken(warning: String)
        /// It is not taken, and why.
        case refused(MigrationError)
    }

    /// Whether an operator's word is enough.
    ///
    /// - Parameters:
    ///   - claim: the word.
    ///   - plan: the migration.
    ///   - host: the other host as `crossdock status` shows it.
    public func ruling(on claim: OwnershipClaim, of plan: MigrationPlan, host: String) -> Ruling {
        if isDecided { return .decided }
        func refused(_ text: String) -> Ruling { .refused(MigrationError(.undecided, text)) }
        let command = "crossdock recover \(plan.id)"
        let isKnown = results.contains { if case .undecided = $0.answer { true } else { false } }
        if isKnown {
            return refused(
                "\(host) can be reached and has not decided yet, so guest '\(plan.guest)' is not taken: \(sentence). Run "
                    + "'\(command)', which asks until it has, or switch that host off first"
            )
        }
        if isSilent {
            guard claim.isOtherHostOff else {
                return refused(
                    "\(host) does not answer, so guest '\(plan.guest)' is not taken: \(sentence). Silence is no proof: the guest "
                        + "may run there without its agent, or behind a link that is down. When you have made sure that \(host) is "
                        + "switched off and its copy never runs, add --other-host-is-off; '\(command)' waits for it"
                )
            }
            return .taken(warning: warning(plan, host, "is off"))
        }
        guard let erased = claim.erasedHost else {
            return refused(
                "\(host) answers\(claim.isOtherHostOff ? ", so it is not off" : ""), and guest '\(plan.guest)' is not taken: "
                    + "\(sentence). The guest may run there: let its 'crossdock destination' run with the state directory and the "
                    + "certificates that it had, and then '\(command)' here; or switch that host off. Only when it was installed "
                    + "anew and has nothing of the guest any more: --other-host-was-erased \(host)"
            )
        }
        guard erased == host else {
            return refused(
                "--other-host-was-erased names '\(erased)', but guest '\(plan.guest)' was released to '\(host)', as 'crossdock "
                    + "status' shows; it is not taken"
            )
        }
        return .taken(warning: warning(plan, host, "was erased"))
    }

    private func warning(_ plan: MigrationPlan, _ host: String, _ claim: String) -> String {
        "Guest '\(plan.guest)' is taken by your word that \(host) \(claim) (\(sentence)). If that is wrong both hosts run the "
            + "guest, and its disks are two from now on"
    }
}
