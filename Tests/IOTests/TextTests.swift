import IO
import Testing

struct TextTests {
    @Test func dottedKeysMakeListsAndRecords() throws {
        #expect(
            try KeyValue.parse("t,a.b=1,a.c.1=y,a.c.0=x", implied: "type") == [
                "type": .text("t"), "a": .record(["b": .text("1"), "c": .list([.text("x"), .text("y")])]),
            ]
        )
    }

    /// The words of QEMU's `keyval_parse`.
    @Test(arguments: [
        ("t,a", "Expected '=' after parameter 'a'"), ("t,=x", "Invalid parameter ''"),
        ("t,1a=x", "Invalid parameter '1a'"),
        ("t,a..b=x", "Invalid parameter 'a..b'"), ("t,a b=x", "Invalid parameter 'a b'"),
        (",a=x", "Invalid parameter ''"),
        ("t,a=1,a.b=2", "Parameters 'a.b' used inconsistently"),
        ("t,a.b=1,a=2", "Parameters 'a.*' used inconsistently"),
        ("t,a.1=x", "Parameter 'a.0' missing"), ("t,a.0=x,a.b=y", "Parameters 'a.*' used inconsistently"),
        ("t,a.00=x", "Parameter 'a.0' missing"),
    ])
    func whatTheKeyvalParserRefusesIsToldInQEMUsWords(_ text: String, _ message: String) {
        let error = #expect(throws: KeyValue.Malformed.self) { try KeyValue.parse(text, implied: "type") }
        #expect(error?.description == message)
    }

    @Test(arguments: [
        ("plain \u{e9}", "plain \u{e9}"), ("two\nl\u{1b}[2J", "two?l?[2J"), ("\u{85}\u{7f}\u{9b}", "???"),
        ("a\u{202e}b\u{2066}c\u{2028}", "a?b?c?"), ("\r\n", "??"), ("0123456789", "0123456789"),
        ("0123456789a", "0123456..."), ("\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}x", "\u{e9}\u{e9}\u{e9}..."), ("", ""),
    ])
    func whatOthersSayIsShownInOneLineOfBoundedLength(_ text: String, _ shown: String) {
        #expect(text.shown(most: 10) == shown)
        #expect(text.shown(most: 10).utf8.count <= 10)
    }

    @Test(arguments: [
        ("one two", "one two"), ("one two three four", "one two..."), ("one twothree", "one twot..."),
        ("onetwothreefour", "onetwoth..."),
        ("one twotwo ", "one twotwo "), ("one two\nthree", "one two?..."),
    ])
    func wholeWordsAreShownWhereTheyFit(_ text: String, _ shown: String) {
        #expect(text.shown(wordsOf: 11) == shown)
    }

    /// RFC 4648, section 10.
    @Test func base64HoldsItsVectorsAndRefusesWhatIsNone() {
        let vectors = [
            ("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy"),
        ]
        for (plain, text) in vectors {
            #expect(Base64.encode(plain.utf8) == text)
            #expect(Base64.decode(text.utf8) == Array(plain.utf8))
        }
        #expect(Base64.decode("Zm9v\nYmFy\n".utf8) == Array("foobar".utf8))
        for bad in ["Z", "Zg", "Zg=", "Zg===", "Z===", "Zm9v=", "Zg==Zg==", "Zm 9v", "Zm9v!", "====", "Zm=8"] {
            #expect(Base64.decode(bad.utf8) == nil, "\(bad)")
        }
    }

    @Test func bytesInHexadecimalHaveTwoDigitsEach() { #expect([0, 0x0a, 0xff].hex == "000aff") }
}
