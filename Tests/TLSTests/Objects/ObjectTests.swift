import TLS
import TestSupport
import Testing

struct ObjectTests {
    @Test func theKeyvalFormIsQEMUs() throws {
        let object = try ObjectDescription(parsing: "tls-creds-x509,id=tls0,endpoint=server,dir=/a,,b,verify-peer=yes,")
        #expect(object.type == "tls-creds-x509")
        #expect(object.id == "tls0")
        #expect(
            object.properties == ["endpoint": .text("server"), "dir": .text("/a,b"), "verify-peer": .text("yes")]
        )
        #expect(try ObjectDescription(parsing: "qom-type=secret,id=a,file=x=y").properties == ["file": .text("x=y")])
        // The last one counts, as in QEMU.
        #expect(try ObjectDescription(parsing: "secret,id=a,id=b,file=1,file=2").properties == ["file": .text("2")])
    }

    @Test func theJSONFormMeansTheSameAndKeepsItsTypes() throws {
        let pki = try TestPKI()
        func load(_ text: String) throws -> any TLSCredentials {
            let store = ObjectStore()
            try store.add(ObjectDescription(parsing: text))
            return try store.credentials("tls0", endpoint: .server)
        }
        let head =
            #"{"qom-type":"tls-creds-x509","id":"tls0","endpoint":"server","dir":"\#(pki.directory)","verify-peer":"#
        #expect(try load(head + "false}").verifiesPeer == false)
        #expect(try load("tls-creds-x509,id=tls0,dir=\(pki.directory),verify-peer=off").verifiesPeer == false)
        let error = #expect(throws: CredentialError.self) { try load(head + #""off"}"#) }
        #expect(error?.message == "Invalid parameter type for 'verify-peer', expected: boolean")
    }

    @Test(arguments: [
        "", "tls-creds-x509", "tls-creds-x509,id=", "tls-creds-x509,id=a,dir", "{}", "{", "tls-creds-x509,id=0",
        "tls-creds-x509,id=a b", #"{"qom-type":"secret","id":1}"#, #"{"qom-type":"secret","id":"a","x":1.5}"#, "id=a",
    ])
    func whatCannotBeUnderstoodIsAnError(_ text: String) {
        #expect(throws: CredentialError.self) { try ObjectDescription(parsing: text) }
    }

    @Test func objectsAreListedAndRemovedAndIdsAreUnique() throws {
        let store = ObjectStore()
        try store.add(ObjectDescription(parsing: "authz-simple,id=b,identity=x"))
        try store.add(ObjectDescription(parsing: "authz-simple,id=a,identity=x"))
        #expect(store.listings.map(\.id) == ["a", "b"])
        let error = #expect(throws: CredentialError.self) {
            try store.add(ObjectDescription(parsing: "authz-simple,id=a,identity=x"))
        }
        #expect(error?.message == "attempt to add duplicate object 'a'")
        try store.remove("a")
        #expect(throws: CredentialError.self) { try store.remove("a") }
    }

    @Test func credentialsInUseCannotBeRemoved() throws {
        let pki = try TestPKI()
        let store = ObjectStore()
        try store.add(ObjectDescription(parsing: "tls-creds-x509,id=tls0,dir=\(pki.directory)"))
        _ = try store.credentials("tls0", endpoint: .server, user: "the agent")
        let error = #expect(throws: CredentialError.self) { try store.remove("tls0") }
        #expect(error?.message == "object 'tls0' is in use, can not be deleted: the agent uses it")
    }

    @Test func credentialsForTheOtherEndAndUnknownPropertiesAreErrors() throws {
        let pki = try TestPKI()
        func load(_ text: String) throws {
            let store = ObjectStore()
            try store.add(ObjectDescription(parsing: text))
            _ = try store.credentials("tls0", endpoint: .client)
        }
        try load("tls-creds-x509,id=tls0,endpoint=client,dir=\(pki.directory)")
        #expect(throws: CredentialError.self) {
            try load("tls-creds-x509,id=tls0,endpoint=server,dir=\(pki.directory)")
        }
        #expect(throws: CredentialError.self) { try load("tls-creds-x509,id=tls0,dir=\(pki.directory),verify=on") }
        #expect(throws: CredentialError.self) { try load("tls-creds-x509,id=tls0") }
        #expect(throws: CredentialError.self) { try load("tls-creds-x509,id=tls0,dir=/nowhere") }
        #expect(throws: CredentialError.self) { try load("rng-random,id=tls0") }
    }
}
