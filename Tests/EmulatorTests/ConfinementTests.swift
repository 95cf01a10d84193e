import FoundationEssentials
import Glibc
import IO
import TestSupport
import Testing

@testable import Emulator

/// What a confined program can reach, found out by one that tries.
@Suite(.timeLimit(.minutes(2)))
struct ConfinementTests {
    /// Tries what its arguments say and prints a line for each: what, and "ok" or the name of the error.
    private static let probe = #"""
        import ctypes, errno, os, socket, sys
        libc = ctypes.CDLL(None, use_errno=True)
        own, other, parent, port, closed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
        def attempt(name, body):
            try:
                body()
                print(name, "ok", flush=True)
            except OSError as error:
                print(name, errno.errorcode.get(error.errno, error.errno), flush=True)
        def trace():
            if libc.ptrace(16, parent, 0, 0) != 0: raise OSError(ctypes.get_errno(), "")
        def bind(number):
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.bind(("127.0.0.1", number))
        def connect(address):
            with socket.socket(socket.AF_UNIX) as s: s.connect(address)
        attempt("own-make", lambda: open(own + "/made", "w").close())
        attempt("own-read", lambda: open(own + "/given").read())
        attempt("own-list", lambda: os.listdir(own))
        attempt("own-link", lambda: os.symlink("/etc/passwd", own + "/link"))
        attempt("own-device", lambda: os.mknod(own + "/pipe", 0o600 | 0o010000))
        attempt("other-read", lambda: open(other + "/given").read())
        attempt("other-empty", lambda: os.truncate(other + "/given", 0))
        attempt("other-make", lambda: open(other + "/made", "w").close())
        attempt("other-remove", lambda: os.unlink(other + "/given"))
        attempt("other-hard-link", lambda: os.link(other + "/given", own + "/stolen"))
        attempt("passwd", lambda: open("/etc/passwd").read())
        attempt("proc", lambda: open("/proc/%d/environ" % parent).read())
        attempt("execute", lambda: os.execv("/bin/true", ["true"]))
        attempt("signal", lambda: os.kill(parent, 0))
        attempt("trace", trace)
        attempt("allowed-port", lambda: bind(port))
        attempt("other-port", lambda: bind(closed))
        attempt("abstract", lambda: connect("\0crossdock-probe-%d" % parent))
        attempt("null", lambda: open("/dev/null", "w").close())
        with open(own + "/gate") as gate: gate.read()
        """#

    private func value(_ key: String, in text: String) -> String {
        text.split(separator: "\n").first { $0.hasPrefix("\(key):") }.map {
            String($0.dropFirst(key.utf8.count + 1)).trimmed
        }
            ?? ""
    }

    private func read(_ path: String) throws -> String {
        String(decoding: try DurableFile.read(path) ?? [], as: UTF8.self)
    }

    /// A port that is free now.
    private func freePort() throws -> UInt16 {
        let socket = Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(socket) }
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let number = withUnsafeMutablePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { raw -> UInt16? in
                guard bind(socket, raw, length) == 0, getsockname(socket, raw, &length) == 0 else { return nil }
                return UInt16(bigEndian: UnsafeRawPointer(raw).load(as: sockaddr_in.self).sin_port)
            }
        }
        return try #require(number)
    }

    @Test(.enabled(if: LandlockRuleset.version ?? 0 >= 6, "the kernel has no Landlock of version 6"))
    func aConfinedProgramReachesWhatItsRulesNameAndNothingElse() async throws {
        let lab = try TestDirectory()
        let (own, other) = (lab.directory("own"), lab.directory("other"))
        for directory in [own, other] { try DurableFile.write(Array("given".utf8), to: "\(directory)/given") }
        let script = "\(own)/probe.py"
        try DurableFile.write(Array(Self.probe.utf8), to: script)
        #expect(mkfifo("\(own)/gate", 0o600) == 0)
        let (port, closed) = (try freePort(), try freePort())
        let program = try ProgramFiles("/usr/bin/python3", withData: false)
        var confinement = Confinement(Confinement.common + program.rules + [.init(own, .directory)])
        confinement.ports = [port]
        setenv("LD_PRELOAD_OF_A_TEST", "1", 1)
        let log = lab.file("log")
        let process = try EmulatorProcess.start(
            ["/usr/bin/python3", "-I", "-S", script, own, other, "\(getpid())", "\(port)", "\(closed)"],
            directory: "/",
            log: log,
            confinement: confinement
        )
        defer { process.signal(SIGKILL) }
        try await eventually("the probe has tried everything") {
            try self.read(log).contains("null ") || !process.isRunning
        }
        var found: [String: String] = [:]
        for line in try read(log).split(separator: "\n") {
            let words = line.split(separator: " ")
            if words.count == 2 { found[String(words[0])] = String(words[1]) }
        }
        let allowed = ["own-make", "own-read", "own-list", "allowed-port", "null"]
        let denied = [
            "own-link", "own-device", "other-read", "other-empty", "other-make", "other-remove", "passwd", "proc",
            "execute", "other-port",
        ]
        for name in allowed { #expect(found[name] == "ok", "\(name): \(found)") }
        for name in denied { #expect(found[name] == "EACCES", "\(name): \(found)") }
        #expect(["EXDEV", "EACCES"].contains(found["other-hard-link"]), "\(found)")
        for name in ["signal", "trace"] { #expect(found[name] == "EPERM", "\(name): \(found)") }
        #expect(["EPERM", "ECONNREFUSED"].contains(found["abstract"]), "\(found)")
        let status = try read("/proc/\(process.pid)/status")
        for key in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            #expect(value(key, in: status) == "0000000000000000", "\(key)")
        }
        if geteuid() == 0 { #expect(value("CapBnd", in: status) == "0000000000000000") }
        #expect(value("NoNewPrivs", in: status) == "1")
        let limits = try read("/proc/\(process.pid)/limits")
        #expect(limits.split(separator: "\n").contains { $0.hasPrefix("Max core file size") && $0.contains(" 0 ") })
        let environment = try read("/proc/\(process.pid)/environ")
        #expect(!environment.contains("LD_PRELOAD") && environment.contains("PATH=/"), "\(environment)")
        let files = DurableFile.list("/proc/\(process.pid)/fd").map {
            DurableFile.resolve("/proc/\(process.pid)/fd/\($0)", in: "/")
        }
        #expect(Set(files).isSubset(of: ["/dev/null", log, "\(own)/gate", script]), "\(files)")
    }

    /// Whoever starts a helper and ends takes it along, confined or not.
    @Test(arguments: [false, true])
    func aBoundProcessEndsWithItsParent(_ isConfined: Bool) async throws {
        let directory = try BoundProcess.makeDirectory()
        var confinement: Confinement?
        if isConfined {
            confinement = Confinement(Confinement.common + (try ProgramFiles("sleep", withData: false)).rules)
        }
        let started = Guarded<Result<BoundProcess, any Error>?>(nil)
        let body: @Sendable () -> Void = { [confinement] in
            let result = Result { try BoundProcess(["sleep", "100"], directory: directory, confinement: confinement) }
            started.withLock { $0 = result }
        }
        let box = Unmanaged.passRetained(Box(body))
        var thread = pthread_t()
        // The child's life hangs on the thread that started it.
        let made = pthread_create(
            &thread,
            nil,
            {
                Unmanaged<Box>.fromOpaque($0!).takeRetainedValue().body(); return nil
            },
            box.toOpaque()
        )
        #expect(made == 0)
        pthread_join(thread, nil)
        let process = try #require(try started.withLock { try $0?.get() })
        try await eventually("the child has ended") { process.hasEnded() }
        #expect(process.exitCode() == 128 + SIGTERM)
        process.clear()
    }

    private final class Box: Sendable {
        let body: @Sendable () -> Void
        init(_ body: @escaping @Sendable () -> Void) { self.body = body }
    }

    @Test(.enabled(if: geteuid() == 0, "only root can give files away"))
    func aUserIsTakenAgainOnlyWhenNothingOfItIsLeft() throws {
        let lab = try TestDirectory()
        let guests = lab.directory("guests")
        let first: UInt32 = 1_899_000_000
        let users = GuestUsers(first...first + 2, file: lab.file("users"), places: [guests])
        #expect(try users.take() == first)
        try DurableFile.makeDirectory("\(guests)/web1")
        try DurableFile.write([1], to: "\(guests)/web1/disk")
        #expect(chown("\(guests)/web1/disk", first + 1, first + 1) == 0)
        // Also by an agent that comes later.
        let later = GuestUsers(first...first + 2, file: lab.file("users"), places: [guests])
        #expect(try later.take() == first + 2)
        #expect(try later.take() == first)
        #expect(try later.take() == first + 2)
        DurableFile.remove("\(guests)/web1")
        #expect(try later.take() == first)
        #expect(try later.take() == first + 1)
    }

    @Test(.enabled(if: geteuid() == 0, "only root can give files away"))
    func aDeviceStaysItsOwnersAndOnlyTheLastGuestsUserMayUseIt() throws {
        let lab = try TestDirectory()
        let device = lab.file("device")
        // No device has this number: nothing is opened.
        #expect(mknod(device, S_IFBLK | 0o640, dev_t(0xfff << 8 | 0xff)) == 0)
        #expect(symlink(device, lab.file("disk")) == 0)
        let first: UInt32 = 1_899_000_021
        func status() -> (owner: UInt32, group: UInt32, mode: UInt32) {
            var status = stat()
            #expect(stat(device, &status) == 0)
            return (status.st_uid, status.st_gid, status.st_mode & 0o777)
        }
        for user in [first, first + 1] {
            try HandOver.give(lab.file("disk"), to: user)
            #expect(GuestDevice.users(of: device) == [user])
            #expect(status().owner == 0 && status().group == 0)
        }
        let users = GuestUsers(first...first + 2, file: lab.file("users"), places: [lab.path])
        #expect(try users.take() == first && users.take() == first + 2 && users.take() == first)
        GuestDevice.withdraw(device)
        #expect(GuestDevice.users(of: device) == [])
        #expect(status() == (0, 0, 0o640))
        // A link that somebody else has made means nothing.
        #expect(lchown(lab.file("disk"), first, first) == 0)
        #expect(GuestDevice.path(of: lab.file("disk")) == nil && GuestDevice.path(of: device) == device)
    }

    @Test(.enabled(if: geteuid() == 0, "only root can give files away"))
    func onlyWhatIsTheAgentsOwnIsGivenToAGuest() throws {
        let lab = try TestDirectory()
        let own = lab.directory("own")
        let user: UInt32 = 1_899_000_007
        let outside = lab.file("outside")
        for path in [outside, "\(own)/image"] { try DurableFile.write([1], to: path) }
        #expect(symlink(outside, "\(own)/link") == 0 && link(outside, "\(own)/second-name") == 0)
        try HandOver.give(own, to: user)
        func owner(_ path: String) -> UInt32 {
            var status = stat()
            return lstat(path, &status) == 0 ? status.st_uid : .max
        }
        #expect(owner(own) == user && owner("\(own)/image") == user)
        #expect(owner(outside) == 0)
        #expect(HandOver.closedDirectory(above: "\(lab.directory("closed"))/x/y") == lab.file("closed"))
    }

    @Test func theFilesOfAProgramAreFoundFromIt() throws {
        let shell = try ProgramFiles("/bin/sh", withData: false)
        let paths = shell.rules.map(\.path)
        #expect(paths.contains("/bin/sh") && paths.contains { $0.contains("/ld-linux") }, "\(paths)")
        #expect(shell.rules.allSatisfy { !$0.rights.contains(.write) })
        // A script runs its interpreter, and the QEMU that it names.
        let lab = try TestDirectory()
        let script = lab.file("kvm")
        try DurableFile.write(
            Array("#!/bin/sh\nexec qemu-system-x86_64 -enable-kvm \"$@\"\n".utf8),
            to: script,
            mode: 0o755
        )
        let wrapped = try ProgramFiles(script, withData: true).rules
        let executable = wrapped.filter { $0.rights.contains(.execute) }.map(\.path)
        for name in [script, "/bin/sh"] { #expect(executable.contains(name), "\(executable)") }
        #expect(executable.contains { $0.hasSuffix("/qemu-system-x86_64") }, "\(executable)")
        #expect(ExecutableFile(script) == nil)
        #expect(throws: GuestError.self) { try ProgramFiles("no-such-program", withData: false) }
    }

    @Test func whatAStrangersCommandLineSaysOfItsOwnConfinementIsDropped() throws {
        let line = GuestCommandLine(
            arguments: [
                "qemu-system-x86_64", "-sandbox", "off", "-runas", "root", "-run-with", "async-teardown=on,user=root",
                "-run-with", "chroot=/", "-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages/x",
                "-mem-path", "/dev/hugepages", "-vnc", "127.0.0.1:1,to=3,websocket=on", "-m", "1G",
            ],
            directory: "/"
        )
        let confined = try line.confined { $0 + "/own" }
        #expect(
            confined.arguments == [
                "qemu-system-x86_64", "-run-with", "async-teardown=on", "-object",
                "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages/x/own", "-mem-path", "/dev/hugepages/own",
                "-vnc",
                "127.0.0.1:1,to=3,websocket=on", "-m", "1G",
            ]
        )
        #expect(try confined.listeningPorts() == [5901, 5902, 5903, 5701, 5702, 5703])
    }

    @Test func portsOfAllKindsAreFoundAndStrangersNumbersDoNotTrap() throws {
        func ports(_ arguments: String...) throws -> Set<UInt16> {
            try GuestCommandLine(arguments: ["qemu-system-x86_64"] + arguments, directory: "/").listeningPorts()
        }
        #expect(try ports("-serial", "tcp:127.0.0.1:4000,server=on,wait=off") == [4000])
        #expect(try ports("-serial", "telnet::4001,server=on,to=4003") == [4001, 4002, 4003])
        #expect(try ports("-chardev", "socket,id=c,host=::1,port=4010,server=on") == [4010])
        #expect(try ports("-netdev", "user,id=n,hostfwd=tcp::4020-:22") == [4020])
        #expect(try ports("-netdev", "socket,id=n,listen=:4030") == [4030])
        #expect(try ports("-spice", "port=4040,tls-port=4041,addr=127.0.0.1") == [4040, 4041])
        for text in [":99999999999999999999", ":-1", ":0,to=99999999999", ":59999,to=99", ":"] {
            _ = try ports("-vnc", text)
        }
        for text in ["tcp:", "tcp::", "tcp:1234,server=on", "tcp::70000,server=on", "tcp::9,server=on,to=-5"] {
            _ = try ports("-serial", text)
        }
    }
}
