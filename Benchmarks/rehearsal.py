"""What a rehearsal costs: `crossdock migrate --dry-run` of guests with more and more memory, time and bytes.

    rehearsal.py CROSSDOCK [--rounds N]

Both agents run on this machine. The second of sampling that a dry run adds is part of the time, and not of a migration.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("crossdock")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    crossdock = os.path.abspath(options.crossdock)
    directory = tempfile.mkdtemp(prefix="xd-rehearsal-")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    agent = None
    try:
        subprocess.run([crossdock, "pki", "init", f"{directory}/ca"], check=True, **quiet)
        subprocess.run([crossdock, "pki", "issue", f"{directory}/ca", f"{directory}/tls", "localhost"], check=True, **quiet)
        tls = ["--object", f"tls-creds-x509,id=t,dir={directory}/tls", "--tls-creds", "t"]
        agent = subprocess.Popen([crossdock, "destination", "--state-dir", f"{directory}/b", "--listen", "127.0.0.1:0",
                                  "--nbd-listen", "127.0.0.1:0", *tls], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 text=True)
        port = agent.stdout.readline().split(":")[2].split(",")[0]
        print("| memory | time of the rehearsal | all of `--dry-run` | bytes sent |")
        print("|---|---|---|---|")
        for memory in (64, 1024, 8192):
            subprocess.run(["truncate", "-s", "1G", f"{directory}/disk.raw"], check=True)
            guest = subprocess.Popen(["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", str(memory), "-smp", "2",
                                      "-display", "none", "-drive", f"file={directory}/disk.raw,format=raw,if=virtio", "-qmp",
                                      f"unix:{directory}/{memory}.sock,server=on,wait=off"], **quiet)
            rehearsals, totals, sizes = [], [], []
            try:
                while not os.path.exists(f"{directory}/{memory}.sock"):
                    time.sleep(0.02)
                for _ in range(options.rounds):
                    report = f"{directory}/report.json"
                    start = time.perf_counter()
                    subprocess.run([crossdock, "migrate", f"g{memory}", f"localhost:{port}", "--dry-run", "--state-dir",
                                    f"{directory}/a", "--qmp", f"{directory}/{memory}.sock", "--report", report, *tls],
                                   check=True, **quiet)
                    totals.append(time.perf_counter() - start)
                    with open(report) as file:
                        rehearsal = json.load(file)["rehearsal"]
                    rehearsals.append(rehearsal["ms"] / 1000)
                    sizes.append(rehearsal["bytes"])
            finally:
                guest.kill()
                guest.wait()

            def spread(values, unit):
                return f"{statistics.median(values):.2f} {unit} [{min(values):.2f}-{max(values):.2f}]"

            print(f"| {memory} MiB | {spread(rehearsals, 's')} | {spread(totals, 's')} | "
                  f"{spread([size / 1e6 for size in sizes], 'MB')} |")
    finally:
        if agent:
            agent.terminate()
            agent.wait()
        shutil.rmtree(directory)


main()
