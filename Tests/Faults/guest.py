"""The guests: a Linux that was booted once and saved, with its disk and its console, from where each run starts; and one
without an operating system, which boots in no time.
"""
import dataclasses
import json
import os
import re
import socket
import subprocess
import time

NAME = "web1"
INTERVAL = 5000  # microseconds between two records
RECORD = 4096
EMULATOR = "qemu-system-x86_64"
# The QEMUs of the hosts a and b, "7.2:10.0", when they are not the system's; that of a is then what the harness runs in.
VERSIONS = os.environ.get("CROSSDOCK_QEMU", ":").split(":")
IS_MIXED = VERSIONS[0] != VERSIONS[1]
MACHINE = "pc-i440fx-7.2" if IS_MIXED else "pc"


def emulator_version():
    """The version of host a's QEMU: (10, 0)."""
    words = subprocess.run([EMULATOR, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(int(part) for part in re.search(r"version (\d+)\.(\d+)", words).groups())


@dataclasses.dataclass(frozen=True)
class Kind:
    """`memory`, `disk` and `data`, what is not zero of the disk's second half, in MiB. `mark` is printed by every boot."""

    memory: int
    disk: int
    data: int
    mark: str

    @property
    def slots(self):
        """The log goes round after so many records."""
        return (self.disk << 20) // 2 // RECORD

    def make_disk(self, path):
        with open(path, "wb") as file:
            file.truncate(self.disk << 20)
            file.seek(self.disk << 19)
            file.write(os.urandom(self.data << 20))


LINUX = Kind(80, 64, 8, "READY")
IDLE = Kind(32, 16, 4, "BOOT")


class GuestFailed(Exception):
    """The guest could not be made."""


def _common(kind, console, monitor):
    """With one processor and a plain model, a look at it takes Crossdock little time."""
    return [
        EMULATOR, "-machine", f"{MACHINE},accel=tcg", "-cpu", "qemu64", "-m", str(kind.memory), "-nodefaults",
        "-display", "none", "-serial", f"file:{console}",
        "-chardev", f"socket,id=watch,path={monitor},server=on,wait=off", "-mon", "chardev=watch,mode=control",
    ]  # fmt: skip


def linux_command(files, disk, console, monitor):
    """QEMU's command line."""
    return _common(LINUX, console, monitor) + [
        "-no-reboot", "-kernel", f"{files}/vmlinuz", "-initrd", f"{files}/initrd",
        "-append", f"console=ttyS0 quiet no_timer_check xd.interval={INTERVAL}", "-drive", f"file={disk},format=raw,if=virtio",
    ]  # fmt: skip


def idle_command(kernel, disk, console, monitor):
    """An image that was opened for writing by name does not keep a QEMU that has given it up from going on."""
    drive = f"file={disk},format=raw,if=ide,auto-read-only=off"
    return _common(IDLE, console, monitor) + ["-kernel", kernel, "-drive", drive]


def copy_sparse(source, target):
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


class SavedGuest:
    """Boots the guest and saves it: `state`, `disk` and `console` belong together."""

    def __init__(self, directory, files):
        self.files = files
        self.disk, self.state, console = (os.path.join(directory, name) for name in ("disk0.raw", "state", "console"))
        LINUX.make_disk(self.disk)
        monitor = os.path.join(directory, "m.sock")
        line = linux_command(files, self.disk, console, monitor)
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._save(process, monitor, console)
        finally:
            process.terminate()
            process.wait()
        with open(console, encoding="latin-1") as file:
            self.console = file.read()

    def _save(self, process, monitor, console):
        limit = time.monotonic() + 120
        while not os.path.exists(console) or open(console, encoding="latin-1").read().count("REC ") < 20:
            if process.poll() is not None or time.monotonic() > limit:
                raise GuestFailed("the guest does not boot")
            time.sleep(0.05)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(monitor)
            lines = connection.makefile("r")
            lines.readline()

            def execute(name, **arguments):
                connection.sendall((json.dumps({"execute": name, "arguments": arguments}) + "\n").encode())
                while True:
                    answer = json.loads(lines.readline())
                    if "return" in answer or "error" in answer:
                        return answer.get("return")

            execute("qmp_capabilities")
            execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            # The guest runs until all is saved, so that it runs again once it was loaded.
            execute("migrate", uri=f"exec:cat > {self.state}")
            while (status := execute("query-migrate").get("status")) != "completed":
                if status in ("failed", "cancelled") or time.monotonic() > limit:
                    raise GuestFailed("the guest could not be saved")
                time.sleep(0.02)
