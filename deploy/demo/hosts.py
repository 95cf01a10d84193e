"""Two hosts on one machine, with a recording forwarder between them.

As root each host has its own network, mount and PID namespace and does not see the other's directory; the forwarder
lives in a third network namespace and is the only way from one to the other. Without root, or where root may not make
namespaces, the hosts are two loopback addresses and two directories.
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from installation import CONTROL_PORT, NBD_PORT, Installation

HERE = os.path.dirname(os.path.abspath(__file__))
OTHER_QEMU = os.path.join(os.path.dirname(HERE), "qemu")


class Host(Installation):
    def __init__(self, lab, name, address, seen_as):
        super().__init__(lab.crossdock, os.path.join(lab.base, name))
        self.lab, self.name, self.address, self.seen_as = lab, name, address, seen_as
        os.makedirs(self.directory)
        self.holder = None
        self.agent = None
        self.emulator = None

    def enter_namespaces(self, others, names):
        """Network, mounts and processes of its own; `names` are what its /etc/hosts calls the addresses of the others.

        The shell is the first process of its namespace: it reaps what is left to it. What belongs to the other hosts and to the
        outside is covered.
        """
        hosts = os.path.join(self.directory, "hosts")
        with open(hosts, "w") as file:
            file.write("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in names.items()))
        recordings = os.path.join(self.lab.base, "recordings")
        covered = " && ".join(f"mount -t tmpfs none {other.directory}" for other in others)
        script = (
            f"mount --make-rprivate / && mount --bind {hosts} /etc/hosts && {covered} && "
            f"mkdir -p {recordings} && mount -t tmpfs none {recordings} && ip link set lo up && "
            f"touch {self.directory}/.up && while :; do sleep 1000 & wait; done"
        )
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        )
        self.lab.processes.append(self.holder)

    def connect(self, middle):
        """A link to another network namespace, whose end there is called `link` + "m"."""
        wait("the namespaces", lambda: os.path.exists(os.path.join(self.directory, ".up")))
        wait("the namespaces", lambda: os.readlink(f"/proc/{middle.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        self.link = f"xd{os.getpid() % 100000}{self.name}"
        quiet("ip", "link", "add", self.link, "type", "veth", "peer", "name", self.link + "m")
        quiet("ip", "link", "set", self.link, "netns", str(self.holder_child()))
        quiet("ip", "link", "set", self.link + "m", "netns", str(middle.pid))
        inside = ["nsenter", "-t", str(self.holder_child()), "-n", "--"]
        quiet(*inside, "ip", "address", "add", self.address + "/24", "dev", self.link)
        quiet(*inside, "ip", "link", "set", self.link, "up")

    def command(self, arguments):
        if self.emulator:
            arguments = [OTHER_QEMU, self.emulator] + arguments
        if self.holder is None:
            return arguments
        return ["nsenter", "-t", str(self.holder_child()), "-n", "-m", "-p", "--wd=" + self.directory, "--"] + arguments

    def holder_child(self):
        """The first process of the host's PID namespace, as the outside knows it."""
        with open(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children") as children:
            return int(children.read().split()[0])

    def run(self, *arguments, check=True, **options):
        return subprocess.run(
            self.command(list(arguments)), check=check, text=True, stdout=subprocess.PIPE, cwd=self.directory, **options
        )

    def start(self, arguments, log):
        with open(os.path.join(self.directory, log), "ab") as output:
            return subprocess.Popen(self.command(arguments), stdout=output, stderr=output, cwd=self.directory)


class Lab:
    """The hosts `a` and `b`. Leaving the `with` block ends every process and removes every file."""

    def __init__(self, crossdock):
        self.crossdock = crossdock
        # A root in a directory that nothing is mounted on (chroot) has no namespaces to offer either.
        self.is_root = os.geteuid() == 0 and can_make_namespaces()
        self.base = tempfile.mkdtemp(prefix="xd-demo-", dir=os.environ.get("XD_DEMO_BASE", "/tmp"))
        self.processes = []
        self.middle = None

    def __enter__(self):
        try:
            self.setup()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def setup(self):
        if self.is_root:
            self.a = Host(self, "a", "10.93.0.2", "10.93.1.1")
            self.b = Host(self, "b", "10.93.1.2", "10.93.0.1")
            self.make_namespaces()
        else:
            self.a = Host(self, "a", "127.93.0.2", "127.93.0.3")
            self.b = Host(self, "b", "127.93.1.2", "127.93.1.3")
        self.recordings = os.path.join(self.base, "recordings")
        for target in (self.a, self.b):
            # Each host is reached under the address that the other one knows.
            arguments = [sys.executable, os.path.join(HERE, "forwarder.py")]
            arguments += [os.path.join(self.recordings, "to-" + target.name), target.seen_as, target.address]
            arguments += [str(CONTROL_PORT), str(NBD_PORT)]
            prefix = ["nsenter", "-t", str(self.middle.pid), "-n", "--"] if self.middle else []
            log = open(os.path.join(self.base, f"forwarder-{target.name}.log"), "wb")
            self.processes.append(subprocess.Popen(prefix + arguments, stdout=log, stderr=log))
        for target in (self.a, self.b):
            log = os.path.join(self.base, f"forwarder-{target.name}.log")
            wait("the forwarders", lambda: open(log).read().count("forwarding") == 2)

    def make_namespaces(self):
        self.middle = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.processes.append(self.middle)
        for host in (self.a, self.b):
            other = self.b if host is self.a else self.a
            host.enter_namespaces([other], {other.seen_as: f"host-{other.name}"})
        for host in (self.a, self.b):
            gateway = self.b.seen_as if host is self.a else self.a.seen_as
            host.connect(self.middle)
            between = ["nsenter", "-t", str(self.middle.pid), "-n", "--"]
            quiet(*between, "ip", "address", "add", gateway + "/24", "dev", host.link + "m")
            quiet(*between, "ip", "link", "set", host.link + "m", "up")

    def name_of(self, host):
        """The name under which the other host reaches this one."""
        return f"host-{host.name}" if self.is_root else host.seen_as

    def close(self):
        if not self.is_root and hasattr(self, "b"):
            for host in (self.a, self.b):
                subprocess.run(
                    [self.crossdock, "guest", "stop", "web1", "--force", "--state-dir", host.state],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
                )
        end(self.processes)
        shutil.rmtree(self.base, ignore_errors=True)


class Fleet:
    """Hosts by their names, on one switch. Needs root. Leaving the `with` block ends every process and removes every file."""

    def __init__(self, crossdock, names):
        self.crossdock = crossdock
        self.base = tempfile.mkdtemp(prefix="xd-fleet-", dir=os.environ.get("XD_DEMO_BASE", "/tmp"))
        self.processes = []
        self.hosts = {name: Host(self, name, f"10.94.0.{index + 1}", f"host-{name}") for index, name in enumerate(names)}

    def __enter__(self):
        try:
            middle = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
            self.processes.append(middle)
            for host in self.hosts.values():
                others = [other for other in self.hosts.values() if other is not host]
                host.enter_namespaces(others, {other.address: f"host-{other.name}" for other in self.hosts.values()})
            switch = ["nsenter", "-t", str(middle.pid), "-n", "--", "ip", "link"]
            for host in self.hosts.values():
                host.connect(middle)
                if host.name == next(iter(self.hosts)):
                    quiet(*switch, "add", "switch", "type", "bridge")
                    quiet(*switch, "set", "switch", "up")
                quiet(*switch, "set", host.link + "m", "master", "switch", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def limit(self, host, rate):
        """What leaves a host goes at so much: 500mbit."""
        words = ["tc", "qdisc", "add", "dev", host.link, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        quiet("nsenter", "-t", str(host.holder_child()), "-n", "--", *words)

    def close(self):
        end(self.processes)
        shutil.rmtree(self.base, ignore_errors=True)


def end(processes):
    for process in reversed(processes):
        process.send_signal(signal.SIGKILL if process.args[0] == "unshare" else signal.SIGTERM)
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def can_make_namespaces():
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def quiet(*arguments):
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)


def wait(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"demo: waited {seconds} s for {what} in vain")
        time.sleep(0.05)
