"""A host in a virtual machine: a Debian with systemd, emulated, with a program of one's own as its operator.

Commands go through a virtio-serial port, so they need neither network nor login. What is asked of the machine while it
starts again is asked when it is up.
"""
import base64
import itertools
import json
import os
import socket
import subprocess
import time

# An emulated machine on a busy one is slow; whoever waits longer than this waits in vain.
PATIENCE = 900
AGENT = """#!/bin/sh
# One line is one command, and its answer one line: number, exit code, output; scripts and outputs in base64.
modprobe virtio_console
port=
until [ "$port" ]; do
    port=$(grep -l -x crossdock.test /sys/class/virtio-ports/*/name 2>/dev/null | cut -d / -f 5)
    [ "$port" ] || sleep 0.2
done
exec 3<>"/dev/$port"
printf '\\nready %s\\n' "$(cat /proc/sys/kernel/random/boot_id)" >&3
while read -r number script <&3; do
    answer=$(sh -c "$(echo "$script" | base64 -d)" 2>&1 </dev/null 3>&-)
    code=$?
    printf '%s %s %s\\n' "$number" "$code" "$(printf %s "$answer" | base64 -w 0)" >&3
done
"""
AGENT_UNIT = """[Unit]
Description=Carries out what the test asks for
[Service]
ExecStart=/usr/local/bin/test-agent
# Guests that are started by a command outlive it.
KillMode=process
"""
# What a Debian does for people at a screen, and its housekeeping, only takes time here.
UNWANTED = (
    "getty@tty1.service", "serial-getty@ttyS0.service", "systemd-logind.service", "systemd-update-utmp.service",
    "e2scrub_reap.service", "e2scrub_all.timer", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
    "fstrim.timer", "systemd-pstore.service", "systemd-binfmt.service", "systemd-networkd.service", "systemd-networkd.socket",
)  # fmt: skip
UNWANTED_MODULES = (
    "kvm", "kvm_amd", "kvm_intel", "aesni_intel", "ghash_clmulni_intel", "crct10dif_pclmul", "crc32_pclmul", "sha512_ssse3",
    "sha256_ssse3", "sha1_ssse3", "acpi_cpufreq", "powernow_k8", "psmouse", "pcspkr", "serio_raw", "rapl", "sg", "i2c_piix4",
)  # fmt: skip
NETWORK_UNIT = """[Unit]
Description=The network of the test
Wants=network.target
Before=network.target network-online.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip address add 10.0.2.15/24 dev eth0
ExecStart=ip link set eth0 up
"""
# What the journal has before a hard reset is there after it.
JOURNAL = """[Journal]
Storage=persistent
SyncIntervalSec=0
RateLimitIntervalSec=0
"""


class MachineFailed(Exception):
    """The machine did not do what the test needs from it; says nothing about the units."""


def wait(what, condition, seconds=PATIENCE):
    """Returns the first true value of the condition."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise MachineFailed(f"waited {seconds} s for {what} in vain")
        time.sleep(0.2)


class Disk:
    """The machine's disk: a copy of the base image, with files of one's own, written without mounting it."""

    def __init__(self, base, path):
        self.path = path
        self.commands = []
        self.made = set()
        subprocess.run(["cp", "--sparse=always", base, path], check=True)
        os.chmod(path, 0o600)

    def add(self, source, target):
        self._parents(target)
        self.commands += [f"rm {target}", f"write {source} {target}"]

    def add_text(self, text, target, mode=0o644):
        source = f"{self.path}.{len(self.commands)}"
        with open(source, "w") as file:
            file.write(text)
        os.chmod(source, mode)
        self.add(source, target)

    def link(self, target, to):
        self._parents(target)
        self.commands.append(f"symlink {target} {to}")

    def _parents(self, target):
        parent = os.path.dirname(target)
        if parent == "/" or parent in self.made:
            return
        self._parents(parent)
        self.made.add(parent)
        self.commands.append(f"mkdir {parent}")

    def write(self):
        script = f"{self.path}.commands"
        with open(script, "w") as file:
            file.write("\n".join(self.commands) + "\n")
        subprocess.run(["debugfs", "-w", "-f", script, self.path], check=True, capture_output=True)
        # It does not say by its exit code that a command failed.
        written = [command.split()[2] for command in self.commands if command.startswith("write")]
        for target in written:
            answer = subprocess.run(["debugfs", "-R", f"stat {target}", self.path], capture_output=True, text=True, check=True)
            if "Type: regular" not in answer.stdout:
                raise MachineFailed(f"{target} could not be written into the machine's disk: {answer.stderr}")


class Machine:
    def __init__(self, directory, images, disk, forwards, memory=1536):
        self.directory, self.images, self.disk = directory, images, disk
        self.forwards, self.memory = forwards, memory
        self.numbers = itertools.count(1)
        self.process = None
        self.boot_id = None
        self.pending = b""

    def prepare(self):
        """Puts what the test needs itself onto the disk."""
        self.disk.add_text(AGENT, "/usr/local/bin/test-agent", 0o755)
        self.disk.add_text(AGENT_UNIT, "/etc/systemd/system/test-agent.service")
        self.disk.link("/etc/systemd/system/multi-user.target.wants/test-agent.service", "../test-agent.service")
        self.disk.add_text(NETWORK_UNIT, "/etc/systemd/system/test-network.service")
        self.disk.link("/etc/systemd/system/network-online.target.wants/test-network.service", "../test-network.service")
        for unit in UNWANTED:
            self.disk.link(f"/etc/systemd/system/{unit}", "/dev/null")
        self.disk.add_text("machine\n", "/etc/hostname")
        self.disk.add_text(JOURNAL, "/etc/systemd/journald.conf.d/test.conf")
        self.disk.write()

    def start(self, second_disk):
        sockets = {name: os.path.join(self.directory, f"{name}.sock") for name in ("agent", "qmp")}
        network = "user,id=n0," + ",".join(f"hostfwd=tcp:{outside}-:{inside}" for outside, inside in self.forwards)
        command = [
            "qemu-system-x86_64", "-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max",
            "-smp", str(max(2, min(4, os.cpu_count()))), "-m", str(self.memory), "-nodefaults", "-display", "none",
            "-kernel", os.path.join(self.images, "vmlinuz"), "-initrd", os.path.join(self.images, "initrd"),
            "-append", f"console=ttyS0 quiet audit=1 mitigations=off panic=-1 net.ifnames=0 module_blacklist={','.join(UNWANTED_MODULES)}",
            "-drive", f"file={self.disk.path},format=raw,if=virtio,cache=writeback",
            "-drive", f"file={second_disk},format=raw,if=virtio,cache=writeback",
            "-serial", f"file:{self.directory}/console.log", "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={sockets['agent']},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=crossdock.test",
            "-qmp", f"unix:{sockets['qmp']},server=on,wait=off",
            "-netdev", network, "-device", "virtio-net-pci,netdev=n0",
        ]  # fmt: skip
        with open(os.path.join(self.directory, "machine.log"), "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait("the machine's sockets", lambda: self._is_alive() and all(map(os.path.exists, sockets.values())), 30)
        self.port, self.monitor = (self._connect(sockets[name]) for name in ("agent", "qmp"))
        self.monitor_file = self.monitor.makefile("rw")
        self.monitor_file.readline()
        self._ask_monitor("qmp_capabilities")
        self._wait_for_boot()

    def _is_alive(self):
        if self.process.poll() is not None:
            with open(os.path.join(self.directory, "machine.log")) as log:
                raise MachineFailed(f"the machine's QEMU has ended: {log.read().strip()}")
        return True

    def _connect(self, path):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return connection

    def _ask_monitor(self, name):
        self.monitor_file.write(json.dumps({"execute": name}) + "\n")
        self.monitor_file.flush()
        while True:
            answer = json.loads(self.monitor_file.readline())
            if "return" in answer:
                return
            if "error" in answer:
                raise MachineFailed(f"{name}: {answer['error']}")

    def _line(self, seconds):
        end = time.monotonic() + seconds
        while b"\n" not in self.pending:
            left = end - time.monotonic()
            if left <= 0:
                self._is_alive()
                raise MachineFailed(f"the machine said nothing for {seconds} s; see {self.directory}/console.log")
            self.port.settimeout(left)
            try:
                data = self.port.recv(65536)
            except TimeoutError:
                continue
            if not data:
                self._is_alive()
                raise MachineFailed("the machine's QEMU has closed its port")
            self.pending += data
        line, self.pending = self.pending.split(b"\n", 1)
        return line.decode()

    def _wait_for_boot(self):
        """Until the system is up. A kernel that QEMU's emulation has locked up (TCG with several processors) is reset again."""
        console = os.path.join(self.directory, "console.log")
        before = os.path.getsize(console) if os.path.exists(console) else 0
        end = time.monotonic() + PATIENCE
        while True:
            try:
                words = self._line(10).split()
            except MachineFailed:
                with open(console, "rb") as file:
                    file.seek(before)
                    if b"soft lockup" in file.read():
                        before = os.path.getsize(console)
                        self._ask_monitor("system_reset")
                if time.monotonic() > end:
                    raise
                continue
            if len(words) == 2 and words[0] == "ready" and words[1] != self.boot_id:
                self.boot_id = words[1]
                return

    def reset(self):
        """As if somebody had pulled the plug and put it in again: nothing is told to the system."""
        self._ask_monitor("system_reset")
        self._wait_for_boot()

    def run(self, script, check=True, seconds=PATIENCE):
        """Carries out a script of the shell; returns its output, or with `check=False` exit code and output."""
        number = next(self.numbers)
        self.port.settimeout(None)
        self.port.sendall(f"{number} {base64.b64encode(script.encode()).decode()}\n".encode())
        while True:
            words = self._line(seconds).split()
            if len(words) in (2, 3) and words[0] == str(number):
                break
        code, output = int(words[1]), base64.b64decode(words[2] if len(words) == 3 else "").decode(errors="replace")
        if not check:
            return code, output
        if code != 0:
            raise MachineFailed(f"{script!r} ended with code {code}: {output}")
        return output

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
