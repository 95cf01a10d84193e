import TestSupport
import Testing

@testable import Web

/// What a viewer and the displays of a guest say to each other, step by step.
struct DisplayConversationTests {
    private static let start = ContinuousClock.now

    private static func screen(_ width: UInt16 = 8, _ height: UInt16 = 4) throws -> ServerInit {
        let format = try PixelFormat([32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0])
        return ServerInit(width: width, height: height, format: format, name: "QEMU")
    }

    private static func conversation(mayWrite: Bool = true, _ encodings: [Int32] = []) throws -> DisplayConversation {
        var conversation = DisplayConversation(guest: "g", screen: try screen(), mayWrite: mayWrite)
        _ = conversation.take(.setEncodings(encodings.map { RFBEncoding(rawValue: $0) }), at: start)
        return conversation
    }

    private static func key(_ symbol: UInt32, _ isDown: Bool = true) -> RFBClientMessage {
        .key(isDown: isDown, symbol: symbol)
    }

    /// What the guest is told in actions.
    private static func told(_ actions: [DisplayConversation.Action]) throws -> [RFBClientMessage] {
        var parser = RFBClientMessage.Parser()
        for case .toGuest(let bytes) in actions { parser.append(bytes) }
        var messages: [RFBClientMessage] = []
        while let message = try parser.next() { messages.append(message) }
        return messages
    }

    @Test func keysOfThePauseWaitForTenSecondsAndForSixtyFour() throws {
        var conversation = try Self.conversation()
        #expect(conversation.lose() == [] && conversation.phase == .away)
        for symbol in 0..<3 {
            let late = Self.start + .seconds(5 * symbol)
            #expect(conversation.take(Self.key(UInt32(symbol)), at: late) == [])
            #expect(conversation.take(Self.key(UInt32(symbol), false), at: late) == [])
        }
        let told = try Self.told(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start + .seconds(11)))
        #expect(told.dropFirst(3) == [1, 2].flatMap { [Self.key($0), Self.key($0, false)] }[...])
        #expect(conversation.lose() == [])
        for symbol in 0..<100 { _ = conversation.take(Self.key(UInt32(symbol)), at: Self.start) }
        for symbol in 0..<100 { _ = conversation.take(Self.key(UInt32(symbol), false), at: Self.start) }
        let full = try Self.told(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start))
        #expect(full.dropFirst(3) == ((0..<64).map { Self.key($0) } + (0..<64).map { Self.key($0, false) })[...])
    }

    @Test func aGuestThatWasStartedAnewIsToldOfNoKeyOfBefore() throws {
        var conversation = try Self.conversation()
        _ = conversation.take(Self.key(0xffe1), at: Self.start)
        _ = conversation.lose()
        _ = conversation.take(Self.key(0x61), at: Self.start)
        let told = try Self.told(conversation.connect(try Self.screen(), hasMoved: false, at: Self.start))
        #expect(told.count == 3 && told.allSatisfy { !$0.isInput })
        #expect(conversation.part() == [])
    }

    @Test func buttonsAreLetGoOfBeforeThePauseAndClicksOfItAreNoClicks() throws {
        var conversation = try Self.conversation()
        let drag = RFBClientMessage.pointer(buttons: 1, x: 3, y: 2)
        _ = conversation.take(drag, at: Self.start)
        #expect(conversation.warn(at: Self.start) == [.toGuest(RFBClientMessage.pointer(buttons: 0, x: 3, y: 2).bytes)])
        #expect(conversation.warn(at: Self.start) == [])
        #expect(conversation.take(drag, at: Self.start) == [])
        #expect(conversation.take(.cutText([1]), at: Self.start) == [])
        #expect(conversation.tick(at: Self.start + .seconds(1)) == [])
        // What is asked of the picture is passed on as before, but for a whole one.
        let area = RFBRectangle(width: 8, height: 4)
        let request = RFBClientMessage.updateRequest(isIncremental: true, area)
        let whole = RFBClientMessage.updateRequest(isIncremental: false, area)
        #expect(conversation.take(request, at: Self.start) == [.toGuest(request.bytes)])
        #expect(conversation.take(whole, at: Self.start) == [])
        var staying = conversation
        #expect(staying.tick(at: Self.start + .seconds(2)).first == .toGuest(whole.bytes))
        #expect(conversation.lose() == [])
        #expect(conversation.take(request, at: Self.start) == [])
        let told = try Self.told(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start))
        #expect(told.count == 3)
        // Without a warning the button is let go of on the other host, which has not seen it pressed.
        _ = conversation.take(drag, at: Self.start)
        #expect(conversation.lose() == [])
        let repaired = try Self.told(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start))
        #expect(repaired.dropFirst(3) == [drag, .pointer(buttons: 0, x: 3, y: 2)][...])
    }

    @Test func aLockIsNotPressedAgain() throws {
        var conversation = try Self.conversation()
        for symbol: UInt32 in [0xffe5, 0xffe1, 0xfe03] { _ = conversation.take(Self.key(symbol), at: Self.start) }
        _ = conversation.warn(at: Self.start)
        #expect(conversation.lose() == [])
        let told = try Self.told(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start))
        #expect(told.dropFirst(3) == [Self.key(0xffe1), Self.key(0xfe03)][...])
    }

    @Test func aViewerThatCannotTakeUpAnotherSizeBeginsAnew() throws {
        for (encodings, length): ([Int32], Int?) in [([], nil), ([-223], 16), ([-308], 36), ([-308, -223], 36)] {
            var conversation = try Self.conversation(encodings)
            _ = conversation.lose()
            let actions = conversation.connect(try Self.screen(9, 4), hasMoved: true, at: Self.start)
            guard let length else {
                #expect(actions == [.end(.cut("the screen has another size, which the viewer cannot take up"))])
                continue
            }
            var sent: [UInt8] = []
            for case .toViewer(let bytes) in actions { sent += bytes }
            #expect(sent.count == length && sent[8...11].elementsEqual([0, 9, 0, 4]))
        }
    }

    @Test func whoOnlyLooksChangesNothing() throws {
        var conversation = try Self.conversation(mayWrite: false)
        let input: [RFBClientMessage] = [
            Self.key(1), .extendedKey(isDown: true, symbol: 1, code: 1), .pointer(buttons: 1, x: 0, y: 0),
            .cutText([1]),
            .setDesktopSize(width: 1, height: 1, screens: []), .power(version: 1, code: 2),
        ]
        for message in input { #expect(conversation.take(message, at: Self.start) == []) }
        #expect(conversation.warn(at: Self.start) == [])
        _ = conversation.lose()
        for message in input { #expect(conversation.take(message, at: Self.start) == []) }
        let told = try Self.told(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start))
        #expect(told.allSatisfy { !$0.isInput })
    }

    /// An update of which one pixel comes.
    private static let update: [UInt8] =
        [0, 0, 0, 1] + [0, 0, 0, 0, 0, 1, 0, 1] + [0, 0, 0, 0] + [1, 2, 3, 4]

    private static func relay(_ bytes: ArraySlice<UInt8>, _ conversation: inout DisplayConversation) throws {
        var copy = Array(bytes)
        try copy.withUnsafeMutableBytes { try conversation.relay($0) }
    }

    /// The names in actions.
    private static func names(_ actions: [DisplayConversation.Action]) -> [String] {
        actions.compactMap { action in
            guard case .toViewer(let bytes) = action, bytes.count > 20 else { return nil }
            return String(decoding: bytes.dropFirst(20), as: UTF8.self)
        }
    }

    @Test func aGuestThatStandsStillIsSaidToBetweenTwoMessagesOnce() throws {
        var conversation = try Self.conversation([-307])
        #expect(conversation.news() == [])
        try Self.relay(Self.update[..<18], &conversation)
        conversation.explain("it stands still")
        #expect(conversation.news() == [])
        try Self.relay(Self.update[18...], &conversation)
        #expect(Self.names(conversation.news()) == ["g: it stands still"])
        #expect(conversation.news() == [])
        conversation.explain("it stands still")
        try Self.relay(Self.update[...], &conversation)
        #expect(conversation.news() == [])
        // It is withdrawn as it was told.
        conversation.explain(nil)
        try Self.relay(Self.update[..<5], &conversation)
        #expect(conversation.news() == [])
        try Self.relay(Self.update[5...], &conversation)
        #expect(Self.names(conversation.news()) == ["g"])
        // What was over before it could be told is not told.
        try Self.relay(Self.update[..<5], &conversation)
        conversation.explain("it stands still")
        #expect(conversation.news() == [])
        conversation.explain(nil)
        try Self.relay(Self.update[5...], &conversation)
        #expect(conversation.news() == [])
    }

    @Test func anAbsenceIsSaidBeforeATroubleAndTheTroubleAfterIt() throws {
        var conversation = try Self.conversation([-307])
        conversation.explain("it stands still")
        #expect(Self.names(conversation.news()) == ["g: it stands still"])
        #expect(conversation.lose() == [])
        #expect(Self.names(conversation.wait(for: .waiting("it does not run"))) == ["g: it does not run"])
        #expect(conversation.wait(for: .waiting("it does not run")) == [])
        let back = conversation.connect(try Self.screen(), hasMoved: true, at: Self.start)
        #expect(Self.names(back) == ["g: it stands still"])
        #expect(conversation.lose() == [])
        #expect(Self.names(conversation.wait(for: .waiting("it does not run"))) == ["g: it does not run"])
        conversation.explain(nil)
        #expect(conversation.news() == [])
        #expect(Self.names(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start)) == ["g"])
        // A viewer that shows no name is told none, and one that says late that it does is told then.
        var late = try Self.conversation([])
        late.explain("it stands still")
        #expect(late.news() == [])
        _ = late.take(.setEncodings([RFBEncoding(rawValue: -307)]), at: Self.start)
        #expect(Self.names(late.news()) == ["g: it stands still"])
        _ = late.part()
        late.explain(nil)
        #expect(late.news() == [])
    }

    @Test func afterTheEndNothingIsSaid() throws {
        var conversation = try Self.conversation()
        _ = conversation.take(Self.key(1), at: Self.start)
        #expect(conversation.part() == [.toGuest(Self.key(1, false).bytes)])
        #expect(conversation.part() == [] && conversation.lose() == [] && conversation.phase == .over)
        #expect(conversation.take(Self.key(1), at: Self.start) == [])
        #expect(conversation.connect(try Self.screen(), hasMoved: true, at: Self.start) == [])
        #expect(conversation.wait(for: .never("x")) == [])
    }
}
