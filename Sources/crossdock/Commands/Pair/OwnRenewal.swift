import Fleet
import FoundationEssentials
import IO
import Migration
import Source
import TLS

/// Renews this host's own certificate at the host that has the fleet's authority, over mutual TLS.
struct OwnRenewal: Sendable {
    let files: FleetFiles
    let stateDirectory: String

    /// What became of it.
    enum Outcome {
        /// It is good for so many more days.
        case good(Int)
        /// It was renewed; what is to be known.
        case renewed([String])
    }

    /// Renews it when it ends soon.
    ///
    /// - Throws: `FleetError` that says why not; the old one stays then.
    func run() async throws -> Outcome {
        let host = MemberHost(files: files, stateDirectory: stateDirectory, version: Crossdock.number)
        let (list, look) = try await BlockingPool.shared.run {
            (try CertificateRenewal(files).list(), try host.carryOut(.look).look)
        }
        guard let member = list.members.first(where: { $0.identity == look?.identity }) else {
            throw FleetError("This host's certificate is of no member of its fleet; pair it again")
        }
        let left = (look?.ends ?? 0) - Int(Date.now.timeIntervalSince1970)
        if left >= CertificateRenewal.margin { return .good(left / 86400) }
        guard left > 0 else {
            throw FleetError(
                "This host's certificate has ended, or is not good: it can prove nothing any more; pair it again"
            )
        }
        guard let keeper = list.members.first(where: { $0.name == list.keeper }) else {
            throw FleetError("The list of the fleet does not say which host has the authority; pair again from there")
        }
        let request = try await BlockingPool.shared.run { try host.carryOut(.request(name: member.name)).request ?? "" }
        let issued = try await ask(keeper, request)
        return try await BlockingPool.shared.run {
            guard try files.trustedAuthority() == Array(issued.authority.utf8) else {
                throw FleetError("\(keeper.name) has another authority than the one that this host trusts; pair again")
            }
            _ = try host.carryOut(.certify(certificate: issued.certificate, authority: issued.authority))
            return .renewed(try host.carryOut(.serve(isNew: true)).notes)
        }
    }

    private func ask(_ keeper: FleetMember, _ request: String) async throws -> HostMessage.Renewed {
        let selection = CredentialSelection()
        let credentials = try selection.credentials(.client, from: selection.store(), user: "the renewal")
        let loop = EventLoop(name: "renewal")
        defer { loop.stop() }
        var reasons: [String] = []
        for address in keeper.addresses + [keeper.name] {
            let host = TargetHost(
                host: address,
                evacuation: MigrationStore.makeID(),
                credentials: credentials,
                on: loop
            )
            defer { host.close() }
            do {
                if let issued = try await host.renew(request) { return issued }
                reasons.append("the agent of \(address) is of an earlier release")
            } catch { reasons.append("\(error)") }
        }
        throw FleetError(
            "\(keeper.name), which has the authority, renews nothing: \(reasons.joined(separator: "; ").shown(most: 1500))"
        )
    }
}
