"""Tests the judge and the eyes: what is in order passes, what was tampered with does not."""
import copy
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import types

import guest
import judge
from judge import Evidence
from lab import Scene

RECORD, COUNT = 4096, 90


def fnv(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def record(number):
    """A record as the guest writes it; its filling does not matter."""
    body = b"XDRECORD" + struct.pack("<QI", number, 0) + bytes([number % 251]) * 64
    body = body.ljust(RECORD - 8, b"\7")
    return body + struct.pack("<Q", fnv(body))


def sound(directory, home):
    """The evidence of a run in which all went well, in `directory`."""
    image = os.path.join(directory, "selftest.raw")
    lines = []
    with open(image, "wb") as file:
        for number in range(COUNT):
            data = record(number)
            file.write(data)
            lines.append(f"REC 0 {number} {data[-8:][::-1].hex()}\r\n")
    split = 60 if home == "b" else COUNT
    text = "".join(lines[20:split])
    # The line at which the guest moved is on both consoles, a part on each.
    cut = len(text) - 7 if home == "b" else len(text)
    there = text[cut:] + "".join(lines[split:])
    running = [("a", 1.0, 9.0), ("b", 9.3, None)] if home == "b" else [("a", 1.0, 9.0), ("a", 9.3, None)]
    state = {"a": "migrated", "b": "owned"} if home == "b" else {"a": "rolled back", "b": "rolled back"}
    return Evidence(
        home=home,
        running=running,
        consoles=["".join(lines[:20]), text[:cut], there],
        image=image,
        rows={
            "a": [{"role": "source", "state": state["a"]}],
            "b": [{"role": "destination", "state": state["b"]}],
        },
        guests={home: [{"state": "running"}], "b" if home == "a" else "a": []},
        may_freeze=False,
    )


def tamperings():
    """Functions that spoil a piece of evidence, with what the judge has to say."""

    def change(name, words, home="b"):
        def decorate(function):
            cases.append((name, words, home, function))
            return function

        return decorate

    cases = []

    @change("a repeated record", "is repeated")
    def _(evidence):
        line = evidence.consoles[1].split("\r\n")[-2]
        evidence.consoles[2] = evidence.consoles[2].split("\n", 1)[0] + "\n" + line + "\r\n"

    @change("a second instance that goes on where the first one is", "is repeated", "a")
    def _(evidence):
        evidence.consoles[2] = "\r\n".join(evidence.consoles[1].split("\r\n")[-3:-1]) + "\r\n"

    @change("a skipped record", "are missing on the consoles")
    def _(evidence):
        evidence.consoles[2] = evidence.consoles[2].split("\n", 1)[0] + "\n" + "\n".join(
            evidence.consoles[2].split("\n")[2:]
        )

    @change("an acknowledged record that is not on the disk", "was acknowledged and is not in")
    def _(evidence):
        with open(evidence.image, "r+b") as file:
            file.seek(40 * RECORD)
            file.write(record(41))

    @change("the last acknowledged record lost", "was acknowledged and is not in")
    def _(evidence):
        os.truncate(evidence.image, (COUNT - 1) * RECORD)

    @change("a flipped bit on the disk", "was acknowledged and is not in")
    def _(evidence):
        with open(evidence.image, "r+b") as file:
            file.seek(30 * RECORD + 2000)
            file.write(b"\x08")

    @change("a checksum that does not fit", "was acknowledged and is not in")
    def _(evidence):
        evidence.consoles[0] = evidence.consoles[0].replace("REC 0 5 ", "REC 0 5 0").replace("\r\n", "\n")
        lines = evidence.consoles[0].split("\n")
        lines[5] = lines[5][:-1]
        evidence.consoles[0] = "\n".join(lines)

    @change("a write error in the guest", "could not write")
    def _(evidence):
        evidence.consoles[2] += "FAIL 0 90\r\n"

    @change("a damaged line", "a damaged line")
    def _(evidence):
        evidence.consoles[2] = evidence.consoles[2].replace("REC 0 7", "REC 0 x", 1)

    @change("an image that is gone", "cannot be read")
    def _(evidence):
        evidence.image += ".gone"

    @change("two running", "two instances ran at once")
    def _(evidence):
        evidence.running[0] = ("a", 1.0, 9.4)

    @change("two running on, nobody stopped", "two instances ran at once")
    def _(evidence):
        evidence.running[0] = ("a", 1.0, None)

    @change("a leftover", "left behind")
    def _(evidence):
        evidence.leftovers = ["process: emulator of host a (1)"]

    @change("no guest anywhere", "neither host")
    def _(evidence):
        evidence.home = ""

    @change("a dead guest", "does not run on host b")
    def _(evidence):
        evidence.is_alive = False

    @change("a guest that was paused and runs", "it must be paused")
    def _(evidence):
        evidence.states, evidence.is_alive = frozenset({"paused"}), False

    @change("a guest that should run and is paused", "does not run on host b")
    def _(evidence):
        evidence.state, evidence.is_alive = "paused", False

    @change("a paused guest that is listed as running", "crossdock guest list on host b")
    def _(evidence):
        evidence.state, evidence.states = "paused", frozenset({"paused"})

    @change("a guest that was to be refused", "where it must not be")
    def _(evidence):
        evidence.homes = frozenset("a")

    @change("what was seen on the way", "the old copy runs")
    def _(evidence):
        evidence.found = ["the old copy runs"]

    @change("a boot that nobody asked for", "the guest booted again")
    def _(evidence):
        evidence.consoles[2] += "\r\nBOOT\r\n"

    @change("a second boot", "the guest booted again")
    def _(evidence):
        lines = evidence.consoles[0].split("\r\n")[:3]
        evidence.boots = 1
        evidence.consoles[2] += "\r\n".join(["\r\nBOOT", *lines, "BOOT", *lines, ""])

    @change("a record of before the boot in the place of one since", "was acknowledged and is not in")
    def _(evidence):
        data = record(0)
        evidence.boots = 1
        evidence.consoles[2] += "REC 0 9\r\nBOOT\r\nREC 0 0 " + data[-8:][::-1].hex() + "\r\n"
        with open(evidence.image, "r+b") as file:
            file.write(record(1))

    @change("two commands", "more than one command")
    def _(evidence):
        evidence.commands = ["crossdock recover", "crossdock guest start"]

    @change("a status that says that the guest stayed", "crossdock status on host a says")
    def _(evidence):
        evidence.rows["a"][0]["state"] = "rolled back"

    @change("a status that says that the guest came", "crossdock status on host b says", "a")
    def _(evidence):
        evidence.rows["b"][0]["state"] = "owned"

    @change("a status that fails", "crossdock status fails on host b")
    def _(evidence):
        evidence.rows["b"] = None

    @change("a source that stays undecided", "left undecided")
    def _(evidence):
        evidence.rows["a"][0]["state"] = "undecided"

    @change("a list that shows a guest that is not there", "crossdock guest list on host a")
    def _(evidence):
        evidence.guests["a"] = [{"state": "running"}]

    @change("a pause that is too long", "the guest stood still", "a")
    def _(evidence):
        evidence.running[1] = ("a", 13.0, None)

    @change("a run without a fault that rolls back", "nothing was in the way", "a")
    def _(evidence):
        evidence.must_migrate = True

    @change("disks that were not compared", "not to have been compared")
    def _(evidence):
        evidence.code = 19

    return cases


class FakeMonitor(threading.Thread):
    """A monitor that says that the guest runs, and later what it is told to say."""

    def __init__(self, path):
        super().__init__(daemon=True)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(path)
        self.server.listen()
        self.peer = None
        self.start()

    def run(self):
        self.peer, _ = self.server.accept()
        self.say({"QMP": {}})
        returns = {
            "query-status": {"status": "running", "running": True},
            "query-jobs": [{"id": "xd-disk0-1"}],
            "query-named-block-nodes": [{"node-name": "xdt-disk0-1"}, {"node-name": "#block1"}],
            "query-block-exports": [{"id": "export0"}],
            "query-migrate": {"status": "pre-switchover"},
        }
        for line in self.peer.makefile():
            message = json.loads(line)
            self.say({"return": returns.get(message["execute"], {}), "id": message.get("id")})

    def say(self, message):
        self.peer.sendall((json.dumps(message) + "\r\n").encode())

    def event(self, name):
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        self.say({"event": name, "timestamp": stamp})


def touch(path, text="{}"):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


def look(directory):
    """Puts things where they do not belong. Returns what the harness does not see of them."""
    site = types.SimpleNamespace(saved=None, tools={}, shim="", crossdock="", ending=threading.Event())
    scene = Scene(types.SimpleNamespace(link=None, site=site, pki=dict.fromkeys("abc", "")), os.path.join(directory, "scene"), 1500)
    wrong = []

    def expect(words, found, what):
        if any(words in sentence for sentence in found):
            print(f"seen: {what}")
        else:
            wrong.append(f"{what}: not seen; there is {found}")

    def start(name, host, *words):
        program = [name, "-c", "import time; time.sleep(60)", *words]
        environment = {"XF_RUN": f"{scene.directory}/{host}/"}
        return subprocess.Popen(program, executable=sys.executable, env=environment)

    monitors = [FakeMonitor(scene.watchers[host].path) for host in ("a", "b")]
    processes = [
        start(guest.EMULATOR, "b", f"{scene.directory}/b/s/crossdock-status"),
        start("crossdock", "a", "source-watchdog"),
        start(guest.EMULATOR, "a", "-S"),
    ]
    try:
        scene.wait(10, "the fake monitors", lambda: all(watcher.is_running for watcher in scene.watchers.values()))
        touch(scene.disk)
        touch(os.path.join(scene.images, guest.NAME, "disk0.raw"))
        touch(os.path.join(scene.state("b"), "guests", guest.NAME, "guest.json"))
        touch(os.path.join(scene.state("a"), "guests", guest.NAME, "guest.json"))
        touch(os.path.join(scene.state("b"), "migrations", "1-a", "incoming.json"))
        touch(os.path.join(scene.state("a"), "migrations", "1-a", "journal"))
        with socket.socket(socket.AF_UNIX) as stray:
            stray.bind(os.path.join(scene.state("a"), "migrations", "1-a", "disk0.sock"))
        found = scene.leftovers("a")
        expect("emulator of host b", found, "a QEMU on the host without the guest")
        expect("helper of host a", found, "a blank copy that still runs")
        expect("image on host b", found, "an image on the host without the guest")
        expect("record of the guest", found, "a record on the host without the guest")
        expect("incoming.json", found, "a migration that the destination still waits for")
        expect("disk0.sock", found, "a socket")
        expect("job in the guest's QEMU: xd-disk0-1", found, "a block job")
        expect("node in the guest's QEMU: xdt-disk0-1", found, "a block node")
        expect("export in the guest's QEMU", found, "an export")
        expect("pre-switchover", found, "a migration under way")
        found = scene.leftovers("b")
        expect("under its old name", found, "an old image that is not fenced")
        expect("does not say that it left", found, "a record that does not say that the guest left")
        if [one.pid for one in scene.source_agents()] != [processes[1].pid]:
            wrong.append(f"a process that works for the source: not seen; there is {scene.processes()}")
        expect("two instances", judge.two_running(scene.spans()), "two guests that run at once")
        monitors[1].event("STOP")
        time.sleep(0.1)
        monitors[1].event("RESUME")
        scene.wait(10, "an event", lambda: len(scene.spans()) == 3)
        if not 0.05 < judge.longest_pause([span for span in scene.spans() if span[0] == "b"]) < 2:
            wrong.append(f"a pause: not measured; there is {scene.spans()}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for watcher in scene.watchers.values():
            watcher.close()
        scene.is_over = True
    return wrong


def run(directory, library):
    """Returns what was not noticed."""
    wrong = []
    for home in ("a", "b"):
        found = judge.judge(sound(directory, home), library)
        if found:
            wrong.append(f"sound evidence, guest on host {home}: {found}")
    for name, words, home, spoil in tamperings():
        evidence = copy.deepcopy(sound(directory, home))
        spoil(evidence)
        found = judge.judge(evidence, library)
        if not any(words in sentence for sentence in found):
            wrong.append(f"{name}: not noticed; the judge said {found}")
        else:
            print(f"noticed: {name}: {next(sentence for sentence in found if words in sentence)}")
    return wrong + look(directory)
