import FoundationEssentials
import Glibc
import IO
import TestSupport

/// Hosts of a fleet on this machine: each has its own files below /etc, /var/lib and /root, its own name, and its own network, on a switch
/// that they share with nobody else. Needs root. Everything ends with the lab.
final class FleetLab: @unchecked Sendable {
    // Unchecked: each test uses its lab from one task.
    let directory: TestDirectory
    private let network: ChildProcess
    private(set) var hosts: [String: Host] = [:]

    /// One of them.
    final class Host: @unchecked Sendable {
        // Unchecked: as its lab.
        let name: String
        let address: String
        fileprivate let holder: ChildProcess
        fileprivate var server: ChildProcess?
        fileprivate var agent: ChildProcess?

        fileprivate init(name: String, address: String, holder: ChildProcess) {
            self.name = name
            self.address = address
            self.holder = holder
        }

        /// A command line that runs in it.
        func command(_ words: [String]) -> [String] {
            ["nsenter", "-t", "\(holder.pid)", "-n", "-m", "-u", "--"] + words
        }

        func run(_ words: [String], seconds: Int = 60) async throws -> ToolResult {
            try await Tool.run(command(words), seconds: seconds)
        }

        func shell(_ text: String) async throws -> ToolResult { try await run(["sh", "-c", text]) }

        /// What a file of it says; empty when it is not there.
        func text(_ path: String) -> String {
            let bytes = (try? DurableFile.read("/proc/\(holder.pid)/root\(path)")) ?? nil
            return String(decoding: bytes ?? [], as: UTF8.self)
        }

        func has(_ path: String) -> Bool { DurableFile.exists("/proc/\(holder.pid)/root\(path)") }
    }

    /// Makes hosts by their names.
    init(_ names: [String] = ["host-a", "host-b"]) async throws {
        directory = try TestDirectory()
        let network = try ChildProcess([
            "unshare", "-n", "sh", "-c",
            "ip link add switch type bridge && ip link set switch up && echo up && exec sleep infinity",
        ])
        self.network = network
        try await network.wait(for: "a network") { network.output.contains("up") }
        let path = directory.path
        for key in ["operator", "stranger"] {
            let made = try await Tool.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "\(path)/\(key)"])
            guard made.code == 0 else { throw TestFailure("ssh-keygen: \(made.all)") }
        }
        for (index, name) in names.enumerated() {
            let holder = try ChildProcess([
                "unshare", "-n", "-m", "-u", "sh", "-c",
                """
                set -e; own=\(path)/\(name); mkdir $own; mount -t tmpfs none $own
                for part in etc var/lib root; do
                    mkdir -p $own/$part.upper $own/$part.work
                    mount -t overlay -o lowerdir=/$part,upperdir=$own/$part.upper,workdir=$own/$part.work none /$part
                done
                rm -rf /etc/pki /etc/crossdock /var/lib/crossdock /root/.ssh; mkdir -m 700 /root/.ssh
                hostname \(name); ip link set lo up; echo up; exec sleep infinity
                """.replacing("$part.upper", with: "$(echo $part | tr / -).upper")
                    .replacing("$part.work", with: "$(echo $part | tr / -).work"),
            ])
            try await holder.wait(for: "host \(name)") { holder.output.contains("up") }
            let host = Host(name: name, address: "10.95.0.\(index + 1)", holder: holder)
            let linked = try await Tool.run([
                "nsenter", "-t", "\(network.pid)", "-n", "--", "sh", "-c",
                "ip link add port\(index) type veth peer name eth0 netns \(holder.pid) && ip link set port\(index) master switch up",
            ])
            let addressed = try await host.shell("ip address add \(host.address)/24 dev eth0 && ip link set eth0 up")
            guard linked.code == 0, addressed.code == 0 else { throw TestFailure(linked.all + addressed.all) }
            hosts[name] = host
        }
    }

    deinit {
        for host in hosts.values {
            host.agent?.signal(SIGKILL)
            host.server?.signal(SIGKILL)
        }
    }

    subscript(name: String) -> Host { hosts[name]! }

    /// Starts an sshd on a host, which lets in who has the operator's key.
    func serve(_ name: String, password: String? = nil, path search: String? = nil, more: String = "") async throws {
        let host = self[name]
        let path = directory.path
        mkdir("/run/sshd", 0o755)
        let key = "\(path)/\(name).key"
        if !DurableFile.exists(key) {
            let made = try await Tool.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
            guard made.code == 0 else { throw TestFailure("ssh-keygen: \(made.all)") }
        }
        if let password {
            let set = try await host.shell("echo 'root:\(password)' | chpasswd")
            guard set.code == 0 else { throw TestFailure("chpasswd: \(set.all)") }
        }
        let tools = Tool.crossdock.split(separator: "/").dropLast().reduce("") { "\($0)/\($1)" }
        let configuration = """
            ListenAddress \(host.address)
            HostKey \(key)
            AuthorizedKeysFile \(path)/operator.pub
            PidFile none
            StrictModes no
            UsePAM no
            PasswordAuthentication \(password == nil ? "no" : "yes")
            KbdInteractiveAuthentication no
            PermitRootLogin yes
            AllowTcpForwarding yes
            \(more)
            SetEnv PATH=\(search ?? "\(tools):/usr/sbin:/usr/bin:/sbin:/bin")
            """
        try configuration.write(toFile: "\(path)/\(name).sshd", atomically: true, encoding: .utf8)
        host.server?.signal(SIGKILL)
        _ = try await host.server?.finish()
        let server = try ChildProcess(host.command(["/usr/sbin/sshd", "-D", "-e", "-f", "\(path)/\(name).sshd"]))
        host.server = server
        try await server.wait(for: "sshd") { server.errors.contains("Server listening") }
    }

    func stopServing(_ name: String) async throws {
        self[name].server?.signal(SIGKILL)
        _ = try await self[name].server?.finish()
        self[name].server = nil
    }

    /// Notes the keys of hosts where the operator of a host has theirs.
    func know(_ names: [String], on host: String) async throws {
        for name in names {
            let key = try String(contentsOfFile: "\(directory.path)/\(name).key.pub", encoding: .utf8)
            let noted = try await self[host].shell(
                "echo '\(self[name].address) \(key.split(separator: "\n")[0])' >>/root/.ssh/known_hosts"
            )
            guard noted.code == 0 else { throw TestFailure(noted.all) }
        }
    }

    /// Writes a file of a host.
    func write(_ text: String, to path: String, on host: String) async throws {
        let source = directory.file("text")
        try DurableFile.write(Array(text.utf8), to: source)
        let done = try await self[host].run(["cp", source, path])
        guard done.code == 0 else { throw TestFailure(done.all) }
    }

    /// Starts a destination agent, as the service would.
    func startAgent(_ name: String) async throws {
        let host = self[name]
        let agent = try ChildProcess(
            host.command([
                Tool.crossdock, "destination", "--listen", "\(host.address):10808", "--nbd-listen",
                "\(host.address):10809",
                "--guest-network", "host",
            ])
        )
        host.agent = agent
        try await agent.wait(for: "a destination agent") { agent.output.contains("listening on") }
    }

    func agentErrors(_ name: String) -> String { self[name].agent?.errors ?? "" }

    /// The environment in which every question has this answer; what was asked is left in the file `question`.
    func answering(_ answer: String) throws -> [String] {
        let path = self.directory.file("answer-\(answer.count)")
        let script = "#!/bin/sh\nprintf '%s' \"$1\" >\(directory.file("question"))\necho '\(answer)'\n"
        try DurableFile.write(Array(script.utf8), to: path, mode: 0o700)
        return ["SSH_ASKPASS=\(path)", "SSH_ASKPASS_REQUIRE=force"]
    }

    /// Gives a host the certificate that the authority of host-a would have issued eleven months ago.
    func age(_ name: String) async throws {
        let host = self[name]
        let script = """
            set -e; cd /etc/pki/crossdock
            openssl req -new -key server-key.pem -subj /CN=\(name) -out /tmp/xd-renew-$$.csr
            printf 'subjectAltName=DNS:\(name),IP:\(host.address)\\nextendedKeyUsage=serverAuth,clientAuth\\nkeyUsage=digitalSignature\\n' >/tmp/xd-renew-$$.ext
            openssl x509 -req -in /tmp/xd-renew-$$.csr -CA \(directory.file("ca"))/ca-cert.pem -CAkey \(directory.file("ca"))/ca-key.pem \
                -CAcreateserial -days 9 -extfile /tmp/xd-renew-$$.ext -out server-cert.pem 2>/dev/null
            cp server-cert.pem client-cert.pem; rm -f /tmp/xd-renew-$$.*
            """
        let copied = try await self["host-a"].shell("cp -rT /etc/pki/crossdock-ca \(directory.file("ca"))")
        let old = try await host.shell(script)
        guard copied.code == 0, old.code == 0 else { throw TestFailure(copied.all + old.all) }
    }

    /// Runs `crossdock pair` on a host, with the operator's key.
    func pair(
        on host: String,
        _ words: [String],
        key: String = "operator",
        environment: [String] = []
    ) async throws -> ToolResult {
        try await self[host].run(
            ["env"] + environment + ["setsid", "-w", Tool.crossdock, "pair", "--identity", directory.file(key)] + words,
            seconds: 120
        )
    }
}
