#!/usr/bin/env python3
"""Migrates the harness's Linux guest from one QEMU to another, without Crossdock, and counts what becomes of it.

    plainqemu.py GUEST-FILES [--runs N] [--only VARIANT[,...]] [--load N] [--json FILE] [--list]

The guest is emulated, and crashes after a migration now and then. Two things are told apart: memory that differs between the
stopped source and the destination before the guest goes on, which QEMU has lost, and a crash of a guest whose memory is the
same, which comes from its clock or its devices. Another QEMU: deploy/qemu VERSION Tests/Faults/plainqemu.py ...
"""
import argparse
import collections
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import guest  # noqa: E402

TROUBLE = re.compile(r"Kernel panic|Oops|BUG:|general protection|segfault|traps:|FAIL 0|Call Trace")
# How long a guest that was moved is watched.
WATCHED = 3.0
# How long it may take until it writes again; a busy host gives it its turn late.
PATIENCE = 15.0
# After so many passes the rest is sent whatever it takes.
PASSES = 12


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    meaning: str
    processors: int = 1
    dirty: int = 12  # MiB that a process of the guest writes over and over
    bandwidth: int = 200_000_000
    accelerator: str = "tcg"
    append: str = ""
    options: tuple = ()
    converges: bool = False  # auto-converge
    mirrors: bool = False  # the disk is copied by a block job to an NBD export of the destination's QEMU


VARIANTS = [
    Variant("plain", "memory only, both QEMUs have the disk; one processor"),
    Variant("idle", "the same, nothing but records is written", dirty=0),
    Variant("slow", "the same as plain, ten passes and more", bandwidth=30_000_000),
    Variant("two-processors", "two processors, each in a thread", processors=2),
    Variant("one-thread", "two processors in one thread", processors=2, accelerator="tcg,thread=single"),
    Variant("auto-converge", "slow, and QEMU holds the guest back", bandwidth=30_000_000, converges=True),
    Variant("clock-pm", "the guest's clock is the ACPI timer", append="clocksource=acpi_pm tsc=unstable"),
    Variant("clock-tsc", "the guest's clock is the processor's counter", append="clocksource=tsc tsc=reliable"),
    Variant("icount", "time is counted in instructions", options=("-icount", "shift=2,sleep=on")),
    Variant("mirror", "the disk is copied by a block job meanwhile", mirrors=True),
]  # fmt: skip
BY_NAME = {variant.name: variant for variant in VARIANTS}


class Emulator:
    """A QEMU with a monitor."""

    def __init__(self, line, monitor):
        self.process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 20
        while True:
            self.connection = socket.socket(socket.AF_UNIX)
            try:
                self.connection.connect(monitor)
                break
            except OSError:
                self.connection.close()
                if time.monotonic() > limit or self.process.poll() is not None:
                    self.close()
                    raise guest.GuestFailed("QEMU does not start") from None
                time.sleep(0.02)
        self.connection.settimeout(60)
        self.lines = self.connection.makefile("r")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.connection.sendall((json.dumps({"execute": command, "arguments": arguments}) + "\n").encode())
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise guest.GuestFailed(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self):
        self.connection.close()
        self.process.kill()
        self.process.wait()


def until(what, condition, seconds=90):
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise guest.GuestFailed(f"waited {seconds} s for {what} in vain")
        time.sleep(0.01)


def words(path):
    try:
        with open(path, encoding="latin-1") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def command(variant, files, disk, console, monitor):
    line = guest.linux_command(files, disk, console, monitor)
    line[line.index("-machine") + 1] = guest.MACHINE
    line[line.index("-append") + 1] += f" xd.dirty={variant.dirty} panic=-1 {variant.append}"
    return line + ["-accel", variant.accelerator, "-smp", str(variant.processors), *variant.options]


def save(variant, files, directory):
    """Boots the guest and saves it with its load under way."""
    disk, console, monitor, state = (os.path.join(directory, name) for name in ("disk", "console", "m", "state"))
    guest.LINUX.make_disk(disk)
    emulator = Emulator(command(variant, files, disk, console, monitor), monitor)
    try:
        until("the guest's records", lambda: words(console).count("REC ") > 50, 180)
        emulator("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        emulator("stop")
        emulator("migrate", uri=f"exec:cat > {state}")
        until("the saved state", lambda: emulator("query-migrate").get("status") == "completed")
    finally:
        emulator.close()
    return state, disk


def mirror(source, target, directory):
    """Copies the disk; returns the job's name once both are the same."""
    path = os.path.join(directory, "nbd")
    device = target("query-block")[0]["device"]
    target("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    target("nbd-server-add", device=device, writable=True)
    server = {"type": "unix", "path": path}
    source("blockdev-add", driver="nbd", **{"node-name": "copy", "server": server, "export": device})
    source("blockdev-mirror", **{"job-id": "copy-job", "device": source("query-block")[0]["device"], "target": "copy", "sync": "full"})
    until("the copy of the disk", lambda: source("query-block-jobs")[0]["ready"])
    return "copy-job"


def compare(source, target, directory):
    """How many pages of memory differ."""
    contents = []
    for name, emulator in (("s", source), ("t", target)):
        path = os.path.join(directory, f"memory-{name}")
        emulator("pmemsave", val=0, size=guest.LINUX.memory << 20, filename=path)
        with open(path, "rb") as file:
            contents.append(file.read())
        os.unlink(path)
    first, second = contents
    return sum(first[at : at + 4096] != second[at : at + 4096] for at in range(0, len(first), 4096))


def migrate(variant, files, state, saved_disk, directory):
    """One migration. Returns (pages that differ, passes, trouble)."""
    paths = {name: os.path.join(directory, name) for name in ("disk-s", "disk-t", "con-s", "con-t", "m-s", "m-t", "stream")}
    guest.copy_sparse(saved_disk, paths["disk-s"])
    other = paths["disk-t"] if variant.mirrors else paths["disk-s"]
    if variant.mirrors:
        with open(other, "wb") as file:
            file.truncate(guest.LINUX.disk << 20)
    emulators = []
    try:
        line = command(variant, files, paths["disk-s"], paths["con-s"], paths["m-s"])
        source = Emulator([*line, "-incoming", f"exec:cat {state}"], paths["m-s"])
        emulators.append(source)
        until("the saved guest", lambda: source("query-status")["status"] in ("paused", "running"))
        source("cont")
        until("the guest's records", lambda: words(paths["con-s"]).count("REC ") > 30)
        line = command(variant, files, other, paths["con-t"], paths["m-t"])
        target = Emulator([*line, "-S", "-incoming", "defer"], paths["m-t"])
        emulators.append(target)
        job = mirror(source, target, directory) if variant.mirrors else None
        target("migrate-incoming", uri=f"unix:{paths['stream']}")
        names = ["pause-before-switchover"] + ["auto-converge"] * variant.converges
        source("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])
        source("migrate-set-parameters", **{"max-bandwidth": variant.bandwidth, "downtime-limit": 300})
        source("migrate", uri=f"unix:{paths['stream']}")

        def status():
            known = source("query-migrate")
            if known.get("status") in ("failed", "cancelled"):
                raise guest.GuestFailed(f"the migration ended: {known}")
            return known

        def is_at_switchover():
            known = status()
            # A guest that is too quick for the line moves all the same.
            if known.get("ram", {}).get("dirty-sync-count", 0) >= PASSES:
                source("migrate-set-parameters", **{"downtime-limit": 30000})
            return known.get("status") == "pre-switchover"

        until("the switchover", is_at_switchover)
        if job:
            source("block-job-cancel", device=job)
            until("the end of the copy", lambda: not source("query-block-jobs"))
            target("nbd-server-stop")
        passes = status().get("ram", {}).get("dirty-sync-count", 0)
        source("migrate-continue", state="pre-switchover")
        until("the end of the migration", lambda: status().get("status") == "completed")
        until("the loaded guest", lambda: target("query-status")["status"] == "paused")
        pages = compare(source, target, directory)
        target("cont")
        limit = time.monotonic() + WATCHED
        trouble = ""
        while not trouble and time.monotonic() < limit:
            found = TROUBLE.search(words(paths["con-t"]))
            if found or target.process.poll() is not None:
                time.sleep(0.3)  # the rest of its last words
                trouble = next((one for one in words(paths["con-t"]).splitlines() if TROUBLE.search(one)), "QEMU ended")
            time.sleep(0.05)
        limit = time.monotonic() + PATIENCE
        while not trouble and words(paths["con-t"]).count("REC ") < 3:
            if time.monotonic() > limit:
                trouble = "it stands still"
            time.sleep(0.05)
        return pages, passes, trouble
    finally:
        for emulator in emulators:
            emulator.close()
        for path in paths.values():
            if os.path.exists(path):
                os.unlink(path)


def measure(variant, files, runs):
    """Migrates over and over. Returns what was counted."""
    counts = collections.Counter()
    passes, words_seen = [], []
    with tempfile.TemporaryDirectory(prefix="xf-plain-") as directory:
        state, disk = save(variant, files, directory)
        for number in range(runs):
            try:
                pages, rounds, trouble = migrate(variant, files, state, disk, directory)
            except guest.GuestFailed as error:
                counts["not made"] += 1
                words_seen.append(str(error))
                continue
            passes.append(rounds)
            counts["made"] += 1
            counts["memory lost"] += pages > 0
            counts["crashed, memory lost"] += pages > 0 and bool(trouble)
            counts["crashed, memory whole"] += pages == 0 and bool(trouble)
            if pages or trouble:
                words_seen.append(f"{pages} pages differ after {rounds} passes; {trouble or 'it goes on'}")
                print(f"  {variant.name} {number + 1}: {words_seen[-1]}", flush=True)
    return {"variant": variant.name, "passes": sum(passes) / max(1, len(passes)), "seen": words_seen, **counts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="GUEST-FILES", nargs="?", help="the directory with vmlinuz and initrd")
    parser.add_argument("--runs", type=int, default=20, help="migrations of each variant")
    parser.add_argument("--only", metavar="VARIANT[,...]")
    parser.add_argument("--load", type=int, default=0, help="processes that keep the host busy meanwhile")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--list", action="store_true", help="show the variants")
    options = parser.parse_args()
    if options.list or not options.files:
        for variant in VARIANTS:
            print(f"{variant.name:16} {variant.meaning}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [BY_NAME[name] for name in options.only.split(",")] if options.only else VARIANTS
    version = ".".join(str(part) for part in guest.emulator_version())
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load)]
    results = []
    try:
        print(f"QEMU {version}, {options.load} busy processes beside it")
        print("| variant | migrations | passes | memory lost | crashed with lost memory | crashed with whole memory | not made |")
        print("|---" * 7 + "|")
        for variant in chosen:
            one = measure(variant, os.path.abspath(options.files), options.runs)
            results.append({"qemu": version, "load": options.load, **one})
            values = [one.get(key, 0) for key in ("memory lost", "crashed, memory lost", "crashed, memory whole", "not made")]
            cells = [one["variant"], one.get("made", 0), f"{one['passes']:.1f}", *values]
            print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
        if options.json:
            with open(options.json, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
