"""Tests the judge: evidence that is in order passes, evidence that was tampered with does not."""
import copy
import os
import struct

import judge
from judge import Evidence

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

    return cases


def run(directory, library):
    """Returns what the judge got wrong."""
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
    return wrong
