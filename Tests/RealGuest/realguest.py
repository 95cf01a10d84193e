#!/usr/bin/env python3
"""Moves a Debian with a database, which serves clients on a bridge, there and back, idle and under load.

    realguest.py CROSSDOCK IMAGES [--moves N] [--only idle|load] [--keep DIR]

Two hosts and the clients are in namespaces of the test's own. A line for each move and each check, and a table of what the clients saw next
to what the report says: "silence" is the longest time whose requests nobody answered, "gap" the longest without an answer, "commit" the longest
transaction. The exit code is 0 when all checks hold, 1 when one does not, 2 when the test could not go on. Needs root.
"""
import argparse
import os
import shutil
import signal
import subprocess
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(os.path.dirname(HERE)), "deploy", "demo")]
import measures  # noqa: E402
from guest import CouldNotGoOn, Guest  # noqa: E402
from hosts import Fleet, can_make_namespaces  # noqa: E402
from installation import Authority  # noqa: E402
from judgement import Judgement  # noqa: E402
from lan import BRIDGES, Lan  # noqa: E402
from clients import Clients  # noqa: E402

COLUMNS = ("blackout ms", "silence ms", "gap ms", "commit ms", "total s", "disks MiB", "memory MiB")
# How long the clients watch a guest that does not move, to know what a gap is without a move.
REST = 15
# After its end a move may still be seen: by the first answers, and by the transactions that waited.
AFTERWARDS = 2


def say(text):
    print(text, flush=True)


def agents(fleet):
    """The hosts' credentials, and the agents that receive guests."""
    # Guests have users of their own, who have to pass through to their images.
    os.chmod(fleet.base, 0o711)
    authority = Authority(fleet.crossdock, os.path.join(fleet.base, "ca"))
    for name, host in fleet.hosts.items():
        authority.issue(host.pki, host.seen_as, host.address)
        fleet.processes.append(host.start(host.destination(host.address, "--allow-bridge", BRIDGES[name]), "agent.log"))


def look_for_room(fleet, options):
    """Each move leaves an old image of the qcow2 disk behind, which is kept as an operator's would be."""
    moves = 2 * options.moves * (1 if options.only else 2)
    needed = (moves + 4) * os.stat(os.path.join(options.images, "system.qcow2")).st_size
    free = shutil.disk_usage(fleet.base).free
    if free < needed:
        raise CouldNotGoOn(f"{fleet.base} has {free >> 20} MiB free, and {needed >> 20} MiB are needed; XD_DEMO_BASE names another directory")


class Trip:
    """Moves under one load, and what was seen of each."""

    def __init__(self, guest, clients, name):
        self.guest, self.clients, self.name = guest, clients, name
        self.rows, self.reports, self.failures = [], [], []
        self.rest = None

    def watch_rest(self):
        begin = time.monotonic_ns()
        time.sleep(REST)
        self.rest = self._seen(begin, time.monotonic_ns())
        busy = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
        say(f"{self.name}: without a move the longest gap in {REST} s is {self.rest[1]:.0f} ms ({busy})")

    def _seen(self, begin, end):
        """Silence, gap and longest transaction in a time."""
        answers = self.clients.answers.read()
        longest = self.clients.ledger.read().longest(begin, end) if self.name == "load" else None
        return answers.silence(begin, end), answers.gap(begin, end), longest

    def move(self, number):
        begin = time.monotonic_ns()
        name = f"{self.name} {number}, {self.guest.here} to {self.guest.there}"
        report, words = self.guest.move()
        if report is None or report["outcome"] != "migrated":
            self.failures.append(f"{name}: {words}")
            say(f"{name}: NOT MOVED: {words}")
            return
        self.clients.wait_for_answer(time.monotonic_ns())
        time.sleep(AFTERWARDS)
        if self.name == "idle":
            self.clients.once()
        end = time.monotonic_ns()
        self._note(name, report, begin, end)

    def _note(self, name, report, begin, end):
        sent = sum(disk["bytes_sent"] for disk in report["disks"]) / (1 << 20)
        row = (name, report["blackout_ms"], *self._seen(begin, end))
        self.rows.append((*row, report["total_ms"] / 1000, sent, report["ram_bytes_sent"] / (1 << 20)))
        self.reports.append(report)
        own = self.clients.answers.own_pause(begin, end)
        note = f"; the probe itself waited {own:.0f} ms" if own else ""
        say(f"{name}: blackout {row[1]:.0f} ms, longest gap {row[3]:.0f} ms, {report['total_ms'] / 1000:.1f} s{note}")

    def table(self):
        if self.rows:
            yield (f"{self.name}, no move", None, *self.rest, None, None, None)
            yield from self.rows
            yield measures.summary(f"{self.name}, median", self.rows)
            yield measures.summary(f"{self.name}, worst", self.rows, max)


def go(fleet, options):
    look_for_room(fleet, options)
    agents(fleet)
    lan = Lan(fleet)
    guest = Guest(fleet, options.images)
    began = time.monotonic()
    guest.start()
    clients = Clients(lan, fleet, options.images)
    clients.wait_for_database(guest)
    say(f"The guest's database answers after {time.monotonic() - began:.0f} s.")
    clients.begin()
    trips = []
    for name in ("idle", "load"):
        if options.only in (None, name):
            trips.append(travel(Trip(guest, clients, name), options.moves))
    clients.end()
    say("")
    rows = [row for trip in trips for row in trip.table()]
    for line in measures.table(rows, COLUMNS) if rows else ():
        say(line)
    say("")
    return Judgement(guest, clients, trips).pronounce(say)


def travel(trip, moves):
    if trip.name == "load":
        trip.clients.run()
    trip.watch_rest()
    for number in range(1, 2 * moves + 1):
        trip.move((number + 1) // 2)
    if trip.name == "load":
        trip.clients.rest()
    return trip


def keep(fleet, directory):
    """The logs and reports, without images and keys."""
    leave = shutil.ignore_patterns("*.raw", "*.plain", "*.qcow2", "*.released-*", "ca", "pki", "*.sock", ".files", "vmlinuz", "initrd")
    shutil.copytree(fleet.base, directory, ignore=leave, dirs_exist_ok=True, copy_function=copy_if_plain)


def copy_if_plain(source, target):
    if os.path.isfile(source) and not os.path.islink(source):
        shutil.copy(source, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("images", type=os.path.realpath, help="what Tests/RealGuest/image made")
    parser.add_argument("--moves", type=int, default=5, metavar="N", help="how often there and back, for each load (default: 5)")
    parser.add_argument("--only", choices=("idle", "load"))
    parser.add_argument("--keep", metavar="DIR", type=os.path.realpath, help="keep logs and reports there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    began = time.monotonic()
    code = 2
    try:
        if os.geteuid() != 0 or not can_make_namespaces():
            raise CouldNotGoOn("it needs root, who may make namespaces")
        with Fleet(options.crossdock, "ab") as fleet:
            try:
                code = go(fleet, options)
            finally:
                if options.keep:
                    keep(fleet, options.keep)
    except (CouldNotGoOn, subprocess.SubprocessError, OSError) as error:
        print(f"realguest: the test could not go on: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("realguest: interrupted; everything was cleaned up", file=sys.stderr)
    except SystemExit as end:
        # The hosts end a program whose wait was in vain with a sentence.
        if isinstance(end.code, str):
            print(f"realguest: the test could not go on: {end.code}", file=sys.stderr)
    say(f"It took {time.monotonic() - began:.0f} s.")
    sys.exit(code)


if __name__ == "__main__":
    main()
