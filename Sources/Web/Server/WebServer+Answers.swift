internal import FoundationEssentials
internal import IO
public import Migration
internal import TLS

/// What each request is answered with.
extension WebServer {
    /// The answer to a request that is no websocket.
    func answer(to request: HTTPRequest, _ visit: Visit) async -> HTTPResponse {
        guard await isOurs(request, visit) else {
            return HTTPResponse(
                403,
                error: "This host is not called '\((request.fields["host"] ?? "").shown(most: 100))'"
            )
        }
        let isReading = request.method == "GET" || request.method == "HEAD"
        guard isReading || request.method == "POST" || request.method == "DELETE" else {
            var answer = HTTPResponse(405, error: "The method is not known here")
            answer.fields.append(("Allow", "GET, HEAD, POST, DELETE"))
            return answer
        }
        if !isReading {
            guard visit.door != .plain else { return HTTPResponse(405, error: "This port has figures only") }
            guard isOwnOrigin(request, visit) else {
                return HTTPResponse(403, error: "The request does not come from a page of this host")
            }
        }
        switch (isReading, request.path.first) {
        case _ where visit.door == .command && request.path.first != "consoles":
            return HTTPResponse(404, error: "There are consoles only on this socket")
        case (true, "healthz"?) where request.path.count == 1: return HTTPResponse(200, text: "ok\n")
        case (true, "readyz"?) where request.path.count == 1: return await readiness()
        case (true, "metrics"?) where request.path.count == 1:
            var namesGuests = true
            if visit.door != .plain {
                switch admitted(request, visit, .view) {
                case .failure(let answer): return answer
                case .success(let presence):
                    guard presence.grant.guest == nil else {
                        return HTTPResponse(403, error: "The ticket is for one guest only")
                    }
                    namesGuests = presence.grant.namesGuests
                }
            }
            let text = await metricsText(namesGuests: namesGuests)
            return HTTPResponse(200, text: text, type: "text/plain; version=0.0.4; charset=utf-8")
        case (true, "consoles"?) where request.path.count == 2 && visit.door != .plain:
            return await standing(of: request.path[1], request, visit)
        case (true, "consoles"?) where request.path.count == 3 && request.path[2] == "vnc" && visit.door != .plain:
            return await displayStanding(of: request.path[1], request, visit)
        case _ where visit.door == .plain: return HTTPResponse(404, error: "There is nothing of that name on this port")
        case (true, nil): return page("index.html", request)
        case (true, "console"?) where request.path.count == 2: return page("console.html", request)
        case (true, "novnc"?): return await viewerFile(request.path.dropFirst(), request)
        case (true, "page"?): return page(request.path.dropFirst().joined(separator: "/"), request)
        case (_, "session"?) where request.path.count == 1: return session(request, visit)
        case (true, "reports"?) where request.path.count == 2: return await report(request.path[1], request, visit)
        case (false, "actions"?) where request.path.count == 1 && request.method == "POST":
            return await act(request, visit)
        default: return HTTPResponse(404, error: "There is nothing of that name here")
        }
    }

    private func page(_ name: String, _ request: HTTPRequest) -> HTTPResponse {
        PageFile.all[name]?.response(to: request) ?? HTTPResponse(404, error: "The page has no such file")
    }

    enum Admission {
        case success(Presence)
        case failure(HTTPResponse)
    }

    /// Sees whether the client has a right, and counts its connection among those that have.
    func admitted(_ request: HTTPRequest, _ visit: Visit, _ right: WebRights) -> Admission {
        guard let presence = presence(request, visit) else {
            let refused = visit.certificate.map { " '\($0.name.shown(most: 200))' may not look." } ?? ""
            return .failure(
                HTTPResponse(
                    401,
                    error: "Nobody is signed in.\(refused) 'crossdock web ticket' on this host opens the page"
                )
            )
        }
        guard presence.grant.rights.contains(right) else {
            return .failure(
                HTTPResponse(
                    403,
                    error: "'\(presence.grant.name)' may look here, and not act; that takes a ticket for it"
                )
            )
        }
        if let reason = prove(visit) { return .failure(HTTPResponse(503, error: "This agent is busy: \(reason)")) }
        return .success(presence)
    }

    // MARK: sessions

    private struct TicketBody: Decodable { var ticket: String }

    private struct SessionBody: Encodable {
        var name: String
        var rights: [String]
        var guest: String?
        /// Whether guests are named to it.
        var guests: Bool
        var expires: Int?
        var host: String
    }

    private func session(_ request: HTTPRequest, _ visit: Visit) -> HTTPResponse {
        switch request.method {
        case "POST":
            guard let body = JSONText.decode(TicketBody.self, from: request.body) else {
                return HTTPResponse(400, error: "There is no ticket")
            }
            guard let grant = tickets.redeem(body.ticket), let secret = sessions.open(grant) else {
                return HTTPResponse(403, error: "The ticket was used, or has expired, or there was none such")
            }
            log(.info, "web: \(visit.peerName) has signed in with a ticket of \(grant.name)")
            var answer = HTTPResponse(204)
            answer.fields.append(
                (
                    "Set-Cookie",
                    "\(Self.cookie)=\(secret); Path=/; Secure; HttpOnly; SameSite=Strict; "
                        + "Max-Age=\(WebLimits.sessionLife.components.seconds)"
                )
            )
            return answer
        case "DELETE":
            if let session = presence(request, visit)?.session { sessions.close(session) }
            var answer = HTTPResponse(204)
            answer.fields.append(
                ("Set-Cookie", "\(Self.cookie)=; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=0")
            )
            return answer
        default:
            switch admitted(request, visit, .view) {
            case .failure(let answer): return answer
            case .success(let presence):
                let left = presence.expires.map { ($0 - ContinuousClock.now).components.seconds }
                return HTTPResponse(
                    200,
                    json: SessionBody(
                        name: presence.grant.name,
                        rights: presence.grant.rights.names,
                        guest: presence.grant.guest,
                        guests: presence.grant.namesGuests,
                        expires: left.map { Int(Date.now.timeIntervalSince1970) + Int($0) },
                        host: configuration.host.name
                    )
                )
            }
        }
    }

    /// Makes a ticket, for who may open the agent's control socket. From any thread.
    ///
    /// - Parameters:
    ///   - grant: what it gives.
    ///   - life: how long it may be used, at most an hour.
    /// - Returns: the URL that opens the page with it.
    /// - Throws: `MigrationError` that says why there is none.
    public func makeTicket(_ grant: WebGrant, life: Duration) async throws -> String {
        try await loop.run {
            guard let address = self.addresses.first, address.hasPrefix("https:") else {
                throw MigrationError(
                    .failed,
                    self.addresses.isEmpty
                        ? "This agent has no page: start it with --web HOST:PORT (OPTIONS in /etc/crossdock/destination)"
                        : "The page is on a socket of this host, which needs no ticket: curl --unix-socket"
                )
            }
            do {
                let secret = try self.tickets.make(grant, life: life)
                self.log(.info, "web: \(grant.name) has made a ticket: \(grant.words)")
                return "\(self.ticketAddress)#t=\(secret)"
            } catch Tickets.Refusal.life {
                throw MigrationError(
                    .failed,
                    "A ticket holds for 1 s to \(WebLimits.ticketLife.components.seconds) s"
                )
            } catch {
                throw MigrationError(
                    .failed,
                    "\(WebLimits.tickets) tickets wait to be used; that is the limit, until some expire"
                )
            }
        }
    }

    // MARK: reports and actions

    private func report(_ id: String, _ request: HTTPRequest, _ visit: Visit) async -> HTTPResponse {
        let presence: Presence
        switch admitted(request, visit, .view) {
        case .failure(let answer): return answer
        case .success(let found): presence = found
        }
        let absent = HTTPResponse(404, error: "There is no report of such a migration")
        guard MigrationStore.isID(id) else { return absent }
        let store = MigrationStore(stateDirectory: configuration.host.stateDirectory)
        let bytes = await pool.value {
            (try? DurableFile.read(store.files(of: id).report, limit: WebLimits.report)) ?? nil
        }
        guard let bytes, let report = try? MigrationReport(parsing: bytes),
            Audience(presence.grant).includes(report.guest)
        else { return absent }
        var answer = HTTPResponse(200)
        answer.body = bytes
        answer.fields = [
            ("Content-Type", "application/json"), ("Content-Disposition", "attachment; filename=\"\(id).json\""),
        ]
        return answer
    }

    private func act(_ request: HTTPRequest, _ visit: Visit) async -> HTTPResponse {
        let presence: Presence
        switch admitted(request, visit, .act) {
        case .failure(let answer): return answer
        case .success(let found): presence = found
        }
        let action: WebAction
        do { action = try WebAction(parsing: request.body) } catch {
            return HTTPResponse(error.status, error: error.reason)
        }
        guard actions < WebLimits.actions else {
            return HTTPResponse(429, error: "\(WebLimits.actions) actions are being carried out; ask again")
        }
        actions += 1
        defer { actions -= 1 }
        let (actor, grant) = (actor, presence.grant)
        do {
            let message = try await actionPool.run { try actor.perform(action, for: grant) }
            log(.info, "web: \(grant.name) at \(visit.peerName) asked for \(action.words)")
            return HTTPResponse(202, json: ["message": message])
        } catch let failure as HTTPFailure { return HTTPResponse(failure.status, error: failure.reason) } catch {
            return HTTPResponse(409, error: "\(error)")
        }
    }

    // MARK: consoles

    /// Who may have the console of a guest: who has a ticket that includes it. A certificate alone is told no guest's name.
    func admittedToConsole(of guest: String, _ request: HTTPRequest, _ visit: Visit) -> Admission {
        let presence: Presence
        switch admitted(request, visit, .view) {
        case .failure(let answer): return .failure(answer)
        case .success(let found): presence = found
        }
        guard visit.door.isLocal || presence.session != nil else {
            return .failure(
                HTTPResponse(
                    403,
                    error: "A certificate alone opens no console; 'crossdock web ticket' on this host does"
                )
            )
        }
        guard presence.grant.guest == nil || presence.grant.guest == guest else {
            return .failure(HTTPResponse(403, error: "The ticket is for another guest"))
        }
        return .success(presence)
    }

    /// The console that a request is about: one that this agent has, or, for who may open a socket of this host, that of a host which is named.
    private func console(
        of guest: String,
        _ request: HTTPRequest,
        _ visit: Visit
    ) async throws(HTTPFailure) -> GuestConsole {
        guard let host = request.query("host") else { return try await consoles.console(of: guest) }
        guard visit.door.isLocal else {
            throw HTTPFailure(
                status: 403,
                reason: "Other hosts are asked for users of this host only: 'crossdock console --host'"
            )
        }
        return try consoles.console(of: guest, at: host)
    }

    /// How the console of a guest stands.
    private func standing(of guest: String, _ request: HTTPRequest, _ visit: Visit) async -> HTTPResponse {
        switch admittedToConsole(of: guest, request, visit) {
        case .failure(let answer): return answer
        case .success(let presence):
            do {
                var standing = try await console(of: guest, request, visit).standing
                standing.mayWrite = presence.grant.rights.contains(.act)
                return HTTPResponse(200, json: standing)
            } catch { return HTTPResponse(error.status, error: error.reason) }
        }
    }

    /// Answers a request for a console. Returns whether the connection can be used for another request.
    func converse(_ request: HTTPRequest, _ connection: HTTPConnection, _ visit: Visit) async throws -> Bool {
        let guest = request.path[1]
        let offset = request.query("from").flatMap { UInt64($0) }
        return try await open(request, connection, visit) {
            admittedToConsole(of: guest, request, visit)
        } find: { presence async throws(HTTPFailure) in
            guard request.query("from") == nil || offset.map({ $0 <= ConsoleRing.mostOffset }) == true else {
                throw HTTPFailure(status: 400, reason: "'from' is no offset")
            }
            guard consoles.count < WebLimits.consoleReaders,
                consoles.count(of: presence.visitor) < WebLimits.consoleReadersOfVisitor
            else {
                throw HTTPFailure(
                    status: 503,
                    reason: "Too many read consoles: at most \(WebLimits.consoleReaders), and "
                        + "\(WebLimits.consoleReadersOfVisitor) of one session or user"
                )
            }
            return try await console(of: guest, request, visit)
        } serve: { channel, presence, console in
            openings(.info, "web: \(presence.grant.name) at \(visit.peerName) opens the console of guest '\(guest)'")
            let reader = ConsoleReader(
                BrowserLine(socket: channel),
                console,
                name: presence.grant.name,
                visitor: presence.visitor,
                mayWrite: presence.grant.rights.contains(.act) && request.query("view") != "only",
                start: (offset, request.query("ring")),
                mayStay: stay(presence)
            )
            await consoles.serve(reader)
        }
    }

    /// How the consoles stand that this agent holds. From any thread.
    public func consoleStandings() async throws -> [ConsoleStanding] {
        try await loop.run { await self.consoles.standings() }
    }

    /// The end of what a guest has written to its console, for its next host; nil when it is not held. From any thread.
    ///
    /// - Parameters:
    ///   - guest: the guest, which has gone.
    ///   - heir: the identity of the agent of that host.
    public func consoleTail(of guest: String, for heir: String) async throws -> ConsoleTail? {
        try await loop.run { self.consoles.takeTail(of: guest, for: heir) }
    }

    /// Goes on with the console of a guest that has come here. From any thread.
    public func followConsole(of guest: String, _ tail: ConsoleTail) async {
        try? await loop.run { await self.consoles.follow(tail, of: guest) }
    }

    // MARK: the feed

    /// Answers a request for the feed. Returns whether the connection can be used for another request.
    func watch(_ request: HTTPRequest, _ connection: HTTPConnection, _ visit: Visit) async throws -> Bool {
        try await open(request, connection, visit) {
            admitted(request, visit, .view)
        } find: { presence async throws(HTTPFailure) in
            guard feed.count < WebLimits.viewers, feed.count(of: presence.visitor) < WebLimits.viewersOfVisitor else {
                throw HTTPFailure(
                    status: 503,
                    reason:
                        "Too many look: at most \(WebLimits.viewers), and \(WebLimits.viewersOfVisitor) of one session or certificate"
                )
            }
        } serve: { channel, presence, _ in
            let access = configuration.access
            let viewer = Viewer(channel, Audience(presence.grant), visitor: presence.visitor) { [weak self] in
                if let session = presence.session { return self?.sessions.isOpen(session) ?? false }
                return visit.certificate.map { (try? access.check($0)) != nil } ?? true
            }
            await feed.serve(viewer)
        }
    }

    // MARK: figures

    /// Whether guests can come.
    private func readiness() async -> HTTPResponse {
        let directory = configuration.host.stateDirectory
        let reason = await pool.value { () -> String? in
            guard HostExamination.isServing(stateDirectory: directory) else { return "The agent takes no commands" }
            do { return try Cordon.read(stateDirectory: directory)?.refusal } catch { return "\(error)" }
        }
        return reason.map { HTTPResponse(503, text: "\($0)\n") } ?? HTTPResponse(200, text: "ok\n")
    }
}

extension WebGrant {
    /// What is logged of it.
    fileprivate var words: String {
        let what = rights.contains(.act) ? "view and act" : "view"
        return guest.map { "\(what), of guest '\($0)'" } ?? what
    }
}
