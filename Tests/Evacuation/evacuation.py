#!/usr/bin/env python3
"""Empties a host with real guests that write all the time, and brings them home; nothing may be lost on the way.

    evacuation.py CROSSDOCK GUEST-DIRECTORY [--keep DIR]

Three hosts in namespaces; six guests: a large one, one with two disks, one that is off, two that are to be kept apart, and one that fits
nowhere. The coordinator is killed in the middle. Needs root.
"""
import argparse
import glob
import json
import os
import signal
import subprocess
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(os.path.dirname(HERE)), "deploy", "demo")]
import proofs  # noqa: E402
from hosts import Fleet, wait  # noqa: E402
from installation import Authority  # noqa: E402


class Guest:
    def __init__(self, name, memory, disks, group=None, is_off=False):
        self.name, self.memory, self.disks, self.group, self.is_off = name, memory, disks, group, is_off
        self.consoles = []


GUESTS = [
    Guest("large", 256, [96]), Guest("two", 192, [48, 48]), Guest("off", 128, [32], is_off=True),
    Guest("db1", 160, [32], "db"), Guest("db2", 160, [32], "db"), Guest("heavy", 800, [32]),
]  # fmt: skip
STAYS = "heavy"
# What each target takes, so that nobody takes all of them and one fits nowhere.
MOST = "740M"


def say(text):
    print(text, flush=True)


def demand(condition, words):
    if not condition:
        raise proofs.ProofFailed(words)


class Site:
    def __init__(self, fleet, crossdock, files):
        self.fleet, self.crossdock, self.files = fleet, crossdock, files
        self.a, self.b, self.c = (fleet.hosts[name] for name in "abc")

    def prepare(self):
        authority = Authority(self.crossdock, os.path.join(self.fleet.base, "ca"))
        for host in self.fleet.hosts.values():
            authority.issue(host.pki, host.seen_as, host.address)
            options = ["--most-memory", MOST] if host is not self.a else []
            options += ["--allow-recall", "CN=host-a"] if host is not self.a else []
            process = host.start(host.destination(host.address, *options), "agent.log")
            self.fleet.processes.append(process)
            log = os.path.join(host.directory, "agent.log")
            wait("the destination agents", lambda: "NBD port" in open(log).read())

    def start(self, guest):
        where = self.a.directory
        command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", str(guest.memory), "-nodefaults"]
        command += ["-display", "none", "-no-reboot", "-kernel", f"{self.files}/vmlinuz", "-initrd", f"{self.files}/initrd"]
        command += ["-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests xd.interval=100000"]
        for index, size in enumerate(guest.disks):
            image = os.path.join(where, f"{guest.name}-{index}.raw")
            with open(image, "wb") as file:
                file.truncate(size << 20)
                file.seek(size << 19)
                file.write(os.urandom(size << 18))
            command += ["-drive", f"file={image},format=raw,if=virtio"]
        console = os.path.join(where, f"{guest.name}.log")
        guest.consoles = [console]
        self.a.run(*self.a.start_guest(guest.name, command + ["-serial", f"file:{console}"]))

    def settle(self):
        for guest in GUESTS:
            wait(f"the records of {guest.name}", lambda: self.count(guest) > 10, 300)
            if guest.is_off:
                self.a.run(self.crossdock, "guest", "stop", guest.name, "--force", "--state-dir", self.a.state)
            if guest.group:
                self.a.run(
                    self.crossdock, "guest", "set", guest.name, "--anti-affinity", guest.group, "--state-dir", self.a.state
                )

    def count(self, guest):
        return sum(open(path, encoding="latin-1").read().count("REC 0 ") for path in guest.consoles if os.path.exists(path))

    def states(self, guest):
        """What each host says of a guest: of one that has left, nothing."""
        found = {}
        for name, host in self.fleet.hosts.items():
            output = host.run(self.crossdock, "guest", "list", "--json", "--state-dir", host.state).stdout
            for row in json.loads(output):
                if row["name"] == guest.name and row["state"] != "released":
                    found[name] = row["state"]
        return found

    def evacuate(self, *more, check=None):
        words = [self.crossdock, "evacuate", "--state-dir", self.a.state, *more]
        done = self.a.run(*words, check=False, stderr=subprocess.STDOUT)
        if check is not None:
            demand(done.returncode == check, f"{' '.join(more)} ended with code {done.returncode}: {done.stdout[-2000:]}")
        return done.stdout

    def begin(self, *more):
        return ["--to", "host-b,host-c", *self.a.credentials(), *more]

    def plan(self):
        plans = sorted(glob.glob(os.path.join(self.a.state, "evacuations", "*", "plan.json")))
        return json.load(open(plans[-1])) if plans else None

    def report(self):
        reports = sorted(glob.glob(os.path.join(self.a.state, "evacuations", "*", "report.json")))
        return json.load(open(reports[-1]))

    def moved(self):
        plan = self.plan()
        return [one["name"] for one in plan["guests"] if "moved" in one["standing"]] if plan else []

    # The proofs.

    def prove(self, where, guests):
        """Every guest is where it should be, only there, as it was, and has written without a gap."""
        for guest in guests:
            states = self.states(guest)
            expected = "stopped" if guest.is_off else "running"
            demand(len(states) == 1, f"{guest.name} is on these hosts: {states}")
            name, state = next(iter(states.items()))
            demand(state == expected and name in where, f"{guest.name} is {state} on host {name}")
            if name != "a":
                guest.consoles.append(os.path.join(self.fleet.hosts[name].run_directory(guest.name), f"{guest.name}.log"))
            elif len(guest.consoles) > 1:
                guest.consoles.append(os.path.join(self.a.run_directory(guest.name), f"{guest.name}.log"))
            if guest.is_off:
                continue
            before = self.count(guest)
            wait(f"further records of {guest.name}", lambda: self.count(guest) > before + 5, 120)
            images = sorted(glob.glob(os.path.join(self.fleet.hosts[name].images, guest.name, "*.raw"))) or sorted(
                glob.glob(os.path.join(self.a.directory, f"{guest.name}-?.raw"))
            )
            proofs.records(guest.consoles, dict(enumerate(images)))
        return self


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("guest", type=os.path.realpath)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        with Fleet(options.crossdock, "abc") as fleet:
            go(Site(fleet, options.crossdock, options.guest))
    except proofs.ProofFailed as failure:
        sys.exit(f"evacuation: NOT PROVED: {failure}")
    say(f"Every proof held. It took {time.monotonic() - began:.0f} s.")


def go(site):
    site.prepare()
    say("Three hosts; six guests on host a, five of which write numbered records.")
    for guest in GUESTS:
        site.start(guest)
    site.settle()
    say("\n$ crossdock evacuate --to host-b,host-c --dry-run")
    text = site.evacuate(*site.begin("--dry-run"), check=21)
    say("".join(line + "\n" for line in text.splitlines() if not line.startswith("crossdock: rehearsing")))
    demand(f"{STAYS} cannot go" in text and "most-memory" in text, "the guest that fits nowhere is not named with its limit")
    demand(site.plan() is None, "a dry run has left a plan")
    site.evacuate(*site.begin(), check=21)
    site.prove("a", GUESTS)
    say("  proved: it is refused as long as one guest cannot go, and nothing was moved")
    site.evacuate(*site.begin("--start-anyway", "--detach", "--bandwidth", "30M"), check=0)
    wait("the second guest to be on its way", lambda: len(site.moved()) == 1, 300)
    site.a.run("pkill", "-KILL", "-f", "evacuation-agent")
    say("  the coordinator was killed after the first guest had moved")
    say("\n$ crossdock evacuate --resume")
    say(site.evacuate("--resume", check=20))
    moving = [guest for guest in GUESTS if guest.name != STAYS]
    site.prove("bc", moving)
    site.prove("a", [guest for guest in GUESTS if guest.name == STAYS])
    places = {guest.name: next(iter(site.states(guest))) for guest in moving}
    demand(places["db1"] != places["db2"], "two guests that are to be kept apart are on one host")
    say(f"  proved: five guests have moved ({places}), each runs in one place, and no record is missing")
    report = site.report()
    say("\n$ crossdock restore")
    say(site.a.run(site.crossdock, "restore", "--address", "host-a", "--state-dir", site.a.state, *site.a.credentials(), check=False,
                   stderr=subprocess.STDOUT).stdout)  # fmt: skip
    site.prove("a", GUESTS)
    say("  proved: everyone is home, and no record is missing")
    sent, whole = 0, sum(sum(guest.disks) for guest in moving) << 20
    pauses = {}
    for host in (site.b, site.c):
        for path in glob.glob(os.path.join(host.state, "migrations", "*", "report.json")):
            back = json.load(open(path))
            if back["outcome"] == "migrated":
                sent += sum(disk["bytes_sent"] for disk in back["disks"])
                pauses[back["guest"]] = back.get("blackout_ms")
    demand(sent < whole / 4, f"{sent} of {whole} bytes of the disks were sent on the way home")
    say(f"  proved: of {whole >> 20} MiB of disks {sent / (1 << 20):.1f} MiB crossed the line on the way home")
    say("\n  guest   pause there  pause back")
    for guest in report["guests"]:
        there, back = guest.get("blackout_ms"), pauses.get(guest["name"])
        if guest["state"] == "moved":
            say(f"  {guest['name']:6} " + "".join(f"{f'{one:.0f} ms' if one is not None else '(off)':>12}" for one in (there, back)))


if __name__ == "__main__":
    main()
