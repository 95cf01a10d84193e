import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

/// Who may have the consoles of guests that came from there.
struct ConsoleGrantTests {
    private let now = 1_800_000_000
    private let day = ConsoleGrantBook.longestLife

    private func book(_ granting: ConsoleGranting, guest: String = "web1", by identity: String = "CN=a")
        -> ConsoleGrantBook
    {
        var book = ConsoleGrantBook()
        book.add(granting, guest: guest, identity: identity, now: now)
        return book
    }

    private func admitted(
        _ book: ConsoleGrantBook,
        _ grant: ConsoleGrant,
        guest: String = "web1",
        identity: String = "CN=a",
        now: Int? = nil
    ) -> ConsoleGrantBook.Right? {
        var book = book
        return book.admit(grant, guest: guest, identity: identity, now: now ?? self.now)
    }

    private func mode(of path: String) throws -> UInt32 {
        var status = stat()
        guard stat(path, &status) == 0 else { throw TestFailure("\(path) is not there") }
        return status.st_mode & 0o777
    }

    @Test func aGrantOpensOneGuestForWhoGaveIt() throws {
        let grant = ConsoleGrant()
        let book = book(ConsoleGranting(grant))
        let right = try #require(admitted(book, grant))
        #expect(right.mayWrite && right.guest == "web1" && right.identity == "CN=a")
        #expect(admitted(book, grant, guest: "web2") == nil, "another guest")
        #expect(admitted(book, grant, identity: "CN=b") == nil, "another identity")
        #expect(admitted(book, ConsoleGrant()) == nil, "a guess")
        #expect(admitted(book, grant, now: now + day) == nil, "too late")
        #expect(admitted(self.book(ConsoleGranting(grant, write: false)), grant)?.mayWrite == false)
    }

    @Test func itsTimeBeginsAnewWheneverItIsUsed() throws {
        let grant = ConsoleGrant()
        var book = book(ConsoleGranting(grant, seconds: 100))
        let late = book.admit(grant, guest: "web1", identity: "CN=a", now: now + 99)
        let right = try #require(late)
        let (first, second) = (book.renew(right, now: now + 198), book.renew(right, now: now + 297))
        let third = book.renew(right, now: now + 397)
        #expect(first && second && !third)
        // Nobody gets more than a day without using it.
        let long = self.book(ConsoleGranting(grant, seconds: .max))
        #expect(admitted(long, grant, now: now + day - 1) != nil && admitted(long, grant, now: now + day) == nil)
        #expect(self.book(ConsoleGranting(grant, seconds: -1)).count == 0)
    }

    @Test func theLatestCountsAndTheWayHomeEndsIt() throws {
        let (first, second) = (ConsoleGrant(), ConsoleGrant())
        var book = book(ConsoleGranting(first))
        let right = try #require(admitted(book, first))
        book.add(ConsoleGranting(second), guest: "web1", identity: "CN=a", now: now)
        #expect(book.count == 1 && admitted(book, first) == nil && admitted(book, second) != nil)
        let renewed = book.renew(right, now: now)
        #expect(!renewed, "what is open by the first one ends")
        book.remove(guest: "web1", identity: "CN=b")
        #expect(admitted(book, second) != nil)
        book.remove(guest: "web1", identity: "CN=a")
        #expect(book.count == 0 && admitted(book, second) == nil)
    }

    @Test func thereAreOnlySoMany() {
        var book = ConsoleGrantBook()
        for index in 0..<20 {
            book.add(ConsoleGranting(ConsoleGrant()), guest: "web1", identity: "CN=\(index)", now: now)
        }
        #expect(book.count == ConsoleGrantBook.mostOfGuest)
        for index in 0..<(ConsoleGrantBook.most + 10) {
            book.add(ConsoleGranting(ConsoleGrant(), seconds: 10), guest: "g\(index)", identity: "CN=a", now: now)
        }
        #expect(book.count == ConsoleGrantBook.most)
    }

    @Test func theFileHasNoGrantAndOutlivesTheAgent() throws {
        let directory = try TestDirectory()
        let grant = ConsoleGrant()
        let path = directory.file("console-grants.json")
        try ConsoleGrants(stateDirectory: directory.path).add(ConsoleGranting(grant), guest: "web1", identity: "CN=a")
        let text = String(decoding: try DurableFile.read(path) ?? [], as: UTF8.self)
        #expect(text.contains("CN=a") && !text.contains(grant.text) && text.contains(grant.digest.hex))
        #expect(try mode(of: path) == 0o600)
        let next = ConsoleGrants(stateDirectory: directory.path)
        let right = try #require(next.admit(grant, guest: "web1", identity: "CN=a"))
        #expect(next.renew(right))
        try next.remove(guest: "web1", identity: "CN=a")
        #expect(!next.renew(right))
        #expect(ConsoleGrants(stateDirectory: directory.path).admit(grant, guest: "web1", identity: "CN=a") == nil)
        // Whatever is there in its place opens nothing.
        try DurableFile.write(Array("{".utf8), to: path)
        #expect(ConsoleGrants(stateDirectory: directory.path).admit(grant, guest: "web1", identity: "CN=a") == nil)
    }

    @Test func whereAGuestHasGoneIsKeptFromOthers() throws {
        let directory = try TestDirectory()
        let grant = ConsoleGrant()
        let departure = ConsoleDeparture(guest: "web1", host: "b", port: 7, identity: "CN=b", grant: grant)
        #expect(try ConsoleDeparture.read("web1", stateDirectory: directory.path) == nil)
        try departure.write(stateDirectory: directory.path)
        #expect(try ConsoleDeparture.read("web1", stateDirectory: directory.path) == departure)
        let path = ConsoleDeparture.path(of: "web1", stateDirectory: directory.path)
        #expect(try mode(of: path) == 0o600)
        #expect(!"\(departure)".contains(grant.text), "it gets into no log")
        #expect(throws: (any Error).self) { try ConsoleDeparture.read("../web1", stateDirectory: directory.path) }
        ConsoleDeparture.remove("web1", stateDirectory: directory.path)
        #expect(try ConsoleDeparture.read("web1", stateDirectory: directory.path) == nil)
    }
}
