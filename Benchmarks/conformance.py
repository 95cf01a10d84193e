#!/usr/bin/env python3
"""Judges the NBD servers that people use with `crossdock nbd conform`, and prints a table as Markdown.

    conformance.py CROSSDOCK [--table FILE]

Each case gets a fresh server, so that one that dies of a case fails that case only. With --table the part of FILE behind the line
`<!-- table -->` is replaced.
"""
import argparse
import concurrent.futures
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Judge:
    def __init__(self, crossdock, directory):
        self.crossdock, self.directory = crossdock, directory
        self.pki = os.path.join(directory, "pki")
        for arguments in (["init", directory + "/ca"], ["issue", directory + "/ca", self.pki, "localhost"]):
            subprocess.run([crossdock, "pki", *arguments], check=True, stdout=subprocess.DEVNULL)
        self.numbers = itertools.count()

    def command(self, kind, tls, port, path, image):
        if kind == "crossdock":
            where = ["-b", "localhost", "-p", str(port)] if tls else ["-k", path]
            safe = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={self.pki}", "--tls-creds", "t"] if tls else []
            return [self.crossdock, "nbd", "serve", "-t", "-f", "raw", "-x", "disk", *where, *safe, image]
        if kind == "qemu-nbd":
            where = ["-b", "localhost", "-p", str(port)] if tls else ["-k", path]
            safe = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={self.pki}", "--tls-creds", "t"] if tls else []
            return ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-A", "-x", "disk", *where, *safe, image]
        if kind == "nbdkit":
            where = ["-p", str(port), "-i", "localhost"] if tls else ["-U", path]
            safe = ["--tls=require", f"--tls-certificates={self.pki}", "--tls-verify-peer"] if tls else []
            return ["nbdkit", "-f", *where, *safe, "file", image]
        lines = ["[generic]", "allowlist=true", f"port={port}", "listenaddr=127.0.0.1"]
        if tls:
            lines += [f"certfile={self.pki}/server-cert.pem", f"keyfile={self.pki}/server-key.pem",
                      f"cacertfile={self.pki}/ca-cert.pem", "force_tls=true"]
        lines += ["[disk]", f"exportname={image}", "flush=true", "fua=true", "trim=true"]
        with open(image + ".conf", "w") as file:
            file.write("\n".join(lines) + "\n")
        # It always goes to the background.
        return ["nbd-server", "-C", image + ".conf", "-p", image + ".pid"]

    def uri(self, kind, tls, port, path):
        if tls:
            return f"nbds://localhost:{port}/disk?tls-certificates={self.pki}"
        return f"nbd://127.0.0.1:{port}/disk" if kind == "nbd-server" else f"nbd+unix:///disk?socket={path}"

    def case(self, kind, tls, name):
        image = os.path.join(self.directory, f"disk{next(self.numbers)}.raw")
        with open(image, "wb") as file:
            file.truncate(8 << 20)
        port, path = free_port(), image + ".sock"
        server = subprocess.Popen(self.command(kind, tls, port, path, image), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  start_new_session=True)
        try:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                try:
                    if tls or kind == "nbd-server":
                        socket.create_connection(("127.0.0.1", port)).close()
                    else:
                        probe = socket.socket(socket.AF_UNIX)
                        probe.connect(path)
                        probe.close()
                    break
                except OSError:
                    time.sleep(0.02)
            result = subprocess.run(
                [self.crossdock, "nbd", "conform", "--destructive", "--json", "--only", name, self.uri(kind, tls, port, path)],
                capture_output=True, text=True)
            verdict = next((json.loads(line) for line in result.stdout.splitlines() if json.loads(line)["name"] == name),
                           {"outcome": "fail", "detail": result.stderr.strip()})
            time.sleep(0.05)
            code = server.poll()
            if kind == "nbd-server":
                alive = os.path.exists(f"/proc/{self.background(image)}")
                code = 0 if alive else -signal.SIGKILL
            if code is not None and code < 0:
                verdict |= {"outcome": "fail", "detail": "the server died" if kind == "nbd-server" else f"the server died of {signal.Signals(-code).name}"}
            return verdict
        finally:
            for group in [server.pid] + ([self.background(image)] if kind == "nbd-server" else []):
                try:
                    os.killpg(group, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            server.wait()

    @staticmethod
    def background(image):
        try:
            return int(open(image + ".pid").read())
        except (OSError, ValueError):
            return 1 << 30


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock")
    parser.add_argument("--table")
    options = parser.parse_args()
    crossdock = os.path.abspath(options.crossdock)
    listed = subprocess.run([crossdock, "nbd", "conform", "--list-cases"], check=True, capture_output=True, text=True).stdout
    cases = [line.split("  ", 1) for line in listed.splitlines() if line.startswith("T-")]
    columns = [(kind, tls) for kind in ("crossdock", "qemu-nbd", "nbdkit", "nbd-server") for tls in (True, False)]
    directory = tempfile.mkdtemp(prefix="xd-conform-")
    try:
        judge = Judge(crossdock, directory)
        keys = [(kind, tls, name) for name, _ in cases for kind, tls in columns]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            results = dict(zip(keys, pool.map(lambda key: judge.case(*key), keys)))
    finally:
        shutil.rmtree(directory)
    heads = [f"{kind} {'TLS' if tls else 'plain'}" for kind, tls in columns]
    lines = ["| case | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    notes = []
    for name, rule in cases:
        marks = []
        for kind, tls in columns:
            verdict = results[kind, tls, name]
            mark = {"pass": "yes", "skip": "-", "fail": "**no**"}[verdict["outcome"]]
            if verdict["outcome"] == "fail":
                detail = verdict["detail"].replace(directory, "DIR")
                notes.append(f"- {name}, {kind} {'TLS' if tls else 'plain'}: {detail}")
            marks.append(mark)
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    counts = [sum(results[kind, tls, name]["outcome"] == "fail" for name, _ in cases) for kind, tls in columns]
    lines.append("| failed | " + " | ".join(map(str, counts)) + " |")
    text = "\n".join(lines) + "\n\nWhat the failures were:\n\n" + "\n".join(notes) + "\n"
    if options.table:
        page = open(options.table).read().split("<!-- table -->")[0]
        open(options.table, "w").write(page + "<!-- table -->\n\n" + text)
    else:
        print(text)


if __name__ == "__main__":
    main()
