#!/usr/bin/env python3
"""Measures NBD over TLS and Unix sockets: Crossdock next to nbdkit, libnbd and qemu-nbd, in turn, in one run.

    nbd.py CROSSDOCK [--size MIB] [--runs N] [--rows NAME,...] [--json FILE] [--markdown FILE]

Everything is on this machine and in tmpfs (/dev/shm). The contestants take turns within each round; each figure is the median with
the lowest and the highest, each ratio is taken pair by pair. CPU-seconds are those of both ends, user and system.
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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_of(pid):
    """The CPU time of a process, its ended threads included."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def timed(arguments, **more):
    """Runs a program; returns its wall-clock time, its CPU time and its output."""
    start = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {(errors or output)[-800:]}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, output


class Server:
    """A server process, and the URI of its export."""

    def __init__(self, bench, kind, image, tls=True):
        self.bench, self.kind, self.tls = bench, kind, tls
        port, pki = free_port(), bench.pki
        path = os.path.join(bench.directory, f"{kind}.sock")
        if os.path.exists(path):
            os.unlink(path)
        if kind == "crossdock":
            where = ["-b", "localhost", "-p", str(port)] if tls else ["-k", path]
            safe = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={pki}", "--tls-creds", "t"] if tls else []
            command = [bench.crossdock, "nbd", "serve", "-t", "-f", "raw", *where, *safe, image]
        elif kind == "nbdkit":
            where = ["-p", str(port), "-i", "localhost"] if tls else ["-U", path]
            safe = ["--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer"] if tls else []
            command = ["nbdkit", "-f", *where, *safe, "file", image]
        else:
            where = ["-b", "localhost", "-p", str(port)] if tls else ["-k", path]
            safe = ["--object", f"tls-creds-x509,id=tls0,dir={pki},endpoint=server,verify-peer=yes",
                    "--tls-creds", "tls0"] if tls else []
            command = ["qemu-nbd", *where, "-f", "raw", "-e", "64", "-t", "--cache=writeback", "--aio=threads", *safe, image]
        # They complain about clients that leave without a word, as fio and the probe below do.
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.address = ("localhost", port) if tls else path
        self.uri = f"nbds://localhost:{port}/?tls-certificates={pki}" if tls else f"nbd+unix:///?socket={path}"
        end = time.monotonic() + 20
        while True:
            try:
                probe = socket.create_connection(self.address) if tls else socket.socket(socket.AF_UNIX)
                if not tls:
                    probe.connect(path)
                probe.close()
                return
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def cpu(self):
        return cpu_of(self.process.pid)

    def resident(self):
        for line in open(f"/proc/{self.process.pid}/status"):
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Bench:
    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.crossdock = os.path.abspath(options.crossdock)
        self.size = options.size
        self.pki = os.path.join(directory, "pki")
        for arguments in (["init", directory + "/ca"], ["issue", directory + "/ca", self.pki, "localhost"]):
            subprocess.run([self.crossdock, "pki", *arguments], check=True, stdout=subprocess.DEVNULL)
        # fio cannot name a credential directory: libnbd looks for one in the home directory, of users other than root.
        os.makedirs(os.path.join(directory, ".pki"))
        os.symlink(self.pki, os.path.join(directory, ".pki/libnbd"))
        self.as_user = {"env": os.environ | {"HOME": directory}}
        if os.geteuid() == 0:
            self.as_user |= {"user": 65534, "group": 65534, "extra_groups": []}
            for path in (directory, self.pki):
                os.chmod(path, 0o755)
            for name in os.listdir(self.pki):
                os.chmod(os.path.join(self.pki, name), 0o644)
        self.source = os.path.join(directory, "source.raw")
        self.target = os.path.join(directory, "target.raw")
        with open(self.source, "wb") as file:
            for _ in range(self.size):
                file.write(os.urandom(1 << 20))
        # The target stays allocated: fresh memory costs more than all that is measured here.
        shutil.copyfile(self.source, self.target)
        self.results = []

    def add(self, row, name, samples, unit, goal=None, against=None):
        """Notes one line of the table; `against` are the samples of the peer, pair by pair."""
        line = {"row": row, "name": name, "unit": unit, "median": statistics.median(samples), "low": min(samples),
                "high": max(samples)}
        if against:
            ratios = [a / b for a, b in zip(samples, against)]
            line |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios), "goal": goal}
        elif goal:
            line["goal"] = goal
        self.results.append(line)
        print(format_line(line), flush=True)

    # Bulk

    def bulk(self, kind, command):
        """One copy against a server: MiB/s, CPU s/GiB of both ends, and of the server."""
        with Server(self, kind, self.target) as server:
            command = [part.replace("URI", server.uri) for part in command]
            before = server.cpu()
            seconds, client, _ = timed(command)
            used = server.cpu() - before
            gib = self.size / 1024
            return {"rate": self.size / seconds, "cpu": (client + used) / gib, "server": used / gib, "client": client / gib}

    def rounds(self, contestants):
        samples = {name: [] for name, _, _ in contestants}
        for _ in range(self.options.runs):
            for name, kind, command in contestants:
                samples[name].append(self.bulk(kind, command))
        return samples

    def report_bulk(self, row, samples, goals):
        for name, values in samples.items():
            for key, unit in (("rate", "MiB/s"), ("cpu", "CPU s/GiB, both ends"), ("server", "CPU s/GiB, server")):
                pair = goals.get((name, key))
                self.add(row, name, [v[key] for v in values], unit, pair and pair[1],
                         pair and [v[key] for v in samples[pair[0]]])

    def row_write(self):
        ours = [self.crossdock, "nbd", "copy", self.source, "URI"]
        theirs = ["nbdcopy", self.source, "URI"]
        samples = self.rounds([
            ("nbdcopy -> nbdkit", "nbdkit", theirs), ("nbdcopy -> crossdock", "crossdock", theirs),
            ("crossdock nbd copy -> crossdock", "crossdock", ours), ("nbdcopy -> qemu-nbd", "qemu-nbd", theirs)])
        self.report_bulk("write", samples, {
            ("nbdcopy -> crossdock", "cpu"): ("nbdcopy -> nbdkit", "at most 0.87"),
            ("crossdock nbd copy -> crossdock", "cpu"): ("nbdcopy -> nbdkit", "at most 0.70"),
            ("crossdock nbd copy -> crossdock", "rate"): ("nbdcopy -> nbdkit", "at least 1.4")})
        self.add("write", "crossdock nbd copy -> crossdock, against nbdcopy -> qemu-nbd",
                 [v["rate"] for v in samples["crossdock nbd copy -> crossdock"]], "MiB/s", "at least 2.2",
                 [v["rate"] for v in samples["nbdcopy -> qemu-nbd"]])

    def row_read(self):
        theirs = ["nbdcopy", "URI", "null:"]
        samples = self.rounds([
            ("nbdkit -> nbdcopy", "nbdkit", theirs), ("crossdock -> nbdcopy", "crossdock", theirs),
            ("crossdock -> crossdock nbd copy", "crossdock", [self.crossdock, "nbd", "copy", "URI", "null:"])])
        self.report_bulk("read", samples, {("crossdock -> nbdcopy", "cpu"): ("nbdkit -> nbdcopy", "at most 0.90")})

    # Small requests

    def fio(self, server, kind, depth):
        uri = server.uri.split("?tls")[0]
        if not server.tls:
            os.chmod(server.address, 0o666)
        job = ["fio", "--name=j", "--ioengine=nbd", f"--uri={uri}", f"--rw=rand{kind}", "--bs=4k", f"--iodepth={depth}",
               "--time_based", f"--runtime={self.options.seconds}", "--ramp_time=0.3", "--output-format=json", "--size=512m",
               "--randrepeat=0"]
        _, _, output = timed(job, **self.as_user)
        return json.loads(output[output.index("{"):])["jobs"][0][kind]["iops"]

    def row_fio(self):
        for tls in (True, False):
            for kind in ("read", "write"):
                for depth in (1, 16, 64):
                    samples = {"nbdkit": [], "crossdock": []}
                    for _ in range(self.options.runs):
                        for name in samples:
                            with Server(self, name, self.target, tls) as server:
                                samples[name].append(self.fio(server, kind, depth))
                    where = "TLS" if tls else "Unix socket"
                    self.add("fio", f"4 KiB random {kind}, depth {depth}, {where}: nbdkit", samples["nbdkit"], "IOPS")
                    self.add("fio", f"4 KiB random {kind}, depth {depth}, {where}: crossdock", samples["crossdock"], "IOPS",
                             "at least 1.1", samples["nbdkit"])

    # Others

    def row_sparse(self):
        """16 GiB with 1 GiB of data in pieces of 1 MiB: what goes over the wire, and what the target takes."""
        source, target = (os.path.join(self.directory, name) for name in ("sparse.raw", "sparse-target.raw"))
        with open(source, "wb") as file:
            file.truncate(16 << 30)
            for piece in range(1024):
                file.seek(piece * (16 << 20))
                file.write(os.urandom(1 << 20))
        open(target, "wb").truncate(16 << 30)
        try:
            with Server(self, "crossdock", target) as server:
                before = wire()
                seconds, _, _ = timed([self.crossdock, "nbd", "copy", source, server.uri])
                sent = wire() - before
            subprocess.run(["cmp", source, target], check=True)
            allocated = [os.stat(path).st_blocks * 512 for path in (source, target)]
            self.add("sparse", "16 GiB with 1 GiB of data: bytes on the wire", [sent / (1 << 30)], "GiB", "at most 1.01")
            self.add("sparse", "16 GiB with 1 GiB of data: target's allocation", [allocated[1] / allocated[0]], "of the source's",
                     "at most 1.01")
            self.add("sparse", "16 GiB with 1 GiB of data: time", [seconds], "s")
        finally:
            os.unlink(source)
            os.unlink(target)

    def row_memory(self):
        """64 connections that read and write all the time."""
        with Server(self, "crossdock", self.target) as server:
            jobs = [subprocess.Popen(
                ["fio", "--name=j", "--ioengine=nbd", f"--uri={server.uri.split('?tls')[0]}", "--rw=randrw", "--bs=64k", "--iodepth=4",
                 "--time_based", "--runtime=6", "--numjobs=16", "--thread", "--size=512m"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self.as_user) for _ in range(4)]
            peak = 0
            while any(job.poll() is None for job in jobs):
                peak = max(peak, server.resident())
                time.sleep(0.1)
            assert all(job.returncode == 0 for job in jobs)
            self.add("memory", "64 busy connections over TLS, resident", [peak], "MiB", "under 64")


def wire():
    """Bytes that the loopback interface has sent."""
    return int(open("/sys/class/net/lo/statistics/tx_bytes").read())


def number(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def format_line(line):
    text = f"{line['name']}: {number(line['median'])}"
    if line["low"] != line["high"]:
        text += f" [{number(line['low'])}-{number(line['high'])}]"
    text += f" {line['unit']}"
    if "ratio" in line:
        text += f", {line['ratio']:.2f} [{line['ratio_low']:.2f}-{line['ratio_high']:.2f}] of the peer's"
    if line.get("goal"):
        text += f" (to reach: {line['goal']})"
    return text


def markdown(results):
    lines = ["| work | measured | ratio, pair by pair | to reach |", "|---|---|---|---|"]
    for line in results:
        spread = f" [{number(line['low'])}-{number(line['high'])}]" if line["low"] != line["high"] else ""
        ratio = f"{line['ratio']:.2f} [{line['ratio_low']:.2f}-{line['ratio_high']:.2f}]" if "ratio" in line else ""
        lines.append(f"| {line['name']} | {number(line['median'])}{spread} {line['unit']} | {ratio} | {line.get('goal') or ''} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock")
    parser.add_argument("--size", type=int, default=4096, help="MiB of random data (default 4096)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each fio run")
    parser.add_argument("--rows", default="write,read,fio,sparse,memory")
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="crossdock-bench-", dir="/dev/shm")
    try:
        bench = Bench(options, directory)
        for row in options.rows.split(","):
            getattr(bench, "row_" + row)()
        if options.json:
            json.dump(bench.results, open(options.json, "w"), indent=1)
        if options.markdown:
            open(options.markdown, "w").write(markdown(bench.results))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
