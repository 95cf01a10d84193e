import TLS
import TestSupport
import Testing

struct ObjectTests {
    @Test func theKeyvalFormIsQEMUs() throws {
        let object = try ObjectDescription(parsing: "tls-creds-x509,id=tls0,endpoint=server,dir=/a,,b,verify-peer=yes")
        #expect(object.type == "tls-creds-x509")
        #expect(object.id == "tls0")
        #expect(object.properties == ["endpoint": "server", "dir": "/a,b", "verify-peer": "yes"])
    }

    @Test func theJSONFormMeansTheSame() throws {
        let json = #"{"qom-type":"tls-creds-x509","id":"tls0","dir":"/a,b","verify-peer":true}"#
        #expect(
            try ObjectDescription(parsing: json)
                == ObjectDescription(parsing: "tls-creds-x509,id=tls0,dir=/a,,b,verify-peer=on")
        )
    }

    @Test(arguments: ["", "tls-creds-x509", "tls-creds-x509,id=", "tls-creds-x509,id=a,dir", "{}", "{"])
    func whatCannotBeUnderstoodIsAnError(_ text: String) {
        #expect(throws: CredentialError.self) { try ObjectDescription(parsing: text) }
    }

    @Test func credentialsForTheOtherEndAndUnknownPropertiesAreErrors() throws {
        let pki = try TestPKI()
        func load(_ text: String) throws {
            var store = ObjectStore()
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
