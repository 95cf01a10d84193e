"""What an export costs the guest: the latency of writes of its disk, without an export and with each kind of one.

    export.py CROSSDOCK [--writes N] [--json FILE]

A QEMU writes 256 KiB at a time through its human monitor (`qemu-io`). The monitor's own round trip, which a command that does
nothing shows, is taken off each figure. The modes take turns, so that a busy machine is busy for all of them.
"""
import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time

MEBIBYTE = 1 << 20
SIZE = 2048 * MEBIBYTE
BLOCK = 256 << 10


class Monitor:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer or "error" in answer:
                return answer

    def timed(self, command):
        start = time.perf_counter()
        self.ask("human-monitor-command", **{"command-line": f'qemu-io virtio0 "{command}"'})
        return (time.perf_counter() - start) * 1000

    def write(self, offset):
        return self.timed(f"write -q -P 7 {offset} {BLOCK}")

    def nothing(self):
        return statistics.median(self.timed("sleep 0") for _ in range(200))


def wait_for(condition, what):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise SystemExit(f"no {what}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("crossdock")
    parser.add_argument("--writes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="xd-export-")
    crossdock = os.path.abspath(options.crossdock)
    state = f"{directory}/state"
    image = f"{directory}/disk.raw"
    subprocess.run(f"fallocate -l {SIZE} {image}", shell=True, check=True)
    subprocess.run([crossdock, "pki", "init", f"{directory}/ca"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([crossdock, "pki", "issue", f"{directory}/ca", f"{directory}/tls", "localhost"], check=True,
                   stdout=subprocess.DEVNULL)
    tls = ["--object", f"tls-creds-x509,id=t,dir={directory}/tls", "--tls-creds", "t"]
    emulator = subprocess.Popen(
        ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-drive",
         f"file={image},format=raw,if=virtio", "-qmp", f"unix:{directory}/a.sock,server=on,wait=off", "-qmp",
         f"unix:{directory}/b.sock,server=on,wait=off"], stdout=subprocess.DEVNULL)
    results = {}
    try:
        wait_for(lambda: os.path.exists(f"{directory}/b.sock"), "monitor")
        subprocess.run([crossdock, "guest", "adopt", "bench", "--qmp", f"{directory}/a.sock", "--state-dir", state],
                       check=True, stdout=subprocess.DEVNULL)
        monitor = Monitor(f"{directory}/b.sock")

        def measure(name, offsets):
            idle = monitor.nothing()
            results.setdefault(name, []).extend(max(monitor.write(offset) - idle, 0) for offset in offsets)

        def export(*more):
            process = subprocess.Popen([crossdock, "export", "bench", "--listen", "localhost:0", "--state-dir", state, *tls,
                                        *more], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for line in process.stdout:
                if "listening" in line:
                    return process, line.rsplit(":", 1)[1].strip()
            raise SystemExit("the export did not start")

        def end(process):
            process.terminate()
            process.wait()

        def offsets():
            return [block * BLOCK for block in random.sample(range(SIZE // BLOCK), options.writes)]

        for _ in range(options.rounds):
            measure("no export", offsets())
            process, port = export()
            measure("live, idle", offsets())
            uri = f"nbds://localhost:{port}/bench/virtio0?tls-certificates={directory}/tls"
            reader = subprocess.Popen(["nbdcopy", uri, "null:"])
            measure("live, being read", offsets())
            reader.kill()
            reader.wait()
            end(process)
            process, port = export("--snapshot")
            places = offsets()
            measure("snapshot, first write to a block", places)
            measure("snapshot, later writes", places)
            end(process)
    finally:
        emulator.kill()
        emulator.wait()
        shutil.rmtree(directory)
    base = statistics.median(results["no export"])
    print("| guest's writes of 256 KiB | median | 99th percentile | median, of that without an export |")
    print("|---|---|---|---|")
    rows = {}
    for name, times in results.items():
        times.sort()
        median, high = statistics.median(times), times[int(len(times) * 0.99)]
        rows[name] = {"median_ms": median, "p99_ms": high, "ratio": median / base}
        print(f"| {name} | {median:.2f} ms | {high:.2f} ms | {median / base:.2f} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=2)


main()
