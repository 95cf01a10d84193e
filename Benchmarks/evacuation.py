#!/usr/bin/env python3
"""What an evacuation costs: ten guests that write leave a host over a line of so many Mbit/s, come home, and leave one by one.

    evacuation.py CROSSDOCK GUEST-DIRECTORY [--guests N] [--memory MIB] [--disk MIB] [--rate MBIT] [--json FILE]

Three hosts in namespaces on this machine; the disks are random bytes. Told are the pauses of the evacuation next to those of single moves
with the same others running, the time next to what the line needs for the bytes that crossed it, and the bytes and time of the way
back. Needs root.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(REPOSITORY, "Tests", "Evacuation"), os.path.join(REPOSITORY, "deploy", "demo")]
import evacuation  # noqa: E402
from hosts import Fleet, wait  # noqa: E402

evacuation.MOST = "1T"
# The guests write their records at the start of their disks.
RECORDS = 32


class Bench(evacuation.Site):
    def __init__(self, fleet, options):
        super().__init__(fleet, options.crossdock, options.guest)
        self.options = options
        self.guests = [evacuation.Guest(f"g{index}", options.memory, [options.disk]) for index in range(options.guests)]

    def start(self, guest):
        image = os.path.join(self.a.directory, f"{guest.name}.raw")
        with open(image, "wb") as file:
            file.truncate(guest.disks[0] << 20)
            file.seek(RECORDS << 20)
            for _ in range(guest.disks[0] - RECORDS):
                file.write(os.urandom(1 << 20))
        command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", str(guest.memory), "-nodefaults"]
        command += ["-display", "none", "-no-reboot", "-kernel", f"{self.files}/vmlinuz", "-initrd", f"{self.files}/initrd"]
        command += ["-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests xd.interval=50000"]
        command += ["-drive", f"file={image},format=raw,if=virtio"]
        guest.consoles = [os.path.join(self.a.directory, f"{guest.name}.log")]
        self.a.run(*self.a.start_guest(guest.name, command + ["-serial", f"file:{guest.consoles[0]}"]))
        wait(f"the records of {guest.name}", lambda: self.count(guest) > 10, 300)

    def sent(self, host):
        """Bytes that a host's line has carried, each packet with its headers: the device's own count has those of a burst once."""
        counters = json.loads(host.run("tc", "-s", "-j", "qdisc", "show", "dev", host.link).stdout)
        return next(counter["bytes"] for counter in counters if counter["kind"] == "tbf")

    def empty(self):
        before, began = self.sent(self.a), time.monotonic()
        self.evacuate(*self.begin(), check=0)
        seconds, bytes_sent = time.monotonic() - began, self.sent(self.a) - before
        pauses = [guest["blackout_ms"] for guest in self.report()["guests"]]
        return {"seconds": seconds, "bytes": bytes_sent, "pauses": pauses}

    def come_home(self):
        before, began = self.sent(self.b) + self.sent(self.c), time.monotonic()
        words = [self.crossdock, "restore", "--address", "host-a", "--state-dir", self.a.state, *self.a.credentials()]
        done = self.a.run(*words, check=False, stderr=subprocess.STDOUT)
        evacuation.demand(done.returncode == 0, done.stdout)
        return {"seconds": time.monotonic() - began, "bytes": self.sent(self.b) + self.sent(self.c) - before}

    def single(self, guest):
        """The pause of one move, with the others running; the guest comes back afterwards."""
        report = os.path.join(self.a.directory, "single.json")
        self.a.run(*self.a.migrate(guest.name, "host-b", "--report", report), stderr=subprocess.STDOUT)
        self.b.run(*self.b.migrate(guest.name, "host-a"), stderr=subprocess.STDOUT)
        with open(report, encoding="utf-8") as file:
            return json.load(file)["blackout_ms"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("guest", type=os.path.realpath)
    parser.add_argument("--guests", type=int, default=10)
    parser.add_argument("--memory", type=int, default=128)
    parser.add_argument("--disk", type=int, default=512)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--json")
    options = parser.parse_args()
    with Fleet(options.crossdock, "abc") as fleet:
        bench = Bench(fleet, options)
        bench.prepare()
        for guest in bench.guests:
            bench.start(guest)
        for host in fleet.hosts.values():
            fleet.limit(host, f"{options.rate}mbit")
        print(f"{options.guests} guests of {options.memory} MiB with disks of {options.disk} MiB write; the line: {options.rate} Mbit/s", flush=True)
        there = bench.empty()
        needed = there["bytes"] * 8 / (options.rate * 1e6)
        print(f"evacuation: {there['seconds']:.1f} s; {there['bytes'] / 1e6:.0f} MB crossed the line, which needs {needed:.1f} s for them: "
              f"{there['seconds'] / needed:.2f}", flush=True)  # fmt: skip
        back = bench.come_home()
        print(f"way back: {back['seconds']:.1f} s, {back['bytes'] / 1e6:.0f} MB", flush=True)
        alone = [bench.single(guest) for guest in bench.guests]
        ratio = statistics.median(there["pauses"]) / statistics.median(alone)
        for name, pauses in (("evacuation", there["pauses"]), ("single moves", alone)):
            print(f"pauses, {name}: median {statistics.median(pauses):.0f} ms, worst {max(pauses):.0f} ms, in order {[round(one) for one in pauses]}")
        print(f"ratio of the medians: {ratio:.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"there": there, "needed_s": needed, "back": back, "alone": alone, "ratio": ratio}, file, indent=1)


if __name__ == "__main__":
    main()
