"""The two hosts of the test: this machine, where the operator's commands are run by hand, and the machine with the units."""
import json
import os
import subprocess

from installation import CONTROL_PORT, NBD_PORT, Authority, Installation
from machine import Disk, Machine, MachineFailed, wait

OUTSIDE, MACHINE = "127.0.0.1", "127.0.0.2"
# The same host as OUTSIDE, as the machine sees it.
GATEWAY = "10.0.2.2"
# QEMU below QEMU, on two busy processors, is slow; what is tested is not how fast it is.
PATIENT = ["--downtime-limit", "5000", "--blackout-deadline", "120000", "--patience", "10m", "--json"]
MEBIBYTE = 1 << 20


def runtime_of(program):
    """The libraries that the program's loader finds outside of the system's directories: Swift's. The others are packages'."""
    answer = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    libraries = [word for word in answer.split() if word.startswith("/")]
    return [one for one in libraries if not one.startswith(("/lib", "/usr/lib"))]


class Migration:
    """A `crossdock migrate` under way on one of the hosts."""

    def __init__(self, host, guest):
        self.host, self.guest = host, guest

    def events(self):
        found = []
        for line in self.host.words(self.guest).splitlines():
            if line.startswith("{"):
                try:
                    found.append(json.loads(line))
                except ValueError:
                    pass  # half a line, so far
        return found

    def is_copying(self):
        """Whether the disks are being copied."""
        events = self.events()
        return bool(events) and events[-1].get("phase") == "disks"

    def wait_for_middle(self):
        def is_there():
            if self.host.code(self.guest) is not None:
                raise MachineFailed(f"the migration of {self.guest} was over before its middle: {self.words()}")
            return self.is_copying()

        wait(f"the middle of the copy of {self.guest}", is_there)

    def end(self):
        """Waits for the end; returns the exit code."""
        return wait(f"the end of the migration of {self.guest}", lambda: self.host.code(self.guest))

    def words(self):
        """Why it ended, when it says so; the end of what it said otherwise."""
        reasons = [one["report"]["reason"] for one in self.events() if one.get("report", {}).get("reason")]
        return reasons[-1] if reasons else self.host.words(self.guest)[-600:]


class Host:
    """What both hosts can do; `run_words` carries out a command, and says exit code and output."""

    def crossdock(self, *words, check=True):
        code, output = self.run_words([self.program, *words])
        if check and code != 0:
            raise MachineFailed(f"crossdock {' '.join(words)} ended with code {code}: {output.strip()}")
        return output

    def listed(self, *words):
        text = self.crossdock(*words, "--json", "--state-dir", self.state)
        return json.loads(text[text.index("["):])

    def guests(self):
        return {one["name"]: one for one in self.listed("guest", "list")}

    def status(self, guest):
        """The last row of `crossdock status` about a guest."""
        rows = [one for one in self.listed("status") if one["guest"] == guest]
        return rows[-1] if rows else {}

    def start_guest(self, name, disk, form="raw", more=()):
        line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none"]
        line += ["-drive", f"file={disk},format={form},if=virtio", *more]
        self.crossdock("guest", "start", name, "--state-dir", self.state, "--", *line)


class Outside(Host):
    def __init__(self, directory, program):
        self.directory, self.program = directory, program
        self.installation = Installation(program, directory)
        self.state = self.installation.state
        self.commands, self.agent = {}, None

    def run_words(self, words):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.returncode, done.stdout

    def make_credentials(self):
        authority = Authority(self.program, os.path.join(self.directory, "ca"))
        authority.issue(self.installation.pki, "outside", OUTSIDE, GATEWAY)
        authority.issue(os.path.join(self.directory, "pki-machine"), "machine", MACHINE)

    def make_disk(self, name, form="raw", filled=4, size=32):
        """A disk of so many MiB, some of which are not zero."""
        path = os.path.join(self.directory, f"{name}.{form}")
        plain = os.path.join(self.directory, f"{name}.plain")
        with open(plain, "wb") as file:
            file.write(os.urandom(filled * MEBIBYTE))
            file.truncate(size * MEBIBYTE)
        # The first sector says that there is nothing to boot.
        with open(plain, "r+b") as file:
            file.write(bytes(512))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, plain, path], check=True)
        os.remove(plain)
        return path

    def start_agent(self):
        words = self.installation.destination(OUTSIDE)
        log = os.path.join(self.directory, "agent.log")
        with open(log, "wb") as output:
            self.agent = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        wait("the agent outside", lambda: self.agent.poll() is not None or b"NBD port" in open(log, "rb").read(), 60)

    def migrate(self, guest, *options):
        words = self.installation.migrate(guest, MACHINE, *PATIENT, *options)
        with open(os.path.join(self.directory, f"migrate-{guest}.log"), "wb") as output:
            self.commands[guest] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        return Migration(self, guest)

    def code(self, guest):
        code = self.commands[guest].poll()
        return None if code is None else str(code)

    def words(self, guest):
        with open(os.path.join(self.directory, f"migrate-{guest}.log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def close(self):
        """Ends what this host has started: agents and guests have the directory in their words."""
        for _ in range(50):
            left = []
            for entry in filter(str.isdigit, os.listdir("/proc")):
                try:
                    with open(f"/proc/{entry}/cmdline", "rb") as file:
                        words = file.read().decode(errors="replace")
                except OSError:
                    continue
                if self.directory + "/" in words and int(entry) != os.getpid():
                    left.append(int(entry))
            if not left:
                return
            for one in left:
                try:
                    os.kill(one, 9)
                except ProcessLookupError:
                    pass
            for child in [*self.commands.values(), self.agent]:
                if child is not None:
                    child.poll()


class Inside(Host):
    """The machine: its agent is the unit, its state directory the units'."""

    program, state = "/usr/bin/crossdock", "/var/lib/crossdock"
    UNITS = ("crossdock-hold", "crossdock-recover", "crossdock-destination", "crossdock-evacuate")

    def __init__(self, directory, images, outside, units):
        self.directory = directory
        disk = Disk(os.path.join(images, "base.ext4"), os.path.join(directory, "machine.img"))
        for library in runtime_of(outside.program):
            disk.add(os.path.realpath(library), library)
        disk.add(outside.program, self.program)
        for name in sorted(os.listdir(units)):
            disk.add(os.path.join(units, name), f"/etc/systemd/system/{name}")
        pki = os.path.join(outside.directory, "pki-machine")
        for name in sorted(os.listdir(pki)):
            disk.add(os.path.join(pki, name), f"/etc/pki/crossdock/{name}")
        forwards = [(f"{MACHINE}:{port}", port) for port in (CONTROL_PORT, NBD_PORT)]
        self.machine = Machine(directory, images, disk, forwards)
        self.machine.prepare()
        self.run = self.machine.run

    def run_words(self, words):
        return self.machine.run(" ".join("'" + one.replace("'", "'\\''") + "'" for one in words), check=False)

    def property(self, unit, name):
        return self.run(f"systemctl show -P {name} {unit}").strip()

    def wait_for_agent(self):
        """Until the agent listens, in its newest start."""
        invocation = wait("the agent's unit", lambda: self.property("crossdock-destination", "InvocationID"))
        script = f"journalctl -o cat _SYSTEMD_INVOCATION_ID={invocation} | grep -c 'NBD port' || true"
        wait("the agent to listen", lambda: self.run(script).strip() not in ("", "0"))

    def agent_process(self):
        return self.property("crossdock-destination", "MainPID")

    def process_of(self, guest):
        return self.guests().get(guest, {}).get("process")

    def migrate(self, guest, *options):
        """In a unit of its own, as from a terminal: what it leaves behind goes on."""
        words = [self.program, "migrate", guest, f"{GATEWAY}:{CONTROL_PORT}", *PATIENT, *options]
        line = " ".join(words)
        self.run(
            f"rm -f /run/migrate-{guest}.*; systemd-run -q --unit=migrate-{guest} --property=KillMode=process "
            f"sh -c '{line} >/run/migrate-{guest}.log 2>&1; echo $? >/run/migrate-{guest}.code'"
        )
        return Migration(self, guest)

    def code(self, guest):
        return self.run(f"cat /run/migrate-{guest}.code 2>/dev/null || true").strip() or None

    def words(self, guest):
        return self.run(f"cat /run/migrate-{guest}.log 2>/dev/null || true")
