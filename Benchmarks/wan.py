#!/usr/bin/env python3
"""Moves over long lines: Crossdock next to QEMU's own TLS migration, in turn, through a line with a round trip, windows, rates and resets.

    wan.py CROSSDOCK [--lines open,1gbit,100mbit,resets,four,debian] [--rtt 0,20] [--runs N] [--disk MIB] [--memory MIB] [--qemu 7.2,10.0]
           [--only ours|native] [--resume] [--results FILE]
    wan.py --self-test                      whether the line itself does what it says
    wan.py --table | --markdown | --svg DIRECTORY | --write docs/performance.md         what was measured so far

The disk and the memory of the guest, which is firmware only, are random bytes, or, for the line "debian", a file system with files of this
machine's system and the memory of a Linux that has read them; everything is in tmpfs on this machine. The line is `Line/line.c`; the same file says what its settings mean. Each result is appended to FILE (.build/wan.jsonl) as a line of JSON when it is
there, so that a run that was interrupted can be resumed: --resume skips what is there of this revision.

A rate is that of the payload after the first 2 s, or in the second half of what takes less than 4 s, by what the line handed on. The
processor seconds are those of both QEMUs and both agents while disks or memory were sent.

Every line has its round trips, disk and memory (LINES); --rtt, --disk and --memory replace them. Needs root for a network of its own, and
otherwise takes loopback addresses that nobody else should use.
"""
import argparse
import contextlib
import dataclasses
import glob
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True
import line as lines  # noqa: E402
import plot  # noqa: E402
from line import Line, in_own_network  # noqa: E402
from moves import REPOSITORY, Host, MoveFailed, Native, Place, Side, all_at_once, available_mebibytes, revision, say  # noqa: E402
from warm import WarmMemory  # noqa: E402

GUEST = os.path.join(REPOSITORY, ".cache", "guest")
RESULTS = os.path.join(REPOSITORY, ".build", "wan.jsonl")
BEGIN, END = "<!-- wan -->", "<!-- /wan -->"
# Seconds that QEMU tries to reach its NBD server again, on lines with resets.
PATIENCE = 30
# MiB after which the resets begin: those of a rehearsal are less, and a move that is cut off before its copy began is not what is measured.
RESETS_FROM = 8


@dataclasses.dataclass(frozen=True)
class Kind:
    """A line, and what is moved over it."""

    text: str
    rtts: tuple
    disk: int
    memory: int
    window: int = 0  # KiB
    rate: int = 0  # Mbit/s
    resets: float = 0  # seconds
    guests: int = 1
    content: str = "random"
    contestants: tuple = ("ours", "native")


LINES = {
    "open": Kind("no limit but the processors", (0, 1, 20, 50, 100, 200), 4096, 3072),
    "1gbit": Kind("1 Gbit/s, windows of 4 MiB", (0, 100), 512, 256, 4096, 1000),
    "100mbit": Kind("100 Mbit/s, windows of 4 MiB", (0, 100), 512, 256, 4096, 100),
    "resets": Kind("a connection is reset every 2 s", (0, 100), 4096, 512, resets=2),
    "four": Kind("four guests, 1 Gbit/s, windows of 4 MiB", (20,), 512, 256, 4096, 1000, guests=4),
    "debian": Kind(
        "a Debian's disk and memory, 100 Mbit/s, windows of 4 MiB", (20,), 512, 256, 4096, 100, content="debian",
        contestants=("ours", "ours-off", "native", "native-zstd")),
}

# Who moves the guests; four of them one after the other and all at once.
CONTESTANTS = ("ours", "native")
# What contestants besides these say.
OPTIONS = {"ours-off": ("--compress", "off")}
CAPABILITIES = {"native-zstd": (("multifd",), {"multifd_compression": "zstd", "multifd_channels": 2})}
NAMES = {"ours": "Crossdock", "ours-off": "Crossdock, `--compress off`", "native": "QEMU alone", "native-zstd": "QEMU alone, multifd with zstd"}

# What a Debian's disk has: a program's libraries, its documentation, its data.
TREES = ("/usr/bin", "/usr/lib/python3", "/usr/share")
# The demo's Linux with other work: its disk is there when that begins, and its first process never ends.
INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc none /proc
$b mount -t devtmpfs none /dev 2>/dev/null
$b mount -t sysfs none /sys
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    [ ! -e /modules/$module.ko ] || $b insmod /modules/$module.ko
done
until [ -b /dev/vda ]; do $b usleep 20000; done
{work}
while :; do $b sleep 1000; done
"""


def make_initrd(root, guest, work):
    """The initrd of the demo's guest, and what is in `root`, which does that work: what comes later takes the place of what came before."""
    os.makedirs(root, exist_ok=True)
    with open(root + "/init", "w", encoding="ascii") as file:
        file.write(INIT.replace("{work}", work))
    os.chmod(root + "/init", 0o755)
    packed = subprocess.run(
        "find . | cpio -o -H newc --quiet | gzip -1", shell=True, cwd=root, check=True, stdout=subprocess.PIPE).stdout
    with open(os.path.join(guest, "initrd"), "rb") as file, open(root + ".initrd", "wb") as both:
        both.write(file.read() + packed)
    return root + ".initrd"


def debian_disk(path, mebibytes, directory):
    """A file system of which three quarters are files of this system."""
    root = os.path.join(directory, "files")
    os.makedirs(root)
    left = mebibytes * 3 << 18
    for tree in TREES:
        for place, _, names in os.walk(tree):
            for name in names:
                source = os.path.join(place, name)
                if not os.path.isfile(source) or os.path.islink(source) or os.path.getsize(source) > 16 << 20 or os.path.getsize(source) > left:
                    continue
                target = root + source
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copyfile(source, target)
                left -= -(-os.path.getsize(source) // 4096) * 4096
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, path, f"{mebibytes}M"], check=True)
    shutil.rmtree(root)


def debian_memory(path, mebibytes, disk, place):
    """The memory of a Linux that has read the disk as far as it fits."""
    initrd = make_initrd(os.path.join(place.directory, "reader"), GUEST, "$b cat /dev/vda > /dev/null\necho READ > /dev/ttyS0")
    words = ["qemu-system-x86_64", "-machine", "pc,accel=tcg,memory-backend=ram0", "-m", f"{mebibytes}M", "-nodefaults", "-display", "none"]
    words += ["-object", f"memory-backend-file,id=ram0,size={mebibytes}M,mem-path={path},share=on", "-kernel", os.path.join(GUEST, "vmlinuz")]
    words += ["-initrd", initrd, "-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests", "-serial", "stdio"]
    words += ["-drive", f"file={disk},format=raw,if=virtio,readonly=on"]
    with subprocess.Popen(place.command(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as guest:
        for line in guest.stdout:
            if "READ" in line:
                break
        else:
            raise RuntimeError("the Linux that was to fill the memory has ended")
        guest.kill()


def random_file(path, mebibytes):
    with open(path, "wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))


class Bench:
    """One version of QEMU, one size of guest."""

    def __init__(self, place, disk, memory, guests, content):
        self.place, self.disk, self.memory = place, disk, memory
        # Not inside of the directory by whose name its processes are known.
        self.disks, self.memories = [], []
        for number in range(guests):
            self.disks.append(os.path.join(place.directory, f"disk-{number}"))
            self.memories.append(os.path.join(place.directory, f"memory-{number}"))
            if content == "debian":
                debian_disk(self.disks[-1], disk, place.directory)
                debian_memory(self.memories[-1], memory, self.disks[-1], place)
            else:
                random_file(self.disks[-1], disk)
                random_file(self.memories[-1], memory)

    def close(self):
        for path in self.disks + self.memories:
            os.unlink(path)

    def machine(self, number):
        """The command line of a guest; what waits for one has memory of its own."""

        def words(image, _, waits):
            memory = f"memory-backend-ram,id=ram0,size={self.memory}M"
            if not waits:
                memory = f"memory-backend-file,id=ram0,size={self.memory}M,mem-path={self.memories[number]},share=on"
            line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg,memory-backend=ram0", "-m", f"{self.memory}M", "-object", memory]
            line += ["-nodefaults", "-display", "none", "-blockdev"]
            line += [f"driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename={image}", "-device", "virtio-blk-pci,drive=disk0,id=vd0"]
            return line

        return words

    def take_back(self):
        """The guests do not write: their old images are as they were, under the names that the fence gave them."""
        for disk in self.disks:
            for path in glob.glob(disk + ".released-*"):
                os.rename(path, disk)

    def line(self, kind, rtt, pairs):
        return Line(self.place.directory, pairs, rtt=rtt, window=kind.window, rate=kind.rate, resets=kind.resets, reset_from=RESETS_FROM)

    # The contestants. Each gives the moves, the line's counts, and the pair of the line for the disk and for the memory of each.

    def ours(self, kind, rtt, at_once, who):
        hosts = [Host(self.place, "a"), Host(self.place, "b")]
        names = [f"g{number}" for number in range(kind.guests)]
        try:
            with self.line(kind, rtt, hosts[1].ports) as line:
                line.is_open()
                for number, name in enumerate(names):
                    hosts[0].start(name, self.machine(number)(self.disks[number], None, False))
                self.settle()
                moves, total = self.go([lambda name=name: hosts[0].migrate(name, hosts[1], OPTIONS.get(who, ()), "1h") for name in names], at_once)
                return moves, total, line.counts(), [(1, 0)] * kind.guests, line.processor_seconds()
        finally:
            for host in hosts:
                for name in names:
                    host.stop_guest(name)
                host.close()
                shutil.rmtree(host.directory, ignore_errors=True)
            self.take_back()

    def native(self, kind, rtt, at_once, who):
        more = CAPABILITIES.get(who, ((), {}))
        guests = [Native(self.place, f"n{number}", self.machine(number), self.disk, number, *more) for number in range(kind.guests)]
        try:
            with self.line(kind, rtt, [pair for guest in guests for pair in guest.pairs(Side("b"))]) as line:
                for number, guest in enumerate(guests):
                    guest.lent.add(self.disks[number])
                    guest.start(self.disks[number])
                others = [guest.prepare() for guest in guests]
                line.is_open()
                self.settle()
                patience = PATIENCE if kind.resets else 0
                moves, total = self.go([lambda guest=guest, other=other: guest.move(other, patience) for guest, other in zip(guests, others)], at_once)
                pairs = [(2 * number, 2 * number + 1) for number in range(kind.guests)]
                return moves, total, line.counts(), pairs, line.processor_seconds()
        finally:
            for guest in guests:
                guest.close()

    def settle(self):
        """Firmware has found nothing to start."""
        time.sleep(1.5)

    @staticmethod
    def go(works, at_once):
        began = time.monotonic()
        moves = all_at_once(works) if at_once else [work() for work in works]
        return moves, time.monotonic() - began

    def measure(self, who, kind, rtt, at_once):
        moves, total, counts, pairs, line_seconds = getattr(self, who.partition("-")[0])(kind, rtt, at_once, who)
        if kind.guests > 1:
            payload = sum(sum(move.payloads.values()) for move in moves)
            return {
                "total_s": total, "mib_s": payload / total / (1 << 20), "pauses_ms": [move.figures["pause_ms"] for move in moves],
                "totals_s": [move.figures["total_s"] for move in moves], "line_cpu_s": line_seconds,
            }  # fmt: skip
        move, (disk, memory) = moves[0], pairs[0]
        result = dict(move.figures)
        for name, pair in (("disk", disk), ("memory", memory)):
            payload = move.payloads[name]
            result[f"{name}_mib"] = payload / (1 << 20)
            if name in move.spans:
                rate, skipped = counts.rate(pair, *move.spans[name], payload)
                result[f"{name}_mib_s"], result[f"{name}_skipped_s"] = rate / (1 << 20), skipped
                begin, end = move.spans[name]
                result[f"{name}_line_mib"] = (counts.at(end, pair) - counts.at(begin, pair)) / (1 << 20)
            if name in move.processors and payload:
                result[f"{name}_cpu_s_per_gib"] = move.processors[name] / (payload / (1 << 30))
        result.update(line_cpu_s=line_seconds, resets=counts.resets, starvations=counts.starvations)
        return result


# The file of results


def identity(row):
    """What two results have in common that measured the same."""
    names = ("bench", "revision", "qemu", "line", "who", "at_once", "rtt", "window_kib", "rate_mbit", "resets_s", "disk", "memory", "guests", "run")
    return tuple(row.get(name) for name in names)


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(text) for text in file if text.strip()]
    except FileNotFoundError:
        return []


def append(path, row):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(rounded(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rounded(value):
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def plan(options):
    """Every measurement that is asked for, in the order in which contestants take turns."""
    for qemu in options.qemu:
        for name in options.lines:
            kind = LINES[name]
            disk, memory = options.disk or kind.disk, options.memory or kind.memory
            for rtt in options.rtt if options.rtt is not None else kind.rtts:
                for run in range(options.runs):
                    for at_once in (False, True) if kind.guests > 1 else (False,):
                        for who in kind.contestants if options.only is None else (options.only,):
                            yield {
                                "bench": "wan", "revision": options.revision, "qemu": qemu, "line": name, "who": who, "at_once": at_once, "rtt": rtt,
                                "window_kib": kind.window, "rate_mbit": kind.rate, "resets_s": kind.resets, "disk": disk, "memory": memory,
                                "guests": kind.guests, "run": run,
                            }  # fmt: skip


def summary(row):
    if "error" in row:
        return f"FAILED: {row['error']}"
    if "pauses_ms" in row:
        return f"{row['total_s']:.1f} s, {row['mib_s']:.0f} MiB/s, pauses {', '.join(f'{one:.0f}' for one in row['pauses_ms'])} ms"
    cpu = " + ".join(f"{row.get(f'{name}_cpu_s_per_gib', 0):.2f}" for name in ("disk", "memory"))
    return (
        f"disk {row.get('disk_mib_s', 0):.0f} MiB/s, memory {row.get('memory_mib_s', 0):.0f} MiB/s, pause {row['pause_ms']:.0f} ms, "
        f"check {row['check_s']:.2f} s, all {row['total_s']:.1f} s, CPU s/GiB {cpu}, line {row['line_cpu_s']:.1f} s"
        + (f", {row['resets']} resets" if row["resets_s"] else "")
    )


def contents(row):
    return LINES[row["line"]].content


def measure_all(options):
    wanted = list(plan(options))
    there = {identity(row) for row in read(options.results) if "error" not in row}
    if options.resume:
        skipped = [row for row in wanted if identity(row) in there]
        wanted = [row for row in wanted if identity(row) not in there]
        say(f"{len(skipped)} results are there already, {len(wanted)} are to be measured")
    while wanted:
        # Those of one version and size share the random bytes.
        first = wanted[0]
        same = [row for row in wanted if all(row[name] == first[name] for name in ("qemu", "disk", "memory", "guests")) and contents(row) == contents(first)]
        wanted = [row for row in wanted if row not in same]
        needed = first["guests"] * 2 * (first["disk"] + first["memory"]) + 2048
        if available_mebibytes() < needed:
            sys.exit(f"wan: {needed} MiB of memory are needed for disks of {first['disk']} MiB in tmpfs, and {available_mebibytes()} are free")
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(Place(options.crossdock, first["qemu"], options.directory))
            version = place.version()
            bench = Bench(place, first["disk"], first["memory"], first["guests"], contents(first))
            warm = stack.enter_context(contextlib.closing(WarmMemory(first["guests"] * (first["disk"] + first["memory"]) + 512)))
            for row in same:
                kind = dataclasses.replace(LINES[row["line"]], disk=row["disk"], memory=row["memory"])
                row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **row, "qemu_version": version}
                try:
                    row.update(bench.measure(row["who"], kind, row["rtt"], row["at_once"]))
                except (MoveFailed, RuntimeError, OSError) as error:
                    row["error"] = str(error)
                warm.fill()
                append(options.results, row)
                way = (", at once" if row["at_once"] else ", in turn") if kind.guests > 1 else ""
                say(f"QEMU {row['qemu']}, {row['line']}, {row['rtt']:g} ms, {row['who']}{way}: {summary(row)}")


# What it says


def latest(rows, options):
    """The results of one revision, that of the newest one if none is asked for."""
    chosen = options.revision if options.has_revision else (rows[-1]["revision"] if rows else None)
    return [row for row in rows if row["revision"] == chosen], chosen


def median(rows, key):
    values = [row[key] for row in rows if "error" not in row and key in row]
    return statistics.median(values) if values else None


def cell(value, digits=0):
    return "-" if value is None else f"{value:,.{digits}f}"


def both(rows, key, digits=0):
    """Ours / native."""
    cells = []
    for who in CONTESTANTS:
        mine = [row for row in rows if row["who"] == who]
        text = cell(median(mine, key), digits)
        failed = sum("error" in row for row in mine)
        cells.append("failed" if failed and failed == len(mine) else text + (f" ({failed} failed)" if failed else ""))
    return " / ".join(cells)


def size_text(row):
    return f"{row['disk'] / 1024:g} GiB of disk, {row['memory'] / 1024:g} GiB of memory" if row["disk"] % 1024 == 0 and row["memory"] % 512 == 0 else (
        f"{row['disk']} MiB of disk, {row['memory']} MiB of memory")


def versions(rows):
    """QEMU's, the oldest first."""
    return sorted({row["qemu"] for row in rows}, key=lambda text: 99.0 if text == "newest" else float(text))


def tables(rows):
    """The tables, as lines of Markdown."""
    out = []
    for qemu in versions(rows):
        mine = [row for row in rows if row["qemu"] == qemu and row["guests"] == 1 and contents(row) == "random"]
        if mine:
            out += [f"QEMU {mine[-1]['qemu_version'].split()[0]}; Crossdock / native:", ""]
            out += ["| line | RTT, ms | disk, MiB/s | memory, MiB/s | pause, ms | check, s | CPU s/GiB, disk | CPU s/GiB, memory |", "|---|---|---|---|---|---|---|---|"]
        for name in LINES:
            group = [row for row in mine if row["line"] == name]
            for rtt, disk, memory in sorted({(row["rtt"], row["disk"], row["memory"]) for row in group}):
                some = [row for row in group if (row["rtt"], row["disk"], row["memory"]) == (rtt, disk, memory)]
                ours = [row for row in some if row["who"] == "ours"]
                out.append(
                    f"| {LINES[name].text}; {size_text(some[0])} | {rtt:g} | {both(some, 'disk_mib_s')} | {both(some, 'memory_mib_s')} | {both(some, 'pause_ms')} "
                    f"| {cell(median(ours, 'check_s'), 1)} | {both(some, 'disk_cpu_s_per_gib', 1)} | {both(some, 'memory_cpu_s_per_gib', 1)} |")  # fmt: skip
        if mine:
            out.append("")
    out += compressed([row for row in rows if contents(row) != "random"])
    groups = [row for row in rows if row["guests"] > 1]
    if groups:
        out += ["| four guests, Crossdock / native | all, s | MiB/s | longest pause, ms |", "|---|---|---|---|"]
        for row in groups:
            row["longest_ms"] = max(row.get("pauses_ms", [0]))
        for qemu, rtt, at_once in sorted({(row["qemu"], row["rtt"], row["at_once"]) for row in groups}):
            some = [row for row in groups if (row["qemu"], row["rtt"], row["at_once"]) == (qemu, rtt, at_once)]
            way = "at once" if at_once else "one after the other"
            kind = LINES[some[0]["line"]]
            out.append(
                f"| QEMU {qemu}, {kind.rate} Mbit/s, {rtt:g} ms, {size_text(some[0])} each; {way} | {both(some, 'total_s', 1)} | {both(some, 'mib_s')} "
                f"| {both(some, 'longest_ms')} |")  # fmt: skip
        out.append("")
    return out


def compressed(rows):
    """The table of what shrinks."""
    if not rows:
        return []
    kind = LINES[rows[0]["line"]]
    out = [f"{kind.text}, {rows[0]['rtt']:g} ms, {size_text(rows[0])}:", ""]
    out += ["| | disk, MiB on the line | disk, s | memory, MiB on the line | memory, s | all, s | pause, ms |", "|---|---|---|---|---|---|---|"]
    for qemu in versions(rows):
        for who in kind.contestants:
            mine = [row for row in rows if (row["qemu"], row["who"]) == (qemu, who)]
            if mine:
                keys = (("disk_line_mib", 0), ("disk_s", 1), ("memory_line_mib", 0), ("memory_s", 1), ("total_s", 1), ("pause_ms", 0))
                cells = " | ".join(cell(median(mine, key), digits) for key, digits in keys)
                failed = "".join(f" ({row['error']})" for row in mine if "error" in row)
                out.append(f"| {NAMES[who]}, QEMU {qemu}{failed} | {cells} |")
    return [*out, ""]


def aims(rows):
    """Which aims are missed, as sentences."""
    missed = []

    def rate(qemu, name, rtt, who, key):
        return median([row for row in rows if (row["qemu"], row["line"], row["rtt"], row["who"]) == (qemu, name, rtt, who)], key)

    for qemu, name, rtt in sorted({(row["qemu"], row["line"], row["rtt"]) for row in rows if row["guests"] == 1 and contents(row) == "random"}):
        kind = LINES[name]
        for what, key in (("disk", "disk_mib_s"), ("memory", "memory_mib_s")):
            mine, other, near = rate(qemu, name, rtt, "ours", key), rate(qemu, name, rtt, "native", key), rate(qemu, name, 0, "ours", key)
            if mine is None:
                continue
            where = f"QEMU {qemu}, {kind.text}, {rtt:g} ms, {what}"
            if other and mine < other:
                missed.append(f"{where}: {mine / other * 100:.0f} % of native's rate")
            if not kind.rate and not kind.resets and near and mine < 0.8 * near:
                missed.append(f"{where}: {mine / near * 100:.0f} % of the rate at 0 ms, at least 80 % are wanted")
            line_rate = kind.rate * 1e6 / 8 / (1 << 20)
            if kind.rate and mine < 0.9 * line_rate:
                missed.append(f"{where}: {mine / line_rate * 100:.0f} % of the line, at least 90 % are wanted")
    for row in rows:
        if "error" in row and row["who"] == "ours":
            missed.append(f"QEMU {row['qemu']}, {LINES[row['line']].text}, {row['rtt']:g} ms: {row['error']}")
    return missed


def plots(rows, directory):
    """Writes the plot of rates; its file's name, or None when there is nothing to show."""
    mine = [row for row in rows if row["line"] == "open" and "error" not in row]
    rtts = sorted({row["rtt"] for row in mine})
    panels = []
    for what, key in (("Disk", "disk_mib_s"), ("Memory", "memory_mib_s")):
        series = []
        for who, text in (("ours", "Crossdock"), ("native", "QEMU alone")):
            for number, qemu in enumerate(versions(mine)):
                values = [median([row for row in mine if (row["who"], row["qemu"], row["rtt"]) == (who, qemu, rtt)], key) for rtt in rtts]
                series.append(plot.Series(f"{text}, QEMU {qemu}", values, 0 if who == "ours" else 1, number > 0))
        panels.append(plot.Panel(f"{what}, MiB/s", series))
    if not rtts:
        return None
    name = "wan-rates.svg"
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        file.write(plot.steps("Rate against round trip, no limit but the processors", "round trip, ms", [f"{rtt:g}" for rtt in rtts], panels))
    return name


def page(rows, chosen, directory, prefix):
    """The section of docs/performance.md."""
    import pauses

    mine = [row for row in rows if row["bench"] == "wan"]
    out = [BEGIN, "<!-- Written by Benchmarks/wan.py --write; do not edit. -->", "## Long lines and pauses, at a glance", ""]
    date = max((row.get("time", "") for row in rows), default="")[:10]
    out += [f"`make wan`, {date}, revision {chosen}: one machine with {os.cpu_count()} processors that are both hosts and the line.", ""]
    name = plots(mine, directory)
    if name:
        out += [f"![Rates of disk and memory against the round trip]({prefix}{name})", ""]
    out += tables(mine)
    missed = aims(mine)
    out += ["Missed aims:", "", *[f"- {text}" for text in missed], ""] if missed else ["Every aim is met.", ""] if mine else []
    out += pauses.page([row for row in rows if row["bench"] == "pauses"], directory, prefix)
    return out + [END]


def write(path, text):
    """Puts the section between its markers; a file without them gets it in front of its second heading."""
    with open(path, encoding="utf-8") as file:
        old = file.read()
    if BEGIN in old and END in old:
        new = old[: old.index(BEGIN)] + text + old[old.index(END) + len(END) :]
    else:
        at = old.find("\n## ") + 1
        new = old[:at] + text + "\n\n" + old[at:] if at else old + "\n" + text + "\n"
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(new)
    os.replace(path + ".new", path)


def numbers(text):
    return [float(part) for part in text.split(",")]


def words_of(choices):
    def parse(text):
        words = text.split(",")
        unknown = [word for word in words if choices and word not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(choices)}")
        return words

    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", nargs="?", type=os.path.realpath)
    parser.add_argument("--lines", type=words_of(LINES), default=list(LINES), help=", ".join(LINES))
    parser.add_argument("--rtt", type=numbers, help="milliseconds")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--disk", type=int, help="MiB")
    parser.add_argument("--memory", type=int, help="MiB")
    parser.add_argument("--qemu", type=words_of(("7.2", "10.0", "newest")), default=["7.2", "10.0"])
    parser.add_argument("--only", choices=list(NAMES))
    parser.add_argument("--resume", action="store_true", help="skip what is there of this revision")
    parser.add_argument("--revision", help="the revision's name, instead of git's")
    parser.add_argument("--results", default=RESULTS)
    parser.add_argument("--directory", default="/dev/shm", help="where the images are")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--markdown", action="store_true", help="print the section of docs/performance.md")
    parser.add_argument("--svg", metavar="DIRECTORY", help="write the plots there")
    parser.add_argument("--write", metavar="FILE", help="put the section into this file, and the plots beside it")
    options = parser.parse_args()
    options.has_revision = options.revision is not None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("wan: ended"))
    if options.self_test:
        in_own_network()
        sys.exit(0 if lines.self_test() else 1)
    if options.crossdock:
        in_own_network()
        options.revision = options.revision or revision()
        measure_all(options)
    elif not (options.table or options.markdown or options.svg or options.write):
        parser.error("what is to be measured, or shown?")
    rows, chosen = latest(read(options.results), options)
    if options.table:
        print("\n".join(tables([row for row in rows if row["bench"] == "wan"])))
    directory = options.svg or (os.path.dirname(os.path.abspath(options.write)) if options.write else None)
    if options.markdown or options.write or options.svg:
        directory = directory or os.path.join(REPOSITORY, ".build")
        text = "\n".join(page(rows, chosen, directory, ""))
        if options.markdown:
            print(text)
        if options.write:
            write(options.write, text)


if __name__ == "__main__":
    main()
