#!/usr/bin/env python3
"""What the confinement of guests costs a move: the same guest goes to agents with and without it, in turns.

    confinement.py CROSSDOCK [--size MIB] [--pairs N]

An idle guest of 256 MiB with a disk of random bytes; both hosts are this machine. Needs root: without it nothing is confined.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "deploy", "demo"))
from installation import Authority, Installation  # noqa: E402


def move(program, base, pki, number, size, options):
    here = Installation(program, os.path.join(base, f"a{number}"), pki)
    there = Installation(program, os.path.join(base, f"b{number}"), pki)
    for one in (here, there):
        os.makedirs(one.directory)
        os.chmod(one.directory, 0o755)
    disk = os.path.join(here.directory, "disk.raw")
    with open(disk, "wb") as file:
        for _ in range(size):
            file.write(os.urandom(1 << 20))
    line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "256", "-nodefaults", "-display", "none"]
    line += ["-drive", f"file={disk},format=raw,if=virtio"]
    log = open(os.path.join(there.directory, "agent.log"), "wb")
    agent = subprocess.Popen(there.destination("127.0.0.1", "--guest-network", "host", *options), stdout=log, stderr=log)
    try:
        while "NBD port" not in open(log.name).read():
            time.sleep(0.05)
        subprocess.run(here.start_guest("web1", line), check=True, stdout=subprocess.DEVNULL)
        report = os.path.join(here.directory, "report.json")
        subprocess.run(here.migrate("web1", "127.0.0.1", "--report", report), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = json.load(open(report))
        return size / found["phases_ms"]["disks"] * 1000, found["blackout_ms"]
    finally:
        for one in (here, there):
            subprocess.run([program, "guest", "stop", "web1", "--force", "--state-dir", one.state], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        agent.terminate()
        agent.wait()
        for one in (here, there):
            shutil.rmtree(one.directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    base = tempfile.mkdtemp(prefix="xd-confinement-")
    os.chmod(base, 0o755)
    kinds = {"confined": ["--require-confinement"], "not confined": ["--no-confinement"]}
    found = {kind: [] for kind in kinds}
    try:
        pki = os.path.join(base, "pki")
        Authority(options.crossdock, os.path.join(base, "ca")).issue(pki, "127.0.0.1")
        for number in range(options.pairs):
            for kind, more in kinds.items():
                found[kind].append(move(options.crossdock, base, pki, f"{number}{len(more[0])}", options.size, more))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    for kind, moves in found.items():
        rates, pauses = zip(*moves)
        print(
            f"{kind:13} copy {statistics.median(rates):5.0f} MiB/s [{min(rates):.0f}-{max(rates):.0f}]"
            f"   pause {statistics.median(pauses):4.0f} ms [{min(pauses):.0f}-{max(pauses):.0f}]"
        )


if __name__ == "__main__":
    main()
