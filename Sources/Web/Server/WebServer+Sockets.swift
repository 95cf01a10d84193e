internal import IO

/// What all websockets of the server begin with.
extension WebServer {
    /// Answers a request for a websocket: it is opened for who asks from a page of this host, has the right, and finds what it asks for.
    ///
    /// - Parameters:
    ///   - request: the request.
    ///   - connection: the connection that it came on.
    ///   - visit: who asks.
    ///   - admit: says who it is, and whether it may.
    ///   - find: finds what is asked for, or says why not.
    ///   - drop: gives up what was found, for a websocket that does not come about.
    ///   - serve: serves the websocket until it ends.
    /// - Returns: whether the connection can be used for another request.
    func open<Subject>(
        _ request: HTTPRequest,
        _ connection: HTTPConnection,
        _ visit: Visit,
        admit: () -> Admission,
        find: (Presence) async throws(HTTPFailure) -> Subject,
        drop: (Subject) -> Void = { _ in },
        serve: (WebSocketChannel, Presence, Subject) async -> Void
    ) async throws -> Bool {
        func refuse(_ answer: HTTPResponse) async throws -> Bool {
            note(answer, to: request, visit)
            try await connection.write(answer.encoded())
            return true
        }
        guard await isOurs(request, visit), isOwnOrigin(request, visit) else {
            return try await refuse(HTTPResponse(403, error: "The request does not come from a page of this host"))
        }
        let presence: Presence
        switch admit() {
        case .failure(let answer): return try await refuse(answer)
        case .success(let found): presence = found
        }
        let subject: Subject
        do { subject = try await find(presence) } catch {
            return try await refuse(HTTPResponse(error.status, error: error.reason))
        }
        let channel: WebSocketChannel
        do {
            channel = try await WebSocketChannel.accept(
                over: connection.channel,
                request: request.head,
                following: connection.takeRest()
            )
        } catch {
            drop(subject)
            throw error
        }
        await serve(channel, presence, subject)
        return false
    }

    /// Says whether somebody whose right is a session's may stay.
    func stay(_ presence: Presence) -> () -> Bool {
        { [weak self] in presence.session.map { self?.sessions.isOpen($0) ?? false } ?? true }
    }
}
