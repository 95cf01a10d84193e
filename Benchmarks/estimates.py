"""What a dry run says that a move will take, and what it takes: `crossdock migrate --dry-run`, and then the move itself.

    estimates.py CROSSDOCK [--rounds N]

Both agents run on this machine. Each row is a guest: how much of its disk and of its memory is in use, and a limit. The last column is the
time that was taken, divided by the time that was estimated; the bytes are compared in the same way. A time on a machine that does something
else says nothing.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
GUEST = os.path.join(HERE, "..", ".cache", "guest")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
MIB = 1 << 20
# Of the disk in use, of the guest's memory, and bytes a second.
CASES = [(16, 64, 0), (256, 64, 0), (1024, 64, 0), (64, 512, 0), (64, 64, 16 * MIB), (256, 256, 64 * MIB)]


def guest(crossdock, directory, name, disk, memory):
    image = f"{directory}/{name}.raw"
    with open(image, "wb") as file:
        file.truncate(4 << 30)
        for _ in range(disk):
            file.write(os.urandom(MIB))
    subprocess.run(
        [crossdock, "guest", "start", name, "--state-dir", f"{directory}/a", "--", "qemu-system-x86_64", "-machine", "pc,accel=tcg",
         "-cpu", "max", "-m", str(memory), "-nodefaults", "-display", "none", "-kernel", f"{GUEST}/vmlinuz", "-initrd",
         f"{GUEST}/initrd", "-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests", "-serial", f"file:{directory}/{name}.log",
         "-drive", f"file={image},format=raw,if=virtio"], check=True, **QUIET,
    )  # fmt: skip


def report(command, path):
    started = time.perf_counter()
    subprocess.run([*command, "--report", path], check=True, **QUIET)
    with open(path, encoding="utf-8") as file:
        return json.load(file), time.perf_counter() - started


def measure(crossdock, rounds):
    for case, (disk, memory, limit) in enumerate(CASES):
        ratios = []
        for round_ in range(rounds):
            directory = tempfile.mkdtemp(prefix="xd-estimates-")
            agent = None
            try:
                subprocess.run([crossdock, "pki", "init", f"{directory}/ca"], check=True, **QUIET)
                subprocess.run([crossdock, "pki", "issue", f"{directory}/ca", f"{directory}/tls", "localhost"], check=True, **QUIET)
                tls = ["--object", f"tls-creds-x509,id=t,dir={directory}/tls", "--tls-creds", "t"]
                agent = subprocess.Popen(
                    [crossdock, "destination", "--state-dir", f"{directory}/b", "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0",
                     "--guest-network", "host", *tls], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
                port = agent.stdout.readline().split(":")[2].split(",")[0]
                name = f"g{case}-{round_}"
                guest(crossdock, directory, name, disk, memory)
                time.sleep(15)
                move = [crossdock, "migrate", name, f"localhost:{port}", "--state-dir", f"{directory}/a", "--bandwidth", str(limit), *tls]
                dry, _ = report([*move, "--dry-run"], f"{directory}/dry.json")
                real, _ = report(move, f"{directory}/real.json")
                estimate, taken = dry["rehearsal"].get("seconds_estimated"), real["total_ms"] / 1000
                ratios.append(taken / estimate if estimate else float("inf"))
                said = dry["rehearsal"]
                print(
                    f"disk {disk:5} MiB, memory {memory:4} MiB, limit {limit >> 20:3} MiB/s: estimated {estimate or 0:6.2f} s, taken {taken:6.2f} s,"
                    f" {ratios[-1]:5.2f}; disk {said['disk_bytes'] >> 20} and {sum(d['bytes_sent'] for d in real['disks']) >> 20} MiB, memory"
                    f" {said.get('memory_bytes_in_use', said['memory_bytes']) >> 20} and {real['ram_bytes_sent'] >> 20} MiB", flush=True,
                )  # fmt: skip
            finally:
                for side in "ab":
                    subprocess.run([crossdock, "guest", "stop", "--force", f"g{case}-{round_}", "--state-dir", f"{directory}/{side}"], **QUIET)
                if agent:
                    agent.terminate()
                    agent.wait()
                shutil.rmtree(directory, ignore_errors=True)
        print(f"  median {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("crossdock")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    measure(os.path.abspath(arguments.crossdock), arguments.rounds)
