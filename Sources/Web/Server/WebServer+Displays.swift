internal import IO
internal import Migration

/// The screens of guests.
extension WebServer {
    /// A file of noVNC.
    func viewerFile(_ names: some Collection<String>, _ request: HTTPRequest) async -> HTTPResponse {
        let (files, names) = (viewerFiles, Array(names))
        let (file, absence) = await pool.value { (files.file(names), files.absence) }
        if let file { return file.response(to: request) }
        return HTTPResponse(
            404,
            error: absence.map { $0.prefix(1).uppercased() + $0.dropFirst() } ?? "noVNC has no such file"
        )
    }

    /// How the screen of a guest stands.
    func displayStanding(of guest: String, _ request: HTTPRequest, _ visit: Visit) async -> HTTPResponse {
        switch admittedToConsole(of: guest, request, visit) {
        case .failure(let answer): return answer
        case .success(let presence):
            var standing = await displays.standing(of: guest)
            let files = viewerFiles
            standing.browsers = await pool.value { files.absence }
            standing.mayWrite = presence.grant.rights.contains(.act)
            return HTTPResponse(200, json: standing)
        }
    }

    /// Answers a request for a screen. Returns whether the connection can be used for another request.
    func show(_ request: HTTPRequest, _ connection: HTTPConnection, _ visit: Visit) async throws -> Bool {
        let guest = request.path[1]
        let source = displays.source(of: guest)
        return try await open(request, connection, visit) {
            admittedToConsole(of: guest, request, visit)
        } find: { presence async throws(HTTPFailure) in
            guard displays.count < WebLimits.displayViewers,
                displays.count(of: presence.visitor) < WebLimits.displayViewersOfVisitor
            else {
                throw HTTPFailure(
                    status: 503,
                    reason: "Too many look at screens: at most \(WebLimits.displayViewers), and "
                        + "\(WebLimits.displayViewersOfVisitor) of one session or user"
                )
            }
            return try await displays.open(source)
        } drop: {
            $0.channel.close()
        } serve: { channel, presence, display in
            let mayWrite = presence.grant.rights.contains(.act) && request.query("view") != "only"
            let aim = mayWrite ? "opens" : "looks at"
            openings(.info, "web: \(presence.grant.name) at \(visit.peerName) \(aim) the screen of guest '\(guest)'")
            let session = DisplaySession(
                .init(channel),
                display,
                source,
                guest: guest,
                visitor: presence.visitor,
                mayWrite: mayWrite,
                reserve: displays.reserve,
                mayStay: stay(presence)
            )
            await displays.serve(session)
        }
    }

    /// A guest is about to be paused, to go on elsewhere: returns when it holds no keys and buttons down any more that viewers of its screen have
    /// pressed. From any thread.
    public func releaseInput(of guest: String) async {
        try? await loop.run { await self.displays.warn(guest) }
    }
}
