internal import IO
internal import Migration
internal import Web

/// What is said about consoles: frames in both directions when the first byte is 0, otherwise messages, one a line.
enum ConsoleFuzz {
    static func conversation(_ input: UnsafeRawBufferPointer) {
        guard let first = input.first else { return }
        let bytes = Array(input.dropFirst())
        if first == 0 {
            frames(bytes)
        } else {
            for line in bytes.split(separator: 10).prefix(64) { message(Array(line)) }
        }
    }

    /// Frames come in pieces, and mean the same however they are cut.
    private static func frames(_ bytes: [UInt8]) {
        var whole = ConsoleFrame.Parser()
        whole.append(bytes)
        var cut = ConsoleFrame.Parser()
        var rest = bytes[...]
        var ring = ConsoleRing(capacity: 1000)
        while let frame = try? whole.next() {
            var again: ConsoleFrame?
            while again == nil, !rest.isEmpty {
                cut.append(rest.prefix(7))
                rest = rest.dropFirst(7)
                again = try? cut.next()
            }
            again = again ?? (try? cut.next())
            precondition(again == frame, "a frame depends on where it is cut")
            take(frame, &ring)
        }
    }

    private static func take(_ frame: ConsoleFrame, _ ring: inout ConsoleRing) {
        switch frame {
        case .note(let bytes):
            precondition(bytes.count <= ConsoleFrame.mostNote, "a note is longer than it may be")
            _ = JSONText.decode(ConsoleStanding.self, from: bytes)
            _ = JSONText.decode(ConsoleWish.self, from: bytes)
        case .output(let offset, let bytes):
            let before = ring
            if ring.extend(with: bytes, at: offset) {
                precondition(ring.next >= before.next && ring.next <= ConsoleRing.mostOffset + UInt64(bytes.count))
            } else {
                precondition(ring == before, "what is no continuation was taken")
            }
            precondition(ring.next - ring.oldest <= 1000, "more is kept than the ring has room for")
            let tail = ring.tail(ConsoleTail.most)
            precondition(tail.offset + UInt64(tail.bytes.count) == ring.next, "the end of a ring is not at its end")
        case .input(let bytes): precondition(bytes.count <= ConsoleFrame.mostBytes, "input is longer than it may be")
        case .end(_, let reason): _ = reason.shown(most: ConsoleFrame.mostReason)
        }
    }

    private static func message(_ line: [UInt8]) {
        guard let message = JSONText.decode(Message.self, from: line) else { return }
        switch message {
        case .console(let tail):
            guard let bytes = tail.bytes else { return }
            var ring = ConsoleRing(capacity: ConsoleTail.most)
            ring.append([1, 2, 3])
            precondition(ring.follow(bytes, at: tail.offset), "the end of a console was taken and cannot be followed")
        case .open(let opening):
            guard opening.isPlausible else { return }
            precondition(opening.path.count <= ConsoleOpening.mostMarks && opening.hops <= ConsoleOpening.mostHops)
            precondition(!opening.guest.contains("/") && opening.guest.first != ".", "a guest's name leads elsewhere")
        case .grant(let granting):
            var book = ConsoleGrantBook()
            book.add(granting, guest: "web1", identity: "CN=a", now: 1_800_000_000)
            let other = book.admit(granting.grant, guest: "web1", identity: "CN=b", now: 1_800_000_000)
            precondition(other == nil, "a grant opens something for another identity")
            let late = 1_800_000_000 + ConsoleGrantBook.longestLife
            let right = book.admit(granting.grant, guest: "web1", identity: "CN=a", now: late)
            precondition(right == nil, "a grant lasts longer than it may")
        default: break
        }
    }
}
