"""The points of a migration at which faults are injected: each is a call of one agent, recognised by what it writes."""
import dataclasses
import signal
import time

import guest
from shim import PWRITE, RENAME, SEND, SIGNAL, SYNC, TRUNCATE, WRITE

SOURCE, DESTINATION = "source-agent", "destination"
# What has happened to the guest: it runs on the source; it stands still and is the source's; it was released; the
# destination owns it.
RUNS, STANDS, RELEASED, OWNED = "runs", "stands", "released", "owned"
QMP = f"guests/{guest.NAME}/qmp.sock"
IMAGE = "/images/" + guest.NAME


@dataclasses.dataclass(frozen=True)
class Point:
    """`after` is whether the call has been made. `cancels` names a point at which the operator cancels first, `follows` one
    that comes before and without which the call is another.
    """

    name: str
    meaning: str
    phase: str
    role: str
    call: int
    path: str
    text: bytes = b""
    after: bool = False
    skip: int = 0
    has_emulator: bool = True  # whether the destination has a QEMU for the guest
    cancels: str = ""
    follows: str = ""

    @property
    def can_go_on(self):
        """Whether a migration with a fault that passes may go on: it is in its disk or memory phase."""
        return self.phase == RUNS and self.has_emulator and not self.cancels and self.name != "ready"

    def arm(self, table):
        """Sets the gate."""
        return table.add(
            self.call, role=self.role, path=self.path, text=self.text, after=self.after, skip=self.skip
        )


def execute(name):
    return f'"execute":"{name}"'.encode()


def record(name):
    return f'"{name}"'.encode()


def journal(name, meaning, phase, role, entry, call, after, **more):
    return Point(name, meaning, phase, role, call, "/journal", record(entry), after, **more)


EARLY = {"has_emulator": False}
# QEMU's client negotiates extended headers from 8.2 on, whose replies begin in another way.
NBD_REPLY = b"\x6e\x8a\x27\x8c" if guest.emulator_version() >= (8, 2) else b"\x67\x44\x66\x98"
FREEZE, END = (f"signal:{int(number)} qemu-system" for number in (signal.SIGSTOP, signal.SIGKILL))
VERIFY = b'"phase":"verify"'
CANCEL = execute("block-job-cancel")
POINTS = [
    Point("check", "the guest is looked at", RUNS, SOURCE, SEND, QMP, execute("query-block"), **EARLY),
    journal("offer-written", "OFFERED is written", RUNS, SOURCE, "offered", WRITE, True, **EARLY),
    journal("offered", "OFFERED is durable", RUNS, SOURCE, "offered", SYNC, True, **EARLY),
    journal("accept-written", "ACCEPTED is written", RUNS, DESTINATION, "accepted", WRITE, True, **EARLY),
    journal("accepted", "ACCEPTED is durable", RUNS, DESTINATION, "accepted", SYNC, True, **EARLY),
    Point("rehearsal", "before the blank copy is sent", RUNS, SOURCE, SEND, "/qmp.sock", b"/outgoing.sock", **EARLY),
    Point("images-made", "an image was made", RUNS, DESTINATION, TRUNCATE, IMAGE, after=True, **EARLY),
    Point("ready", "the destination's QEMU waits", RUNS, DESTINATION, SEND, QMP, b"late-block-activate", after=True),
    Point("mirror-due", "before blockdev-mirror", RUNS, SOURCE, SEND, QMP, execute("blockdev-mirror")),
    Point("mirror-begun", "after blockdev-mirror", RUNS, SOURCE, SEND, QMP, execute("blockdev-mirror"), after=True),
    Point("copy-source", "in the disk copy, an answer to QEMU", RUNS, SOURCE, SEND, "/disk0.sock", NBD_REPLY, skip=4),
    Point("copy-image", "in the disk copy, a write to the image", RUNS, DESTINATION, PWRITE, IMAGE, skip=3),
    Point("mirrors-ready", "the disks are in sync", RUNS, SOURCE, WRITE, "/events.jsonl", VERIFY, after=True),
    Point("stream-due", "before migrate-incoming", RUNS, DESTINATION, SEND, QMP, execute("migrate-incoming")),
    Point("memory-due", "before migrate", RUNS, SOURCE, SEND, QMP, execute("migrate")),
    Point("memory-begun", "after migrate", RUNS, SOURCE, SEND, QMP, execute("migrate"), after=True),
    Point("memory-middle", "in the memory", RUNS, DESTINATION, SEND, f"{guest.NAME}/incoming.sock", skip=25),
    Point("pre-switchover", "the guest stands still", STANDS, SOURCE, SEND, QMP, CANCEL),
    Point("mirrors-ending", "after block-job-cancel", STANDS, SOURCE, SEND, QMP, CANCEL, after=True),
    Point("mirrors-ended", "before blockdev-del", STANDS, SOURCE, SEND, QMP, execute("blockdev-del")),
    journal("prepare-due", "before PREPARED is written", STANDS, DESTINATION, "prepared", WRITE, False),
    journal("prepare-written", "PREPARED is written", STANDS, DESTINATION, "prepared", WRITE, True),
    journal("prepared", "PREPARED is durable", STANDS, DESTINATION, "prepared", SYNC, True),
    Point("continue-due", "before migrate-continue", STANDS, SOURCE, SEND, QMP, execute("migrate-continue")),
    Point("continued", "after migrate-continue", STANDS, SOURCE, SEND, QMP, execute("migrate-continue"), after=True),
    Point("fenced", "the old image has its new name", STANDS, SOURCE, RENAME, "disk0.raw", b".released-", after=True),
    Point("freeze-due", "before the old QEMU is frozen", STANDS, SOURCE, SIGNAL, FREEZE),
    Point("frozen", "the old QEMU is frozen", STANDS, SOURCE, SIGNAL, FREEZE, after=True),
    journal("release-due", "before RELEASED is written", STANDS, SOURCE, "released", WRITE, False),
    journal("release-written", "RELEASED is written", RELEASED, SOURCE, "released", WRITE, True),
    journal("released", "RELEASED is durable", RELEASED, SOURCE, "released", SYNC, True),
    Point("release-sent", "RELEASE is sent", RELEASED, SOURCE, SEND, "tcp", after=True, follows="released"),
    journal("own-due", "before OWNER is written", RELEASED, DESTINATION, "owner", WRITE, False),
    journal("own-written", "OWNER is written", RELEASED, DESTINATION, "owner", WRITE, True),
    journal("owner", "OWNER is durable", OWNED, DESTINATION, "owner", SYNC, True),
    Point("resume-due", "before cont", OWNED, DESTINATION, SEND, QMP, execute("cont")),
    Point("resumed", "after cont", OWNED, DESTINATION, SEND, QMP, execute("cont"), after=True),
    Point("announced", "before OWNED is sent", OWNED, DESTINATION, SEND, QMP, execute("announce-self"), after=True),
    journal("confirm-due", "before CONFIRMED is written", OWNED, SOURCE, "confirmed", WRITE, False),
    journal("confirmed", "CONFIRMED is durable", OWNED, SOURCE, "confirmed", SYNC, True),
    Point("end-due", "before the old QEMU is ended", OWNED, SOURCE, SIGNAL, END, follows="released"),
    Point("way-back", "cancelled; before block-job-cancel", RUNS, SOURCE, SEND, QMP, CANCEL, cancels="copy-source"),
    Point(
        "back-memory", "cancelled in the memory; before migrate_cancel", RUNS, SOURCE, SEND, QMP,
        execute("migrate_cancel"), cancels="memory-middle",
    ),  # fmt: skip
    Point(
        "back-paused", "cancelled while the guest stands still; before migrate_cancel", STANDS, SOURCE, SEND, QMP,
        execute("migrate_cancel"), cancels="mirrors-ended",
    ),  # fmt: skip
    journal(
        "back-there-due", "cancelled; before the destination writes ROLLEDBACK", RUNS, DESTINATION, "rolledBack", WRITE,
        False, cancels="copy-source",
    ),  # fmt: skip
    journal(
        "back-there", "cancelled; ROLLEDBACK is durable there", RUNS, DESTINATION, "rolledBack", SYNC, True,
        cancels="copy-source",
    ),  # fmt: skip
    journal(
        "back-here-due", "cancelled; before the source writes ROLLEDBACK", RUNS, SOURCE, "rolledBack", WRITE, False,
        has_emulator=False, cancels="copy-source",
    ),  # fmt: skip
]
BY_NAME = {point.name: point for point in POINTS}


def cancel(scene):
    """What Ctrl-C does."""
    for agent in scene.find("a", SOURCE):
        agent.signal(signal.SIGINT)


def reach(scene, point, seconds):
    """Starts the migration and waits until it stands at the point. Returns the gate, None when it was not reached."""
    over = Over(scene)
    if point.follows:
        first = BY_NAME[point.follows].arm(scene.table)
        scene.start_migration()
        if not first.wait(seconds, over):
            return None
        gate = point.arm(scene.table)
        first.go()
        return gate if gate.wait(seconds, over) else None
    first = BY_NAME[point.cancels].arm(scene.table) if point.cancels else None
    gate = point.arm(scene.table)
    scene.start_migration()
    if first is not None:
        if not first.wait(seconds, over):
            return None
        # The agent's loop, which may stand at the gate, sees the wish when it goes on.
        cancel(scene)
        first.go()
    return gate if gate.wait(seconds, over) else None


class Over:
    """Tells whether the command has ended, a moment ago: the last steps of the destination may come after it."""

    def __init__(self, scene):
        self.scene, self.since = scene, None

    def __call__(self):
        if self.scene.site.ending.is_set():
            return True
        if self.scene.command is None or self.scene.command.poll() is None:
            return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > 2
