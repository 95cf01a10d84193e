#!/usr/bin/env python3
"""Migrates a running Linux guest with its disk from host a to host b and back, and proves that nothing was lost.

    demo.py CROSSDOCK GUEST-DIRECTORY [--memory MIB] [--disk MIB] [--disks N] [--keep DIRECTORY]
        [--qemu VERSION:VERSION]
"""
import argparse
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import proofs  # noqa: E402
from hosts import Lab, wait  # noqa: E402
from installation import Authority  # noqa: E402


def say(text):
    print(text, flush=True)


class Demo:
    def __init__(self, lab, options):
        self.lab, self.options = lab, options
        self.crossdock = options.crossdock
        self.consoles = []
        self.migrations = 0

    def prepare(self):
        authority = Authority(self.crossdock, os.path.join(self.lab.base, "ca"))
        for host in (self.lab.a, self.lab.b):
            authority.issue(host.pki, self.lab.name_of(host), host.seen_as)
            os.makedirs(os.path.join(host.directory, "guest-files"))
        for name in ("vmlinuz", "initrd"):
            # Host b does not have these: they travel with the guest.
            shutil.copy(os.path.join(self.options.guest, name), os.path.join(self.lab.a.directory, "guest-files"))

    def start_agent(self, host):
        process = host.start(host.destination(host.address), "agent.log")
        self.lab.processes.append(process)
        wait("the destination agent", lambda: "listening" in self.read(host, "agent.log"))

    def read(self, host, name):
        try:
            return open(os.path.join(host.directory, name), encoding="latin-1").read()
        except FileNotFoundError:
            return ""

    def start_guest(self):
        host = self.lab.a
        files = os.path.join(host.directory, "guest-files")
        # Hosts with different QEMUs: a machine type that both have, and a processor that both can give.
        machine, cpu = ("pc-i440fx-7.2", "Nehalem") if self.options.qemu else ("pc", "max")
        command = ["qemu-system-x86_64", "-machine", f"{machine},accel=tcg", "-cpu", cpu, "-m", str(self.options.memory)]
        command += ["-nodefaults", "-display", "none", "-no-reboot"]
        command += ["-kernel", f"{files}/vmlinuz", "-initrd", f"{files}/initrd", "-append", "console=ttyS0 quiet no_timer_check"]
        self.images = []
        for index in range(self.options.disks):
            image = os.path.join(host.directory, f"disk{index}.raw")
            with open(image, "wb") as file:
                file.truncate(self.options.disk << 20)
                # Old data that is not zero, with the marker that must never be seen on the wire.
                for block in range(self.options.disk // 16):
                    file.seek((self.options.disk << 19) + (block << 20))
                    file.write(proofs.MARKER + os.urandom((1 << 20) - len(proofs.MARKER)))
            command += ["-drive", f"file={image},format=raw,if=virtio"]
            self.images.append(image)
        console = os.path.join(host.directory, "console.log")
        command += ["-serial", f"file:{console}"]
        self.consoles = [console]
        host.run(*host.start_guest("web1", command))
        wait("the guest's first records", lambda: self.count() > 50, 180)

    def count(self):
        return sum(open(path, encoding="latin-1").read().count("REC 0 ") for path in self.consoles if os.path.exists(path))

    def guest(self, host):
        output = host.run(self.crossdock, "guest", "list", "--json", "--state-dir", host.state).stdout
        rows = [row for row in json.loads(output) if row["name"] == "web1"]
        return {"state": rows[0]["state"], "process": rows[0].get("process")} if rows else {"state": "none", "process": None}

    def migrate(self, source, target):
        name = self.lab.name_of(target)
        say(f"\n$ crossdock migrate web1 {name}            # on host {source.name}, records so far: {self.count()}")
        report = os.path.join(source.directory, f"report-{self.migrations}.json")
        arguments = source.command(source.migrate("web1", name, "--report", report))
        result = subprocess.run(arguments, cwd=source.directory, check=False)
        if result.returncode != 0:
            raise proofs.ProofFailed(f"crossdock migrate ended with code {result.returncode}")
        self.migrations += 1
        self.consoles.append(os.path.join(target.run_directory("web1"), "console.log"))
        before = self.count()
        wait("records on the destination", lambda: self.count() > before + 50)
        return json.load(open(report))

    def prove(self, report, source, target):
        """All proofs of one move. Returns the evidence, for the controls."""
        source_state, target_state = self.guest(source), self.guest(target)
        proofs.only_there(target_state, source_state)
        say(f"  proved: the guest runs on host {target.name} and only there")
        new_images = [os.path.join(target.images, "web1", os.path.basename(path)) for path in self.images]
        counts = proofs.records(self.consoles, dict(enumerate(new_images)))
        say(f"  proved: its records continue without gap, repeat or bad checksum: {sum(counts.values())} so far")
        for disk, image in zip(report["disks"], self.images):
            fenced = f"{image}.released-{report['migration']}"
            own = proofs.same_digest(fenced, disk["digest_destination"], disk["digest_source"])
            say(f"  proved: {disk['name']} was identical on both hosts at the switchover: {own[:16]}...")
        recordings = glob.glob(os.path.join(self.lab.recordings, f"to-{target.name}", "*"))
        carried = proofs.tls(recordings)
        say(f"  proved: {carried >> 20} MiB between the hosts, every byte of it in TLS records")
        refused = source.run(
            self.crossdock, "guest", "start", "web1", "--state-dir", source.state, check=False,
            stderr=subprocess.STDOUT,
        )
        if refused.returncode == 0:
            raise proofs.ProofFailed("the old copy of the guest could be started again")
        say(f"  proved: the old copy cannot be started: {refused.stdout.strip()[:90]}...")
        evidence = {"fenced": f"{self.images[0]}.released-{report['migration']}", "image": new_images[0]}
        evidence.update(digest=report["disks"][0]["digest_destination"], recordings=recordings)
        self.images = new_images
        return evidence

    def controls(self, evidence, host):
        """Each proof once more with a fault put into its evidence: it must fail."""
        scratch = os.path.join(self.lab.base, "controls")
        os.makedirs(scratch)
        text = "".join(open(path, encoding="latin-1").read() for path in self.consoles)
        lines = [line for line in text.replace("\r", "").split("\n")[:-1] if line.startswith("REC 0 ")]
        middle = len(lines) // 2
        flipped = "0" if lines[middle][-1] != "0" else "1"
        faults = {
            "a missing record": lines[:middle] + lines[middle + 1 :],
            "a repeated record": lines[: middle + 1] + lines[middle:],
            "a wrong checksum": lines[:middle] + [lines[middle][:-1] + flipped] + lines[middle + 1 :],
        }
        for name, tampered in faults.items():
            path = os.path.join(scratch, "console")
            with open(path, "w") as file:
                file.write("\n".join(tampered) + "\n")
            must_fail(name, lambda: proofs.records([path], {0: evidence["image"]}))
        must_fail("a running copy on both hosts", lambda: proofs.only_there(self.guest(host), self.guest(host)))
        with open(evidence["fenced"], "r+b") as image:
            image.seek(middle * 4096 + 100)
            byte = image.read(1)
            image.seek(-1, os.SEEK_CUR)
            image.write(bytes([byte[0] ^ 1]))
        must_fail("a flipped bit in the image", lambda: proofs.same_digest(evidence["fenced"], evidence["digest"]))
        largest = max((path for path in evidence["recordings"] if path.endswith(".client")), key=os.path.getsize)
        for name, fault in (("the guest's data in clear text", proofs.MARKER), ("bytes that are no TLS", b"\0" * 64)):
            copy = os.path.join(scratch, os.path.basename(largest))
            shutil.copy(largest, copy)
            with open(copy, "ab") as file:
                file.write(fault)
            must_fail(name, lambda: proofs.tls([copy]))
        say(f"  proved: each proof fails when its evidence is tampered with ({len(faults) + 4} controls)")


def must_fail(name, proof):
    try:
        proof()
    except proofs.ProofFailed:
        return
    raise proofs.ProofFailed(f"the proof did not notice {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock")
    parser.add_argument("guest")
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--disk", type=int, default=1024)
    parser.add_argument("--disks", type=int, default=1)
    parser.add_argument("--qemu", metavar="VERSION:VERSION", help="the QEMUs of hosts a and b, from deploy/qemu")
    options = parser.parse_args()
    options.crossdock = os.path.abspath(options.crossdock)
    options.guest = os.path.abspath(options.guest)
    # A terminated demo cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        with Lab(options.crossdock) as lab:
            if options.qemu:
                lab.a.emulator, lab.b.emulator = options.qemu.split(":")
            demo = Demo(lab, options)
            kind = "network, mount and PID namespaces" if lab.is_root else "two loopback addresses and two directories"
            say(f"Two hosts that share nothing ({kind}), a recording forwarder between them.")
            demo.prepare()
            for host in (lab.a, lab.b):
                demo.start_agent(host)
            say(f"Booting a Linux guest on host a: {options.memory} MiB of memory, {options.disks} disk(s) of "
                f"{options.disk} MiB, writing numbered records.")
            demo.start_guest()
            there = demo.migrate(lab.a, lab.b)
            demo.prove(there, lab.a, lab.b)
            back = demo.migrate(lab.b, lab.a)
            # On the way back the old image of host a became the disk again; that of host b is the evidence.
            evidence = demo.prove(back, lab.b, lab.a)
            demo.controls(evidence, lab.a)
            say("\n           blackout      disks                    memory      total")
            for name, report in (("a to b", there), ("b to a", back)):
                sent = sum(disk["bytes_sent"] for disk in report["disks"])
                rate = sent / max(report["phases_ms"]["disks"], 1) * 1000 / (1 << 20)
                say(f"  {name}   {report['blackout_ms']:6.0f} ms   {sent >> 20:5} MiB {rate:6.0f} MiB/s"
                    f"   {report['ram_bytes_sent'] >> 20:5} MiB   {report['total_ms'] / 1000:6.1f} s")
    except proofs.ProofFailed as failure:
        sys.exit(f"demo: NOT PROVED: {failure}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything was cleaned up")
    say(f"\nEvery proof held. It took {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
