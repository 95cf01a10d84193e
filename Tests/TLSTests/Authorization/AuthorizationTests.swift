import Glibc
import TLS
import TestSupport
import Testing

struct AuthorizationTests {
    let store = ObjectStore()

    func add(_ text: String) throws { try store.add(ObjectDescription(parsing: text)) }
    func allows(_ id: String, _ identities: String...) throws -> Bool { try store.authorizer(id).allows(identities) }

    @Test func simpleComparesByteForByte() throws {
        try add("authz-simple,id=a,identity=CN=host-a,,O=Example")
        #expect(try allows("a", "CN=host-a,O=Example"))
        #expect(try !allows("a", "CN=host-a"))
        #expect(try !allows("a", "cn=host-a,O=Example"))
        #expect(try !allows("a"))
    }

    @Test func theFirstRuleThatMatchesDecidesAndThePolicyWhenNoneDoes() throws {
        try add(
            "authz-list,id=a,policy=deny,rules.0.match=CN=bad-*,rules.0.policy=deny,rules.0.format=glob,"
                + "rules.1.match=CN=*-host,rules.1.policy=allow,rules.1.format=glob,rules.2.match=fred,rules.2.policy=allow"
        )
        #expect(try allows("a", "CN=good-host"))
        #expect(try !allows("a", "CN=bad-host"))
        #expect(try allows("a", "fred"))
        #expect(try !allows("a", "fredx"))
        #expect(try !allows("a", "CN=*-hos"))
        try add(#"{"qom-type":"authz-list","id":"b","policy":"allow","rules":[{"match":"fred","policy":"deny"}]}"#)
        #expect(try !allows("b", "fred"))
        #expect(try allows("b", "anybody"))
        try add("authz-list,id=c")
        #expect(try !allows("c", "anybody"))
    }

    @Test func alternativeNamesMatchAsTheMainNameDoes() throws {
        try add("authz-list,id=a,rules.0.match=DNS:*.example.org,rules.0.policy=allow,rules.0.format=glob")
        #expect(try allows("a", "CN=x", "DNS:host.example.org"))
        #expect(try !allows("a", "CN=x", "DNS:host.example.com"))
        // A pattern for distinguished names is not met by another kind of name.
        try add("authz-list,id=b,rules.0.match=*O=Acme*,rules.0.policy=allow,rules.0.format=glob")
        #expect(try !allows("b", "CN=x", "URI:x:O=Acme"))
        #expect(try allows("b", "CN=x,O=Acme"))
    }

    @Test(arguments: [
        ("*", "", true), ("*", "x", true), ("", "", true), ("", "x", false), ("a?c", "abc", true), ("a?c", "ac", false),
        ("a*c", "abbbc", true), ("a*c", "abbb", false), ("*a*a*", "banana", true), ("*ana", "banana", true),
        ("[a-z]", "b", false), ("[a-z]", "[a-z]", true), ("?", "é", true), ("**", "ab", true),
    ])
    func globsKnowStarAndQuestionMarkOnly(_ pattern: String, _ text: String, _ expected: Bool) {
        let rule = AuthorizationRule(match: pattern, policy: .allow, format: .glob)
        #expect(rule.matches(text) == expected)
    }

    @Test func aHostilePatternTakesNoExponentialTime() {
        let rule = AuthorizationRule(match: String(repeating: "*a", count: 200) + "b", policy: .allow, format: .glob)
        #expect(!rule.matches(String(repeating: "a", count: 5000)))
    }

    @Test func aFileIsReadAgainWhenItChangesAndDeniesEverybodyWhileItIsBad() throws {
        let directory = try TestDirectory()
        let path = directory.file("list.json")
        func write(_ text: String) {
            let file = fopen(path, "w")
            fputs(text, file)
            fclose(file)
        }
        write(#"{"rules":[{"match":"CN=a","policy":"allow"}],"policy":"deny"}"#)
        try add("authz-list-file,id=live,filename=\(path)")
        try add("authz-list-file,id=fixed,filename=\(path),refresh=off")
        #expect(try allows("live", "CN=a"))
        write(#"{"rules":[{"match":"CN=b","policy":"allow"}],"policy":"deny"}"#)
        #expect(try !allows("live", "CN=a"))
        #expect(try allows("live", "CN=b"))
        #expect(try allows("fixed", "CN=a"))
        for bad in ["{", "[]", #"{"rules":[{"policy":"allow"}]}"#, #"{"policy":"maybe"}"#, #"{"rule":[]}"#, ""] {
            write(bad)
            #expect(try !allows("live", "CN=b"), "\(bad)")
        }
        write(#"{"policy":"allow"}"#)
        #expect(try allows("live", "CN=b"))
        unlink(path)
        #expect(try !allows("live", "CN=b"))
        mkdir(path, 0o700)
        #expect(try !allows("live", "CN=b"))
        #expect(throws: CredentialError.self) { try add("authz-list-file,id=x,filename=\(path)") }
        #expect(throws: CredentialError.self) { try add("authz-list-file,id=x,filename=relative.json") }
    }

    @Test func aMissingObjectOrOneOfAnotherTypeDenies() throws {
        let peer = TLSPeer(distinguishedName: "CN=a")
        func denied(_ id: String) -> String {
            let error = #expect(throws: CredentialError.self) {
                try AccessControl(objects: store, authorization: id).check(peer)
            }
            return error?.message ?? ""
        }
        #expect(denied("z") == "Cannot find QAuthZ object ID z")
        try store.add(ObjectDescription(parsing: "secret,id=s,data=x"), from: .control)
        #expect(denied("s") == "Object 's' is not a QAuthZ subclass")
        try add("authz-simple,id=z,identity=CN=b")
        #expect(denied("z").contains("TLS authz check for CN=a is denied"))
        try store.remove("z")
        try add("authz-simple,id=z,identity=CN=a")
        try AccessControl(objects: store, authorization: "z").check(peer)
        try AccessControl(objects: store, authorization: nil).check(peer)
        // Who has no name cannot be denied by name.
        try add("authz-list,id=open,policy=allow,rules.0.match=alice,rules.0.policy=deny")
        #expect(throws: CredentialError.self) {
            try AccessControl(objects: store, authorization: "open").check(TLSPeer())
        }
        try add("authz-simple,id=user,identity=alice")
        try AccessControl(objects: store, authorization: "user").check(TLSPeer(pskUser: "alice"))
    }
}
