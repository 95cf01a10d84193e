internal import IO

/// Bytes that go to many viewers: made once, and never changed.
struct Payload: Sendable {
    let buffer: IOBuffer
    let count: Int

    init(_ bytes: [UInt8]) {
        buffer = IOBuffer(copying: bytes)
        count = bytes.count
    }
}

/// What waits for one viewer: of each section the newest only, and the latest events, in their order.
struct ViewerQueue: Sendable {
    private var sections: [Sections.Name: Payload] = [:]
    private var events: [Payload] = []
    private var eventBytes = 0

    /// Whether nothing waits.
    var isEmpty: Bool { sections.isEmpty && events.isEmpty }

    /// A section has changed; an older state of it that still waits is never sent.
    mutating func put(_ name: Sections.Name, _ section: Payload) { sections[name] = section }

    /// Something has happened. When more waits than `WebLimits.eventBytes`, all of that is left out: the sections say where things
    /// stand.
    mutating func add(_ event: Payload) {
        if eventBytes + event.count > WebLimits.eventBytes { (events, eventBytes) = ([], 0) }
        events.append(event)
        eventBytes += event.count
    }

    /// Takes what is to be sent next: events before the sections that follow from them.
    mutating func take() -> [Payload] {
        defer { self = ViewerQueue() }
        return events + Sections.Name.allCases.compactMap { sections[$0] }
    }
}
