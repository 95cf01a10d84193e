import IO
import Migration
import TestSupport
import Testing

@testable import Destination

/// What an identity can hold of a destination agent.
struct PeerAccountsTests {
    @Test func eachLimitIsNamedAndHoldsForOneIdentityOnly() throws {
        let accounts = PeerAccounts()
        for _ in 0..<PeerLimits.guests { try accounts.beginGuest("a") }
        let guests = #expect(throws: MigrationError.self) { try accounts.beginGuest("a") }
        #expect(guests?.message.contains("limit of 64 guests") == true)
        try accounts.beginGuest("b")
        accounts.endGuest("a")
        try accounts.beginGuest("a")
        for _ in 0..<PeerLimits.connections { try accounts.connect("a") }
        let connections = #expect(throws: ChannelError.self) { try accounts.connect("a") }
        #expect(connections?.message.contains("limit of 256 connections") == true)
        try accounts.connect("b")
        for _ in 0..<PeerLimits.hostConnections { try accounts.beginHost("a") }
        let hosts = #expect(throws: ChannelError.self) { try accounts.beginHost("a") }
        #expect(hosts?.message.contains("limit of 16 connections for evacuations") == true)
        try accounts.beginHost("b")
        for _ in 0..<PeerLimits.recalls { try accounts.beginRecall("a") }
        let recalls = #expect(throws: MigrationError.self) { try accounts.beginRecall("a") }
        #expect(recalls?.message.contains("limit of 4 guests that go back") == true)
        try accounts.beginRecall("b")
        accounts.endRecall("a")
        try accounts.beginRecall("a")
        for _ in 0..<PeerLimits.renewals { try accounts.renew("a") }
        let renewals = #expect(throws: MigrationError.self) { try accounts.renew("a") }
        #expect(renewals?.message.contains("limit of 5 certificates") == true)
        try accounts.renew("b")
        try accounts.hold(PeerLimits.messageBytes, for: "a")
        let bytes = #expect(throws: ChannelError.self) { try accounts.hold(1, for: "a") }
        #expect(bytes?.message.contains("limit of 64 MiB") == true)
        try accounts.hold(1, for: "b")
    }

    @Test func whoHoldsNothingMoreIsForgotten() throws {
        let accounts = PeerAccounts()
        for index in 0..<1000 {
            try accounts.connect("peer \(index)")
            try accounts.hold(100, for: "peer \(index)")
            #expect(accounts.count == 1)
            accounts.release(100, for: "peer \(index)")
            accounts.disconnect("peer \(index)")
        }
        #expect(accounts.count == 0)
        _ = #expect(throws: ChannelError.self) { try accounts.hold(PeerLimits.messageBytes + 1, for: "a") }
        #expect(accounts.count == 0)
    }

    @Test func wordsOfAPeerAreOneLineAndNotLongerThanASentence() {
        typealias Event = DestinationHandover.Event
        #expect(Event.sentence("the guest stays") == "the guest stays")
        #expect(Event.sentence("a\nerror: b\u{1b}[2J\u{0}\u{85}c") == "a error: b [2J  c")
        let long = Event.sentence(String(repeating: "é", count: 1 << 20))
        #expect(long.utf8.count <= PeerLimits.sentenceBytes + 8 && long.hasSuffix(" ..."))
    }
}

/// The digests of files that an offer names.
struct FileDigestsTests {
    private let directory: TestDirectory
    private let path: String
    private let file: Message.Offer.File

    init() throws {
        directory = try TestDirectory()
        path = directory.file("image")
        try DurableFile.write([UInt8](repeating: 7, count: 1 << 20), to: path)
        file = Message.Offer.File(path: path, size: 1 << 20, digest: try ChunkDigests.digest(of: path))
    }

    @Test func aFileIsReadOnceWhateverItIsCalled() async throws {
        let (root, file) = (directory.path, file)
        try await onLoop { _ in
            let digests = FileDigests(KeyedSemaphore(limit: 1), key: "a", Abandonment())
            for index in 0..<320 {
                let spelling = root + String(repeating: "/.", count: index) + "/image"
                #expect(try await digests.matches(spelling, file))
            }
            var other = file
            other.digest = String(repeating: "0", count: 64)
            #expect(try await !digests.matches(root + "/image", other))
            #expect(digests.reckoned == 1)
            // What was changed is read again.
            try DurableFile.write([UInt8](repeating: 8, count: 1 << 20), to: root + "/image")
            #expect(try await !digests.matches(root + "/image", file))
            #expect(digests.reckoned == 2)
        }
    }

    @Test func oneIdentitysDigestsWaitForEachOtherAndNotForThoseOfOthers() async throws {
        let (path, file) = (path, file)
        try await onLoop { loop in
            let semaphore = KeyedSemaphore(limit: 1)
            // What stands for a reading that takes long.
            let held = semaphore.request("hostile")
            try await held.wait()
            let abandonment = Abandonment()
            let hostile = FileDigests(semaphore, key: "hostile", abandonment)
            let reading = Task(executorPreference: loop) { try await hostile.matches(path, file) }
            let honest = FileDigests(semaphore, key: "honest", Abandonment())
            #expect(try await honest.matches(path, file))
            #expect(semaphore.waiting("hostile") == 1 && hostile.reckoned == 0)
            // The hostile source goes away: it waits for nothing any more, and holds nothing.
            abandonment.happen()
            hostile.leave()
            let error = await #expect(throws: ChannelError.self) { try await reading.value }
            #expect(error?.code == .closed)
            #expect(semaphore.waiting("hostile") == 0)
            held.end()
        }
    }

    @Test func aReadingThatNobodyWaitsForEnds() async throws {
        let (path, file) = (path, file)
        try await onLoop { loop in
            let semaphore = KeyedSemaphore(limit: 1)
            let abandonment = Abandonment()
            let digests = FileDigests(semaphore, key: "a", abandonment)
            abandonment.happen()
            let error = await #expect(throws: ChannelError.self) { try await digests.matches(path, file) }
            #expect(error?.code == .closed)
            #expect(semaphore.held("a") == 0)
        }
    }
}
