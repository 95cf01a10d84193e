internal import FoundationEssentials
public import IO
internal import TLS

/// Joins a fleet with a token: carries out what the host that waits orders, and undoes it when the connection ends before all is done.
public struct Joiner: Sendable {
    private let place: PairingPlace
    private let host: MemberHost
    private let say: @Sendable (PairingConductor.Event) -> Void

    /// Makes a joiner.
    public init(
        _ place: PairingPlace,
        version: String,
        say: @escaping @Sendable (PairingConductor.Event) -> Void
    ) {
        self.place = place
        self.say = say
        host = MemberHost(files: place.files, stateDirectory: place.stateDirectory, version: version)
    }

    /// What this host has written down of its joining.
    private struct Record: Codable {
        /// The name of the host that has the authority.
        var waiter: String
        /// Whether it is a member; else it was interrupted.
        var isMember: Bool
    }

    private var path: String { "\(place.stateDirectory)/joined.json" }

    private func record() throws -> Record? {
        guard let bytes = try DurableFile.read(path, limit: 1 << 16) else { return nil }
        guard let record = JSONText.decode(Record.self, from: bytes) else {
            throw FleetError("\(path) is damaged; remove it, and join again")
        }
        return record
    }

    private func write(_ record: Record) throws {
        try DurableFile.makeDirectory(place.stateDirectory)
        try DurableFile.write(try JSONText.encode(record), to: path)
    }

    private func forget() {
        DurableFile.remove(path)
        try? DurableFile.syncDirectory(of: path)
    }

    // MARK: leaving

    /// Leaves the fleet that this host has joined by a token, and gives it back what it had before. Blocks.
    ///
    /// - Parameter waiter: the name of the host from which it was joined.
    /// - Returns: whether this host has joined from there.
    /// - Throws: `FleetError` or `FileError` when something stays.
    public func leave(_ waiter: String) throws -> Bool {
        guard let record = try record(), record.waiter == waiter else { return false }
        _ = try host.carryOut(.leave)
        forget()
        say(.done("left", "this host belongs to no fleet any more"))
        say(.note("'crossdock pair --undo \(HostName.own)' on \(waiter) tells the others"))
        return true
    }

    // MARK: joining

    /// Joins. Called on a loop.
    ///
    /// - Parameters:
    ///   - token: the token.
    ///   - name: this host's name; nil for its own.
    ///   - loop: where the connection lives.
    /// - Throws: `PairingFailure`.
    public func run(_ token: JoinToken, name: String?, on loop: EventLoop) async throws {
        let (link, own): (JoinLink, String)
        do {
            own = name ?? HostName.own
            guard own == token.host else {
                throw FleetError(
                    "The token is for '\(token.host)', and this host is called '\(own)'; make one for it on \(token.waiter), "
                        + "or say --own-name \(token.host) if this is the host that is meant"
                )
            }
            try await BlockingPool.shared.run {
                guard let record = try record(), !record.isMember else { return }
                say(.note("An earlier joining was interrupted; it is undone first"))
                _ = try host.carryOut(.leave)
                forget()
            }
            link = try await connect(token, on: loop)
        } catch { throw PairingFailure(reason: "\(error)", outcome: .unchanged) }
        defer { link.close() }
        do { try await obey(link, token, own) } catch {
            throw await BlockingPool.shared.undo(self, "\(error)")
        }
    }

    fileprivate func undone(_ reason: String) -> PairingFailure {
        do {
            guard let record = try record(), !record.isMember else {
                return PairingFailure(reason: reason, outcome: .unchanged)
            }
            _ = try host.carryOut(.leave)
            forget()
            return PairingFailure(reason: reason, outcome: .undone)
        } catch {
            return PairingFailure(reason: reason, outcome: .left(["\(error); 'crossdock pair --join' tries again"]))
        }
    }

    private func connect(_ token: JoinToken, on loop: EventLoop) async throws -> JoinLink {
        var secret = token.secret
        let credentials = try PSKCredentials(
            id: "token",
            key: SecretBytes(wiping: &secret),
            user: JoinLink.user,
            endpoint: .client
        )
        var reasons: [String] = []
        for address in token.waiterAddresses {
            do {
                let channel = try await SocketChannel.connect(
                    to: .inet(host: address, port: token.port),
                    on: loop,
                    timeout: .seconds(10)
                )
                do {
                    return JoinLink(try await TLSChannel.handshake(over: channel, credentials: credentials))
                } catch {
                    throw FleetError(
                        "\(token.waiter) does not accept this token: it is not the one that it waits for, or was tried too often "
                            + "in a short time, or others keep its port busy (\(error))"
                    )
                }
            } catch let error as FleetError { throw error } catch { reasons.append("\(error)") }
        }
        let isOver = Int64(Date.now.timeIntervalSince1970) >= token.ends
        throw FleetError(
            "Nobody waits for this token at \(token.waiter)"
                + (isOver
                    ? ": its time is over"
                    : ": it was used, or its time is over, or a firewall keeps port \(token.port) closed")
                + "; make another one there with 'crossdock pair --token \(token.host)' (\(reasons.joined(separator: "; ")))"
        )
    }

    private func obey(_ link: JoinLink, _ token: JoinToken, _ own: String) async throws {
        while true {
            let message: JoinLink.Message
            do { message = try await link.receive() } catch {
                throw FleetError(
                    "The connection to \(token.waiter) ended before all was done: what it says of it is shown there"
                )
            }
            switch message {
            case .refused(let reason): throw FleetError("\(token.waiter) refuses: \(reason.shown(most: 1000))")
            case .answer: throw FleetError("\(token.waiter) does not speak as this host does")
            case .order(let order):
                let answer = await answer(order, token, own)
                try await link.send(.answer(answer))
                if case .finish = order, answer.failure == nil { return }
            }
        }
    }

    private func answer(_ order: MemberOrder, _ token: JoinToken, _ own: String) async -> MemberAnswer {
        do {
            return try await BlockingPool.shared.run { try carryOut(order, token, own) }
        } catch {
            var answer = MemberAnswer()
            answer.failure = "\(error)"
            return answer
        }
    }

    /// Blocks.
    private func carryOut(_ order: MemberOrder, _ token: JoinToken, _ own: String) throws -> MemberAnswer {
        let runner = MemberRunner(here: place.program)
        switch order {
        case .look:
            var answer = try runner.carryOut(order)
            answer.look?.name = own
            return answer
        case .request(let name):
            guard name == token.host else { throw FleetError("The token is not for '\(name.shown(most: 100))'") }
            // From here on something is to be undone.
            if try record() == nil { try write(Record(waiter: token.waiter, isMember: false)) }
            return try runner.carryOut(order)
        case .certify(_, let authority):
            guard try CertificateAuthority.fingerprint(of: Array(authority.utf8)) == token.authority else {
                throw FleetError("The authority is not the one that the token names")
            }
            say(.done("certificate", "\(token.host), of the authority that the token names"))
            return try runner.carryOut(order)
        case .list:
            say(.done("list of the fleet", "taken"))
            return try runner.carryOut(order)
        case .serve:
            let answer = try runner.carryOut(order)
            for note in answer.notes { say(.note(note)) }
            return answer
        case .prove: return try runner.carryOut(order)
        case .finish:
            try write(Record(waiter: token.waiter, isMember: true))
            say(.done("joined", "this host is a member of the fleet of \(token.waiter)"))
            return MemberAnswer()
        case .leave:
            // What this connection has begun is undone when it ends; this is about an earlier joining that the waiter has not seen end.
            guard let record = try record(), record.isMember, record.waiter == token.waiter else {
                return MemberAnswer()
            }
            let answer = try runner.carryOut(order)
            forget()
            return answer
        case .bring: throw FleetError("That is nothing for a host that joins")
        }
    }
}

extension BlockingPool {
    /// Undoes on this pool what a joining has begun.
    fileprivate func undo(_ joiner: Joiner, _ reason: String) async -> PairingFailure {
        (try? await run { joiner.undone(reason) }) ?? PairingFailure(reason: reason, outcome: .unchanged)
    }
}

/// This host's name.
enum HostName {
    static var own: String { SSHConfigurationReader.Person.current.hostName }
}
