"""One move of a guest, by Crossdock or by QEMU alone, measured the same way from outside: what crossed the line, and what it cost.

Both ends are on this machine, under addresses of their own. QEMU alone is its own way of doing this over TLS: `blockdev-mirror` into the
NBD server of the other QEMU, then its migration stream, each a connection of its own. What passes between the two monitors then costs no
round trip, which a real program that does this would have to pay."""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import line as lines
from line import REPOSITORY, processor_seconds, wait_for

OTHER_QEMU = os.path.join(REPOSITORY, "deploy", "qemu")
CONTROL_PORT, NBD_PORT, FIRST_NATIVE_PORT = 10808, 10809, 10820
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
PATIENCE = 900
PHASES = ("check", "disks", "verify", "memory", "switchover", "release")


class MoveFailed(Exception):
    """A guest did not move; the text says why."""


class Monitor:
    """QEMU's monitor. Nothing is waited for longer than PATIENCE."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        wait_for(f"QEMU's monitor {path}", lambda: self.socket.connect_ex(path) == 0)
        self.socket.settimeout(PATIENCE)
        self.file = self.socket.makefile("rw", encoding="utf-8")
        self.events = []
        self.read()
        self.call("qmp_capabilities")

    def read(self):
        line = self.file.readline()
        if not line:
            raise MoveFailed("QEMU has ended")
        return json.loads(line)

    def call(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            message = self.read()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise MoveFailed(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait(self, name, *statuses):
        """The first event of this name, and of the status, that was not waited for yet; what cannot end well any more is an error."""
        while True:
            for event in self.events:
                data = event.get("data", {})
                if event["event"] == "MIGRATION" and data.get("status") == "failed":
                    raise MoveFailed("QEMU's migration failed: " + self.call("query-migrate").get("error-desc", "no reason given"))
                if event["event"] == "BLOCK_JOB_COMPLETED" and data.get("error"):
                    raise MoveFailed(f"QEMU's mirror failed: {data['error']}")
                if event["event"] == name and (not statuses or data.get("status") in statuses):
                    self.events.remove(event)
                    return event
            self.events.append(self.read())

    def forget(self):
        self.events.clear()

    def close(self):
        self.file.close()
        self.socket.close()


def moment(event):
    """When QEMU says that it happened; both QEMUs have this machine's clock."""
    return event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6


class Place:
    """Where a bench runs: a directory, a certificate, a version of QEMU."""

    def __init__(self, crossdock, qemu, base):
        self.crossdock, self.qemu = crossdock, qemu
        self.directory = tempfile.mkdtemp(prefix="xd-move-", dir=base)
        # Guests that came have users of their own.
        os.chmod(self.directory, 0o755)
        self.pki = os.path.join(self.directory, "pki")
        for words in (["init", self.directory + "/ca"], ["issue", self.directory + "/ca", self.pki, "localhost", *Side.addresses()]):
            subprocess.run([crossdock, "pki", *words], check=True, stdout=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # What an interrupted bench has left: everything that works in this directory is its own.
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def command(self, words):
        return [OTHER_QEMU, self.qemu, *words] if self.qemu else list(words)

    def version(self):
        words = subprocess.run(self.command(["qemu-system-x86_64", "--version"]), check=True, stdout=subprocess.PIPE, text=True).stdout
        return words.splitlines()[0].removeprefix("QEMU emulator version ")

    def processes(self):
        """The processes that work here, but for the bench, the line, and who only waits or watches."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read().decode(errors="replace").split("\0")
            except OSError:
                continue
            text = " ".join(words)
            if self.directory in text and int(pid) != os.getpid() and words[0] != lines.PROGRAM:
                if "source-watchdog" not in text and " migrate " not in text:
                    found.append(int(pid))
        return found

    def usage(self):
        return {pid: processor_seconds(pid) or 0 for pid in self.processes()}


def used(before, after):
    """Processor seconds between two usages."""
    return sum(seconds - before.get(pid, 0) for pid, seconds in after.items())


class Side:
    """One of the two hosts: its own address, and the one under which the other host reaches it."""

    is_direct = False  # nothing is between them

    def __init__(self, name):
        self.name = name
        number = "ab".index(name)
        self.address = f"127.94.{number}.2"
        self.seen_as = self.address if self.is_direct else f"127.94.{number}.3"

    @staticmethod
    def addresses():
        return [address for name in "ab" for address in (Side(name).address, Side(name).seen_as)]


class Move:
    """What is known of one move. Times are of the monotonic clock."""

    def __init__(self):
        self.figures = {}
        self.spans = {}  # disk and memory: begin, end
        self.payloads = {}  # the bytes that they carried
        self.processors = {}


# Crossdock


class Host(Side):
    """A host with Crossdock."""

    def __init__(self, place, name, options=()):
        super().__init__(name)
        self.place = place
        self.directory = os.path.join(place.directory, name)
        self.state, self.images = self.directory + "/state", self.directory + "/images"
        os.makedirs(self.directory)
        os.makedirs(self.images, mode=0o711)
        words = [place.crossdock, "destination", "--state-dir", self.state, "--image-dir", self.images, "--log-level", "error"]
        words += ["--listen", f"{self.address}:{CONTROL_PORT}", "--nbd-listen", f"{self.address}:{NBD_PORT}", "--guest-network", "host"]
        self.log = open(self.directory + "/agent.log", "wb")
        self.agent = subprocess.Popen(
            place.command(words + self.credentials() + list(options)), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        wait_for("the destination agent", lambda: lines.listens(self.address, NBD_PORT) and lines.listens(self.address, CONTROL_PORT))

    @property
    def ports(self):
        return [((self.seen_as, port), (self.address, port)) for port in (CONTROL_PORT, NBD_PORT)]

    def credentials(self):
        return ["--object", f"tls-creds-x509,id=t,dir={self.place.pki}", "--tls-creds", "t"]

    def run(self, *words, check=True):
        done = subprocess.run(
            self.place.command([self.place.crossdock, *words, "--state-dir", self.state]), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False)
        if check and done.returncode != 0:
            raise MoveFailed(f"crossdock {words[0]}: {done.stdout.strip()}")
        return done.stdout

    def start(self, guest, words):
        command = [self.place.crossdock, "guest", "start", guest, "--state-dir", self.state, "--", *words]
        done = subprocess.run(self.place.command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise MoveFailed(f"crossdock guest start: {done.stdout.strip()}")

    def migrate(self, guest, other, options=(), keep="0s", measures=True):
        """Moves a guest to another host; `keep` is how long its old images are there."""
        report = os.path.join(self.directory, f"{guest}.json")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(report)
        words = [self.place.crossdock, "migrate", guest, f"{other.seen_as}:{CONTROL_PORT}", "--state-dir", self.state, "--report", report, "--json"]
        words += ["--log-level", "error", "--keep-source", keep, *self.credentials(), *options]
        known = set(self.migrations())
        began = time.monotonic()
        with open(os.path.join(self.directory, f"{guest}.log"), "wb") as log:
            process = subprocess.Popen(self.place.command(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        phases, usages = {}, {}
        self.follow(process, known, guest, phases, usages if measures else None)
        total = time.monotonic() - began
        try:
            with open(report, encoding="utf-8") as file:
                found = json.load(file)
        except OSError:
            with open(os.path.join(self.directory, f"{guest}.log"), encoding="utf-8", errors="replace") as log:
                raise MoveFailed(f"no report: {log.read().strip()[-300:]}") from None
        if found["outcome"] != "migrated" or found["code"] != 0:
            phase = next((one for one in reversed(PHASES) if one in found["phases_ms"]), "no phase")
            raise MoveFailed(f"{found['outcome']} in {phase}, code {found['code']}: {found.get('reason', '')}")
        return self.evaluate(found, phases, usages, total)

    def migrations(self):
        with contextlib.suppress(OSError):
            return os.listdir(self.state + "/migrations")
        return []

    def follow(self, process, known, guest, phases, usages):
        """Notes when phases began. The events' file has them at once, what `migrate` prints comes a little later."""
        path, at, deadline = None, 0, time.monotonic() + PATIENCE
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.terminate()
                process.wait()
                raise MoveFailed(f"it took longer than {PATIENCE} s")
            if path is None:
                for name in self.migrations():
                    # Guests that leave at the same time have migrations of their own.
                    candidate = f"{self.state}/migrations/{name}/events.jsonl"
                    if name not in known and os.path.exists(candidate):
                        with open(candidate, encoding="utf-8") as file:
                            if f'"guest":"{guest}"' in file.readline():
                                path = candidate
            if path is not None:
                with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
                    file.seek(at)
                    text = file.read()
                    whole = text.rfind("\n") + 1
                    at += len(text[:whole].encode())
                    for event in map(json.loads, text[:whole].splitlines()):
                        if event["event"] == "phase":
                            phases[event["phase"]] = (time.monotonic(), event["ms"])
                            if usages is not None:
                                usages[event["phase"]] = self.place.usage()
            time.sleep(0.01)
        process.wait()

    @staticmethod
    def evaluate(report, phases, usages, total):
        move = Move()
        times = report["phases_ms"]
        pause = report.get("blackout_ms", 0.0)
        move.figures = {
            "pause_ms": pause, "check_s": times.get("check", 0) / 1000, "verify_s": times.get("verify", 0) / 1000,
            "disk_s": times["disks"] / 1000, "memory_s": times["memory"] / 1000, "total_s": total, "reconnects": report["reconnects"],
            "bytes_resent": report["bytes_resent"], "connections": report["tls"]["connections"],
            "parts_ms": {
                "stop": max(0.0, pause - times["switchover"] - times["release"]), "switchover": times["switchover"], "release": times["release"]},
        }  # fmt: skip
        move.payloads = {"disk": sum(disk["size"] for disk in report["disks"]), "memory": report["ram_bytes_sent"]}
        # What the events say is exact, when they were seen is late by a little that varies: the least is nearest.
        if phases:
            origin = min(seen - ms / 1000 for seen, ms in phases.values())
            began = {phase: origin + ms / 1000 for phase, (_, ms) in phases.items()}
            spans = {"disk": ("disks", "verify"), "memory": ("memory", "release")}
            move.spans = {name: (began[first], began[last]) for name, (first, last) in spans.items() if first in began and last in began}
            for name, (first, last) in spans.items():
                if usages and first in usages and last in usages:
                    move.processors[name] = used(usages[first], usages[last])
        return move

    def stop_guest(self, guest):
        self.run("guest", "stop", guest, "--force", check=False)

    def close(self):
        self.agent.terminate()
        self.agent.wait()
        self.log.close()


# QEMU alone


class Native:
    """A guest that QEMU moves by itself, there and back. `line(image, side)` is its command line, but for memory of its own."""

    def __init__(self, place, name, line, disk, number=0, caps=(), parameters=None):
        self.place, self.name, self.line, self.disk = place, name, line, disk
        self.ports = (FIRST_NATIVE_PORT + 2 * number, FIRST_NATIVE_PORT + 2 * number + 1)
        self.caps, self.parameters = list(caps), parameters or {}
        self.directory = os.path.join(place.directory, f"native-{name}")
        os.makedirs(self.directory)
        self.lent = set()  # images that stay when the guest has left
        self.number = 0
        self.end = self.waiting = None  # process and monitor of the QEMU that has the guest, and of the one that waits for it
        self.image = None
        self.side = Side("a")

    def pairs(self, side):
        return [((side.seen_as, port), (side.address, port)) for port in self.ports]

    def launch(self, image, side, *words):
        self.number += 1
        path = f"{self.directory}/{self.number}.qmp"
        command = self.line(image, side, self.number > 1)
        for end in ("client", "server"):
            command += ["-object", f"tls-creds-x509,id={end},dir={self.place.pki},endpoint={end}"]
        command += ["-qmp", f"unix:{path},server=on,wait=off", *words]
        with open(f"{self.directory}/{self.number}.log", "wb") as log:
            process = subprocess.Popen(self.place.command(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            return process, Monitor(path)
        except BaseException:
            self.kill(process)
            raise

    @staticmethod
    def kill(process):
        process.kill()
        process.wait()

    def start(self, image):
        self.image = image
        self.end = self.launch(image, self.side)

    def prepare(self):
        """The other QEMU, which waits for the guest: how plain scripts do it."""
        other = Side("b" if self.side.name == "a" else "a")
        self.target = f"{self.directory}/{other.name}-{self.number}.raw"
        with open(self.target, "wb") as file:
            file.truncate(self.disk << 20)
        self.waiting = self.launch(self.target, other, "-incoming", "defer", "-S")
        source, destination = self.end[1], self.waiting[1]
        for monitor in (source, destination):
            monitor.forget()
            capabilities = ["events", "return-path", "pause-before-switchover", *self.caps]
            monitor.call("migrate-set-capabilities", capabilities=[{"capability": one, "state": True} for one in capabilities])
        limits = {"max_bandwidth": 1 << 40, "downtime_limit": 300}
        source.call("migrate-set-parameters", tls_creds="client", tls_hostname=other.seen_as, **limits, **self.parameters)
        destination.call("migrate-set-parameters", tls_creds="server", **self.parameters)
        address = {"type": "inet", "data": {"host": other.address, "port": str(self.ports[0])}}
        destination.call("nbd-server-start", addr=address, tls_creds="server")
        destination.call("block-export-add", type="nbd", id="export", node_name="disk0", name="disk0", writable=True)
        destination.call("migrate-incoming", uri=f"tcp:{other.address}:{self.ports[1]}")
        return other

    def move(self, other, patience=0):
        """Moves the guest to the QEMU that `prepare` has started. `patience`: seconds that QEMU tries to reach a lost NBD server."""
        (process, source), (_, destination) = self.end, self.waiting
        move = Move()
        usages = [self.place.usage()]
        began = time.monotonic()
        server = {"type": "inet", "host": other.seen_as, "port": str(self.ports[0])}
        more = {"reconnect_delay": patience} if patience else {}
        source.call("blockdev-add", driver="nbd", node_name="target", server=server, export="disk0", tls_creds="client", **more)
        disks = time.monotonic()
        source.call("blockdev-mirror", job_id="mirror", device="disk0", target="target", sync="full", auto_dismiss=True)
        source.wait("BLOCK_JOB_READY")
        memory = time.monotonic()
        usages.append(self.place.usage())
        source.call("migrate", uri=f"tcp:{other.seen_as}:{self.ports[1]}")
        stopped = source.wait("STOP")
        paused = source.wait("MIGRATION", "pre-switchover")
        sent = time.monotonic()
        source.call("block-job-cancel", device="mirror")
        mirrored = source.wait("BLOCK_JOB_COMPLETED")
        source.call("migrate-continue", state="pre-switchover")
        arrived = source.wait("MIGRATION", "completed")
        destination.wait("MIGRATION", "completed")
        destination.call("nbd-server-stop")
        destination.call("cont")
        resumed = destination.wait("RESUME")
        ended = time.monotonic()
        usages.append(self.place.usage())
        transferred = source.call("query-migrate")["ram"]["transferred"]

        def between(first, last):
            return (moment(last) - moment(first)) * 1000

        move.figures = {
            "pause_ms": between(stopped, resumed), "check_s": disks - began, "verify_s": 0.0, "disk_s": memory - disks, "memory_s": sent - memory,
            "total_s": ended - began, "connections": 2,
            "parts_ms": {
                "stop": between(stopped, paused), "mirror": between(paused, mirrored), "memory": between(mirrored, arrived),
                "hand_over": between(arrived, resumed)},
        }  # fmt: skip
        move.spans = {"disk": (disks, memory), "memory": (memory, ended)}
        move.payloads = {"disk": self.disk << 20, "memory": transferred}
        move.processors = {"disk": used(usages[0], usages[1]), "memory": used(usages[1], usages[2])}
        source.close()
        self.kill(process)
        if self.image not in self.lent:
            os.unlink(self.image)
        self.end, self.image, self.side, self.waiting = self.waiting, self.target, other, None
        return move

    def close(self):
        for end in (self.end, self.waiting):
            if end:
                with contextlib.suppress(OSError):
                    end[1].close()
                self.kill(end[0])
        shutil.rmtree(self.directory, ignore_errors=True)


def all_at_once(works):
    """Does all of these at the same time; their results, or the first exception."""
    results = [None] * len(works)

    def do(index, work):
        try:
            results[index] = work()
        except Exception as error:  # noqa: BLE001 - it is told to who waits
            results[index] = error

    threads = [threading.Thread(target=do, args=(index, work)) for index, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def revision():
    """What is measured: the commit, with a + when the sources differ from it."""
    words = ["git", "-C", REPOSITORY, "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(words, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip() or "unknown"
    changed = subprocess.run(["git", "-C", REPOSITORY, "diff", "--quiet", "HEAD", "--", "Sources", "Package.swift"], check=False, **QUIET).returncode
    return commit + ("+" if changed else "")


def memory_mebibytes(name):
    """A figure of /proc/meminfo."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(row.split()[1]) >> 10 for row in file if row.startswith(name + ":"))


def available_mebibytes():
    return memory_mebibytes("MemAvailable")


def say(text):
    print(text, flush=True)
    sys.stdout.flush()
