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
from forwarder import CONTROL_PORT, NBD_PORT, Link
from watch import Console, Watcher

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WRAPPER = """#!/bin/sh
# A guest's QEMU goes on from a saved state when the harness says so. The shim is not for it.
unset LD_PRELOAD XF_TABLE
if [ -n "$XF_STATE" ]; then
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

    def __init__(self, crossdock, files, patience):
        self.ending = threading.Event()
        self.crossdock = os.path.abspath(crossdock)
        self.base = tempfile.mkdtemp(prefix="xf-", dir=os.environ.get("XF_BASE", "/tmp"))
        self.shim = shim.build("shim.c", os.path.join(self.base, "shim.so"), "-ldl")
        self.records = shim.build("records.c", os.path.join(self.base, "records.so"))
        # Host b may have another QEMU than the system's, which host a has.
        self.tools = {"a": os.path.join(self.base, "bin-a"), "b": os.path.join(self.base, "bin-b")}
        emulator = shutil.which(guest.EMULATOR)
        other = f"{REPOSITORY}/deploy/qemu {guest.VERSIONS[1]} {emulator}" if guest.IS_MIXED else emulator
        for host, real in (("a", emulator), ("b", other)):
            os.makedirs(self.tools[host])
            wrapper = os.path.join(self.tools[host], guest.EMULATOR)
            with open(wrapper, "w") as file:
                file.write(WRAPPER.replace("{real}", real))
            os.chmod(wrapper, 0o755)
        # A copy: the program may be replaced while the matrix runs.
        copy = os.path.join(self.base, "crossdock")
        shutil.copy(self.crossdock, copy)
        self.crossdock = copy
        self.run([copy, "pki", "init", os.path.join(self.base, "ca")])
        options = self.run([copy, "migrate", "--help"]) + self.run([copy, "destination", "--help"])
        self.patience = patience if "--patience" in options else None
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
                self.link = Link(self.seen_as, self.addresses["b"])
                break
            except OSError:
                continue
        else:
            raise LabFailed("there is no free address for the link")
        self.pki = {}
        for name, hosts in (("a", [self.addresses["a"]]), ("b", [self.seen_as, self.addresses["b"]])):
            self.pki[name] = os.path.join(site.base, f"pki-{number}-{name}")
            site.run([site.crossdock, "pki", "issue", os.path.join(site.base, "ca"), self.pki[name], *hosts])

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
    """The world of one run: a guest on host a, an agent on host b, a link between them."""

    def __init__(self, pair, directory, deadline):
        self.pair, self.site, self.link = pair, pair.site, pair.link
        self.directory, self.deadline = directory, deadline
        self.began = time.time()
        self.log = []
        for name in ("a", "b"):
            os.makedirs(os.path.join(directory, name, "t"))
        self.table = shim.Table(os.path.join(directory, "table"))
        self.disk = os.path.join(directory, "a", "disk0.raw")
        self.images = os.path.join(directory, "b", "images")
        run = os.path.join(self.state("b"), "guests", guest.NAME, "run")
        self.consoles = {
            "a": Console(os.path.join(directory, "a", "console")),
            "b": Console(os.path.join(run, "console")),
        }
        self.watchers = {
            "a": Watcher("a", os.path.join(directory, "a", "w.sock")),
            "b": Watcher("b", os.path.join(run, "w.sock")),
        }
        self.agent = None
        self.wants_agent = False
        self.supervisor = None
        self.command = None
        self.mounted = False
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
        return os.path.join(self.directory, host, "s")

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
            self.note(f"memory compared: {lost} pages differ")
            self.guard.go()

    def _compare_memory(self):
        """How many pages differ between the hosts."""
        paths = []
        for host, watcher in self.watchers.items():
            paths.append(os.path.join(self.directory, f"memory-{host}"))
            watcher.ask("pmemsave", 20, val=0, size=guest.MEMORY << 20, filename=paths[-1])
            if not os.path.exists(paths[-1]):
                return 0
        first, second = (open(path, "rb").read() for path in paths)
        for path in paths:
            os.unlink(path)
        if first == second or len(first) != len(second):
            return 0
        return sum(first[at : at + 4096] != second[at : at + 4096] for at in range(0, len(first), 4096))

    # Programs.

    def environment(self, host, shimmed=True):
        environment = dict(os.environ)
        environment["PATH"] = self.site.tools[host] + ":" + environment.get("PATH", "/usr/bin:/bin")
        environment["TMPDIR"] = os.path.join(self.directory, host, "t")
        environment["XF_RUN"] = f"{self.directory}/{host}/"
        if shimmed:
            environment["XF_TABLE"] = self.table.path
            environment["LD_PRELOAD"] = self.site.shim
        return environment

    def credentials(self, host):
        return ["--object", f"tls-creds-x509,id=tls0,dir={self.pair.pki[host]}", "--tls-creds", "tls0"]

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

    def start_guest(self):
        guest.copy_sparse(self.site.saved.disk, self.disk)
        line = guest.command(
            self.site.saved.files, self.disk, self.consoles["a"].path, self.watchers["a"].path
        )
        code, words = self.crossdock("a", "guest", "start", guest.NAME, "--", *line, state=self.site.saved.state)
        if code != 0:
            raise LabFailed(f"the guest does not start: {words}")
        self.wait(20, "the guest's records", lambda: self.consoles["a"].size > 200 and self.watchers["a"].is_running)

    def start_agent(self):
        """Starts the destination agent, and again whenever it ends, as systemd would."""
        self.wants_agent = True
        self._launch_agent()
        self.supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.supervisor.start()
        log = os.path.join(self.directory, "b", "agent.log")
        self.wait(20, "the destination agent", lambda: b"NBD port" in open(log, "rb").read())

    def _launch_agent(self):
        command = [self.site.crossdock, "destination", "--state-dir", self.state("b"), "--image-dir", self.images]
        command += ["--listen", f"{self.pair.addresses['b']}:{CONTROL_PORT}"]
        command += ["--nbd-listen", f"{self.pair.addresses['b']}:{NBD_PORT}", *self.credentials("b")]
        if self.site.patience is not None:
            command += ["--patience", str(self.site.patience)]
        with open(os.path.join(self.directory, "b", "agent.log"), "ab") as output:
            self.agent = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment("b"),
                cwd=os.path.join(self.directory, "b"),
            )  # fmt: skip

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

    def start_migration(self):
        command = [self.site.crossdock, "migrate", guest.NAME, f"{self.pair.seen_as}:{CONTROL_PORT}", "--json"]
        command += ["--state-dir", self.state("a"), "--blackout-deadline", str(self.deadline)]
        command += ["--downtime-limit", "300", "--connections", "2", *self.credentials("a")]
        if self.site.patience is not None:
            command += ["--patience", str(self.site.patience)]
        with open(os.path.join(self.directory, "a", "migrate.log"), "ab") as output:
            self.command = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment("a"),
                cwd=os.path.join(self.directory, "a"),
            )  # fmt: skip

    def mount_images(self, megabytes):
        """Gives the destination's images a small file system of their own."""
        os.makedirs(self.images)
        options = f"size={megabytes}m,mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", self.images], check=True)
        self.mounted = True

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
            host = "a" if self.directory + "/a/" in line else "b"
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
        """The rows of `crossdock status`; None when it fails."""
        code, text = self.crossdock(host, "status", "--json", seconds=20)
        return json.loads(text) if code == 0 and text.startswith("[") else None

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
            if one.role == "migrate" or (one.role, one.host) == ("destination", "b"):
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
        if not os.path.exists(self.disk):
            left.append("host a has no image under the disk's name")
        return left

    def _files_of_a_guest_that_left(self):
        left = []
        for name in os.listdir(os.path.dirname(self.disk)):
            if name == "disk0.raw":
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
        if self.supervisor:
            self.supervisor.join(10)
        # Whoever starts something on the way out is seen in the next round.
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
        if self.mounted:
            subprocess.run(["umount", "-l", self.images], check=False)

    def forget(self):
        for console in self.consoles.values():
            console.close()
        shutil.rmtree(self.directory, ignore_errors=True)
