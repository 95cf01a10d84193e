import Testing

@testable import Emulator

/// Which sockets of a command line can be a guest's console.
struct SerialSocketTests {
    private func line(_ arguments: String) -> GuestCommandLine {
        GuestCommandLine(
            arguments: ["qemu-system-x86_64"] + arguments.split(separator: " ").map(String.init),
            directory: "/d"
        )
    }

    @Test func portsAndDevicesHaveTheirNames() throws {
        let line = line(
            "-chardev socket,id=c0,path=c.sock,server=on,wait=off -serial null -serial unix:/a,server=on,wait=off -serial chardev:c0 "
                + "-chardev socket,id=away,path=/x -chardev pty,id=p -serial unix:/client"
        )
        #expect(line.serialSockets.map { "\($0.name) \($0.path)" } == ["serial1 /a", "serial2 c.sock", "c0 c.sock"])
        #expect(try line.serialSocket("1").path == "/a" && line.serialSocket("c0").path == "c.sock")
        let error = #expect(throws: GuestError.self) { try line.serialSocket("serial0") }
        #expect("\(error.map { "\($0)" } ?? "")".contains("serial1 (/a), serial2 (c.sock), c0 (c.sock)"))
    }

    /// Who writes to a monitor commands QEMU, and thereby this host.
    @Test(arguments: [
        "-serial mon:unix:/a,server=on",
        "-chardev socket,id=m,path=/a,server=on,mux=on -serial chardev:m -mon chardev=m",
        "-chardev socket,id=m,path=/a,server=on -qmp chardev:m", "-monitor unix:/a,server=on", "-gdb unix:/a,server=on",
        "-serial telnet:127.0.0.1:1,server=on", "-chardev socket,id=m,path=/a,server=on,telnet=on -serial chardev:m",
        "-serial unix:/a",
    ])
    func otherSocketsAreNone(_ arguments: String) { #expect(line(arguments).serialSockets.isEmpty) }
}
