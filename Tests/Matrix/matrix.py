#!/usr/bin/env python3
"""Moves guests between hosts with every pair of QEMUs, runs the suites and the fast fault matrix for each, and writes the table.

    matrix.py CROSSDOCK GUEST-DIRECTORY [--pairs A:B[,A:B...]] [--only scenarios|suites|faults] [--json FILE] [--write FILE]

The table takes the place of what is between the marks `<!-- matrix -->` and `<!-- /matrix -->` of the file.
"""
import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import types

sys.dont_write_bytecode = True
REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(REPOSITORY, "deploy", "demo"))
from demo import Demo  # noqa: E402
from hosts import Lab, wait  # noqa: E402

VERSIONS = ["7.2", "10.0", "newest"]
OTHER_QEMU = os.path.join(REPOSITORY, "deploy", "qemu")
PC, Q35 = "pc-i440fx-7.2,accel=tcg", "pc-q35-7.2,accel=tcg"
DISK = ["-drive", "file=@DISK,format=raw,if=virtio"]
PLAIN = ["-m", "64", "-nodefaults", "-display", "none"]
LINUX = [
    "-m", "320", "-nodefaults", "-display", "none", "-no-reboot", "-kernel", "@FILES/vmlinuz-devices",
    "-initrd", "@FILES/initrd-devices", "-append", "console=ttyS0 quiet no_timer_check", "-serial", "file:@CONSOLE",
]  # fmt: skip
DEVICES = [
    "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci", "-device",
    "virtio-scsi-pci", "-device", "virtio-keyboard-pci", "-device", "virtio-gpu-pci", "-device", "i6300esb",
    "-device", "qemu-xhci,id=x0", "-device", "usb-tablet", "-netdev", "user,id=n0,restrict=on", "-device", "virtio-net,netdev=n0",
]  # fmt: skip
# What is moved: a name, QEMU's arguments, monitor commands once it runs, and what the console says when it is ready to go.
SCENARIOS = [
    ("firmware, pc", ["-machine", PC, *PLAIN, *DISK], [], None),
    ("firmware, own machine type", ["-machine", "pc,accel=tcg", *PLAIN, *DISK], [], None),
    ("q35, root ports, e1000e, xHCI", [
        "-machine", Q35, *PLAIN, *DISK, "-device", "pcie-root-port,id=r0,chassis=1", "-device", "virtio-balloon-pci,bus=r0",
        "-device", "e1000e", "-device", "qemu-xhci", "-device", "pvpanic,ioport=1285",
    ], [], None),
    ("2 processors, Nehalem", ["-machine", PC, "-smp", "2", "-cpu", "Nehalem", *PLAIN, *DISK], [], None),
    ("-cpu max", ["-machine", PC, "-cpu", "max", *PLAIN, *DISK], [], None),
    ("plugged in at run time", [
        "-machine", PC, *PLAIN, *DISK, "-device", "qemu-xhci,id=x0", "-device", "virtio-scsi-pci,id=s0",
    ], [
        ("device_add", {"driver": "virtio-rng-pci", "id": "p1"}),
        ("device_add", {"driver": "usb-hub", "id": "p2", "bus": "x0.0", "port": "1"}),
        ("device_add", {"driver": "usb-tablet", "id": "p3", "bus": "x0.0", "port": "1.1"}),
        ("device_add", {"driver": "usb-kbd", "id": "p4", "bus": "x0.0"}),
        ("device_add", {"driver": "scsi-cd", "id": "p5", "bus": "s0.0"}),
        ("netdev_add", {"type": "user", "id": "n5", "restrict": True}),
        ("device_add", {"driver": "virtio-net-pci", "id": "p6", "netdev": "n5"}),
        ("device_add", {"driver": "e1000e", "id": "p7"}),
    ], None),
    ("two user networks", [
        "-machine", PC, *PLAIN, *DISK, "-netdev", "user,id=n0,restrict=on", "-device", "e1000,netdev=n0", "-netdev",
        "user,id=n1,restrict=on", "-device", "e1000,netdev=n1",
    ], [], None),
    ("Linux, writing", ["-machine", PC, "-cpu", "Nehalem", *LINUX, *DISK], [], "REC 0 20 "),
    ("Linux, devices in use", ["-machine", Q35, "-cpu", "Nehalem", *LINUX, *DISK, *DEVICES], [], "REC 0 60 "),
]  # fmt: skip
SUITES = {
    "moves": ["MigrationEndToEnd"], "adoption": ["AdoptionEndToEnd"], "rehearsal": ["RehearsalEndToEnd"],
    "devices": ["DevicesEndToEnd"], "formats": ["FormatEndToEnd"], "export": ["ExportEndToEnd"],
    "seeds": ["SeedsEndToEnd/onTheWayBackOnlyWhatDiffersIsSent"],
    "NBD peers": ["NBDPeers", "ClientInterop", "ServerInterop", "NBDServeTests", "NBDCopyTests", "NBDInfoTests", "TLSInterop"],
}  # fmt: skip
# They have one host, and with it one version.
ALONE = {"export", "seeds", "NBD peers"}


class Scenario(Demo):
    """One guest and one move."""

    def __init__(self, lab, crossdock, files):
        super().__init__(lab, types.SimpleNamespace(crossdock=crossdock, guest=files, disks=0, qemu=None))

    def run(self, arguments, commands, ready):
        """What came of it: a sentence."""
        self.prepare()
        self.start_agent(self.lab.b)
        host = self.lab.a
        disk, console = (os.path.join(host.directory, name) for name in ("disk0.raw", "console.log"))
        with open(disk, "wb") as file:
            file.truncate(32 << 20)
        places = {"@DISK": disk, "@CONSOLE": console, "@FILES": self.options.guest}
        for mark, place in places.items():
            arguments = [word.replace(mark, place) for word in arguments]
        command = host.start_guest("web1", ["qemu-system-x86_64", *arguments])
        started = host.run(*command, check=False, stderr=subprocess.STDOUT)
        if started.returncode:
            return "does not start: " + last(started.stdout)
        if ready:
            wait("the guest", lambda: ready in self.read(host, "console.log"), 180)
        if commands:
            script = "import json,socket,sys\ns=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);f=s.makefile('rb');f.readline()\n"
            script += "for c,a in [['qmp_capabilities',{}]]+json.loads(sys.argv[2]):\n s.sendall(json.dumps({'execute':c,'arguments':a}).encode())\n"
            script += " r={'event':1}\n while 'event' in r: r=json.loads(f.readline())\n if 'error' in r: sys.exit(c+str(a)+r['error']['desc'])\n"
            monitor = os.path.join(host.state, "guests/web1/status.sock")
            host.run(sys.executable, "-c", script, monitor, json.dumps(commands))
        report = os.path.join(host.directory, "report.json")
        command = host.migrate("web1", self.lab.name_of(self.lab.b), "--report", report)
        moved = host.run(*command, check=False, stderr=subprocess.STDOUT)
        if moved.returncode:
            states = [self.guest(host)["state"], self.guest(self.lab.b)["state"]]
            kept = "" if states == ["running", "none"] else f" (the guest is {states[0]} here and {states[1]} there)"
            return ("refused: " if moved.returncode == 13 else "failed: ") + last(moved.stdout) + kept
        with open(report, encoding="utf-8") as file:
            pause = json.load(file)["blackout_ms"]
        if ready:
            self.consoles = [os.path.join(self.lab.b.run_directory("web1"), "console.log")]
            before = self.count()
            wait("records on the destination", lambda: self.count() > before + 20)
        return f"moved, {pause:.0f} ms"


def last(text):
    """The last thing that was said which tells why."""
    lines = [line.removeprefix("crossdock: ") for line in text.splitlines() if "stays on this host" not in line]
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def scenarios(crossdock, files, pair):
    results = {}
    for name, arguments, commands, ready in SCENARIOS:
        with Lab(crossdock) as lab:
            lab.a.emulator, lab.b.emulator = pair
            try:
                results[name] = Scenario(lab, crossdock, files).run(arguments, commands, ready)
            except Exception as error:  # noqa: BLE001 - one scenario must not end the others
                results[name] = f"failed: {error}"
        print(f"  {name}: {results[name]}", flush=True)
    return results


def suites(pair, directory):
    chosen = {name: suite for name, suite in SUITES.items() if pair[0] == pair[1] or name not in ALONE}
    environment = {**os.environ, "CROSSDOCK_QEMU": ":".join(pair), "SWT_EXPERIMENTAL_MAXIMUM_PARALLELIZATION_WIDTH": "4"}
    wanted = "|".join(suite for several in chosen.values() for suite in several)
    command = [OTHER_QEMU, pair[0], "swift", "test", "--skip-build", "--disable-xctest", "--filter", wanted]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(os.path.join(directory, f"{pair[0]}-{pair[1]}.log"), "w", encoding="utf-8") as log:
        log.write(run.stdout)
    results = {}
    for name, several in chosen.items():
        passed = [suite for suite in several if re.search(rf"Suite {suite.split('/')[0]} passed", run.stdout)]
        results[name] = "passed" if passed == several else "failed: " + ", ".join(sorted(set(several) - set(passed)))
        print(f"  {name}: {results[name]}", flush=True)
    return results


def faults(crossdock, files, pair):
    environment = {**os.environ, "CROSSDOCK_QEMU": ":".join(pair)}
    command = [OTHER_QEMU, pair[0], sys.executable, "Tests/Faults/faults.py", crossdock, files, "--fast"]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = next((line for line in run.stdout.splitlines() if re.match(r"\d+ runs in", line)), last(run.stdout))
    summary = re.sub(r" in \d+ s:", ":", summary)
    print(f"  faults: {summary}", flush=True)
    return {"faults": summary if run.returncode == 0 else "failed: " + summary}


def markdown(results):
    """A table of outcomes, and the sentence of each refusal under it."""
    notes = []

    def cell(text):
        kind, _, words = text.partition(": ")
        if text.startswith("moved"):
            return "moved"
        if not words or kind not in ("refused", "failed", "does not start"):
            return text
        # Version numbers and names of temporary files are of one run.
        words = re.sub(r"/\S*/xd-demo-\w+/", "", words).removeprefix("The destination host-b refused guest 'web1': ")
        words = re.sub(r"allocated max \d+", "allocated max N", re.sub(r"'0000:[^']*/", "'.../", words))
        if words not in notes:
            notes.append(words)
        return f"{kind} [{notes.index(words) + 1}]"

    pairs = list(results)
    lines = ["| | " + " | ".join(f"{a} -> {b}" for a, b in (pair.split(":") for pair in pairs)) + " |", "|---" * (len(pairs) + 1) + "|"]
    for name in dict.fromkeys(name for pair in pairs for name in results[pair]):
        lines.append(f"| {name} | " + " | ".join(cell(results[pair].get(name, "-")) for pair in pairs) + " |")
    return "\n".join(lines + [""] + [f"{index + 1}. {words}" for index, words in enumerate(notes)])


def moves_nothing(found):
    outcomes = [found[name] for name, *_ in SCENARIOS if name in found]
    return bool(outcomes) and all(outcome.startswith("refused") for outcome in outcomes)


def write(path, results):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock")
    parser.add_argument("guest")
    parser.add_argument("--pairs", help="7.2:10.0,10.0:7.2; all when it is not given")
    parser.add_argument("--only", choices=["scenarios", "suites", "faults"])
    parser.add_argument("--json", default=os.path.join(REPOSITORY, ".build", "matrix.json"))
    parser.add_argument("--write", metavar="FILE")
    options = parser.parse_args()
    crossdock, files = os.path.abspath(options.crossdock), os.path.abspath(options.guest)
    pairs = options.pairs.split(",") if options.pairs else [":".join(pair) for pair in itertools.product(VERSIONS, VERSIONS)]
    logs = os.path.join(REPOSITORY, ".build", "matrix")
    os.makedirs(logs, exist_ok=True)
    results = {}
    if os.path.exists(options.json):
        with open(options.json, encoding="utf-8") as file:
            results = json.load(file)
    for pair in pairs:
        print(pair, flush=True)
        write(options.json, results)
        versions = tuple(pair.split(":"))
        found = results.setdefault(pair, {})
        if options.only in (None, "scenarios"):
            found.update(scenarios(crossdock, files, versions))
        # Where QEMU itself moves nothing, the suites have nothing to move either; they go both ways.
        if moves_nothing(found):
            continue
        if moves_nothing(results.get(":".join(reversed(versions)), {})):
            found["suites"] = "not run: QEMU moves nothing back"
        elif options.only in (None, "suites"):
            found.update(suites(versions, logs))
        if options.only in (None, "faults"):
            found.update(faults(crossdock, files, versions))
    write(options.json, results)
    table = markdown(results)
    if options.write:
        with open(options.write, encoding="utf-8") as file:
            text = file.read()
        before, rest = text.split("<!-- matrix -->", 1)
        after = rest.split("<!-- /matrix -->", 1)[1]
        with open(options.write, "w", encoding="utf-8") as file:
            file.write(f"{before}<!-- matrix -->\n\n{table}\n\n<!-- /matrix -->{after}")
    else:
        print(table)
    # A refusal is an outcome; something that failed is not.
    sys.exit(1 if any(value.startswith("failed") for pair in pairs for value in results[pair].values()) else 0)


if __name__ == "__main__":
    main()
