"""Hosts with Crossdock for the tests of the page, all in one network that is the test's own.

Each host has an address of that network, a name, and its own `/etc` and `/var/lib`: Crossdock runs there as it is installed, with its usual
directories, so that a command that the page shows can be typed as it is.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.append(os.path.join(REPOSITORY, "deploy", "demo"))
from installation import Authority  # noqa: E402

# Set in the namespaces that are the test's own.
APART = "XD_WEB_APART"
NAMESPACES = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
ADDRESSES = {"a": "10.95.0.1", "b": "10.95.0.2", "c": "10.95.0.3"}
LEFT_OUT = ("*.raw", "*.released-*", "*.sock", "ca", "etc", "vmlinuz", "initrd", ".files")
MIB = 1 << 20


class CouldNotGoOn(Exception):
    """The test itself could not go on."""


def go_apart():
    """Goes on in namespaces of one's own: ports are nobody else's, and nothing outlives the test.

    Returns a directory in the process that goes on; the one that was called waits for it and ends as it does.
    """
    if APART in os.environ:
        reap()
        return os.environ[APART]
    if os.geteuid() != 0 or subprocess.run(["unshare", *NAMESPACES, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        raise CouldNotGoOn("it needs root, who may make namespaces")
    base = tempfile.mkdtemp(prefix="xd-web-", dir=os.environ.get("XD_DEMO_BASE", "/tmp"))
    # Guests have users of their own, who have to pass through to their images.
    os.chmod(base, 0o711)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    code, inside = 2, None
    try:
        inside = subprocess.Popen(["unshare", *NAMESPACES, sys.executable, *sys.argv], env={**os.environ, APART: base})
        code = inside.wait()
    finally:
        if inside:
            inside.kill()
            inside.wait()
        shutil.rmtree(base, ignore_errors=True)
    sys.exit(code)


def reap():
    """Lets a child go on, as the first process of the namespace, to which the processes of others fall when those end."""
    if not (child := os.fork()):
        return
    while True:
        ended, status = os.wait()
        if ended == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def wait_until(what, condition, seconds=60):
    """Waits until a condition holds; what it returned then."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise CouldNotGoOn(f"waited {seconds} s for {what} in vain")
        time.sleep(0.03)
    return found


class Host:
    """A host. `run` is what an administrator types on it."""

    def __init__(self, lab, letter):
        self.lab, self.letter = lab, letter
        self.name, self.address = f"host-{letter}", ADDRESSES[letter]
        self.directory = os.path.join(lab.base, self.name)
        self.lib, self.etc = os.path.join(self.directory, "lib"), os.path.join(self.directory, "etc")
        self.log = os.path.join(self.directory, "agent.log")
        self.state = os.path.join(self.lib, "crossdock")
        for path in (self.lib + "/guests", self.lib + "/crossdock/images"):
            os.makedirs(path)
            os.chmod(path, 0o711)
        os.chmod(self.state, 0o711)
        shutil.copytree("/etc", self.etc, symlinks=True, ignore=shutil.ignore_patterns("pki", "crossdock", "ssl", "alternatives"))
        os.makedirs(self.etc + "/crossdock")
        with open(self.etc + "/hosts", "w", encoding="utf-8") as file:
            file.write("127.0.0.1 localhost\n" + "".join(f"{address} host-{one}\n" for one, address in ADDRESSES.items()))
        lab.authority.issue(self.etc + "/pki/crossdock", self.name, self.address, "localhost")
        script = (
            f"mount --make-rprivate / && hostname {self.name} && mount --bind {self.etc} /etc && mount --bind {self.lib} /var/lib && "
            f"touch {self.directory}/up && exec sleep infinity"
        )
        self.holder = subprocess.Popen(["unshare", "--mount", "--uts", "sh", "-c", script], stdin=subprocess.DEVNULL)
        wait_until(f"{self.name}", lambda: os.path.exists(f"{self.directory}/up") or self.holder.poll() is not None)
        if self.holder.poll() is not None:
            raise CouldNotGoOn(f"{self.name} could not be made")
        self.agent = None
        self.port = None

    def command(self, words):
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-u", "--wd=/", "--", *words]

    def run(self, *words, code=0, **options):
        """Runs a command to its end; its output, with what it has to complain about. `code` is what it has to end with; None for any."""
        words = [self.lab.crossdock if words[0] == "crossdock" else words[0], *words[1:]]
        done = subprocess.run(
            self.command(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
        if code is not None and done.returncode != code:
            raise CouldNotGoOn(f"on {self.name}, '{' '.join(words[:4])} ...' ended with code {done.returncode}: {done.stdout.strip()[-1000:]}")
        return done.stdout

    def begin(self, *words, log):
        """Begins a command, whose output goes to a file."""
        words = [self.lab.crossdock if words[0] == "crossdock" else words[0], *words[1:]]
        with open(os.path.join(self.directory, log), "wb") as file:
            return subprocess.Popen(self.command(words), stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    # The agent.

    def start_agent(self, *more):
        words = [self.lab.crossdock, "destination", "--listen", f"{self.address}:10808", "--nbd-listen", f"{self.address}:0"]
        words += [*(() if "--web" in more else ("--web", f"{self.address}:0")), "--guest-network", "host", *more]
        begin = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        with open(self.log, "ab") as file:
            self.agent = subprocess.Popen(self.command(words), stdin=subprocess.DEVNULL, stdout=file, stderr=file)

        def page():
            if self.agent.poll() is not None:
                raise CouldNotGoOn(f"the agent of {self.name} has ended: {self.logged(begin)[-1000:]}")
            return re.search(r"page at https://[^:]*:(\d+)", self.logged(begin))

        self.port = int(wait_until(f"the page of {self.name}", page)[1])

    def stop_agent(self, by=signal.SIGTERM):
        self.agent.send_signal(by)
        self.agent.wait(30)

    def logged(self, begin=0):
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            return file.read()

    def log_size(self):
        return os.path.getsize(self.log)

    @property
    def origin(self):
        return f"https://{self.address}:{self.port}"

    def ticket(self, *options):
        """The URL that `crossdock web ticket` prints."""
        output = self.run("crossdock", "web", "ticket", *options)
        found = re.search(r"https://\S+/#t=[0-9a-f]+", output)
        if not found:
            raise CouldNotGoOn(f"there is no URL in what 'crossdock web ticket' prints: {output}")
        return found[0]

    def usage(self):
        """Resident bytes and processor seconds of the agent."""
        with open(f"/proc/{self.agent.pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # Guests.

    def start_guest(self, name, memory=96, disk=64, data=32):
        """A small Linux that writes numbered records, with `data` MiB of its disk filled."""
        image = os.path.join(self.lib, "guests", f"{name}.raw")
        with open(image, "wb") as file:
            file.truncate(disk * MIB)
            file.seek((disk - data) * MIB)
            file.write(os.urandom(data * MIB))
        line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", str(memory), "-nodefaults", "-display", "none"]
        line += ["-no-reboot", "-kernel", f"{self.lab.files}/vmlinuz", "-initrd", f"{self.lab.files}/initrd"]
        line += ["-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests xd.interval=200000"]
        line += ["-drive", f"file=/var/lib/guests/{name}.raw,format=raw,if=virtio", "-serial", f"file:/var/lib/guests/{name}.log"]
        self.run("crossdock", "guest", "start", name, "--", *line)
        console = os.path.join(self.lib, "guests", f"{name}.log")

        def writes():
            with contextlib.suppress(OSError), open(console, encoding="latin-1") as file:
                return file.read().count("REC 0 ") > 3

        wait_until(f"the records of {name}", writes, 180)

    def guests(self):
        """The guests that are this host's, with their states."""
        rows = json.loads(self.run("crossdock", "guest", "list", "--json"))
        return {row["name"]: row["state"] for row in rows if row["state"] != "released"}

    def migrate(self, guest, target, *options):
        """Begins to move a guest; the process, and where its report will be."""
        report = os.path.join(self.directory, f"{guest}.report.json")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(report)
        words = ["crossdock", "migrate", guest, target, "--report", report, "--json", *options]
        return self.begin(*words, log=f"{guest}.migrate.log"), report

    def workers(self, migration):
        """The processes that carry a migration away from here, by their ids."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().decode(errors="replace").split("\0")
                if words[1:2] in (["source-agent"], ["source-watchdog"]) and any(f"/migrations/{migration}/" in word for word in words):
                    found.append(int(pid))
        return found


class Lab:
    """The hosts `a`, `b` and `c` with running agents, in the namespaces of `go_apart`, with which all of it ends."""

    def __init__(self, crossdock, files, base):
        self.crossdock, self.files, self.base = crossdock, files, base
        self.hosts, self.started = {}, set()
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for address in ADDRESSES.values():
            subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        self.authority = Authority(crossdock, os.path.join(base, "ca"))
        self.a, self.b, self.c = (self.hosts.setdefault(letter, Host(self, letter)) for letter in ADDRESSES)
        for host in self.hosts.values():
            host.start_agent()

    def guest(self, name, **options):
        """Sees to it that a guest runs on host a."""
        if name not in self.started:
            self.a.start_guest(name, **options)
            self.started.add(name)
        return name

    def where(self, guest):
        """The hosts that have a guest, with its state."""
        return {letter: found[guest] for letter, host in self.hosts.items() if guest in (found := host.guests())}

    def keep(self, directory):
        """Logs and reports, without images and keys."""
        shutil.copytree(self.base, directory, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True, copy_function=copy_if_plain)


def copy_if_plain(source, target):
    if os.path.isfile(source) and not os.path.islink(source):
        shutil.copy(source, target)
