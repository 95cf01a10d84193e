#!/usr/bin/env python3
"""A move to a host with a slow disk: how steady the copy is, how much the page cache holds back, and how long the guest is paused.

    slowdisk.py CROSSDOCK GUEST-DIRECTORY [--rate MB/s] [--disk MIB] [--json FILE]

The destination's images are on ext4 on a loop device whose writes the kernel throttles (blkio.throttle.write_bps_device, so a kernel with
cgroups of version 1); all of that is in tmpfs. The guest writes records to its disk all the time. Needs root.
"""
import argparse
import contextlib
import json
import os
import signal
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
THROTTLE = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device"
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
# The guest writes its records at the start of its disk.
RECORDS = 32


class SlowDisk:
    """A file system whose writes have a rate."""

    def __init__(self, directory, mebibytes, rate):
        self.point, backing = os.path.join(directory, "disk"), os.path.join(directory, "backing")
        os.makedirs(self.point)
        with open(backing, "wb") as file:
            file.truncate(mebibytes << 20)
        words = ["losetup", "--find", "--show", backing]
        self.device = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", self.device], check=True, **QUIET)
        subprocess.run(["mount", self.device, self.point], check=True)
        self.limit(rate)

    def limit(self, rate):
        number = os.stat(self.device).st_rdev
        with open(THROTTLE, "w", encoding="ascii") as file:
            file.write(f"{os.major(number)}:{os.minor(number)} {rate * 1000000}")

    def written(self):
        name = os.path.basename(self.device)
        with open("/proc/diskstats", encoding="ascii") as file:
            return next(int(line.split()[9]) for line in file if line.split()[2] == name) * 512

    def close(self):
        self.limit(0)
        subprocess.run(["umount", "--lazy", self.point], check=False)
        subprocess.run(["losetup", "--detach", self.device], check=False)


class Watch(threading.Thread):
    """What the disk writes and what waits in the page cache, four times a second."""

    def __init__(self, disk):
        super().__init__(daemon=True)
        self.disk, self.over, self.samples = disk, threading.Event(), []

    def run(self):
        while not self.over.wait(0.25):
            with open("/proc/meminfo", encoding="ascii") as file:
                waiting = sum(int(line.split()[1]) for line in file if line.startswith(("Dirty:", "Writeback:")))
            self.samples.append((time.monotonic(), waiting / 1024, self.disk.written()))

    def rates(self):
        """MB/s of each second in which the copy was under way."""
        seconds = self.samples[::4]
        rates = [(b[2] - a[2]) / (b[0] - a[0]) / 1e6 for a, b in zip(seconds, seconds[1:])]
        busy = [index for index, rate in enumerate(rates) if rate > 10]
        # The first and the last second are not whole.
        return rates[busy[0] + 1:busy[-1]] if busy else []


def measure(options, directory, disk):
    def run(*words, **more):
        return subprocess.run([options.crossdock, *words], check=True, **(QUIET | more))

    run("pki", "init", f"{directory}/ca")
    run("pki", "issue", f"{directory}/ca", f"{directory}/tls", "localhost")
    credentials = ["--object", f"tls-creds-x509,id=t,dir={directory}/tls", "--tls-creds", "t"]
    image, console, monitor = f"{directory}/disk.raw", f"{directory}/console", f"{directory}/qmp.sock"
    with open(image, "wb") as file:
        file.truncate(options.disk << 20)
        file.seek(RECORDS << 20)
        for _ in range(options.disk - RECORDS):
            file.write(os.urandom(1 << 20))
    os.makedirs(f"{disk.point}/images", mode=0o711)
    processes = []
    try:
        words = [options.crossdock, "destination", "--state-dir", f"{directory}/b", "--image-dir", f"{disk.point}/images"]
        words += ["--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0", "--guest-network", "host", "--log-level", "error"]
        agent = subprocess.Popen(words + credentials, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        processes.append(agent)
        port = agent.stdout.readline().split(":")[2].split(",")[0]
        words = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none"]
        words += ["-kernel", f"{options.guest}/vmlinuz", "-initrd", f"{options.guest}/initrd", "-serial", f"file:{console}"]
        words += ["-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests xd.interval=50000"]
        words += ["-drive", f"file={image},format=raw,if=virtio", "-qmp", f"unix:{monitor},server=on,wait=off"]
        processes.append(subprocess.Popen(words, **QUIET))
        end = time.monotonic() + 300
        while not os.path.exists(console) or os.path.getsize(console) < 500:
            if time.monotonic() > end:
                raise SystemExit("the guest does not write")
            time.sleep(0.1)
        watch = Watch(disk)
        watch.start()
        run("migrate", "slow", f"localhost:{port}", "--qmp", monitor, "--state-dir", f"{directory}/a", "--report", f"{directory}/report",
            *credentials)
        watch.over.set()
        watch.join()
        with open(f"{directory}/report", encoding="utf-8") as file:
            report = json.load(file)
        rates = watch.rates()
        return {
            "limit_mb_s": options.rate, "disk_mib": options.disk, "copy_mb_s": options.disk * 1.048576 / report["phases_ms"]["disks"] * 1000,
            "seconds_mb_s": {"median": statistics.median(rates), "least": min(rates), "most": max(rates)},
            "waiting_mib": max(sample[1] for sample in watch.samples), "pause_ms": report["blackout_ms"],
        }
    finally:
        for process in arrived(f"{directory}/b/"):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        for process in reversed(processes):
            process.kill()
            process.wait()


def arrived(state):
    """The guest that came: what works in the destination's state directory, but for its agent."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", encoding="latin-1") as file:
            words = file.read()
            if state in words and "qemu-system" in words.split("\0")[0]:
                yield int(pid)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("guest", type=os.path.realpath)
    parser.add_argument("--rate", type=int, default=150)
    parser.add_argument("--disk", type=int, default=3072)
    parser.add_argument("--json")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="xd-slow-", dir="/dev/shm")
    os.chmod(directory, 0o755)
    disk = None
    try:
        disk = SlowDisk(directory, options.disk + 1024, options.rate)
        result = measure(options, directory, disk)
    finally:
        if disk:
            disk.close()
        shutil.rmtree(directory, ignore_errors=True)
    seconds = result["seconds_mb_s"]
    print(f"{options.disk} MiB to a disk of {options.rate} MB/s: {result['copy_mb_s']:.0f} MB/s, in each second {seconds['median']:.0f} "
          f"[{seconds['least']:.0f}-{seconds['most']:.0f}]; at most {result['waiting_mib']:.0f} MiB waited in the page cache; pause "
          f"{result['pause_ms']:.0f} ms")  # fmt: skip
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
