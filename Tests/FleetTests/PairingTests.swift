import Fleet
import IO
import Testing

/// What is decided before a pairing writes anything, and what undoes one.
struct PairingTests {
    private static let a = FleetMember(name: "host-a", addresses: ["192.0.2.1"])
    private static let b = FleetMember(name: "host-b", addresses: ["192.0.2.2"])
    private static let fleet = "SHA256:0102030405060708"

    private static func fresh(_ name: String) -> MemberLook {
        MemberLook(version: "1", name: name, clock: 1_000_000_000_000)
    }

    private static func member(_ member: FleetMember) -> MemberLook {
        var look = fresh(member.name)
        look.authority = fleet
        look.identity = member.identity
        look.names = member.hosts.map { $0.first?.isNumber == true ? "IP:\($0)" : "DNS:\($0)" }
        look.ends = 1_000_000_000 + 300 * 86400
        look.list = 4
        return look
    }

    private static func plan(
        _ here: MemberLook,
        _ there: MemberLook,
        list: FleetList? = nil,
        authority: String? = nil,
        own: FleetMember = a,
        other: FleetMember = b
    ) throws -> Set<Pairing.Step> {
        try PairingPlan(
            here,
            there,
            host: "root@host-b",
            list: list,
            own: own,
            member: other,
            authority: authority
        ).steps
    }

    private static let both = FleetList(number: 4, members: [a, b])

    @Test func twoFreshHostsNeedEverything() throws {
        let steps = try Self.plan(Self.fresh("host-a"), Self.fresh("host-b"))
        #expect(steps == [.authority, .certifyHere, .certifyThere, .list, .serve, .prove])
    }

    @Test func twoMembersAreOnlyVerified() throws {
        let steps = try Self.plan(Self.member(Self.a), Self.member(Self.b), list: Self.both, authority: Self.fleet)
        #expect(steps == [.serve, .prove])
    }

    @Test func aThirdHostNeedsItsCertificateAndTheList() throws {
        let c = FleetMember(name: "host-c", addresses: ["192.0.2.3"])
        let steps = try Self.plan(
            Self.member(Self.a),
            Self.fresh("host-c"),
            list: Self.both,
            authority: Self.fleet,
            other: c
        )
        #expect(steps == [.certifyThere, .list, .serve, .prove])
    }

    @Test func aCertificateThatIsAboutToEndIsMadeAnew() throws {
        var there = Self.member(Self.b)
        there.ends = 1_000_000_000 + 29 * 86400
        let steps = try Self.plan(Self.member(Self.a), there, list: Self.both, authority: Self.fleet)
        #expect(steps == [.certifyThere, .serve, .prove])
    }

    @Test func anotherAddressNeedsAnotherCertificate() throws {
        let moved = FleetMember(name: "host-b", addresses: ["192.0.2.2", "198.51.100.2"])
        let steps = try Self.plan(
            Self.member(Self.a),
            Self.member(Self.b),
            list: Self.both,
            authority: Self.fleet,
            other: moved
        )
        #expect(steps == [.certifyThere, .list, .serve, .prove])
    }

    @Test func aListThatIsBehindIsBroughtAgain() throws {
        var there = Self.member(Self.b)
        there.list = 3
        let steps = try Self.plan(Self.member(Self.a), there, list: Self.both, authority: Self.fleet)
        #expect(steps == [.list, .serve, .prove])
    }

    @Test func hostsThatCannotBePairedAreToldWhyAndWhatToDo() throws {
        func refused(_ word: String, _ body: () throws -> Set<Pairing.Step>) {
            do {
                _ = try body()
                Issue.record("It was not refused: \(word)")
            } catch { #expect("\(error)".contains(word), "\(error)") }
        }
        let (here, there) = (Self.fresh("host-a"), Self.fresh("host-b"))
        var other = there
        other.version = "2"
        refused("install the same release") { try Self.plan(here, other) }
        other = there
        other.clock += 86_400_000
        refused("86400 s apart") { try Self.plan(here, other) }
        other = there
        other.free = 0
        refused("is full") { try Self.plan(here, other) }
        other = there
        other.authority = "SHA256:ffff"
        refused("belongs to another fleet") { try Self.plan(here, other) }
        var foreign = here
        foreign.authority = "SHA256:ffff"
        refused("whose key is on another host") { try Self.plan(foreign, there) }
        refused("another authority") { try Self.plan(foreign, there, authority: Self.fleet) }
        refused("Both hosts are called") { try Self.plan(here, there, other: Self.a) }
        refused("is no name") { try Self.plan(here, there, other: FleetMember(name: "localhost", addresses: [])) }
    }

    // MARK: undoing

    private static func pairing(hadPackage: Bool, earlier: Pairing? = nil) throws -> Pairing {
        Pairing(
            target: try SSHTarget(parsing: "root@host-b"),
            member: b,
            own: a,
            plan: [.prove, .serve, .list, .certifyThere, .certifyHere, .authority, .install],
            hadPackage: hadPackage,
            earlier: earlier
        )
    }

    @Test func whatWasBegunIsUndoneBackwards() throws {
        var pairing = try Self.pairing(hadPackage: false)
        #expect(pairing.undoing.isEmpty)
        var steps: [Pairing.Step] = []
        while let step = pairing.next {
            pairing.begin(step)
            steps.append(step)
        }
        #expect(steps == [.install, .authority, .certifyHere, .certifyThere, .list, .serve, .prove])
        #expect(pairing.undoing == [.listWithout, .leaveThere, .leaveHere, .removeAuthority, .removePackage])
        let read = try #require(JSONText.decode(Pairing.self, from: try JSONText.encode(pairing)))
        #expect(read == pairing)
    }

    @Test func anEarlierPairingIsUndoneWithALaterOne() throws {
        var first = try Self.pairing(hadPackage: true)
        while let step = first.next { first.begin(step) }
        var again = Pairing(target: first.target, member: Self.b, own: Self.a, plan: [.prove], earlier: first)
        while let step = again.next { again.begin(step) }
        #expect(again.undoing == [.listWithout, .leaveThere, .leaveHere, .removeAuthority])
    }
}

/// Hosts as operators write them for SSH.
struct SSHTargetTests {
    @Test(
        arguments: [
            ("host-b", "host-b", nil), ("root@host-b", "root@host-b", nil), ("host-b:2222", "host-b", 2222),
            ("root@192.0.2.2:22", "root@192.0.2.2", 22), ("[2001:db8::1]:2222", "2001:db8::1", 2222),
            ("root@[2001:db8::1]", "root@2001:db8::1", nil), ("2001:db8::1", "2001:db8::1", nil),
        ] as [(String, String, UInt16?)]
    )
    func aHostIsRead(_ text: String, _ destination: String, _ port: UInt16?) throws {
        let target = try SSHTarget(parsing: text)
        #expect(target.destination == destination && target.port == port)
    }

    /// What would be an option of ssh, or a word of a shell, is none.
    @Test(arguments: [
        "", "@", "root@", "-oProxyCommand=x", "root@-oProxyCommand=x", "-l@host", "a b", "a;b", "a$(b)", "a`b`",
        "host:0",
        "host:99999", "host:x", "[::1", "[::1]x", "h\u{1b}",
    ])
    func whatIsNoHostIsRefused(_ text: String) {
        #expect(throws: FleetError.self) { try SSHTarget(parsing: text) }
    }
}
