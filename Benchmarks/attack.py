#!/usr/bin/env python3
"""What an attack on a destination costs an honest migration: its pause next to that under as much load that is no attack.

    attack.py CROSSDOCK [--moves N] [--attackers N] [--json FILE]

Each time N moves of an idle guest between two hosts of this machine: with nothing else, with busy loops, and with as many attackers. Half of
these have no certificate and open connections as fast as they can, to both ports; the others have one of the right authority and bring
secrets, offers that are refused, and messages of 4 MiB. Busy loops and attackers run at the same priority as everything else.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "deploy", "demo"))
from installation import CONTROL_PORT, NBD_PORT, Authority, Installation  # noqa: E402

HERE = "127.0.0.1"


def spin(_number, _pki):
    while True:
        pass


def stranger(number, _pki):
    """Opens connections, and leaves each before it has said anything."""
    while True:
        for port in (CONTROL_PORT, NBD_PORT):
            try:
                with socket.create_connection((HERE, port), 5) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.send(b"\x16\x03\x01")
            except OSError:
                pass


def frame(kind, payload):
    return struct.pack(">IB", len(payload), kind) + payload


def message(name, **body):
    return frame(1, json.dumps({"type": name, "body": body}).encode())


def insider(number, pki):
    """Speaks the protocol, to no good end."""
    context = ssl.create_default_context(cafile=os.path.join(pki, "ca-cert.pem"))
    context.check_hostname = False
    context.load_cert_chain(os.path.join(pki, "client-cert.pem"), os.path.join(pki, "client-key.pem"))
    turn = 0
    while True:
        turn += 1
        try:
            with socket.create_connection((HERE, CONTROL_PORT), 10) as plain, context.wrap_socket(plain, server_hostname=HERE) as one:
                one.sendall(message("HELLO", versions=[1], role="control", migration=f"{number}-{turn}", index=0, features=[]))
                one.recv(65536)
                if turn % 3 == 0:
                    one.sendall(frame(1, b'{"type":"PROBE","body":"' + b"x" * (4 << 20 - 1)))
                for _ in range(20):
                    one.sendall(message("SECRETS", **{f"s{index}": "QUJD" * 50 for index in range(50)}))
                    one.sendall(message("OFFER", guest="x", nonsense=[0] * 20000))
                one.recv(65536)
        except OSError:
            pass


class Bench:
    def __init__(self, options, base):
        self.options, self.base = options, base
        authority = Authority(options.crossdock, os.path.join(base, "ca"))
        self.pki, self.other = os.path.join(base, "pki"), os.path.join(base, "other")
        authority.issue(self.pki, "localhost", HERE)
        authority.issue(self.other, "attacker", "127.0.0.9")
        self.number = 0

    def move(self):
        """The pause of one move."""
        self.number += 1
        here = Installation(self.options.crossdock, os.path.join(self.base, f"a{self.number}"), self.pki)
        os.makedirs(here.directory)
        disk, report = os.path.join(here.directory, "disk.raw"), os.path.join(here.directory, "report.json")
        with open(disk, "wb") as file:
            file.write(os.urandom(16 << 20))
        guest = f"g{self.number}"
        line = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
        line += ["-drive", f"file={disk},format=raw,if=virtio"]
        subprocess.run(here.start_guest(guest, line), check=True, stdout=subprocess.DEVNULL)
        moved = subprocess.run(here.migrate(guest, HERE, "--report", report), check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for one in (here, self.there):
            subprocess.run([one.program, "guest", "stop", guest, "--force", "--state-dir", one.state], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if moved.returncode:
            sys.exit(f"attack.py: a move failed: {moved.stdout[-1000:]}")
        with open(report, encoding="utf-8") as file:
            return json.load(file)["blackout_ms"]

    def measure(self, kinds):
        """The pauses of some moves beside processes of these kinds, on an agent of its own."""
        self.there = Installation(self.options.crossdock, os.path.join(self.base, f"b-{'-'.join(kind.__name__ for kind in kinds)}"), self.pki)
        os.makedirs(self.there.directory)
        log = open(os.path.join(self.there.directory, "agent.log"), "wb")
        agent = subprocess.Popen(self.there.destination(HERE, "--guest-network", "host"), stdout=log, stderr=log)
        attackers = []
        try:
            while "NBD port" not in open(log.name).read():
                time.sleep(0.05)
            for number in range(self.options.attackers if kinds else 0):
                attackers.append(multiprocessing.Process(target=kinds[number % len(kinds)], args=(number, self.other), daemon=True))
                attackers[-1].start()
            return [self.move() for _ in range(self.options.moves)]
        finally:
            for one in attackers:
                one.kill()
                one.join()
            agent.terminate()
            agent.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--attackers", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    base = tempfile.mkdtemp(prefix="xd-attack-")
    os.chmod(base, 0o755)
    results = {}
    try:
        bench = Bench(options, base)
        for name, kinds in (("nothing else", []), ("busy loops", [spin]), ("attackers", [stranger, insider])):
            results[name] = bench.measure(kinds)
            print(f"{name}: median {statistics.median(results[name]):.0f} ms, {[round(one) for one in sorted(results[name])]}", flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    ratio = statistics.median(results["attackers"]) / statistics.median(results["busy loops"])
    print(f"attackers / busy loops: {ratio:.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"pauses_ms": results, "ratio": ratio}, file, indent=1)


if __name__ == "__main__":
    main()
