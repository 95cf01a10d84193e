#!/usr/bin/env python3
"""Measures the mirror of a disk over TLS: Crossdock next to QEMU's own NBD over TLS, in turn, in one run.

    mirror.py CROSSDOCK [--size MIB] [--runs N] [--json FILE]

Everything is on this machine and in tmpfs; 4 KiB of the disk differ from the next, so nothing can be left out. Reported
are MiB/s of the mirror's first pass and CPU-seconds per GiB of all processes (user and system), as the median with the
lowest and the highest.
"""
import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time

TICK = os.sysconf("SC_CLK_TCK")


class QMP:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + 20
        while True:
            try:
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.events = []
        self.call("qmp_capabilities")

    def call(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            message = json.loads(self.file.readline())
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_event(self, name):
        while True:
            for message in self.events:
                if message["event"] == name:
                    self.events.remove(message)
                    return message
            self.events.append(json.loads(self.file.readline()))


def cpu(pids):
    total = 0
    for pid in pids:
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def children_named(text):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{pid}/cmdline", "rb").read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        # The watchdog only sleeps, and ends before it could be asked what it used.
        if text in line and line.strip() and "source-watchdog" not in line:
            found.append(int(pid))
    return found


def warm(directory, megabytes):
    """Freed memory goes back to the host of a virtual machine soon; what was touched a moment ago is still there."""
    path = os.path.join(directory, "warm")
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(b"\1" * (1 << 20))
    os.unlink(path)


def qemu(*more):
    return ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", *more]


class Bench:
    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.crossdock = options.crossdock
        self.disk = os.path.join(directory, "source.raw")
        with open(self.disk, "wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(1 << 20))
        self.pki = os.path.join(directory, "pki")
        for arguments in (["init", directory + "/ca"], ["issue", directory + "/ca", self.pki, "localhost"]):
            subprocess.run([self.crossdock, "pki", *arguments], check=True, stdout=subprocess.DEVNULL)

    def figures(self, seconds, used):
        gigabytes = self.options.size / 1024
        return {"mib_per_s": self.options.size / seconds, "cpu_s_per_gib": used / gigabytes}

    def run_crossdock(self, connections):
        work = tempfile.mkdtemp(dir=self.directory)
        credentials = ["--object", f"tls-creds-x509,id=t,dir={self.pki}", "--tls-creds", "t"]
        image = os.path.join(work, "disk.raw")
        # An image with two names may be in use under the other one, and does not move.
        os.rename(self.disk, image)
        agent = subprocess.Popen(
            [self.crossdock, "destination", "--state-dir", work + "/b", "--listen", "127.0.0.1:0", "--nbd-listen",
             "127.0.0.1:0", "--guest-network", "host", "--log-level", "error", *credentials], stdout=subprocess.PIPE, text=True)
        try:
            port = agent.stdout.readline().split(", NBD")[0].rsplit(":", 1)[1]
            subprocess.run([self.crossdock, "guest", "start", "bench", "--state-dir", work + "/a", "--",
                            *qemu("-drive", f"file={image},format=raw,if=virtio")], check=True, stdout=subprocess.DEVNULL)
            warm(self.directory, self.options.size)
            migrate = subprocess.Popen(
                [self.crossdock, "migrate", "bench", "localhost:" + port, "--state-dir", work + "/a", "--json",
                 "--connections", str(connections), *credentials], stdout=subprocess.PIPE, text=True)
            split = {}
            for line in migrate.stdout:
                event = json.loads(line)
                if event.get("phase") == "disks" and event["event"] == "phase":
                    pids = children_named(work)
                    pids = [pid for pid in pids if pid not in (os.getpid(), migrate.pid)]
                    split = {pid: cpu([pid]) for pid in pids}
                elif event.get("phase") == "verify":
                    # A QEMU that only rehearsed the machine may be seen in its last moment.
                    split = {pid: earlier for pid, earlier in split.items() if os.path.exists(f"/proc/{pid}")}
                    split = {pid: cpu([pid]) - earlier for pid, earlier in split.items()}
                    names = {pid: open(f"/proc/{pid}/cmdline").read().replace("\0", " ")[:60] for pid in split}
                elif event["event"] == "finished":
                    report = event["report"]
            assert migrate.wait() == 0, report
            if self.options.verbose:
                for pid, seconds in split.items():
                    print(f"  {seconds / self.options.size * 1024:.2f} CPU s/GiB  {names[pid]}")
            return self.figures(report["phases_ms"]["disks"] / 1000, sum(split.values()))
        finally:
            for side in ("/a", "/b"):
                subprocess.run([self.crossdock, "guest", "stop", "bench", "--force", "--state-dir", work + side], check=False,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            agent.send_signal(signal.SIGTERM)
            agent.wait()
            # It is called disk.raw.released-MIGRATION when the guest has left.
            [kept] = [name for name in os.listdir(work) if name.startswith("disk.raw")]
            os.rename(os.path.join(work, kept), self.disk)
            shutil.rmtree(work)

    def run_native(self):
        work = tempfile.mkdtemp(dir=self.directory)
        target = os.path.join(work, "target.raw")
        with open(target, "wb") as file:
            file.truncate(self.options.size << 20)
        creds = "tls-creds-x509,id=t,dir={},endpoint={}"
        port = 20000 + os.getpid() % 10000
        processes = [
            subprocess.Popen(qemu("-object", creds.format(self.pki, "client"), "-qmp", f"unix:{work}/a,server=on,wait=off",
                                  "-blockdev", f"raw,node-name=disk,file.driver=file,file.filename={self.disk},file.locking=off",
                                  "-device", "virtio-blk-pci,drive=disk")),
            subprocess.Popen(qemu("-object", creds.format(self.pki, "server"), "-qmp", f"unix:{work}/b,server=on,wait=off",
                                  "-blockdev", f"raw,node-name=disk,discard=unmap,file.driver=file,file.filename={target}",
                                  "-device", "virtio-blk-pci,drive=disk", "-S", "-incoming", "defer")),
        ]
        try:
            source, destination = QMP(work + "/a"), QMP(work + "/b")
            destination.call("nbd-server-start", addr={"type": "inet", "data": {"host": "localhost", "port": str(port)}},
                             tls_creds="t")
            destination.call("block-export-add", type="nbd", id="e", node_name="disk", name="disk", writable=True)
            warm(self.directory, self.options.size)
            pids = [process.pid for process in processes]
            before, start = cpu(pids), time.monotonic()
            source.call("blockdev-add", driver="nbd", node_name="target", export="disk", tls_creds="t",
                        server={"type": "inet", "host": "localhost", "port": str(port)})
            source.call("blockdev-mirror", job_id="m", device="disk", target="target", sync="full")
            source.wait_event("BLOCK_JOB_READY")
            return self.figures(time.monotonic() - start, cpu(pids) - before)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            shutil.rmtree(work)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--json", help="write the figures of every run to this file")
    parser.add_argument("--verbose", action="store_true", help="print what each process of Crossdock used")
    options = parser.parse_args()
    options.crossdock = os.path.abspath(options.crossdock)
    directory = tempfile.mkdtemp(prefix="xd-bench-", dir="/dev/shm")
    try:
        bench = Bench(options, directory)
        contestants = {"crossdock": lambda: bench.run_crossdock(options.connections), "QEMU native": bench.run_native}
        results = {name: [] for name in contestants}
        for run in range(options.runs + 1):
            for name, contestant in contestants.items():
                figures = contestant()
                # The first round warms up.
                if run:
                    results[name].append(figures)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"Mirror of {options.size} MiB of random data over TLS, {options.runs} runs in turn, median [lowest-highest]\n")
    print("| | MiB/s | CPU s/GiB, all processes |\n|---|---|---|")
    for name, figures in results.items():
        cells = []
        for key, digits in (("mib_per_s", 0), ("cpu_s_per_gib", 2)):
            values = sorted(figure[key] for figure in figures)
            cells.append(f"{statistics.median(values):.{digits}f} [{values[0]:.{digits}f}-{values[-1]:.{digits}f}]")
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    for key, text in (("mib_per_s", "throughput"), ("cpu_s_per_gib", "CPU")):
        ratios = [own[key] / other[key] for own, other in zip(results["crossdock"], results["QEMU native"])]
        print(f"\ncrossdock / QEMU native, {text}, pair by pair: median {statistics.median(ratios):.2f} "
              f"[{min(ratios):.2f}-{max(ratios):.2f}]", end="")
    print()
    if options.json:
        json.dump(results, open(options.json, "w"), indent=2)


if __name__ == "__main__":
    main()
