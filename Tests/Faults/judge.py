"""Judges a run from evidence that Crossdock did not make: QEMU's own events, the guest's consoles, the images, /proc.

`Evidence` is plain data, so that the judge can be tested with evidence that was tampered with.
"""
import ctypes
import dataclasses
import re

# How much longer than the blackout deadline a guest may stand still; tight times belong into a benchmark.
GRACE = 2.0
# What `crossdock status` may say of a migration whose guest is on the source, and on the destination.
AT_SOURCE = {
    "source": {None, "rolled back", "interrupted", "reclaimed", "taken", "taken over"},
    "destination": {None, "rolled back", "receiving", "prepared", "reclaimed", "refused", "overruled"},
}
AT_DESTINATION = {"source": {"migrated", "undecided", "overruled"}, "destination": {"owned", "taken"}}
# The exit code of a move whose disks are not known to be the same on both hosts.
MISMATCH = 19
RUNNING = frozenset({"running"})


@dataclasses.dataclass
class Evidence:
    """What was seen of a run."""

    home: str = ""  # the host on which the guest lives at the end; empty when nobody knows
    is_alive: bool = True  # whether it is there, and nowhere else, in a state in which it may be
    state: str = "running"  # as QEMU names it
    states: frozenset = RUNNING  # those in which it may be
    homes: frozenset = frozenset("ab")  # where it may be
    boots: int = 0  # how often it may have booted again
    found: list = dataclasses.field(default_factory=list)  # what was seen to be wrong on the way
    running: list = dataclasses.field(default_factory=list)  # (host, from, to) of each time that a guest ran
    consoles: list = dataclasses.field(default_factory=list)  # texts: saved guest, source, destination
    image: str = ""  # where the guest's disk is now
    slots: int = 8192
    rows: dict = dataclasses.field(default_factory=dict)  # host: rows of `crossdock status`; None when it failed
    guests: dict = dataclasses.field(default_factory=dict)  # host: rows of `crossdock guest list`
    leftovers: list = dataclasses.field(default_factory=list)
    commands: list = dataclasses.field(default_factory=list)  # what an operator had to do
    emulator_killed: bool = False
    may_freeze: bool = True  # whether the guest may stand still for longer than the deadline
    deadline: float = 1.5
    must_migrate: bool = False
    code: int = 0  # the report's, of a source agent that saw the end


def judge(evidence, library):
    """Returns the violations, a sentence each; empty when all is well."""
    found = evidence.found + two_running(evidence.running)
    found += records(evidence, library)
    found += alive(evidence)
    if evidence.home:
        found += [f"left behind: {item}" for item in evidence.leftovers]
        found += status(evidence)
    found += pause(evidence)
    if evidence.must_migrate and evidence.home != "b":
        found.append("nothing was in the way, and the guest did not move")
    if evidence.code == MISMATCH:
        found.append("the disks are said to differ, or not to have been compared")
    return found


def two_running(running):
    """Two instances of the guest at the same time."""
    found = []
    for index, (host, start, end) in enumerate(running):
        for other, other_start, other_end in running[index + 1 :]:
            if start < (other_end or float("inf")) and other_start < (end or float("inf")):
                spans = f"on host {host} from {start:.3f} and on host {other} from {other_start:.3f}"
                found.append(f"two instances ran at once, {spans}")
    return found


def parse(consoles, boots=0):
    """The records of one disk since its guest's last boot, in the order of the consoles: {number: checksum}, and what is
    wrong with them. `boots` is how often it may have booted again.
    """
    sums, found = {}, []
    # The last line may be on its way; a line that one console begins the next one ends.
    lines = [line for line in "".join(consoles).replace("\r", "").split("\n")[:-1] if line]
    for line, following in zip(lines, lines[1:] + [""]):
        if line.endswith("BOOT"):
            boots -= bool(sums)
            if boots < 0:
                found.append("the guest booted again")
                break
            sums = {}
        elif line.startswith("FAIL"):
            found.append(f"the guest could not write: {line}")
        elif "Kernel panic" in line or "I/O error" in line:
            found.append(f"the guest has trouble: {line}")
        elif line.startswith("REC"):
            match = re.fullmatch(r"REC 0 (\d+) ([0-9a-f]{16})", line)
            if not match and boots and following.endswith("BOOT"):
                continue  # the boot cut it short
            if not match:
                found.append(f"a damaged line on the consoles: {line!r}")
                continue
            number = int(match[1])
            if number < len(sums):
                found.append(f"record {number} is repeated: two instances wrote, or time went back")
                break
            if number > len(sums):
                found.append(f"the records {len(sums)} to {number - 1} are missing on the consoles")
                break
            sums[number] = int(match[2], 16)
    return sums, found


def records(evidence, library):
    """Records that were repeated or skipped, and acknowledged ones that are not on the disk."""
    sums, found = parse(evidence.consoles, evidence.boots)
    if not sums:
        return found + ["the consoles have no records"]
    if found or not evidence.image:
        return found
    # Each slot has the latest record of its number, and the guest has gone on since the consoles were read.
    first = max(0, len(sums) - evidence.slots // 2)
    count = len(sums) - first
    values = (ctypes.c_uint64 * count)(*(sums[number] for number in range(first, len(sums))))
    check = ctypes.CDLL(library).xf_first_missing
    check.restype = ctypes.c_int64
    check.argtypes = [
        ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64
    ]  # fmt: skip
    missing = check(evidence.image.encode(), 0, first, count, values, evidence.slots)
    if missing == -2:
        found.append(f"the guest's image {evidence.image} cannot be read")
    elif missing >= 0:
        found.append(f"record {missing} of {len(sums)} was acknowledged and is not in {evidence.image}")
    return found


def alive(evidence):
    found = []
    if not evidence.home:
        found.append("neither host could be brought to run the guest")
    elif evidence.home not in evidence.homes:
        found.append(f"the guest is on host {evidence.home}, where it must not be")
    elif evidence.states == RUNNING and not evidence.is_alive:
        found.append(f"the guest does not run on host {evidence.home}; it is {evidence.state}")
    elif not evidence.is_alive:
        expected = " or ".join(sorted(evidence.states))
        found.append(f"the guest on host {evidence.home} is {evidence.state}; it must be {expected}")
    if len(evidence.commands) > 1:
        found.append(f"it took more than one command: {', '.join(evidence.commands)}")
    return found


def status(evidence):
    """What `crossdock status` and `crossdock guest list` say against what is true."""
    found = []
    allowed = AT_SOURCE if evidence.home == "a" else AT_DESTINATION
    for host, role in (("a", "source"), ("b", "destination")):
        rows = evidence.rows.get(host)
        if rows is None:
            found.append(f"crossdock status fails on host {host}")
            continue
        states = [row["state"] for row in rows if row["role"] == role]
        state = states[-1] if states else None
        if state not in allowed[role]:
            found.append(f"crossdock status on host {host} says '{state}', but the guest is on host {evidence.home}")
        listed = [row["state"] for row in evidence.guests.get(host) or []]
        # A guest in another state is listed with that; where it is not, it is not said to run.
        is_right = evidence.state in listed if host == evidence.home else "running" not in listed
        if evidence.is_alive and not is_right:
            found.append(
                f"crossdock guest list on host {host} says {listed}, but the guest is {evidence.state} "
                f"on host {evidence.home}"
            )
    source = [row["state"] for row in evidence.rows.get("a") or [] if row["role"] == "source"]
    if evidence.home == "b" and source and source[-1] == "undecided":
        found.append("the source is left undecided, though the destination owns the guest and can be reached")
    if evidence.home == "a" and source and source[-1] == "interrupted":
        found.append("the source's migration is left interrupted, though the guest runs here and all is cleaned up")
    return found


def longest_pause(running):
    """The longest time between the first and the last moment in which the guest ran nowhere, in seconds."""
    spans = sorted((start, end or float("inf")) for _, start, end in running)
    longest, reached = 0.0, None
    for start, end in spans:
        if reached is not None:
            longest = max(longest, start - reached)
        reached = end if reached is None else max(reached, end)
    return longest


def pause(evidence):
    if evidence.may_freeze or evidence.home != "a" or evidence.emulator_killed:
        return []
    stood = longest_pause(evidence.running)
    if stood <= evidence.deadline + GRACE:
        return []
    return [f"the guest stood still for {stood:.1f} s, the blackout deadline is {evidence.deadline:.1f} s"]
