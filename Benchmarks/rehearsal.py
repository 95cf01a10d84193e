"""What a rehearsal costs: `crossdock migrate --dry-run` of guests with more and more memory, time, bytes and resident memory.

    rehearsal.py CROSSDOCK [--rounds N] [--qemu A:B[,A:B...]]

Both agents run on this machine, with the system's QEMU or those that `deploy/qemu` has brought. The second of sampling that a dry
run adds is part of the time, and not of a migration.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time


HERE = os.path.dirname(os.path.abspath(__file__))
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Resident(threading.Thread):
    """The largest resident size of any blank copy, in KiB: their sockets are in directories of Crossdock's."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.over = 0, threading.Event()

    def run(self):
        while not self.over.is_set():
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    with open(f"/proc/{pid}/cmdline", "rb") as file:
                        line = file.read()
                    if b"qemu-system" in line and b"/crossdock-" in line:
                        with open(f"/proc/{pid}/status", encoding="latin-1") as file:
                            self.largest = max(self.largest, int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)))
                except (OSError, AttributeError):
                    pass
            time.sleep(0.02)


def prefix(version):
    return [os.path.join(HERE, "..", "deploy", "qemu"), version] if version else []


def measure(crossdock, rounds, pair):
    here, there = (prefix(version) for version in pair)
    directory = tempfile.mkdtemp(prefix="xd-rehearsal-")
    agent = None
    try:
        subprocess.run([crossdock, "pki", "init", f"{directory}/ca"], check=True, **QUIET)
        subprocess.run([crossdock, "pki", "issue", f"{directory}/ca", f"{directory}/tls", "localhost"], check=True, **QUIET)
        tls = ["--object", f"tls-creds-x509,id=t,dir={directory}/tls", "--tls-creds", "t"]
        agent = subprocess.Popen(
            [*there, crossdock, "destination", "--state-dir", f"{directory}/b", "--listen", "127.0.0.1:0", "--nbd-listen",
             "127.0.0.1:0", "--guest-network", "host", *tls], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        port = agent.stdout.readline().split(":")[2].split(",")[0]
        for memory in (64, 8192, 65536):
            subprocess.run(["truncate", "-s", "1G", f"{directory}/disk.raw"], check=True)
            guest = subprocess.Popen(
                [*here, "qemu-system-x86_64", "-machine", "pc-q35-7.2,accel=tcg,memory-backend=m0", "-object",
                 f"memory-backend-ram,id=m0,size={memory}M,reserve=off", "-m", str(memory), "-smp", "2", "-display", "none",
                 "-drive", f"file={directory}/disk.raw,format=raw,if=virtio", "-qmp",
                 f"unix:{directory}/{memory}.sock,server=on,wait=off"], **QUIET,
            )  # fmt: skip
            rehearsals, totals, sizes = [], [], []
            resident = Resident()
            try:
                while not os.path.exists(f"{directory}/{memory}.sock"):
                    time.sleep(0.02)
                resident.start()
                for _ in range(rounds):
                    report = f"{directory}/report.json"
                    start = time.perf_counter()
                    subprocess.run(
                        [*here, crossdock, "migrate", f"g{memory}", f"localhost:{port}", "--dry-run", "--state-dir",
                         f"{directory}/a", "--qmp", f"{directory}/{memory}.sock", "--report", report, *tls], check=True, **QUIET,
                    )  # fmt: skip
                    totals.append(time.perf_counter() - start)
                    with open(report, encoding="utf-8") as file:
                        rehearsal = json.load(file)["rehearsal"]
                    rehearsals.append(rehearsal["ms"] / 1000)
                    sizes.append(rehearsal["bytes"])
            finally:
                resident.over.set()
                guest.kill()
                guest.wait()

            def spread(values, unit):
                return f"{statistics.median(values):.2f} {unit} [{min(values):.2f}-{max(values):.2f}]"

            names = " -> ".join(version or "system's" for version in pair)
            print(f"| {names} | {memory} MiB | {spread(rehearsals, 's')} | {spread(totals, 's')} | "
                  f"{spread([size / 1e6 for size in sizes], 'MB')} | {resident.largest / 1024:.0f} MiB |", flush=True)
    finally:
        if agent:
            agent.terminate()
            agent.wait()
        shutil.rmtree(directory)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("crossdock")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--qemu", help="A:B[,A:B...]; the system's on both hosts when it is not given")
    options = parser.parse_args()
    print("| QEMU | memory | time of the rehearsal | all of `--dry-run` | bytes sent | resident, at most |")
    print("|---|---|---|---|---|---|")
    for pair in options.qemu.split(",") if options.qemu else [":"]:
        measure(os.path.abspath(options.crossdock), options.rounds, pair.split(":"))


main()
