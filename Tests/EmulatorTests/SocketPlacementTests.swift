import Testing

@testable import Emulator

struct SocketPlacementTests {
    @Test func everySocketOfACharacterDeviceIsPlacedAndMonitorsAreKnown() {
        let line = GuestCommandLine(
            arguments: [
                "qemu-system-x86_64", "-qmp", "unix:a.sock,server=on,wait=off", "-serial", "mon:unix:b.sock,server=on",
                "-serial", "file:console.log", "-chardev", "socket,id=c0,path=c.sock,server=on,wait=off", "-mon",
                "chardev=c0,mode=control", "-chardev", "socket,id=d0,path=d.sock,server=on", "-gdb",
                "unix:e.sock,server=on", "-chardev", "socket,id=f0,host=127.0.0.1,port=4,server=on", "-monitor",
                "unix:g.sock,server",
            ],
            directory: "/run"
        )
        #expect(line.sockets.map(\.path) == ["a.sock", "b.sock", "c.sock", "d.sock", "e.sock", "g.sock"])
        #expect(line.sockets.filter(\.isMonitor).map(\.path) == ["a.sock", "c.sock", "g.sock"])
        let placed = line.placingSockets { index, _ in "/new/\(index)" }
        #expect(placed.sockets.map(\.path) == (0..<6).map { "/new/\($0)" })
        #expect(placed.arguments.contains("mon:unix:/new/1,server=on"))
        #expect(placed.arguments.contains("socket,id=c0,path=/new/2,server=on,wait=off"))
        #expect(placed.placingSockets { index, _ in line.sockets[index].path } == line)
    }
}
