"""The two hosts of a run: directories, addresses, agents, and what can be seen of them from outside."""
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time

import guest
import shim
from fault import Expectation
from forwarder import Link
from installation import Authority, Installation
from watch import Console, Watcher

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WRAPPER = """#!/bin/sh
# A guest's QEMU goes on from a saved state when the harness says so. The shim is not for it.
unset LD_PRELOAD XF_TABLE
{more}if [ -n "$XF_STATE" ]; then
    state=$XF_STATE
    unset XF_STATE
    exec {real} "$@" -incoming "exec:cat $state"
fi
exec {real} "$@"
"""


class LabFailed(Exception):
    """The harness could not set a scene up; says nothing about Crossdock."""


class Ended(LabFailed):
    """Whoever started the harness has ended it."""


class Spoiled(LabFailed):
    """QEMU has lost memory of the guest by itself: what happens then says nothing about Crossdock."""


class Site:
    """What all runs share. Everything is in one directory, which `close` removes."""

    def __init__(self, crossdock, files, patience, round_trip=0.0):
        self.ending, self.round_trip = threading.Event(), round_trip
        self.crossdock = os.path.abspath(crossdock)
        self.base = tempfile.mkdtemp(prefix="xf-", dir=os.environ.get("XF_BASE", "/tmp"))
        self.shim = shim.build("shim.c", os.path.join(self.base, "shim.so"), "-ldl")
        self.records = shim.build("records.c", os.path.join(self.base, "records.so"))
        full = shim.build("full.c", os.path.join(self.base, "full.so"), "-ldl")
        self.idle = shim.build_guest("idle.c", os.path.join(self.base, "idle"), guest.IDLE.slots)
        # Host b may have another QEMU than the system's, which host a has.
        self.tools = {"a": os.path.join(self.base, "bin-a"), "b": os.path.join(self.base, "bin-b")}
        emulator = shutil.which(guest.EMULATOR)
        other = f"{REPOSITORY}/deploy/qemu {guest.VERSIONS[1]} {emulator}" if guest.IS_MIXED else emulator
        for host, real in (("a", emulator), ("b", other)):
            os.makedirs(self.tools[host])
            wrapper = os.path.join(self.tools[host], guest.EMULATOR)
            with open(wrapper, "w") as file:
                # The images of the source can be full, see `Scene.fill_source`.
                more = f"export LD_PRELOAD={full} XF_FULL=${{XF_RUN}}full\n" if host == "a" else ""
                file.write(WRAPPER.replace("{real}", real).replace("{more}", more))
            os.chmod(wrapper, 0o755)
        # A copy: the program may be replaced while the matrix runs.
        copy = os.path.join(self.base, "crossdock")
        shutil.copy(self.crossdock, copy)
        self.crossdock = copy
        self.authority, self.other_authority = (Authority(copy, os.path.join(self.base, one)) for one in ("ca", "other-ca"))
        options = self.run([copy, "migrate", "--help"]) + self.run([copy, "destination", "--help"])
        self.patience = patience if "--patience" in options else None
        # No packet filter stays on this machine.
        self.network = ["--guest-network", "host"] if "--guest-network" in options else []
        saved = os.path.join(self.base, "saved")
        os.makedirs(saved)
        self.saved = guest.SavedGuest(saved, os.path.abspath(files))

    def run(self, command):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            raise LabFailed(f"{' '.join(command)}: {result.stdout}")
        return result.stdout

    def close(self):
        shutil.rmtree(self.base, ignore_errors=True)


class Pair:
    """Addresses and certificates for runs that follow each other; runs beside each other have pairs of their own."""

    def __init__(self, site, number):
        self.site = site
        for attempt in range(40):
            net = (os.getpid() + 7 * attempt + 2 * number) % 120 * 2
            self.addresses = {"a": f"127.94.{net}.2", "b": f"127.94.{net + 1}.2"}
            self.seen_as = f"127.94.{net + 1}.9"
            try:
                self.link = Link(self.seen_as, self.addresses["b"], delay=site.round_trip / 2)
                break
            except OSError:
                continue
        else:
            raise LabFailed("there is no free address for the link")
        self.pki = {}
        for name, hosts in (("a", [self.addresses["a"]]), ("b", [self.seen_as, self.addresses["b"]])):
            self.pki[name] = os.path.join(site.base, f"pki-{number}-{name}")
            site.authority.issue(self.pki[name], *hosts)
        self.pki["c"] = self.pki["a"]
        # Host b as somebody else's certificate authority knows it.
        self.pki["other"] = os.path.join(site.base, f"pki-{number}-other")
        site.other_authority.issue(self.pki["other"], self.seen_as, self.addresses["b"])

    def close(self):
        self.link.close()


class Process:
    """A process of a run, as /proc shows it."""

    def __init__(self, pid, words, host, role):
        self.pid, self.words, self.host, self.role = pid, words, host, role

    def signal(self, number):
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def __repr__(self):
        return f"{self.role} of host {self.host} ({self.pid})"


class Scene:
    """The world of one run: a guest on host a, an agent on host b, a link between them.

    A host c, with the certificate of host a, exists only in some.
    """

    def __init__(self, pair, directory, deadline, kind=guest.LINUX):
        self.pair, self.site, self.link = pair, pair.site, pair.link
        self.directory, self.deadline, self.kind = directory, deadline, kind
        self.expects = Expectation()
        self.point = None
        self.began = time.time()
        self.log = []
        self.installations = {}
        for name in ("a", "b", "c"):
            place = os.path.join(directory, name)
            self.installations[name] = Installation(self.site.crossdock, place, pair.pki[name], state="s")
            if name != "c":
                os.makedirs(os.path.join(place, "t"))
        self.table = shim.Table(os.path.join(directory, "table"))
        self.disk = os.path.join(directory, "a", "disk0.raw")
        self.images = self.installations["b"].images
        run = self.installations["b"].run_directory(guest.NAME)
        self.consoles = {
            "a": Console(os.path.join(directory, "a", "console")),
            "b": Console(os.path.join(run, "console")),
        }
        self.watchers = {
            "a": Watcher("a", os.path.join(directory, "a", "w.sock")),
            "b": Watcher("b", os.path.join(run, "w.sock")),
        }
        self.agent = None
        self.started = 0  # how often an agent has said where it listens
        self.wants_agent = False
        self.supervisor = None
        self.command = None
        self.mounts = []
        self.agent_credentials = None  # another directory than host b's
        self.agent_options = []
        self.is_over = False
        self.guard = None
        self.spoiled = ""
        self.observer = threading.Thread(target=self._observe, daemon=True)
        self.observer.start()

    def sleep(self, seconds):
        if self.site.ending.wait(seconds):
            raise Ended("the harness was ended")
        if self.spoiled:
            raise Spoiled(self.spoiled)

    def note(self, text):
        self.log.append((time.time(), text))

    def state(self, host):
        return self.installations[host].state

    def _observe(self):
        while not self.is_over:
            for console in self.consoles.values():
                console.look()
            self._guard_memory()
            time.sleep(0.01)

    def _guard_memory(self):
        """Compares the memory of both QEMUs before the guest goes on, when the source's has gone through it quickly.

        Under TCG, QEMU 7.2 does not notice a write to a page that was dirtied again before it was sent: when two passes
        follow each other at once and the second finds no page that the first did not, the writes after it are lost.
        """
        source = self.watchers["a"].current
        if self.guard is None:
            if source and source.passes_before_stop >= 3 and not source.is_running:
                # The last step before the guest runs there.
                path = f"guests/{guest.NAME}/qmp.sock"
                self.guard = self.table.add(shim.SEND, role="destination", path=path, text=b'"execute":"cont"')
        elif self.guard.state == shim.REACHED:
            lost = self._compare_memory()
            if lost:
                self.spoiled = f"QEMU lost {lost} pages of the guest's memory (TCG)"
            self.note("the memory cannot be compared" if lost is None else f"memory compared: {lost} pages differ")
            self.guard.go()

    def _compare_memory(self):
        """How many pages differ between the hosts; None when that cannot be seen.

        The source's QEMU is frozen and answers nobody, so the memory is read from outside.
        """
        memories = [self._memory_of(watcher.current) for watcher in self.watchers.values()]
        if None in memories:
            return None
        first, second = memories
        if first == second:
            return 0
        return sum(first[at : at + 4096] != second[at : at + 4096] for at in range(0, len(first), 4096))

    def _memory_of(self, emulator):
        """The guest's memory in a QEMU: the one mapping of that size; None when there is no such."""
        size = self.kind.memory << 20
        if emulator is None:
            return None
        try:
            with open(f"/proc/{emulator.process}/maps") as maps:
                found = []
                for line in maps:
                    first, last = (int(word, 16) for word in line.split()[0].split("-"))
                    if last - first == size:
                        found.append(first)
            if len(found) != 1:
                return None
            with open(f"/proc/{emulator.process}/mem", "rb") as memory:
                memory.seek(found[0])
                return memory.read(size)
        except OSError:
            return None

    # Programs.

    def environment(self, host, shimmed=True):
        environment = dict(os.environ)
        environment["PATH"] = self.site.tools["b" if host == "b" else "a"] + ":" + environment.get("PATH", "/usr/bin:/bin")
        environment["TMPDIR"] = os.path.join(self.directory, host, "t")
        environment["XF_RUN"] = f"{self.directory}/{host}/"
        if shimmed:
            environment["XF_TABLE"] = self.table.path
            environment["LD_PRELOAD"] = self.site.shim
        return environment

    def crossdock(self, host, *arguments, seconds=60, shimmed=False, state=None):
        """Runs a command to its end. Returns its code and what it said; 124 when it had to be ended."""
        command = [self.site.crossdock, *arguments]
        where = arguments.index("--") if "--" in arguments else len(arguments)
        command[1 + where : 1 + where] = ["--state-dir", self.state(host)]
        environment = self.environment(host, shimmed)
        if state:
            environment["XF_STATE"] = state
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                cwd=os.path.join(self.directory, host),
            )  # fmt: skip
            limit = time.monotonic() + seconds
            while (code := process.poll()) is None and time.monotonic() < limit and not self.site.ending.is_set():
                time.sleep(0.005)
            if code is None:
                process.kill()
                process.wait()
                code = 124
            output.seek(0)
            return code, output.read()

    def start_guest(self, options=(), arrange=None):
        """`arrange` changes something about the disk before QEMU opens it."""
        state = None
        if self.kind is guest.LINUX:
            guest.copy_sparse(self.site.saved.disk, self.disk)
            state = self.site.saved.state
        else:
            self.kind.make_disk(self.disk)
        if arrange:
            arrange(self)
        options = options(self) if callable(options) else options
        line = self.command_line(self.disk, self.consoles["a"].path, self.watchers["a"].path)
        code, words = self.crossdock("a", "guest", "start", guest.NAME, "--", *line, *options, state=state)
        if code != 0:
            raise LabFailed(f"the guest does not start: {words}")
        self.wait(20, "the guest's records", lambda: self.consoles["a"].size > 200 and self.watchers["a"].is_running)

    def command_line(self, disk, console, monitor):
        if self.kind is guest.LINUX:
            return guest.linux_command(self.site.saved.files, disk, console, monitor)
        return guest.idle_command(self.site.idle, disk, console, monitor)

    @property
    def saved_console(self):
        """What the guest had printed before it was started here."""
        return self.site.saved.console if self.kind is guest.LINUX else ""

    def fill_source(self):
        """From now on the source's QEMU has no room for what it writes to an image."""
        with open(os.path.join(self.directory, "a", "full"), "w"):
            pass

    def start_agent(self):
        """Starts the destination agent, and again whenever it ends, as systemd would."""
        self.wants_agent = True
        self._launch_agent()
        self.supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.supervisor.start()
        log = os.path.join(self.directory, "b", "agent.log")
        before = self.started
        self.wait(20, "the destination agent", lambda: open(log, "rb").read().count(b"NBD port") > before)
        self.started = open(log, "rb").read().count(b"NBD port")

    def _launch_agent(self):
        address = self.pair.addresses["b"]
        command = self.installations["b"].destination(address, *self.agent_options, *self.site.network, pki=self.agent_credentials)
        if self.site.patience is not None:
            command += ["--patience", f"{self.site.patience}s"]
        if guest.IS_MIXED:
            # Its QEMU is brought by a program that makes a namespace first.
            command += ["--no-confinement"]
        with open(os.path.join(self.directory, "b", "agent.log"), "ab") as output:
            self.agent = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment("b"),
                cwd=os.path.join(self.directory, "b"),
            )  # fmt: skip

    def stop_agent(self):
        """Kills the destination agent for good; `start_agent` starts another one."""
        self.wants_agent = False
        self.supervisor.join(10)
        self.agent.kill()
        self.agent.wait(10)

    def _supervise(self):
        while self.wants_agent:
            code = self.agent.poll()
            if code is not None:
                self.note(f"the destination agent ended with code {code}; it is started again")
                # systemd waits RestartSec, 100 ms.
                time.sleep(0.1)
                if self.wants_agent:
                    self._launch_agent()
            time.sleep(0.02)

    def migrate_command(self, host, *options, to=None):
        command = self.installations[host].migrate(guest.NAME, to or self.pair.seen_as, "--json")
        command += ["--blackout-deadline", str(self.deadline), "--downtime-limit", "300", "--connections", "2", *options]
        if self.site.patience is not None:
            command += ["--patience", f"{self.site.patience}s"]
        return command

    def start_migration(self):
        self.command = self._begin("a", self.migrate_command("a"))

    def _begin(self, host, command, log="migrate.log"):
        with open(os.path.join(self.directory, host, log), "ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment(host),
                cwd=os.path.join(self.directory, host),
            )  # fmt: skip

    def words(self, host="a"):
        """What `crossdock migrate` has said."""
        try:
            with open(os.path.join(self.directory, host, "migrate.log"), encoding="latin-1") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def receive_on_source(self):
        """Starts a destination agent on host a, which the harness does not look after."""
        command = self.installations["a"].destination(self.pair.addresses["a"], *self.site.network)
        agent = self._begin("a", command, "agent.log")
        log = os.path.join(self.directory, "a", "agent.log")
        self.wait(20, "host a's own agent", lambda: b"NBD port" in open(log, "rb").read())
        return agent

    def offer_from_elsewhere(self, seconds=4, to=None):
        """Host c offers a guest of the same name, which it takes back, if it is not refused, before the copy is over."""
        here = os.path.join(self.directory, "c")
        os.makedirs(os.path.join(here, "t"))
        disk, monitor = os.path.join(here, "disk0.raw"), os.path.join(here, "w.sock")
        guest.IDLE.make_disk(disk)
        line = guest.idle_command(self.site.idle, disk, os.path.join(here, "console"), monitor)
        code, words = self.crossdock("c", "guest", "start", guest.NAME, "--", *line)
        if code != 0:
            raise LabFailed(f"the guest of host c does not start: {words}")
        command = self._begin("c", self.migrate_command("c", "--bandwidth", "50000", to=to))
        limit = time.monotonic() + seconds
        while command.poll() is None and time.monotonic() < limit:
            self.sleep(0.05)
        if command.poll() is None:
            for agent in self.find("c", "source-agent"):
                agent.signal(signal.SIGINT)
        try:
            command.wait(20)
        except subprocess.TimeoutExpired:
            self.expects.found.append("the offer of a guest of the same name from elsewhere does not come to its end")
        self.note(f"the offer of host c ended with code {command.poll()}: {self.words('c')[-300:].strip()!r}")
        if command.poll() == 0:
            self.expects.found.append("a guest of the same name came from elsewhere")
        for one in self.find("c", "emulator", "source-agent", "source-watchdog", "migrate", "helper"):
            one.signal(signal.SIGKILL)
        command.wait(10)

    def mount_images(self, megabytes):
        """Gives the destination's images a small file system of their own."""
        os.makedirs(self.images)
        options = f"size={megabytes}m,mode=700"
        self.mount("-t", "tmpfs", "-o", options, "none", self.images)

    def mount(self, *words):
        subprocess.run(["mount", *words], check=True)
        self.mounts.append(words[-1])

    # What can be seen.

    def processes(self):
        """Every living process of this run but the harness's own."""
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().decode("latin-1").split("\0")
                if self.directory not in " ".join(words):
                    with open(f"/proc/{entry}/environ", "rb") as file:
                        mark = next((part for part in file.read().split(b"\0") if part.startswith(b"XF_RUN=")), b"")
                    if not mark.startswith(b"XF_RUN=" + self.directory.encode() + b"/"):
                        continue
                    words.append(mark.decode())
                with open(f"/proc/{entry}/stat", "rb") as file:
                    if file.read().rsplit(b")", 1)[1].split()[0] == b"Z":
                        continue
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            line = " ".join(words)
            # A guest on host b may use a file of host a that is the same.
            marks = {"/b/s/": "b", "/a/": "a", "/c/": "c"}
            host = next((name for mark, name in marks.items() if self.directory + mark in line), "b")
            if "crossdock-status" in line:
                role = "emulator"
            elif os.path.basename(words[0]).startswith("qemu-"):
                role = "helper"  # a blank copy, or a tool
            elif os.path.basename(words[0]) == "crossdock":
                role = words[1]
            else:
                role = os.path.basename(words[0])
            found.append(Process(int(entry), words, host, role))
        return found

    def find(self, host, *roles):
        return [one for one in self.processes() if one.host == host and one.role in roles]

    def source_agents(self):
        """The processes that still work at the source's part by themselves."""
        others = ("emulator", "helper", "migrate")
        return [one for one in self.processes() if one.host == "a" and one.role not in others]

    def migrations(self, host):
        directory = os.path.join(self.state(host), "migrations")
        return sorted(os.listdir(directory)) if os.path.isdir(directory) else []

    def journal(self, host):
        """The journal's text, for people."""
        parts = []
        for name in self.migrations(host):
            try:
                with open(os.path.join(self.state(host), "migrations", name, "journal"), encoding="latin-1") as file:
                    parts.append(file.read())
            except FileNotFoundError:
                pass
        return "".join(parts)

    def status(self, host):
        """The rows of `crossdock status` about the migrations of host a; None when it fails."""
        code, text = self.crossdock(host, "status", "--json", seconds=20)
        if code != 0 or not text.startswith("["):
            return None
        known = self.migrations("a")
        return [row for row in json.loads(text) if row["migration"] in known]

    def code(self):
        """The code in the report of the source agent that began the migration; 0 when it did not live to write one."""
        codes = [0]
        for name in self.migrations("a"):
            try:
                with open(os.path.join(self.state("a"), "migrations", name, "events.jsonl"), encoding="utf-8") as file:
                    events = [json.loads(line) for line in file if line.endswith("\n")]
            except FileNotFoundError:
                continue
            codes += [event["report"]["code"] for event in events if event["event"] == "finished"]
        return max(codes)

    def guests(self, host):
        code, text = self.crossdock(host, "guest", "list", "--json", seconds=20)
        if code != 0:
            return None
        return json.loads(text) if text.startswith("[") else []

    def alive(self, seconds=0.4):
        """The hosts on which the guest runs and writes records."""
        before = {name: console.size for name, console in self.consoles.items()}
        self.sleep(seconds)
        return [
            name for name, console in self.consoles.items()
            if console.size > before[name] and self.watchers[name].is_running
        ]  # fmt: skip

    def in_order(self):
        """The hosts on which the guest is in a state in which it may be, with nothing where it does not belong.

        A guest that stands still does not show by itself where it belongs.
        """
        running = self.alive()
        found = []
        for host, watcher in self.watchers.items():
            state = watcher.run_state()
            if state == "running" and host not in running or state not in self.expects.states:
                continue
            if not self.leftovers(host):
                found.append(host)
        return found

    def spans(self):
        """(host, from, to) of each time that a guest ran; `to` is None while it runs."""
        emulators = [one for watcher in self.watchers.values() for one in watcher.emulators]
        return [(one.host, *span) for one in emulators for span in one.running]

    def leftovers(self, home):
        """What is left of the guest and of the migration where it does not belong, a sentence each.

        `home` is the host that has the guest.
        """
        left = []
        for one in self.processes():
            if one.host == "c" or one.role == "migrate" or (one.role, one.host) == ("destination", "b"):
                continue
            if (one.role, one.host) == ("emulator", home):
                continue
            left.append(f"process: {one}")
        away = "b" if home == "a" else "a"
        left += [f"socket on host {name}: {path}" for name in ("a", "b") for path in self._sockets(name, home)]
        if away == "b":
            left += self._files_of_a_guest_that_did_not_come()
        else:
            left += self._files_of_a_guest_that_left()
        for name in self.migrations("b"):
            if os.path.exists(os.path.join(self.state("b"), "migrations", name, "incoming.json")):
                left.append(f"host b still has incoming.json of migration {name}")
        return left + self._parts_in_the_emulator(home)

    def _sockets(self, name, home):
        """Sockets that nobody should need any more."""
        allowed = {"w.sock"}
        for where, _, files in os.walk(os.path.join(self.directory, name)):
            if f"/{name}/t" in where:
                continue
            for file in files:
                path = os.path.join(where, file)
                try:
                    if not stat.S_ISSOCK(os.lstat(path).st_mode) or file in allowed:
                        continue
                except FileNotFoundError:
                    continue
                if file in ("qmp.sock", "status.sock") and name == home:
                    continue
                # The destination agent's own: its control socket.
                if name == "b" and os.path.dirname(path) == self.state("b"):
                    continue
                yield os.path.relpath(path, self.directory)

    def _files_of_a_guest_that_did_not_come(self):
        left = []
        record = os.path.join(self.state("b"), "guests", guest.NAME)
        if os.path.exists(os.path.join(record, "guest.json")):
            left.append("host b still has a record of the guest")
        for where, _, files in os.walk(self.images):
            if "/.files" not in where:
                left += [f"image on host b: {os.path.relpath(where, self.images)}/{one}" for one in files]
        if not os.path.exists(self.expects.image or self.disk):
            left.append("host a has no image under the disk's name")
        return left

    def _files_of_a_guest_that_left(self):
        left = []
        for name in os.listdir(os.path.dirname(self.disk)):
            # A symbolic link that leads nowhere is no image.
            is_there = name == os.path.basename(self.disk) and os.path.exists(self.disk)
            if is_there and not self.expects.image:
                left.append("host a still has the image under its old name, not fenced")
        record = os.path.join(self.state("a"), "guests", guest.NAME, "guest.json")
        try:
            with open(record) as file:
                if "released" not in json.load(file):
                    left.append("host a still has a record of the guest that does not say that it left")
        except FileNotFoundError:
            pass
        return left

    def _parts_in_the_emulator(self, home):
        """Jobs, nodes and exports of the migration in the guest's QEMU."""
        watcher = self.watchers[home]
        if watcher.current is None:
            return []
        left = []
        for job in watcher.ask("query-jobs") or []:
            left.append(f"job in the guest's QEMU: {job.get('id')}")
        for node in watcher.ask("query-named-block-nodes", flat=True) or []:
            name = node.get("node-name", "")
            if re.match(r"xdt?-", name):
                left.append(f"node in the guest's QEMU: {name}")
        for export in watcher.ask("query-block-exports") or []:
            left.append(f"export in the guest's QEMU: {export.get('id')}")
        migration = (watcher.ask("query-migrate") or {}).get("status", "none")
        if home == "a" and migration in ("setup", "active", "pre-switchover", "device"):
            left.append(f"a migration under way in the guest's QEMU: {migration}")
        return left

    def scraps(self):
        """Files that harm nobody but are not taken away: the directories of helpers."""
        found = []
        for name in ("a", "b"):
            found += [f"{name}/t/{entry}" for entry in os.listdir(os.path.join(self.directory, name, "t"))]
        return found

    def wait(self, seconds, what, condition):
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                raise LabFailed(f"waited {seconds} s for {what} in vain")
            self.sleep(0.01)

    def close(self):
        """Ends every process of the run and forgets it. The directory stays."""
        self.wants_agent = False
        self.table.release()
        self.link.let_go()
        self.link.listen()
        if self.supervisor:
            self.supervisor.join(10)
        # Whoever is frozen ends when it is killed, too. Whoever starts something on the way out is seen in the next round.
        for _ in range(100):
            left = self.processes()
            for one in left:
                one.signal(signal.SIGKILL)
            for child in (self.agent, self.command):
                if child is not None:
                    child.poll()
            if not left:
                break
            time.sleep(0.02)
        for child in (self.agent, self.command):
            if child is not None:
                child.wait(10)
        for watcher in self.watchers.values():
            watcher.close()
        self.is_over = True
        self.observer.join(5)
        self.link.reset()
        for where in self.mounts:
            subprocess.run(["umount", "-l", where], check=False)

    def forget(self):
        for console in self.consoles.values():
            console.close()
        shutil.rmtree(self.directory, ignore_errors=True)
