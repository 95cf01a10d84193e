import IO
import NBD
import Testing

struct URITests {
    @Test func theStandardFormsAreUnderstood() throws {
        let plain = try NBDURI(parsing: "nbd://example.com/web1")
        #expect(plain.address == .inet(host: "example.com", port: 10809) && plain.export == "web1" && !plain.usesTLS)
        let secure = try NBDURI(parsing: "nbds://alice@[::1]:7000/a%2Fb%20c?tls-psk-file=/k&x-more=1")
        #expect(secure.address == .inet(host: "::1", port: 7000) && secure.export == "a/b c" && secure.usesTLS)
        #expect(secure.user == "alice" && secure.keyFile == "/k")
        let unix = try NBDURI(parsing: "nbds+unix:///x?socket=/run/a%20b&tls-hostname=host&tls-certificates=/pki")
        #expect(
            unix.address == .unix(path: "/run/a b") && unix.certificateName == "host" && unix.certificates == "/pki"
        )
        #expect(try NBDURI(parsing: "nbd+vsock://2:1234/").address == .vsock(cid: 2, port: 1234))
        #expect(try NBDURI(parsing: "nbd+vsock://2").address == .vsock(cid: 2, port: 10809))
        #expect(try NBDURI(parsing: "NBD://h").export.isEmpty)
        #expect(try NBDURI(parsing: "nbd:///x").address == .inet(host: "localhost", port: 10809))
        #expect(try !NBDURI(parsing: "nbds://h/?tls-verify-peer=false").verifiesPeer)
        // There is no command line that a host could be an option of.
        #expect(try NBDURI(parsing: "nbd://-oProxyCommand=x/").address.host == "-oProxyCommand=x")
    }

    @Test(arguments: [
        "nbd:host", "http://host/", "nbd://host/x#y", "nbd://host/?unknown=1", "nbd+unix:///x",
        "nbd+unix://host/x?socket=/s",
        "nbd://host/?socket=/s", "nbd://host/%zz", "nbd://host/%ff%fe", "nbd://host:99999/", "nbd://::1/x",
        "nbd://[::1/x",
        "nbd://host/?tls-certificates=/p", "nbds://host/?tls-type=anon",
        "nbds://host/?tls-type=psk&tls-certificates=/p",
        "nbds://host/?tls-verify-peer=maybe", "nbd+vsock://x:1/", "nbd://@host/", "nbd://host/%00",
    ])
    func whatIsWrongIsSaid(_ text: String) {
        let error = #expect(throws: ChannelError.self) { try NBDURI(parsing: text) }
        #expect(error?.message.isEmpty == false)
    }
}
