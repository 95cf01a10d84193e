#!/usr/bin/env python3
"""What the way back of a guest costs: a disk of which 1 % of the 64 KiB chunks have changed, where its old image is still there.

    seeds.py CROSSDOCK [--size MIB] [--changed PERCENT] [--runs N] [--directory DIR] [--json FILE]

Both hosts are this machine. The guest moves from a to b as a whole; then chunks of its disk are overwritten with random bytes, and it
moves back. Reported are the bytes that crossed the loopback interface (in a network namespace of its own, so as root; with its headers
and acknowledgements, and with all that is not the disk: what the same guest with no disk to speak of takes is not taken off), the time
of the phases `disks` and `verify`, and the time of `crossdock nbd info --digest` of the same image before, over a Unix socket.
"""
import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

CHUNK = 64 << 10
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def line_bytes():
    for line in open("/proc/net/dev"):
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[8])
    raise RuntimeError("there is no loopback interface")


def digest(crossdock, image):
    """How long `nbd info --digest` takes of an image that nobody else uses, the lower of two."""
    socket = image + ".sock"
    server = subprocess.Popen([crossdock, "nbd", "serve", "-t", "-r", "-f", "raw", "-k", socket, "-x", "disk", image], **QUIET)
    try:
        while not os.path.exists(socket):
            time.sleep(0.02)
        times = []
        for _ in range(2):
            start = time.monotonic()
            subprocess.run([crossdock, "nbd", "info", "--digest", f"nbd+unix:///disk?socket={socket}"], check=True, **QUIET)
            times.append(time.monotonic() - start)
        return min(times)
    finally:
        server.terminate()
        server.wait()


class Hosts:
    def __init__(self, crossdock, directory):
        self.crossdock, self.directory = crossdock, directory
        subprocess.run([crossdock, "pki", "init", f"{directory}/ca"], check=True, **QUIET)
        subprocess.run([crossdock, "pki", "issue", f"{directory}/ca", f"{directory}/tls", "localhost"], check=True, **QUIET)
        self.tls = ["--object", f"tls-creds-x509,id=t,dir={directory}/tls", "--tls-creds", "t"]
        self.agents, self.ports = {}, {}
        for side in "ab":
            agent = subprocess.Popen(
                [crossdock, "destination", "--state-dir", self.state(side), "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0",
                 "--guest-network", "host", "--log-level", "error", *self.tls], stdout=subprocess.PIPE, text=True)  # fmt: skip
            self.agents[side] = agent
            self.ports[side] = agent.stdout.readline().split(", NBD")[0].rsplit(":", 1)[1]

    def state(self, side):
        return f"{self.directory}/{side}"

    def start(self, image):
        subprocess.run(
            [self.crossdock, "guest", "start", "bench", "--state-dir", self.state("a"), "--", "qemu-system-x86_64", "-machine",
             "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-drive", f"file={image},format=raw,if=virtio"],
            check=True, stdout=subprocess.DEVNULL)  # fmt: skip

    def move(self, side):
        other = "b" if side == "a" else "a"
        report = f"{self.directory}/report.json"
        subprocess.run(
            [self.crossdock, "migrate", "bench", "localhost:" + self.ports[other], "--state-dir", self.state(side), "--report", report,
             *self.tls], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        return json.load(open(report))

    def end(self):
        for side in "ab":
            subprocess.run([self.crossdock, "guest", "stop", "bench", "--force", "--state-dir", self.state(side)], check=False, **QUIET)
            self.agents[side].terminate()
            self.agents[side].wait()


def measure(options):
    directory = tempfile.mkdtemp(prefix="xd-seeds-", dir=options.directory)
    hosts = None
    try:
        image = f"{directory}/disk.raw"
        with open(image, "wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(1 << 20))
        read = digest(options.crossdock, image)
        hosts = Hosts(options.crossdock, directory)
        hosts.start(image)
        hosts.move("a")
        away = f"{hosts.state('b')}/images/bench/disk.raw"
        chunks = options.size * (1 << 20) // CHUNK
        changed = random.sample(range(chunks), max(1, int(chunks * options.changed / 100)))
        with open(away, "r+b") as file:
            for chunk in changed:
                file.seek(chunk * CHUNK)
                file.write(os.urandom(CHUNK))
        before = line_bytes()
        report = hosts.move("b")
        crossed = line_bytes() - before
        disk, phases = report["disks"][0], report["phases_ms"]
        assert disk["digest_source"] == disk["digest_destination"] and "seeded_bytes" in disk, disk
        copy = (phases["disks"] + phases["verify"]) / 1000
        return {
            "size": disk["size"], "changed": len(changed) * CHUNK, "sent": disk["bytes_sent"], "seeded": disk["seeded_bytes"],
            "crossed": crossed, "crossed_percent": 100 * crossed / disk["size"], "disks_s": phases["disks"] / 1000,
            "verify_s": phases["verify"] / 1000, "digest_s": read, "copy_to_digest": copy / read,
            "disks_to_digest": phases["disks"] / 1000 / read, "blackout_ms": report["blackout_ms"],
        }  # fmt: skip
    finally:
        if hosts:
            hosts.end()
        shutil.rmtree(directory, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock")
    parser.add_argument("--size", type=int, default=4096, help="MiB of the disk")
    parser.add_argument("--changed", type=float, default=1, help="per cent of its chunks")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", help="where the images are; a file system on a disk, not tmpfs")
    parser.add_argument("--json")
    options = parser.parse_args()
    if "XD_SEEDS" not in os.environ:
        command = "ip link set lo up && exec \"$@\""
        os.execvpe(
            "unshare", ["unshare", "--net", "sh", "-c", command, "sh", sys.executable, *sys.argv], {**os.environ, "XD_SEEDS": "1"})
    options.crossdock = os.path.abspath(options.crossdock)
    results = [measure(options) for _ in range(options.runs)]
    for key in results[0]:
        values = sorted(result[key] for result in results)
        print(f"{key:18} {statistics.median(values):16.3f}   ({values[0]:.3f} to {values[-1]:.3f})")
    if options.json:
        json.dump(results, open(options.json, "w"), indent=1)


main()
