import Emulator
import Glibc
import IO
import TLS
import TestSupport

@testable import Web

/// A guest with a screen, whose agent is a web server.
final class DisplayLab: @unchecked Sendable {
    // Unchecked: each test uses its lab from one task.
    let lab: WebLab
    let store: GuestStore
    let loop = EventLoop(name: "viewers")
    let socket: String
    let serial: String
    var record: GuestRecord
    var browser: X509Credentials

    /// - Parameters:
    ///   - display: what `-vnc` is given; nil for a Unix socket.
    ///   - isStarted: whether the guest is started at once.
    ///   - objects: the objects of the process.
    ///   - change: changes the configuration of the server.
    init(
        display: String? = nil,
        isStarted: Bool = true,
        objects: ObjectStore = ObjectStore(),
        _ change: (inout WebServer.Configuration) -> Void = { _ in }
    ) async throws {
        lab = try await WebLab(objects: objects) { configuration in
            configuration.commands = .unix(path: "\(configuration.host.stateDirectory)/console.sock")
            change(&configuration)
        }
        store = GuestStore(stateDirectory: lab.state)
        browser = try lab.browserCredentials()
        (socket, serial) = (lab.directory.file("vnc.sock"), lab.directory.file("serial.txt"))
        let disk = lab.directory.file("disk.raw")
        try KeyboardGuest.makeDisk(disk)
        let command = [
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-vga", "std", "-display",
            "none",
            "-drive", "file=\(disk),format=raw,if=ide", "-serial", "file:\(serial)", "-vnc",
            display ?? "unix:\(socket)",
        ]
        record = GuestRecord(name: "web1", commandLine: GuestCommandLine(arguments: command, directory: "/"))
        if isStarted { try await start() } else { try store.save(record) }
    }

    deinit {
        record.process?.signal(SIGKILL)
        loop.stop()
    }

    func start() async throws {
        let (store, loop, before) = (store, loop, record)
        record = try await loop.run {
            var record = before
            try await store.start(&record, on: loop).close()
            return record
        }
    }

    /// What the guest's keyboard has sent since it was started, behind the asterisk.
    var typed: String { KeyboardGuest.typed(serial) }

    /// Waits until the guest has written its asterisk.
    func begin() async throws {
        let serial = serial
        try await loop.run { [loop] in
            try await Self.poll("the guest", on: loop) {
                (((try? DurableFile.read(serial)) ?? nil) ?? []).contains(UInt8(ascii: "*"))
            }
        }
    }

    /// Waits until the guest's keyboard has sent this. Called on the loop.
    func typed(_ text: String) async throws {
        try await Self.poll("'\(text)', there is '\(typed)'", on: loop) { self.typed == text }
    }

    private static func poll(_ what: String, on loop: EventLoop, _ condition: () -> Bool) async throws {
        let end = ContinuousClock.now + .seconds(60)
        while !condition() {
            guard .now < end else { throw TestFailure("Waited in vain for \(what)") }
            await loop.sleep(for: .milliseconds(20))
        }
    }

    var local: SocketAddress { .unix(path: "\(lab.state)/console.sock") }

    /// A viewer with a cookie, or by the socket of the commands.
    func viewer(_ cookie: String? = nil, query: String = "") async throws -> DisplayClient {
        if let cookie {
            return try await .connect(lab.address, lab.host, browser, cookie: cookie, query: query, on: loop)
        }
        return try await .connect(local, "localhost", nil, query: query, on: loop)
    }

    /// Runs `body` on the viewers' loop.
    func run<T: Sendable>(_ body: @escaping @Sendable () async throws -> T) async throws -> T {
        try await loop.run(body)
    }
}
