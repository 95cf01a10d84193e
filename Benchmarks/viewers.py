#!/usr/bin/env python3
"""What the page costs a move: the same guest goes there and back, with nobody and with many viewers of the source's page in turns.

    viewers.py CROSSDOCK GUEST-DIRECTORY [--moves N] [--viewers N] [--nice N] [--memory MIB] [--disk MIB] [--json FILE]

Both hosts are on this machine; the guest is a small Linux under emulation that writes numbered records, its disk is random bytes. The viewers
are one other process, on the same processors as everything else. Needs root.
"""
import argparse
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "Tests", "Web")]
import line as lines  # noqa: E402
import moves  # noqa: E402
from visitors import Crowd, context, gather  # noqa: E402

FIGURES = {"disk, MiB/s": "rate", "pause, ms": "pause_ms", "memory, s": "memory_s", "whole move, s": "total_s"}


class PagedHost(moves.Host):
    is_direct = True

    def __init__(self, place, name):
        super().__init__(place, name, ["--web", f"{self.address_of(name)}:0"])
        lines.wait_for("the page", self.page)
        self.origin = self.page()[1]

    def page(self):
        with open(self.directory + "/agent.log", encoding="utf-8") as file:
            return re.search(r"page at (https://[^/\s]+)/", file.read())

    @staticmethod
    def address_of(name):
        return moves.Side(name).address

    def ticket(self, *options):
        return re.search(r"https://\S+", self.run("web", "ticket", *options))[0]

    def processor(self):
        return lines.processor_seconds(self.agent.pid)


class Audience:
    """Viewers of a host's page, in a process of their own."""

    def __init__(self, host, authority, number, nice):
        self.here, there = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=self.look, args=(host, authority, number, nice, there), daemon=True)
        self.process.start()
        if not self.here.poll(60) or self.here.recv() != "all look":
            raise moves.MoveFailed("the viewers could not be opened")

    @staticmethod
    def look(host, authority, number, nice, there):
        os.nice(nice)
        crowd = Crowd(gather(context(authority), host, number, keeps=False))
        crowd.read_until(lambda: all(len(viewer.times) >= 6 for viewer in crowd.viewers), 30)
        there.send("all look")
        crowd.read_until(there.poll, moves.PATIENCE)
        there.send((sum(len(viewer.times) for viewer in crowd.viewers), sum(bool(viewer.ended) for viewer in crowd.viewers)))

    def close(self):
        """How many lines all of them have got, and how many were closed."""
        self.here.send("enough")
        told = self.here.recv() if self.here.poll(30) else (0, -1)
        self.process.join(10)
        return told


def guest_line(options, place, console):
    image = os.path.join(place.directory, "guest.raw")
    with open(image, "wb") as file:
        for _ in range(options.disk):
            file.write(os.urandom(1 << 20))
    line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", str(options.memory), "-nodefaults", "-display", "none", "-no-reboot"]
    line += ["-kernel", f"{options.guest}/vmlinuz", "-initrd", f"{options.guest}/initrd"]
    line += ["-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests xd.interval=50000"]
    return line + ["-drive", f"file={image},format=raw,if=virtio", "-serial", f"file:{console}"]


def records(path):
    try:
        with open(path, encoding="latin-1") as file:
            return file.read().count("REC 0 ")
    except OSError:
        return 0


def measure(options, place):
    rows = []
    hosts = [PagedHost(place, name) for name in "ab"]
    try:
        console = os.path.join(place.directory, "console.log")
        hosts[0].start("web1", guest_line(options, place, console))
        lines.wait_for("the guest's records", lambda: records(console) > 20, 180)
        for number in range(2 * options.moves + 2):
            source, target = hosts[number % 2], hosts[1 - number % 2]
            # There and back with the same audience: each has as many moves of each direction.
            viewers = options.viewers if number // 2 % 2 else 0
            audience = Audience(source, f"{place.directory}/ca/ca-cert.pem", viewers, options.nice) if viewers else None
            before = source.processor()
            move = source.migrate("web1", target)
            busy = source.processor() - before
            got, closed = audience.close() if audience else (0, 0)
            if closed:
                raise moves.MoveFailed(f"{closed} viewers were closed")
            row = {**move.figures, "rate": options.disk / move.figures["disk_s"], "viewers": viewers, "lines": got, "agent_s": busy}
            # The first time there and back is another one: the hosts have not seen each other yet.
            if number >= 2:
                rows.append(row)
            print(f"move {number}: {viewers} viewers, {row['rate']:.0f} MiB/s, pause {row['pause_ms']:.0f} ms, {row['total_s']:.1f} s, "
                  f"{got} lines, the agent's processor {busy:.2f} s", flush=True)  # fmt: skip
    finally:
        for host in hosts:
            host.stop_guest("web1")
            host.close()
    return rows


def told(values):
    """The median with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    digits = 0 if middle >= 100 else 1
    return f"{middle:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def table(rows, options):
    yield f"| viewers | moves | {' | '.join(FIGURES)} | the source's agent, s of a processor |"
    yield "|---|---|" + "---|" * (len(FIGURES) + 1)
    for viewers in (0, options.viewers):
        mine = [row for row in rows if row["viewers"] == viewers]
        cells = [told([row[key] for row in mine]) for key in (*FIGURES.values(), "agent_s")]
        yield f"| {viewers} | {len(mine)} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("guest", type=os.path.realpath)
    parser.add_argument("--moves", type=int, default=20, metavar="N", help="in all, half of them with viewers (default: 20)")
    parser.add_argument("--viewers", type=int, default=50, metavar="N")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="how much the viewers go after others on the processors (default: 0)")
    parser.add_argument("--memory", type=int, default=128, metavar="MIB")
    parser.add_argument("--disk", type=int, default=512, metavar="MIB")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    # There and back twice: without viewers, and with them.
    options.moves = max(1, options.moves // 4) * 2
    # An ended bench cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("viewers: ended"))
    lines.in_own_network()
    try:
        with moves.Place(options.crossdock, None, os.environ.get("XD_DEMO_BASE", "/tmp")) as place:
            rows = measure(options, place)
    except (moves.MoveFailed, subprocess.SubprocessError) as error:
        sys.exit(f"viewers: {error}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    print("\n" + "\n".join(table(rows, options)))


if __name__ == "__main__":
    main()
