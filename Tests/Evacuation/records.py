#!/usr/bin/env python3
"""Kills whoever coordinates an evacuation before and after each record of its plan, and has somebody else go on.

    records.py CROSSDOCK [--fast]

Each time two guests leave host a for hosts b and c, in namespaces. What is judged: one `--resume` empties the host (or, where no plan was
written yet, the evacuation as it was asked for), every guest runs in exactly one place, and its disk is as it was. Needs root.
"""
import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path[:0] = [HERE, os.path.join(os.path.dirname(TESTS), "deploy", "demo"), os.path.join(TESTS, "Faults")]
import proofs  # noqa: E402
import shim  # noqa: E402
from evacuation import Guest, Site, demand, say  # noqa: E402
from hosts import Fleet  # noqa: E402

# Who writes a record, and the file: the command that makes the plan, and the process that carries it out.
RECORDS = [("evacuate", "plan.json"), ("evacuation-agent", "plan.json"), ("evacuation-agent", "report.json")]
FAST = [("evacuation-agent", "plan.json", 1, False), ("evacuation-agent", "plan.json", 2, True), ("evacuation-agent", "report.json", 0, False)]
# An evacuation in which nobody is killed writes fewer; one that writes more goes in circles.
MOST = 40


class Run:
    """One evacuation that is broken at one record."""

    def __init__(self, site, number, library):
        self.site, self.library = site, library
        self.guests = [Guest(f"run{number}-{index}", 32, [8]) for index in (1, 2)]
        self.digests = {}
        self.said = None

    def start(self):
        host = self.site.a
        for guest in self.guests:
            image = os.path.join(host.directory, f"{guest.name}.raw")
            content = os.urandom(1 << 20) + bytes(7 << 20)
            with open(image, "wb") as file:
                file.write(content)
            self.digests[guest.name] = hashlib.sha256(content).digest()
            line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none"]
            host.run(*host.start_guest(guest.name, line + ["-drive", f"file={image},format=raw,if=virtio"]))

    def evacuate(self, *more, **options):
        words = [self.site.crossdock, "evacuate", "--state-dir", self.site.a.state, *more]
        return self.site.a.run(*words, check=False, stderr=subprocess.STDOUT, **options)

    def break_at(self, role, name, skip, after):
        """Whether the record was reached, and the writer killed there."""
        table = shim.Table(os.path.join(self.site.fleet.base, "table"))
        rule = table.add(shim.RENAME, shim.DIE, role=role, text=name, after=after, skip=skip)
        environment = {**os.environ, "LD_PRELOAD": self.library, "XF_TABLE": table.path}
        done = self.evacuate(*self.site.begin(), env=environment)
        if rule.hits == 0:
            demand(done.returncode == 0, f"nobody was killed, and it ended with {done.returncode}: {done.stdout[-2000:]}")
            return False
        self.said = (done.stdout.splitlines() or ["nothing"])[-1]
        # Who watches and finds the report has seen the end; everybody else has to be told.
        over = name == "report.json" and after
        demand(over or done.returncode != 0, f"its coordinator was killed, and it ended with 0: {done.stdout[-2000:]}")
        return True

    def go_on(self):
        """One command empties the host."""
        done = self.evacuate("--resume")
        # After its end there is nothing to resume and nobody to move.
        if "No evacuation of this host was interrupted" in done.stdout and any("a" in self.site.states(guest) for guest in self.guests):
            done = self.evacuate(*self.site.begin())
        demand(done.returncode == 0, f"going on ended with {done.returncode}: {done.stdout[-2000:]}")

    def judge(self):
        for guest in self.guests:
            states = self.site.states(guest)
            demand(list(states.values()) == ["running"] and "a" not in states, f"{guest.name} is on these hosts: {states}")
            host = self.site.fleet.hosts[next(iter(states))]
            with open(os.path.join(host.images, guest.name, f"{guest.name}.raw"), "rb") as file:
                demand(hashlib.sha256(file.read()).digest() == self.digests[guest.name], f"the disk of {guest.name} is not as it was")
            running = [name for name, other in self.site.fleet.hosts.items() if emulators(other, guest.name)]
            demand(running == [host.name], f"QEMUs of {guest.name} run on {running}")

    def clear(self):
        for guest in self.guests:
            for host in self.site.fleet.hosts.values():
                if self.site.states(guest).get(host.name):
                    host.run(host.program, "guest", "stop", guest.name, "--force", "--state-dir", host.state, stderr=subprocess.STDOUT)


def emulators(host, guest):
    """The QEMUs of a host whose command line names a directory or an image of the guest."""
    script = "for p in /proc/[0-9]*; do case $(readlink $p/exe) in *qemu-system*) "
    script += f"tr '\\0' '\\n' < $p/cmdline | grep -q '{guest}' && echo $p;; esac; done; true"
    return host.run("sh", "-c", script).stdout.split()


class Breaker:
    """Breaks one evacuation after the other on the same three hosts."""

    def __init__(self, site, library):
        self.site, self.library, self.runs, self.kills = site, library, 0, 0

    def kill(self, role, name, skip, after):
        """Whether there is such a record: then its writer was killed, and what followed was judged."""
        run = Run(self.site, self.runs, self.library)
        self.runs += 1
        run.start()
        where = f"{role}, {'after' if after else 'before'} {name} number {skip + 1}"
        try:
            reached = run.break_at(role, name, skip, after)
            if reached:
                run.go_on()
            run.judge()
        except proofs.ProofFailed as failure:
            raise proofs.ProofFailed(f"killed {where}: {failure}") from failure
        run.clear()
        if reached:
            self.kills += 1
            say(f"  {where}: it went on (who watched was told: {run.said})")
        return reached

    def every(self):
        for role, name in RECORDS:
            skip = 0
            while self.kill(role, name, skip, False):
                demand(self.kill(role, name, skip, True), f"{name} number {skip + 1} of {role} was there once")
                skip += 1
                demand(skip < MOST, f"{role} has written {name} {skip} times")

    def some(self):
        for point in FAST:
            demand(self.kill(*point), f"{point} was not reached")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("--fast", action="store_true", help="three of the records only")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        with Fleet(options.crossdock, "abc") as fleet:
            site = Site(fleet, options.crossdock, None)
            site.prepare()
            breaker = Breaker(site, shim.build("shim.c", os.path.join(fleet.base, "shim.so"), "-ldl"))
            if options.fast:
                breaker.some()
            else:
                breaker.every()
    except proofs.ProofFailed as failure:
        sys.exit(f"records: NOT PROVED: {failure}")
    say(f"{breaker.kills} kills, none of which kept a guest or ran one twice. It took {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
