internal import Glibc
internal import IO
internal import TLS

/// Pairing with a host that joins with a token.
extension PairingConductor {
    /// What a token rests on.
    struct Foundation: Sendable {
        /// The authority's fingerprint.
        var authority: String
        /// This host.
        var own: FleetMember
        /// Whether the authority was made for this token.
        var isNew: Bool
    }

    /// Finds the authority that a token pins, or makes it. Blocks.
    ///
    /// - Throws: `FleetError`.
    func layFoundation(_ order: JoinOrder) throws -> Foundation {
        guard let lock = try store.lock() else { throw FleetError("Another pairing of this host is under way") }
        defer { withExtendedLifetime(lock) {} }
        guard let look = try MemberRunner(here: place.program).carryOut(.look).look else {
            throw FleetError("This host says nothing of itself")
        }
        let own = FleetMember(name: order.ownName ?? look.name, addresses: order.ownAddresses)
        for name in [own.name, order.host] where !FleetMember.isName(name) || name == "localhost" {
            throw FleetError("'\(name.shown(most: 100))' is no name for a host; give another one, or --own-name")
        }
        guard own.name != order.host else {
            throw FleetError("This host is '\(own.name)' itself; --token takes the name of the host that joins")
        }
        let isNew = !files.hasAuthority
        if isNew {
            guard look.authority == nil else {
                throw FleetError(
                    "This host has a certificate of an authority whose key is on another host; make the token there"
                )
            }
            try DurableFile.makeDirectory(files.authority)
            try CertificateAuthority(name: "Crossdock fleet of \(own.name)").save(to: files.authority)
            say(.done(Pairing.Step.authority.title, "\(files.authority), whose key stays here"))
        }
        let authority = try CertificateAuthority(loading: files.authority)
        return Foundation(
            authority: try CertificateAuthority.fingerprint(of: Array(try authority.pem.utf8)),
            own: own,
            isNew: isNew
        )
    }

    /// Removes an authority that was made for a token nobody has used. Blocks.
    func removeFoundation(_ made: Foundation) {
        guard made.isNew, (try? files.trustedAuthority()) ?? nil == nil, (try? store.all().isEmpty) == true else {
            return
        }
        DurableFile.remove(files.authority)
    }

    /// Pairs this host with one that joins. Blocks.
    ///
    /// - Throws: `PairingFailure`; what was done here is undone then, and the other host undoes what was done there.
    func join(_ order: JoinOrder, over link: JoinLink) throws {
        var session: Session
        let earlier: Pairing?
        let lock: PairingLock
        do {
            guard let taken = try store.lock() else { throw FleetError("Another pairing of this host is under way") }
            lock = taken
            (session, earlier) = try prepare(order, link)
        } catch { throw PairingFailure(reason: "\(error)", outcome: .unchanged) }
        defer { withExtendedLifetime(lock) {} }
        do {
            try perform(&session)
            // Who joins has it written down that it belongs to the fleet before this host has.
            _ = try session.other().carryOut(.finish)
            session.pairing.finish()
            try store.write(session.pairing)
            say(.done("joined", "\(session.pairing.member.name) is a member"))
        } catch { throw giveUp(session, earlier, error, keepsPackage: true) }
    }

    private func prepare(_ order: JoinOrder, _ link: JoinLink) throws -> (Session, earlier: Pairing?) {
        let here = MemberRunner(here: place.program)
        let there = MemberRunner(order.host, over: link)
        guard let ownLook = try here.carryOut(.look).look, let look = try there.carryOut(.look).look else {
            throw FleetError("The hosts say nothing of themselves")
        }
        guard look.name == order.host else {
            throw FleetError("The token is for \(order.host), and \(look.name.shown(most: 100)) has come with it")
        }
        var pairing = PairingOrder(target: try SSHTarget(parsing: order.host))
        pairing.name = order.host
        pairing.addresses = order.addresses
        pairing.ownName = order.ownName
        pairing.ownAddresses = order.ownAddresses
        pairing.isOneWay = order.isOneWay
        let way = Way(address: nil, source: nil)
        var (session, earlier) = try plan(pairing, way, here, there, ownLook, look, true, false, false)
        session.pairing.isJoined = true
        return (session, earlier)
    }
}
