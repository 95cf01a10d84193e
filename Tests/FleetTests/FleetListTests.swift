import Fleet
import IO
import TLS
import TestSupport
import Testing

/// Who belongs to a fleet: signed, numbered, and never taken backwards.
struct FleetListTests {
    private static let a = FleetMember(name: "host-a", addresses: ["192.0.2.1"])
    private static let b = FleetMember(name: "host-b", addresses: ["192.0.2.2"])

    /// A host that belongs to the fleet of an authority.
    private static func host(_ directory: TestDirectory, _ name: String, of authority: CertificateAuthority) throws
        -> FleetFiles
    {
        let files = FleetFiles(root: directory.directory(name))
        try DurableFile.makeDirectory(files.credentials)
        try DurableFile.write(Array(try authority.pem.utf8), to: "\(files.credentials)/ca-cert.pem")
        return files
    }

    @Test func aListIsTakenOverWithWhoMaySend() throws {
        let directory = try TestDirectory()
        let authority = try CertificateAuthority(name: "fleet")
        let files = try Self.host(directory, "a", of: authority)
        var quiet = Self.b
        quiet.sends = false
        let list = FleetList(number: 3, members: [Self.a, quiet])
        #expect(try files.accept(list.signed(by: authority)) == 3)
        let store = ObjectStore()
        try store.add(ObjectDescription(parsing: "authz-list-file,id=peers,filename=\(files.authorization)"))
        let authorizer = try store.authorizer("peers")
        #expect(authorizer.allows(["CN=host-a"]))
        #expect(!authorizer.allows(["CN=host-b"]) && !authorizer.allows(["CN=host-c"]) && !authorizer.allows([]))
        // The agent's list follows without a word.
        try files.accept(list.with(Self.b).signed(by: authority))
        #expect(authorizer.allows(["CN=host-b"]))
        try files.accept(FleetList(number: 9, members: []).signed(by: authority))
        #expect(!authorizer.allows(["CN=host-a"]))
    }

    @Test func anEarlierListIsNeverTaken() throws {
        let directory = try TestDirectory()
        let authority = try CertificateAuthority(name: "fleet")
        let files = try Self.host(directory, "a", of: authority)
        let earlier = FleetList(number: 1, members: [Self.a, Self.b])
        let later = earlier.without("host-b")
        try files.accept(earlier.signed(by: authority))
        try files.accept(later.signed(by: authority))
        #expect(throws: FleetError.self) { try files.accept(earlier.signed(by: authority)) }
        // The same again, as one that was sent twice.
        #expect(try files.accept(later.signed(by: authority)) == 2)
        #expect(throws: FleetError.self) {
            try files.accept(FleetList(number: 2, members: [Self.b]).signed(by: authority))
        }
        #expect(try files.signedList()?.read == later)
    }

    @Test func aListOfAnotherAuthorityIsRefused() throws {
        let directory = try TestDirectory()
        let authority = try CertificateAuthority(name: "fleet")
        let files = try Self.host(directory, "a", of: authority)
        let stranger = try CertificateAuthority(name: "fleet")
        let list = FleetList(number: 1, members: [Self.a])
        #expect(throws: FleetError.self) { try files.accept(list.signed(by: stranger)) }
        var forged = try list.signed(by: authority)
        forged.list = forged.list.replacing("host-a", with: "host-x")
        #expect(throws: FleetError.self) { try files.accept(forged) }
        #expect(try files.signedList() == nil && !DurableFile.exists(files.authorization))
    }

    @Test func aHostOfNoFleetTakesNoList() throws {
        let directory = try TestDirectory()
        let files = FleetFiles(root: directory.path)
        let list = try FleetList(number: 1, members: [Self.a]).signed(by: CertificateAuthority(name: "fleet"))
        #expect(throws: FleetError.self) { try files.accept(list) }
    }
}

/// A host that asks for a certificate, uses it, and leaves.
struct MemberHostTests {
    private static func host(_ directory: TestDirectory) -> (MemberHost, FleetFiles) {
        let files = FleetFiles(root: directory.directory("root"))
        let host = MemberHost(files: files, stateDirectory: directory.directory("state"), version: "1")
        return (host, files)
    }

    private static func certify(_ host: MemberHost, _ authority: CertificateAuthority, ends: Int = 365 * 86400) throws {
        let request = try #require(try host.carryOut(.request(name: "host-b")).request)
        let certificate = try authority.issue(
            for: request,
            .init(name: "host-b", hosts: ["host-b", "192.0.2.2"], ends: ends)
        )
        _ = try host.carryOut(.certify(certificate: certificate, authority: try authority.pem))
    }

    @Test func aCertificateForBothEndsComesFromARequest() throws {
        let directory = try TestDirectory()
        let (host, files) = Self.host(directory)
        let authority = try CertificateAuthority(name: "fleet")
        #expect(try host.carryOut(.look).look?.authority == nil)
        try Self.certify(host, authority)
        let checked = CredentialDirectory(checking: files.credentials)
        #expect(checked.findings.isEmpty, "\(checked.findings)")
        #expect(checked.endpoints == TLSEndpoint.allCases)
        let look = try #require(try host.carryOut(.look).look)
        #expect(look.identity == "CN=host-b" && look.names == ["DNS:host-b", "IP:192.0.2.2"])
        #expect(try look.authority == CertificateAuthority.fingerprint(of: Array(authority.pem.utf8)))
    }

    @Test func aCertificateThatIsNotGoodChangesNothing() throws {
        let directory = try TestDirectory()
        let (host, files) = Self.host(directory)
        let authority = try CertificateAuthority(name: "fleet")
        try Self.certify(host, authority)
        let before = try DurableFile.read("\(files.credentials)/server-cert.pem")
        #expect(throws: FleetError.self) { try Self.certify(host, authority, ends: -10) }
        let request = try #require(try host.carryOut(.request(name: "host-b")).request)
        let certificate = try authority.issue(for: request, .init(name: "host-b", hosts: ["host-b"]))
        // Its authority is another one than the one that is sent with it.
        #expect(throws: FleetError.self) {
            try host.carryOut(
                .certify(certificate: certificate, authority: try CertificateAuthority(name: "other").pem)
            )
        }
        #expect(try DurableFile.read("\(files.credentials)/server-cert.pem") == before)
        #expect(DurableFile.list("\(files.root)/etc/pki") == ["crossdock"])
    }

    @Test func aRequestIsOnlyForTheKeyThatSignedIt() throws {
        let directory = try TestDirectory()
        let (host, _) = Self.host(directory)
        let authority = try CertificateAuthority(name: "fleet")
        let request = try #require(try host.carryOut(.request(name: "host-b")).request)
        var lines = request.split(separator: "\n").map(String.init)
        // A bit of the signature, near the end of the request.
        let index = lines.count - 2
        lines[index] = String(lines[index].reversed())
        #expect(throws: CredentialError.self) {
            try authority.issue(for: lines.joined(separator: "\n"), .init(name: "host-b", hosts: []))
        }
        #expect(throws: CredentialError.self) { try authority.issue(for: "nothing", .init(name: "host-b", hosts: [])) }
        #expect(throws: FleetError.self) { try host.carryOut(.request(name: "../evil")) }
    }

    @Test func whoLeavesGetsBackWhatWasThereBefore() throws {
        let directory = try TestDirectory()
        let (host, files) = Self.host(directory)
        let earlier = try CertificateAuthority(name: "earlier")
        try DurableFile.makeDirectory(files.credentials)
        try earlier.issue(.init(name: "old", hosts: ["old"]), to: files.credentials)
        let authority = try CertificateAuthority(name: "fleet")
        try Self.certify(host, authority)
        let member = FleetMember(name: "host-b", addresses: [])
        _ = try host.carryOut(.list(FleetList(number: 1, members: [member]).signed(by: authority)))
        // Renewed once: what was there before the pairing is still kept.
        try Self.certify(host, authority)
        _ = try host.carryOut(.leave)
        #expect(try host.carryOut(.look).look?.identity == "CN=old")
        #expect(!DurableFile.exists(files.list) && !DurableFile.exists(files.authorization))
        #expect(DurableFile.list("\(files.root)/etc/pki") == ["crossdock"])
        _ = try host.carryOut(.leave)
    }
}
