#!/usr/bin/env python3
"""The pause of a guest as a distribution: many moves there and back, by Crossdock and by QEMU alone in turns, with the parts of each pause.

    pauses.py CROSSDOCK GUEST-DIRECTORY [--moves N] [--block N] [--memory MIB] [--disk MIB] [--rtt MS] [--qemu 7.2,10.0] [--only ours|native]
              [--resume] [--results FILE]
    pauses.py --table [--results FILE]

An emulated Linux guest writes 5 MiB/s to its disk, with an fsync after each 256 KiB, and 20 MiB/s to its memory, which is filled with random
bytes; both hosts are this machine. Contestants take turns after --block moves, each with a guest that was started anew. A guest that
panics or says nothing any more after a move is counted as that, its move too, and another one is started. Each move is appended to FILE
(.build/wan.jsonl) at once; --resume goes on where that ends.

The pause of Crossdock is what its report says (docs/report.md), an upper bound; of QEMU alone the time from its STOP on the source to its
RESUME on the destination. Its parts are from the events of the source's QEMU, what is left is the hand-over. The images are in /var/tmp, on a disk: what has to be durable before a guest may run takes its time there.
"""
import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
import plot  # noqa: E402
import wan  # noqa: E402
from line import WARNINGS, Line, in_own_network  # noqa: E402
from moves import Host, MoveFailed, Native, Place, Side, moment, revision, say  # noqa: E402

# A guest that is emulated on processors that others use too may be silent for a while.
SILENCE = 60
PARTS = {
    "stop": "QEMU's stop", "mirror": "end of the mirror", "memory": "rest of the memory, and what is asked meanwhile",
    "hand_over": "from QEMU's completion until it runs there"}  # fmt: skip


def make_initrd(place, guest, disk, memory, fill):
    """The demo's guest with the writer."""
    root = os.path.join(place.directory, "root")
    os.makedirs(root + "/bin")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "Pauses", "writer.c")
    subprocess.run(["gcc", "-static", "-O2", *WARNINGS, "-o", root + "/bin/writer", source], check=True)
    return wan.make_initrd(root, guest, f"/bin/writer /dev/vda {disk} {memory} {fill}")


class Lost(Exception):
    """The guest does not live any more; the text says why."""


class Watch:
    """What a QEMU says on a second monitor, to somebody who only listens: the guest takes it along."""

    def __init__(self, path):
        self.path, self.events, self.is_over = path, [], False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        with socket.socket(socket.AF_UNIX) as monitor, contextlib.suppress(OSError):
            monitor.connect(self.path)
            monitor.settimeout(0.2)
            self.listen(monitor)

    def listen(self, monitor):
        data = b""
        while not self.is_over:
            try:
                piece = monitor.recv(65536)
            except TimeoutError:
                continue
            if not piece:
                return
            *messages, data = (data + piece).split(b"\n")
            for message in map(json.loads, messages):
                if "QMP" in message:
                    monitor.sendall(b'{"execute":"qmp_capabilities"}\n')
                elif "event" in message:
                    self.events.append(message)

    def moment(self, name, status=None):
        # The last one: a stream that was lost is sent again.
        for event in reversed(self.events):
            if event["event"] == name and (status is None or event["data"].get("status") == status):
                return moment(event)
        return None

    def end(self):
        self.is_over = True
        self.thread.join()


def parts(source, pause):
    """The parts of a pause in milliseconds, by QEMU's own events where it ended; the rest is the hand-over. Nothing when one is missing."""
    moments = {
        "STOP": source.moment("STOP"), "stop": source.moment("MIGRATION", "pre-switchover"), "mirror": source.moment("BLOCK_JOB_COMPLETED"),
        "memory": source.moment("MIGRATION", "completed"),
    }  # fmt: skip
    if None in moments.values():
        return {}
    times = list(moments.values())
    found = {name: (time - before) * 1000 for name, time, before in zip(list(moments)[1:], times[1:], times)}
    return {**found, "hand_over": max(0.0, pause - sum(found.values()))}


class Console:
    """What a guest says, host after host."""

    def __init__(self):
        self.beats = 0

    def look(self, path):
        """The number of the last beat; Lost when the guest has panicked."""
        try:
            with open(path, encoding="latin-1") as file:
                text = file.read()
        except OSError:
            return self.beats
        trouble = re.search(r"Kernel panic[^\n]*|Oops[^\n]*|BUG: [^\n]*|FAIL [^\n]*|Out of memory[^\n]*", text)
        if trouble:
            raise Lost(trouble[0].strip())
        numbers = re.findall(r"^BEAT (\d+) \d+ \d+\r?$", text, re.MULTILINE)
        return int(numbers[-1]) if numbers else self.beats

    def goes_on(self, path, seconds=SILENCE, count=2):
        """Waits for so many beats more."""
        wanted, end = self.beats + count, time.monotonic() + seconds
        while (now := self.look(path)) < wanted:
            if time.monotonic() > end:
                raise Lost(f"silent for {seconds} s")
            time.sleep(0.05)
        self.beats = now


class Guest:
    """What is common to both contestants."""

    def __init__(self, bench):
        self.bench, self.console, self.launches = bench, Console(), 0
        self.side = Side("a")

    def words(self, image, *_):
        """Its command line; each QEMU has a console of its own."""
        options, place = self.bench.options, self.bench.place
        self.launches += 1
        self.path = os.path.join(place.directory, f"{type(self).__name__}-{self.launches}.console")
        line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", str(options.memory), "-nodefaults", "-display", "none"]
        line += ["-no-reboot", "-kernel", os.path.join(options.guest, "vmlinuz"), "-initrd", self.bench.initrd]
        line += ["-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests", "-serial", f"file:{self.path}", "-blockdev"]
        line += [f"driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename={image}", "-device", "virtio-blk-pci,drive=disk0,id=vd0"]
        return line

    def new_image(self):
        path = os.path.join(self.bench.place.directory, f"{type(self).__name__}.raw")
        with open(path, "wb") as file:
            for _ in range(self.bench.options.disk):
                file.write(os.urandom(1 << 20))
        return path

    def boot(self):
        self.console = Console()
        self.console.goes_on(self.path, 300, 3)


class Ours(Guest):
    def __init__(self, bench):
        super().__init__(bench)
        self.hosts, self.has_moved = {name: Host(bench.place, name) for name in "ab"}, False
        options = bench.options
        self.lines = [Line(bench.place.directory, host.ports, rtt=options.rtt) for host in self.hosts.values() if options.rtt]
        for line in self.lines:
            line.is_open()
        watch = ["-qmp", f"unix:{bench.place.directory}/watch.qmp,server=on,wait=off"]
        self.hosts["a"].start("guest", self.words(self.new_image()) + watch)
        self.boot()

    def move(self):
        here = self.hosts[self.side.name]
        there = self.hosts["b" if self.side.name == "a" else "a"]
        watch = Watch(self.monitor(here))
        try:
            move = here.migrate("guest", there, measures=False)
        finally:
            watch.end()
        move.figures["agent_parts_ms"] = move.figures["parts_ms"]
        move.figures["parts_ms"] = parts(watch, move.figures["pause_ms"])
        self.has_moved = True
        self.side = there
        self.path = os.path.join(there.state, "guests", "guest", "run", os.path.basename(self.path))
        return move

    def monitor(self, host):
        if host is self.hosts["a"] and not self.has_moved:
            return os.path.join(self.bench.place.directory, "watch.qmp")
        return os.path.join(host.state, "guests", "guest", "run", "watch.qmp")

    def close(self):
        for line in self.lines:
            line.stop()
        for host in self.hosts.values():
            host.stop_guest("guest")
            host.close()
            subprocess.run(["rm", "-rf", host.directory], check=True)


class Alone(Guest):
    """By QEMU alone."""

    def __init__(self, bench):
        super().__init__(bench)
        self.native = Native(bench.place, "guest", self.words, bench.options.disk)
        rtt = bench.options.rtt
        self.lines = {name: Line(bench.place.directory, self.native.pairs(Side(name)), rtt=rtt) for name in "ab" if rtt}
        self.native.start(self.new_image())
        self.boot()

    def move(self):
        other = self.native.prepare()
        if self.lines:
            self.lines[other.name].is_open()
        return self.native.move(other)

    def close(self):
        for line in self.lines.values():
            line.stop()
        self.native.close()


class Bench:
    def __init__(self, place, options):
        self.place, self.options = place, options
        self.initrd = make_initrd(place, options.guest, options.disk_rate, options.memory_rate, options.fill)

    def block(self, who, rows, add):
        """So many moves of one guest; ends early when the guest is lost."""
        guest = {"ours": Ours, "native": Alone}[who](self)
        try:
            for row in rows:
                row["time"] = time.strftime("%Y-%m-%dT%H:%M:%S")
                try:
                    row.update(guest.move().figures)
                except (MoveFailed, RuntimeError, OSError) as error:
                    row["error"] = str(error)
                    add(row)
                    return
                try:
                    guest.console.goes_on(guest.path)
                except Lost as lost:
                    # Its pause counts all the same.
                    row["lost"] = str(lost)
                    add(row)
                    return
                add(row)
        finally:
            guest.close()


def settings(options, qemu, who):
    return {
        "bench": "pauses", "revision": options.revision, "qemu": qemu, "who": who, "rtt": options.rtt, "memory": options.memory, "disk": options.disk,
        "disk_rate": options.disk_rate, "memory_rate": options.memory_rate, "fill": options.fill,
    }  # fmt: skip


def measure(options):
    contestants = [options.only] if options.only else ["ours", "native"]
    there = wan.read(options.results) if options.resume else []
    for qemu in options.qemu:
        left = {}
        for who in contestants:
            mine = settings(options, qemu, who)
            left[who] = options.moves - sum(all(row.get(key) == value for key, value in mine.items()) for row in there)
        if max(left.values()) <= 0:
            continue
        with Place(options.crossdock, qemu, options.directory) as place:
            version = place.version()
            bench = Bench(place, options)
            while max(left.values()) > 0:
                for who in contestants:
                    count = min(left[who], options.block)
                    if count <= 0:
                        continue
                    done = []

                    def add(row):
                        done.append(row)
                        wan.append(options.results, row)

                    rows = ({**settings(options, qemu, who), "qemu_version": version, "move": options.moves - left[who] + index} for index in range(count))
                    try:
                        bench.block(who, rows, add)
                    except (Lost, MoveFailed, RuntimeError) as trouble:
                        # It did not even start; that is no move.
                        say(f"QEMU {qemu}, {who}: {trouble}")
                        wan.append(options.results, {**settings(options, qemu, who), "bench": "pauses-start", "error": str(trouble)})
                        options.troubles -= 1
                        if options.troubles < 0:
                            sys.exit("pauses: too many guests did not start")
                        continue
                    left[who] -= len(done)
                    tell(qemu, who, done, left[who])


def tell(qemu, who, rows, left):
    pauses = [row["pause_ms"] for row in rows if "pause_ms" in row]
    text = f"median {statistics.median(pauses):.0f} ms, {min(pauses):.0f} to {max(pauses):.0f}" if pauses else "no pause"
    troubles = "".join(f"; {row.get('lost') or row.get('error')}" for row in rows if "lost" in row or "error" in row)
    say(f"QEMU {qemu}, {who}: {len(rows)} moves, pause {text}{troubles}; {left} moves are left")


# What it says


def percentile(values, share):
    """The smallest value that so many are not above."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)] if ordered else None


def figures(rows):
    pauses = [row["pause_ms"] for row in rows if "pause_ms" in row]
    return {share: percentile(pauses, share) for share in (50, 90, 99, 100)}


def tables(rows):
    out = ["| pause, ms | moves | p50 | p90 | p99 | longest | the guest was lost | did not move |", "|---|---|---|---|---|---|---|---|"]
    differences = []
    for qemu in wan.versions(rows):
        found = {}
        for who, name in (("ours", "Crossdock"), ("native", "QEMU alone")):
            mine = [row for row in rows if (row["qemu"], row["who"]) == (qemu, who)]
            if not mine:
                continue
            found[who] = figures(mine)
            cells = " | ".join(wan.cell(found[who][share]) for share in (50, 90, 99, 100))
            lost, failed = sum("lost" in row for row in mine), sum("error" in row for row in mine)
            out.append(f"| {name}, QEMU {qemu} | {len(mine)} | {cells} | {lost} | {failed} |")
        if len(found) == 2 and None not in (found["ours"][50], found["native"][50]):
            more = {share: found["ours"][share] - found["native"][share] for share in (50, 99)}
            kept = "kept" if more[50] < 50 and more[99] < 150 else "missed"
            differences.append(
                f"Beyond QEMU alone, {qemu}: p50 {more[50]:+.0f} ms (aim: below 50), p99 {more[99]:+.0f} ms (aim: below 150): {kept}.")
    out.append("")
    out += [*differences, ""] if differences else []
    out += ["| part of the pause, ms | p50 | p90 | p99 |", "|---|---|---|---|"]
    for qemu in wan.versions(rows):
        for who, name in (("ours", "Crossdock"), ("native", "QEMU alone")):
            for part, text in PARTS.items():
                values = [row["parts_ms"][part] for row in rows if (row["qemu"], row["who"]) == (qemu, who) and part in row.get("parts_ms", {})]
                if values:
                    out.append(f"| {name}, QEMU {qemu}: {text} | " + " | ".join(wan.cell(percentile(values, share)) for share in (50, 90, 99)) + " |")
    return out + [""]


def page(rows, directory, prefix):
    """The part of docs/performance.md about the pauses."""
    if not rows:
        return []
    series = []
    for number, qemu in enumerate(wan.versions(rows)):
        for colour, (who, name) in enumerate((("ours", "Crossdock"), ("native", "QEMU alone"))):
            values = [row["pause_ms"] for row in rows if (row["qemu"], row["who"]) == (qemu, who) and "pause_ms" in row]
            if values:
                series.append(plot.Series(f"{name}, QEMU {qemu}", values, colour, number > 0))
    name = "wan-pauses.svg"
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        file.write(plot.distribution("So many of the moves have at most this pause", "pause, ms", series))
    row = rows[-1]
    words = f"an emulated Linux guest with {row['memory']} MiB of memory that writes {row['disk_rate']:g} MiB/s to its disk with fsync and {row['memory_rate']:g} MiB/s "
    words += f"to its memory moves there and back, the round trip is {row['rtt']:g} ms"
    return [f"`Benchmarks/pauses.py`: {words}.", "", f"![Distribution of the pauses]({prefix}{name})", "", *tables(rows)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", nargs="?", type=os.path.realpath)
    parser.add_argument("guest", nargs="?", type=os.path.realpath)
    parser.add_argument("--moves", type=int, default=300, help="of each contestant, with each QEMU")
    parser.add_argument("--block", type=int, default=20, help="moves of one guest, after which the contestants change")
    parser.add_argument("--memory", type=int, default=1024, help="MiB")
    parser.add_argument("--fill", type=int, help="MiB of it that are random bytes; three quarters by default, and all but 128")
    parser.add_argument("--disk", type=int, default=256, help="MiB")
    parser.add_argument("--disk-rate", type=float, default=5, help="MiB/s")
    parser.add_argument("--memory-rate", type=float, default=20, help="MiB/s")
    parser.add_argument("--rtt", type=float, default=0, help="milliseconds; without it nothing is between the hosts")
    parser.add_argument("--qemu", type=wan.words_of(("7.2", "10.0", "newest")), default=["7.2", "10.0"])
    parser.add_argument("--only", choices=["ours", "native"])
    parser.add_argument("--resume", action="store_true", help="go on where the results of this revision end")
    parser.add_argument("--revision", help="the revision's name, instead of git's")
    parser.add_argument("--results", default=wan.RESULTS)
    parser.add_argument("--directory", default="/var/tmp", help="where the images are")
    parser.add_argument("--table", action="store_true", help="print the tables")
    options = parser.parse_args()
    options.fill = options.fill if options.fill is not None else min(options.memory * 3 // 4, options.memory - 128)
    options.has_revision = options.revision is not None
    options.troubles = 5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("pauses: ended"))
    Side.is_direct = not options.rtt
    if options.crossdock:
        if not options.guest:
            parser.error("where is the guest? .cache/guest")
        in_own_network()
        options.revision = options.revision or revision()
        measure(options)
    rows = [row for row in wan.read(options.results) if row["bench"] == "pauses"]
    rows, _ = wan.latest(rows, options)
    print("\n".join(tables(rows)))


if __name__ == "__main__":
    main()
