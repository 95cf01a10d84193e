internal import Emulator
internal import IO
internal import Migration
internal import TLS

/// Guests that the host where they were at home asks for.
extension DestinationAgent {
    /// What this host knows of a guest that is asked for.
    private enum Verdict: Sendable {
        case mayGo
        case stays(String)
        case later(String)
    }

    /// Sends guests back, or says why not.
    ///
    /// Only to the identity that this host has seen proved when the guest came from there, its home or the host that had it last, only if
    /// the policy lists it, and only to an agent that proves to be the same.
    func recall(_ recall: HostMessage.Recall, for peer: TLSPeer) async -> HostMessage.Content {
        do {
            let (send, host, port) = try judge(recall, peer)
            let identity = peer.name
            let (guests, migrations, wanted) = (guests, migrations, recall.guests)
            let names = try await BlockingPool.shared.run {
                wanted ?? guests.names().filter { Self.isAtHome($0, identity, guests) }
            }
            var answers: [HostMessage.Recalled] = []
            for name in names {
                let verdict = await BlockingPool.shared.value { Self.verdict(name, identity, guests, migrations) }
                switch verdict {
                case .stays(let reason): answers.append(.init(guest: name, reason: reason))
                case .later(let reason): answers.append(.init(guest: name, reason: reason, isLater: true))
                case .mayGo where recall.isQuestion:
                    answers.append(.init(guest: name, lastFailure: failedReturns[name].map { $0.shown(most: 2000) }))
                case .mayGo:
                    let departure = Departure(
                        guest: name,
                        host: host,
                        port: port,
                        identity: identity,
                        networks: recall.networks
                    )
                    answers.append(await begin(departure, send))
                }
            }
            return .recalled(answers)
        } catch { return .denied("\(error)") }
    }

    /// Whether this host sends anything to who asks.
    private func judge(_ recall: HostMessage.Recall, _ peer: TLSPeer) throws -> (SendAway, host: String, port: UInt16) {
        guard configuration.policy.recallers.contains(peer.name) else {
            throw GuestError(
                "This host sends no guests back to '\(peer.name)': its policy does not list it (allow-recall = \(peer.name))"
            )
        }
        guard peer.distinguishedName != nil else {
            throw GuestError("Guests are sent back only to who has a certificate: '\(peer.name)' has shown none")
        }
        guard let send = configuration.sendAway else { throw GuestError("This agent sends no guests back") }
        guard (recall.guests?.count ?? 0) <= PeerLimits.recalledGuests else {
            throw GuestError("The limit of \(PeerLimits.recalledGuests) guests that are asked for at once is exceeded")
        }
        let networks = recall.networks ?? [:]
        guard networks.count <= PeerLimits.networks,
            (Array(networks.keys) + networks.values).allSatisfy(PeerText.isInterface)
        else { throw GuestError("The question is malformed: its networks are none") }
        guard recall.address.utf8.count <= 255, PeerText.isPlain(recall.address),
            case .inet(let host, let port)? = try? SocketAddress(
                parsing: recall.address,
                defaultPort: MessageConnection.port
            ), !host.isEmpty
        else {
            throw GuestError("'\(recall.address.shown(most: 255))' is no host to send guests to; it is HOST:PORT")
        }
        return (send, host, port)
    }

    private static func isAtHome(_ name: String, _ identity: String, _ guests: GuestStore) -> Bool {
        guard let record = (try? guests.load(name)) ?? nil else { return false }
        return record.released == nil && record.origin?.identity == identity
    }

    /// Whether a guest may go. Blocks.
    private static func verdict(
        _ name: String,
        _ identity: String,
        _ guests: GuestStore,
        _ migrations: MigrationStore
    ) -> Verdict {
        do {
            // A guest that is at home here is nobody else's, wherever it came home from.
            guard let record = try guests.load(name), let origin = record.origin,
                origin.identity == identity || record.arrival?.source == identity
            else {
                // Of other guests nothing is told, not even whether they are here.
                return .stays("No guest '\(name)' that is here came from '\(identity)'")
            }
            if record.arrival?.source != identity, let host = origin.toldBy {
                return .stays(
                    "Guest '\(name)' came here from '\(host)', and that it was at home with '\(identity)' is that host's word only; move it "
                        + "from here by hand"
                )
            }
            guard let lock = try migrations.lock(guest: name) else {
                return .later("Guest '\(name)' is being migrated, started or stopped at the moment")
            }
            defer { withExtendedLifetime(lock) {} }
            if let bar = try migrations.startBar(of: name) { return .stays(bar.sentence(guest: name)) }
            return .mayGo
        } catch { return .stays("\(error)") }
    }

    private func begin(_ departure: Departure, _ send: @escaping SendAway) async -> HostMessage.Recalled {
        let identity = departure.identity
        do { try accounts.beginRecall(identity) } catch {
            return .init(guest: departure.guest, reason: "\(error)", isLater: true)
        }
        let (accounts, loop) = (accounts, loop)
        failedReturns[departure.guest] = nil
        do {
            let id = try await BlockingPool.shared.run {
                try send(departure) { failure in
                    loop.execute {
                        accounts.endRecall(identity)
                        self.failedReturns[departure.guest] = failure
                    }
                }
            }
            log(
                .info,
                "Migration \(id): guest '\(departure.guest)' goes back to '\(identity)' at \(departure.host), which has asked for it"
            )
            return .init(guest: departure.guest, migration: id)
        } catch {
            accounts.endRecall(identity)
            return .init(guest: departure.guest, reason: "\(error)")
        }
    }
}
