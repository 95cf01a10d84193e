import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

/// The objects of running agents, who may migrate to whom, and the commands around them.
@Suite(.timeLimit(.minutes(9)))
struct SecurityTests {
    func object(_ lab: Lab, _ arguments: [String]) async throws -> ToolResult {
        try await lab.crossdock(["object"] + arguments + ["--state-dir", lab.state("b")])
    }

    @Test func onlySourcesThatTheAuthorisationAllowsMigrateAndItChangesWhileTheAgentRuns() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 2)])
        try await lab.startDestination(more: [
            "--object", "authz-simple,id=sources,identity=CN=somebody-else", "--tls-authz", "sources",
        ])
        let denied = try await lab.migrate()
        #expect(denied.code == MigrationError.Code.refused.rawValue, "\(denied.all)")
        #expect(denied.errors.contains("does not let 'CN=host' migrate guests to it"), "\(denied.all)")
        #expect(lab.destination?.errors.contains("TLS authz check for CN=host is denied") == true)

        let listed = try await object(lab, ["list"])
        #expect(listed.output.contains("sources  authz-simple"), "\(listed.all)")
        #expect(listed.output.contains("the destination agent"))
        #expect(try await object(lab, ["remove", "tls0"]).errors.contains("is in use, can not be deleted"))
        // Without its object everybody is denied.
        #expect(try await object(lab, ["remove", "sources"]).code == 0)
        #expect(try await lab.migrate().code == MigrationError.Code.refused.rawValue)
        #expect(lab.destination?.errors.contains("Cannot find QAuthZ object ID sources") == true)
        let rules = "authz-list,id=sources,rules.0.match=DNS:local*,rules.0.format=glob,rules.0.policy=allow"
        #expect(try await object(lab, ["add", rules]).code == 0)
        #expect(try await object(lab, ["add", rules]).errors.contains("attempt to add duplicate object 'sources'"))
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
    }

    @Test func credentialsAreReloadedOnSIGHUPAndOnRequestAndBadOnesAreNot() async throws {
        let lab = try Lab()
        let directory = try lab.pki.issue("agent", hosts: ["localhost"])
        try await lab.startDestination(credentials: lab.credentials(directory))
        let agent = try #require(lab.destination)
        func expectName(_ name: String) async throws {
            let shown = try await Tool.run([
                "sh", "-c",
                "gnutls-cli --x509cafile \(lab.pki.directory)/ca-cert.pem --x509certfile \(lab.pki.directory)/client-cert.pem "
                    + "--x509keyfile \(lab.pki.directory)/client-key.pem -p \(lab.controlPort) localhost </dev/null",
            ])
            #expect(shown.output.contains("subject `CN=\(name)'"), "\(shown.all)")
        }
        try await expectName("agent")
        let renewed = try lab.pki.issue("renewed", hosts: ["localhost"])
        let script = "cp \(renewed)/server-*.pem \(directory)/"
        #expect(try await Tool.run(["sh", "-c", script]).code == 0)
        agent.signal(SIGHUP)
        try await agent.wait(for: "the reload") { agent.errors.contains("reloaded 'tls0'") }
        try await expectName("renewed")
        let other = try TestPKI()
        #expect(try await Tool.run(["cp", "\(other.directory)/server-cert.pem", directory]).code == 0)
        let failed = try await object(lab, ["reload"])
        #expect(failed.code != 0)
        #expect(failed.errors.contains("the credentials loaded before stay in use"), "\(failed.all)")
        #expect(failed.errors.contains("\(directory)/server-cert.pem"))
        try await expectName("renewed")
        #expect(try await Tool.run(["sh", "-c", script]).code == 0)
        #expect(try await object(lab, ["reload", "tls0"]).output == "Reloaded tls0.\n")
    }

    /// QMP, as QEMU's own clients speak it.
    @Test func theControlSocketSpeaksQMPAndBelongsToItsOwner() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let path = "\(lab.state("b"))/control.sock"
        var status = stat()
        #expect(stat(path, &status) == 0 && status.st_mode & 0o777 == 0o600)
        try await onLoop { loop in
            let channel = try await SocketChannel.connect(to: .unix(path: path), on: loop)
            let lines = [
                #"{"execute":"qom-list"}"#, #"{"execute":"qmp_capabilities","id":1}"#, #"{"execute":"query-commands"}"#,
                #"{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":"hunter2"},"id":2}"#,
                #"{"execute":"object-add","arguments":{"qom-type":"secret","id":"t","fd":5},"id":3}"#,
                #"{"execute":"object-del","arguments":{"id":"s"},"id":4}"#, #"{"execute":"quit"}"#, "{nonsense",
                #"{"execute":"object-add","arguments":{"qom-type":"secret","id":1.5},"id":5}"#,
            ]
            try await channel.write(Array((lines.joined(separator: "\n") + "\n").utf8))
            try await channel.finishWriting()
            var bytes: [UInt8] = []
            let buffer = IOBuffer(capacity: 4096)
            while true {
                let count = try await channel.readSome(into: buffer.mutable(0..<4096))
                if count == 0 { break }
                bytes += buffer.bytes(0..<count)
            }
            let answers = String(decoding: bytes, as: UTF8.self).split(separator: "\r\n")
            #expect(answers.count == 10, "\(answers)")
            guard answers.count == 10 else { return }
            #expect(answers[0].contains("\"QMP\""))
            #expect(answers[1].contains("Expecting capabilities negotiation"))
            #expect(answers[2] == #"{"id":1,"return":{}}"#)
            #expect(answers[3].contains("object-reload"))
            #expect(answers[4] == #"{"id":2,"return":{}}"#)
            #expect(answers[5].contains("a running agent inherits nothing"))
            #expect(answers[6] == #"{"id":4,"return":{}}"#)
            #expect(answers[7].contains("CommandNotFound"))
            #expect(answers[8].contains("GenericError"))
            #expect(answers[9].contains("\"id\":5") && answers[9].contains("error"))
        }
        #expect(lab.destination.map { $0.output + $0.errors }?.contains("hunter2") == false)
    }

    /// As systemd starts a service whose sockets it opened.
    @Test func anAgentTakesTheSocketsThatItsSupervisorOpened() async throws {
        let lab = try Lab()
        let script = """
            import os, socket, sys
            sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
            print("ports", *(s.getsockname()[1] for s in sockets), flush=True)
            kept = [os.dup(s.fileno()) for s in sockets]
            for number, fd in enumerate(kept):
                os.dup2(fd, 3 + number, inheritable=True)
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="nbd:control")
            os.execv(sys.argv[1], sys.argv[1:])
            """
        let agent = try ChildProcess(
            ["python3", "-c", script, Tool.crossdock, "destination", "--state-dir", lab.state("b")] + lab.credentials()
                + ["--guest-network", "host"]
        )
        try await agent.wait(for: "the agent") { agent.output.contains("listening on") }
        let ports = agent.output.split(separator: "\n")[0].split(separator: " ").dropFirst()
        #expect(
            agent.output.contains("listening on 127.0.0.1:\(ports.last!), NBD port \(ports.first!)"),
            "\(agent.output)"
        )
        let info = try await Tool.run([
            "nbdinfo", "--list",
            "nbds://localhost:\(ports.first!)/?tls-certificates=\(lab.pki.directory)",
        ])
        #expect(info.code == 0, "\(info.all)")
        agent.signal(SIGTERM)
        _ = try await agent.finish()
    }

    @Test(arguments: [
        ("tls-creds-anon,id=t", "do not verify who connects"),
        ("tls-creds-x509,id=t,dir=DIR,verify-peer=off", "do not verify"),
        ("tls-creds-x509,id=t,dir=/nowhere", "Unable to access credentials /nowhere/ca-cert.pem"),
        ("secret,id=t,data=hunter2", "in clear"), ("tls-creds-x509,id=t", "Missing 'dir' property"),
        ("tls-creds-x509,id=t,dir=DIR,endpoint=client", "Expected TLS credentials for a server endpoint"),
    ])
    func anAgentThatCouldNotTellFriendFromFoeDoesNotStart(_ object: String, _ words: String) async throws {
        let lab = try Lab()
        let result = try await lab.crossdock([
            "destination", "--state-dir", lab.state("b"), "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0",
            "--object", object.replacing("DIR", with: lab.pki.directory), "--tls-creds", "t",
        ])
        #expect(result.code == 12)
        #expect(result.errors.contains(words), "\(result.all)")
        #expect(!result.all.contains("hunter2"))
    }

    @Test func objectsOfAnAgentThatDoesNotRunCannotBeReached() async throws {
        let lab = try Lab()
        let result = try await lab.crossdock(["object", "list", "--state-dir", lab.state("b")])
        #expect(result.code == 11 && result.errors.contains("no running destination agent"), "\(result.all)")
    }

    @Test func pkiCheckPrintsATableAndFailsWhenLoadingWould() async throws {
        let directory = try TestDirectory()
        let script = """
            set -e
            \(Tool.crossdock) pki init \(directory.path)/ca
            \(Tool.crossdock) pki issue \(directory.path)/ca \(directory.path)/host host-a 192.0.2.7
            """
        #expect(try await Tool.run(["sh", "-c", script]).code == 0)
        let host = directory.file("host")
        let good = try await Tool.run([Tool.crossdock, "pki", "check", host])
        #expect(good.code == 0)
        for words in ["FILE", "ca-cert.pem", "server-cert.pem", "CN=host-a", "DNS:host-a IP:192.0.2.7", "ok"] {
            #expect(good.output.contains(words), "\(good.all)")
        }
        var status = stat()
        #expect(stat("\(host)/server-key.pem", &status) == 0 && status.st_mode & 0o777 == 0o600)
        // What was made is readable by the others.
        for file in ["server", "client"] {
            let openssl = try await Tool.run([
                "openssl", "verify", "-CAfile", "\(host)/ca-cert.pem", "-purpose", "ssl\(file)",
                "\(host)/\(file)-cert.pem",
            ])
            #expect(openssl.code == 0, "\(openssl.all)")
            let certtool = try await Tool.run([
                "certtool", "--verify", "--load-ca-certificate", "\(host)/ca-cert.pem", "--infile",
                "\(host)/\(file)-cert.pem",
            ])
            #expect(certtool.output.contains("Verified"), "\(certtool.all)")
        }
        chmod("\(host)/client-key.pem", 0o644)
        let warned = try await Tool.run([Tool.crossdock, "pki", "check", host])
        #expect(warned.code == 0)
        #expect(warned.output.contains("warning: permissions: \(host)/client-key.pem"))
        unlink("\(host)/server-key.pem")
        let bad = try await Tool.run([Tool.crossdock, "pki", "check", host, "--json"])
        #expect(bad.code == 12)
        #expect(bad.output.contains("\"good\":false") && bad.output.contains("without corresponding key"), "\(bad.all)")
    }
}
