import Emulator
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// `crossdock console` in a real terminal.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct ConsoleEndToEnd {
    /// Runs the command in a terminal of its own, types what it is told once something is on the screen, and says how the terminal was left.
    private static let terminal = #"""
        import os, pty, select, sys, termios, time
        steps, command = eval(sys.argv[1]), sys.argv[2:]
        master, slave = pty.openpty()
        before = termios.tcgetattr(slave)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for fd in (0, 1, 2): os.dup2(slave, fd)
            os.execvp(command[0], command)
        screen, end, code = b"", time.monotonic() + 120, None
        while time.monotonic() < end:
            if select.select([master], [], [], 0.05)[0]: screen += os.read(master, 65536)
            if steps and steps[0][0] in screen:
                screen = screen.split(steps[0][0], 1)[1]
                if isinstance(steps[0][1], int): os.kill(pid, steps[0][1])
                else: os.write(master, steps[0][1])
                steps = steps[1:]
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
        while select.select([master], [], [], 0)[0]: screen += os.read(master, 65536)
        print("steps left", len(steps), "code", code, "restored", termios.tcgetattr(slave) == before)
        print(screen[-2000:].decode(errors="replace"))
        """#

    private func console(_ lab: Lab, _ steps: String, _ more: [String] = []) async throws -> String {
        let result = try await Tool.run(
            ["python3", "-c", Self.terminal, steps, Lab.crossdock, "console", "web1", "--state-dir", lab.state("a")]
                + more,
            seconds: 200
        )
        return result.all
    }

    private func startGuest(
        _ lab: Lab,
        console: String = "serial0",
        workload: String = "xd.interval=100000",
        more: [String] = []
    ) async throws {
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        var command = lab.linuxCommand(disks: [disk], workload: workload)
        command.removeLast(2)
        command += more + ["-serial", "unix:\(lab.directory.file("serial.sock")),server=on,wait=off"]
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + command
        )
        #expect(started.code == 0, "\(started.all)")
        let set = try await lab.crossdock(["guest", "set", "web1", "--console", console, "--state-dir", lab.state("a")])
        #expect(set.code == 0 && set.output.contains("console \(console)"), "\(set.all)")
    }

    @Test func aTerminalIsTheGuestsAndIsGivenBack() async throws {
        let lab = try Lab()
        let none = try await lab.crossdock(["console", "web1", "--state-dir", lab.state("a")])
        #expect(none.code == 11 && none.all.contains("There is no running destination agent"), "\(none.all)")
        // Without --web.
        try await lab.startDestination("a")
        let unknown = try await lab.crossdock(["console", "web1", "--state-dir", lab.state("a")])
        #expect(unknown.code == 10 && unknown.all.contains("This host has no guest 'web1'"), "\(unknown.all)")
        try await startGuest(lab)
        let wrong = try await lab.crossdock([
            "guest", "set", "web1", "--console", "serial1", "--state-dir", lab.state("a"),
        ])
        #expect(wrong.code == 10 && wrong.all.contains("its command line names serial0 ("), "\(wrong.all)")

        let typed = try await console(lab, #"[(b"REC", b"~"), (b"~", b"more\x1d")]"#)
        #expect(typed.contains("steps left 0 code 0 restored True"), "\(typed)")
        #expect(typed.contains("left the console of guest 'web1'"), "\(typed)")
        let killed = try await console(lab, "[(b'REC', 15)]")
        #expect(killed.contains("steps left 0 code 143 restored True"), "\(killed)")
        let shown = try await lab.crossdock(["guest", "show", "web1", "--state-dir", lab.state("a")])
        #expect(shown.output.contains("console    serial0: held by the destination agent, 0 readers"), "\(shown.all)")

        // An agent that ends and comes back is waited for, and nothing is lost that it has kept.
        let reader = try ChildProcess([Lab.crossdock, "console", "web1", "--state-dir", lab.state("a"), "--view-only"])
        try await reader.wait(for: "records") { reader.output.contains("REC") }
        try await lab.replaceDestination("a")
        try await reader.wait(for: "the agent") { reader.errors.contains("the agent is back") }
        let before = reader.output.utf8.count
        try await reader.wait(for: "more records") { reader.output.utf8.count > before + 200 }

        let back = try await lab.crossdock(["guest", "set", "web1", "--console", "none", "--state-dir", lab.state("a")])
        #expect(back.code == 0, "\(back.all)")
        let ended = try await reader.finish()
        #expect(ended.code == 11 && ended.errors.contains("the agent holds this console no more"), "\(ended.errors)")
        // Others can have the socket again.
        let path = lab.directory.file("serial.sock")
        let loop = lab.loop
        try await loop.run {
            let socket = try await SocketChannel.connect(to: .unix(path: path), on: loop)
            defer { socket.close() }
            let bytes = try await socket.withDeadline(.seconds(60), for: "the guest's words") {
                try await socket.read(exactly: 20)
            }
            #expect(bytes.count == 20)
        }
    }

    @Test func itGoesOnWhereTheGuestHasGone() async throws {
        let lab = try Lab()
        try await lab.startDestination("a")
        try await lab.startDestination("b")
        try await startGuest(lab)
        let reader = try ChildProcess([Lab.crossdock, "console", "web1", "--state-dir", lab.state("a")])
        try await reader.wait(for: "records") { reader.output.contains("REC") }
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        try await reader.wait(for: "where it is") { reader.errors.contains("The guest has moved to localhost") }
        let shown = try await lab.crossdock(["guest", "show", "web1", "--state-dir", lab.state("a")])
        #expect(shown.output.contains("console    serial0: passed on by localhost, 1 reader"), "\(shown.all)")
        let before = reader.output.utf8.count
        try await reader.wait(for: "records of the other host") { reader.output.utf8.count > before + 500 }
        // What it wrote last on its former host has come along, at the same offsets, and what it writes here follows.
        let there = try ChildProcess([Lab.crossdock, "console", "web1", "--state-dir", lab.state("b"), "--from", "0"])
        try await there.wait(for: "records on the other host") { there.output.utf8.count > before + 500 }
        let (here, now) = (Array(reader.output.utf8), Array(there.output.utf8))
        let common = zip(here, now).prefix { $0 == $1 }.count
        #expect(before < 64 << 10 && common == min(here.count, now.count), "the first \(common) bytes are the same")
        // An agent that was started anew goes on with what its file says.
        try await lab.replaceDestination("a")
        try await reader.wait(for: "the agent") { reader.errors.contains("the agent is back") }
        let again = reader.output.utf8.count
        try await reader.wait(for: "records through the new agent") { reader.output.utf8.count > again + 500 }
        #expect(!reader.errors.contains("left out") && !reader.errors.contains("new record"), "\(reader.errors)")
        #expect(Self.isWhole(reader.output), "\(reader.output.suffix(2000))")
        // Nobody is led to a host that does not give the console: the one that has it is ended.
        lab.stopDestination("b")
        try await reader.wait(for: "why") { reader.errors.contains("trying again") }
        let left = try await lab.crossdock(["guest", "show", "web1", "--state-dir", lab.state("a")])
        #expect(left.output.contains("console    serial0: with the guest on localhost"), "\(left.all)")
        let ended = try await reader.finish(seconds: 100)
        #expect(ended.code == 0 && ended.errors.contains("guest 'web1' has moved to localhost"), "\(ended.errors)")
    }

    /// The agent of the migration and its watchdog are dead and the guest is paused: nobody but the journal knows what is true.
    @Test func whoLooksIsToldThatTheGuestStandsStillAndWhatMendsThat() async throws {
        let lab = try Lab()
        for host in ["a", "b"] { try await lab.startDestination(host) }
        let socket = lab.directory.file("vnc.sock")
        try await startGuest(lab, more: ["-vga", "std", "-vnc", "unix:\(socket)"])
        let reader = try ChildProcess([Lab.crossdock, "console", "web1", "--state-dir", lab.state("a")])
        let relay = try ChildProcess([
            Lab.crossdock, "console", "web1", "--vnc", "--listen", "unix:\(lab.directory.file("viewer.sock"))",
            "--state-dir", lab.state("a"),
        ])
        try await relay.wait(for: "an address") { relay.output.contains("; Ctrl-C ends this") }
        try await reader.wait(for: "records") { reader.output.contains("REC") }
        let (loop, path) = (lab.loop, lab.directory.file("viewer.sock"))
        let viewer = try await loop.run {
            try await DisplayClient.shakeHands(try await SocketChannel.connect(to: .unix(path: path), on: loop))
        }
        let migration = try lab.beginMigration(more: ["--bandwidth", "200000"])
        try await migration.wait(for: "the copy") { migration.output.contains("copying disks") }
        for process in Lab.processes(containing: "source-watchdog") where process.line.contains(lab.state("a")) {
            kill(process.pid, SIGKILL)
        }
        try lab.sourceAgent().signal(SIGKILL)
        _ = try await migration.finish(seconds: 60)
        try await lab.monitor("a") { _ = try await $0.execute("stop") }
        let id = try #require(DurableFile.list("\(lab.state("a"))/migrations").first)
        for child in [reader, relay] {
            try await child.wait(for: "why it stands still") { child.errors.contains("stands still ('") }
            #expect(child.errors.contains("'crossdock recover \(id)' on "), "\(child.errors)")
        }
        // Who comes now is told as well.
        let late = try ChildProcess([Lab.crossdock, "console", "web1", "--view-only", "--state-dir", lab.state("a")])
        try await late.wait(for: "why it stands still") { late.errors.contains("stands still ('") }
        let recovered = try await lab.crossdock(["recover", id, "--state-dir", lab.state("a")])
        #expect(recovered.code == 0, "\(recovered.all)")
        for child in [reader, relay, late] {
            try await child.wait(for: "that it goes on") { child.errors.contains("needs nobody any more") }
            child.signal(SIGTERM)
            _ = try await child.finish()
        }
        try await loop.run { viewer.close() }
    }

    /// Whether the numbers of the records follow each other.
    private static func isWhole(_ text: String) -> Bool {
        let numbers = text.utf8.split(separator: 10).dropLast().compactMap { line -> Int? in
            let words = line.split(separator: 32)
            guard words.count == 4, words[0].elementsEqual("REC".utf8) else { return nil }
            return Int(String(decoding: words[2], as: UTF8.self))
        }
        return numbers.count > 10 && zip(numbers, numbers.dropFirst()).allSatisfy { $1 == $0 + 1 }
    }

    @Test func itSaysWhereTheGuestHasGoneWhenThePreviousReleaseHasIt() async throws {
        let lab = try Lab()
        try await lab.startDestination("a")
        try await lab.startDestination("b", program: PreviousReleaseEndToEnd.program)
        try await startGuest(lab)
        let reader = try ChildProcess([Lab.crossdock, "console", "web1", "--state-dir", lab.state("a")])
        try await reader.wait(for: "records") { reader.output.contains("REC") }
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        let ended = try await reader.finish()
        #expect(ended.code == 0 && ended.errors.contains("guest 'web1' has moved to localhost"), "\(ended.errors)")
        #expect(try ConsoleDeparture.read("web1", stateDirectory: lab.state("a")) == nil)
    }
}
