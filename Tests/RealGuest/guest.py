"""The guest, as the operator of its hosts sees it: started, moved to and fro, shut down."""
import json
import os
import subprocess

from lan import BRIDGES, TAP

NAME = "db1"
MEMORY = 512
# A migration that takes longer than this on a busy machine waits for something that does not come.
PATIENCE = 900
# What the kernel says when a disk or the memory is not what it was.
COMPLAINTS = ("I/O error", "EXT4-fs error", "Kernel panic", "Oops", "BUG:", "general protection")


class CouldNotGoOn(Exception):
    """Something that the test needs failed; says nothing about the moves."""


class Guest:
    def __init__(self, fleet, images):
        self.fleet, self.images = fleet, images
        self.crossdock = fleet.crossdock
        self.here, self.there = "a", "b"
        self.moves = 0
        self.complaints = set()

    @property
    def host(self):
        return self.fleet.hosts[self.here]

    def start(self):
        for name in ("system.qcow2", "data.raw", "vmlinuz", "initrd"):
            subprocess.run(["cp", "--sparse=always", os.path.join(self.images, name), self.host.directory], check=True)
        where = self.host.directory
        self.console = os.path.join(where, "console.log")
        line = [
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", str(MEMORY), "-nodefaults", "-display", "none",
            "-kernel", f"{where}/vmlinuz", "-initrd", f"{where}/initrd",
            "-append", "console=ttyS0 quiet mitigations=off no_timer_check net.ifnames=0",
            "-drive", f"file={where}/system.qcow2,format=qcow2,if=virtio", "-drive", f"file={where}/data.raw,format=raw,if=virtio",
            "-netdev", f"tap,id=n0,ifname={TAP},script=no,downscript=no",
            "-device", "virtio-net-pci,netdev=n0,rombar=0,mac=52:54:00:5e:00:01", "-device", "virtio-rng-pci",
            "-serial", f"file:{self.console}",
        ]  # fmt: skip
        self.host.run(*self.host.start_guest(NAME, line))

    def move(self):
        """Moves it to the other host. Returns the report, if there is one, and what the command said."""
        source, target = self.here, self.there
        self.look_at_console()
        self.moves += 1
        report = os.path.join(self.host.directory, f"report-{self.moves}.json")
        network = ["--network", f"{BRIDGES[source]}={BRIDGES[target]}", "--report", report]
        words = self.host.migrate(NAME, self.fleet.hosts[target].seen_as, *network)
        done = self.host.run(*words, check=False, stderr=subprocess.STDOUT, timeout=PATIENCE)
        with open(os.path.join(self.host.directory, "migrate.log"), "a") as log:
            log.write(done.stdout)
        found = json.load(open(report)) if os.path.exists(report) else None
        if found and found["outcome"] == "migrated":
            self.here, self.there = target, source
            self.console = os.path.join(self.host.run_directory(NAME), "console.log")
        return found, done.stdout.strip()[-600:]

    def look_at_console(self):
        """Notes what the kernel has complained about. A console stays on its host when the guest leaves."""
        if os.path.exists(self.console):
            with open(self.console, errors="replace") as file:
                self.complaints.update(line.strip() for line in file if any(word in line for word in COMPLAINTS))

    def last_words(self):
        with open(self.console, errors="replace") as file:
            return file.read()[-600:]

    def listed(self, name):
        """What a host says of the guest."""
        host = self.fleet.hosts[name]
        rows = json.loads(host.run(self.crossdock, "guest", "list", "--json", "--state-dir", host.state).stdout)
        return next((row for row in rows if row["name"] == NAME), {"state": "unknown here", "process": None})

    def disks(self):
        """The paths of its images by their formats."""
        shown = self.host.run(self.crossdock, "guest", "show", NAME, "--json", "--state-dir", self.host.state).stdout
        return {disk["format"]: disk["path"] for disk in json.loads(shown)["disks"]}

    def shut_down(self):
        """By its power button. Returns the exit code and what the command said."""
        self.look_at_console()
        words = [self.crossdock, "guest", "stop", NAME, "--patience", "10m", "--state-dir", self.host.state]
        done = self.host.run(*words, check=False, stderr=subprocess.STDOUT)
        self.look_at_console()
        return done.returncode, done.stdout.strip()
