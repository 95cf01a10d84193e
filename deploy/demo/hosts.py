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
            # The shell is the first process of its namespace: it reaps what is left to it. What belongs to the other
            # host and to the outside is covered, and /etc/hosts is the host's own.
            hosts = os.path.join(host.directory, "hosts")
            with open(hosts, "w") as file:
                file.write(f"127.0.0.1 localhost\n{other.seen_as} host-{other.name}\n")
            script = (
                "mount --make-rprivate / && mount --bind {hosts} /etc/hosts && mount -t tmpfs none {other} && "
                "mkdir -p {base}/recordings && mount -t tmpfs none {base}/recordings && ip link set lo up && "
                "touch {mine}/.up && while :; do sleep 1000 & wait; done"
            ).format(hosts=hosts, other=other.directory, base=self.base, mine=host.directory)
            host.holder = subprocess.Popen(
                ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
            )
            self.processes.append(host.holder)
        for host in (self.a, self.b):
            wait("the namespaces", lambda: os.path.exists(os.path.join(host.directory, ".up")))
            wait("the namespaces", lambda: os.readlink(f"/proc/{self.middle.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
            link = f"xd{os.getpid() % 100000}{host.name}"
            quiet("ip", "link", "add", link, "type", "veth", "peer", "name", link + "m")
            quiet("ip", "link", "set", link, "netns", str(host.holder_child()))
            quiet("ip", "link", "set", link + "m", "netns", str(self.middle.pid))
            inside = ["nsenter", "-t", str(host.holder_child()), "-n", "--"]
            between = ["nsenter", "-t", str(self.middle.pid), "-n", "--"]
            gateway = self.b.seen_as if host is self.a else self.a.seen_as
            quiet(*inside, "ip", "address", "add", host.address + "/24", "dev", link)
            quiet(*inside, "ip", "link", "set", link, "up")
            quiet(*between, "ip", "address", "add", gateway + "/24", "dev", link + "m")
            quiet(*between, "ip", "link", "set", link + "m", "up")

    def name_of(self, host):
        """The name under which the other host reaches this one."""
        return f"host-{host.name}" if self.is_root else host.seen_as

    def close(self):
        if not self.is_root and hasattr(self, "b"):
            for host in (self.a, self.b):
                subprocess.run(
                    [self.crossdock, "guest", "stop", "web1", "--state-dir", host.state],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
                )
        for process in reversed(self.processes):
            process.send_signal(signal.SIGKILL if process.args[0] == "unshare" else signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.base, ignore_errors=True)


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
