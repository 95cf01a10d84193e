"""The faults, and at which points each is injected."""
import errno
import os
import signal

import fences
import forwarder
import points
import recovery
import states
from fault import DESTINATION_AGENT, SOURCE_AGENT, WATCHDOG, Fault, hit
from shim import ALLOCATE, FAIL, PWRITE, SYNC, WRITE

# Longer than the blackout deadline of a run.
HOLE = 4.0
# How long a stopped agent stays stopped when the program knows no --patience: longer than its keepalive.
LONG_STOP = 18.0


def killing(*targets):
    def inject(scene, gate):
        hit(scene, signal.SIGKILL, *targets)
        gate.go()

    return inject


# Nobody is left who could watch the time.
killing_everybody = killing(SOURCE_AGENT, WATCHDOG)


def stopping(*targets):
    def inject(scene, gate):
        found = hit(scene, signal.SIGSTOP, *targets)
        gate.go()
        scene.sleep(LONG_STOP if scene.site.patience is None else scene.site.patience + 8)
        for one in found:
            one.signal(signal.SIGCONT)
        scene.note("SIGCONT")

    return inject


def resetting(*kinds):
    def inject(scene, gate):
        scene.link.reset(kinds or None)
        scene.note("connections reset")
        gate.go()

    return inject


def holding(seconds, directions=(forwarder.FORWARD, forwarder.BACK), kinds=None, dies=True):
    """Nothing is forwarded for a while; then the connections die, or everything goes on."""

    def inject(scene, gate):
        scene.link.hold(kinds, directions)
        scene.note(f"the link holds {directions} back")
        gate.go()
        scene.sleep(seconds)
        if dies:
            scene.link.reset()
        scene.link.let_go()
        scene.note("the link forwards again")

    return inject


def closing(direction):
    def inject(scene, gate):
        scene.link.half_close(direction=direction)
        scene.note(f"the link has ended the direction {direction}")
        gate.go()

    return inject


def changing(function, direction=forwarder.FORWARD):
    def inject(scene, gate):
        scene.link.transform(function, direction=direction)
        scene.note(f"the next pieces are {function.__name__}")
        gate.go()

    return inject


def delaying(scene, gate):
    scene.link.slow_down(0.08)
    gate.go()
    scene.sleep(4)
    scene.link.slow_down(0)


def filling(scene, gate):
    """The image's file system refuses every write, and has room again later."""
    rules = [
        scene.table.add(call, FAIL, role="destination", path=points.IMAGE, error=errno.ENOSPC, left=-1)
        for call in (PWRITE, ALLOCATE)
    ]
    gate.go()
    scene.sleep(3)
    for rule in rules:
        rule.go()
    scene.note("the disk has room again")


def mounting(scene):
    scene.mount_images(26)


def filling_for_real(scene, gate):
    ballast = os.path.join(scene.images, "ballast")
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    scene.note(f"the file system is full, {os.path.getsize(ballast)} bytes of ballast")
    gate.go()
    scene.sleep(3)
    os.unlink(ballast)
    scene.note("the disk has room again")


def failing_flush(scene, gate):
    scene.table.add(SYNC, FAIL, role="destination", path=points.IMAGE, error=errno.EIO)
    gate.go()


def stepping(host, days):
    def inject(scene, gate):
        scene.table.step_clock(host, days * 86400)
        scene.note(f"the clock of host {host} is stepped by {days} days")
        gate.go()
        scene.sleep(8)
        scene.table.step_clock(host, 0)
        scene.note("the clock is right again")

    return inject


def nothing(scene, gate):
    gate.go()


FAULTS = [
    Fault("none", "nothing; the gate alone", nothing, is_bounded=False, must_migrate=True),
    Fault("kill-source-agent", "SIGKILL of the source agent", killing(SOURCE_AGENT)),
    Fault("kill-destination-agent", "SIGKILL of the destination agent", killing(DESTINATION_AGENT)),
    Fault("kill-both-agents", "SIGKILL of both agents", killing(SOURCE_AGENT, DESTINATION_AGENT)),
    Fault("kill-source-qemu", "SIGKILL of the source's QEMU", killing(("a", "emulator")), kills="a"),
    Fault("kill-destination-qemu", "SIGKILL of the destination's QEMU", killing(("b", "emulator")), kills="b"),
    Fault("kill-source-agent-and-watchdog", "SIGKILL of both at once", killing_everybody, is_bounded=False),
    Fault("die", "the agent that makes the call kills itself within it", dies=True),
    Fault("stop-source-agent", "SIGSTOP for longer than every timeout", stopping(SOURCE_AGENT)),
    Fault("stop-destination-agent", "SIGSTOP for longer than every timeout", stopping(DESTINATION_AGENT)),
    Fault("link-reset", "every connection ends with RST", resetting()),
    Fault("link-reset-control", "the control connection ends with RST", resetting("control")),
    Fault("link-reset-stream", "the stream's connection ends with RST", resetting("stream")),
    Fault("link-reset-nbd", "the NBD connections end with RST", resetting("nbd")),
    Fault("link-black-hole", "nothing passes for 4 s, then all connections die", holding(HOLE)),
    Fault("link-silence", "nothing passes for 25 s, then all connections die", holding(25)),
    Fault("link-outage", "nothing passes for 3 s, then all goes on", holding(3, dies=False)),
    Fault(
        "link-half-open-forward", "nothing passes towards the destination for 4 s, then all connections die",
        holding(HOLE, (forwarder.FORWARD,)),
    ),
    Fault(
        "link-half-open-back", "nothing passes towards the source for 4 s, then all connections die",
        holding(HOLE, (forwarder.BACK,)),
    ),
    Fault("link-closed-forward", "the destination sees every stream end", closing(forwarder.FORWARD)),
    Fault("link-closed-back", "the source sees every stream end", closing(forwarder.BACK)),
    Fault("link-corrupt", "a bit flips towards the destination", changing(forwarder.corrupted)),
    Fault("link-corrupt-back", "a bit flips towards the source", changing(forwarder.corrupted, forwarder.BACK)),
    Fault("link-duplicate", "bytes come twice", changing(forwarder.duplicated)),
    Fault("link-reorder", "bytes change places", changing(forwarder.reordered)),
    Fault("link-delay", "everything takes 80 ms more", delaying),
    Fault("disk-full", "ENOSPC for 3 s on every write to the image", filling),
    Fault("disk-full-real", "a file system without room for 3 s", filling_for_real, prepare=mounting),
    Fault("image-sync-error", "EIO from an fsync of the image", failing_flush),
    Fault("journal-sync-error", "EIO from the fsync of the record", error=errno.EIO),
    Fault("journal-sync-error-lasting", "EIO from the fsync of the record for 4 s", error=errno.EIO, lasts=True),
    Fault("journal-full", "ENOSPC for the record", error=errno.ENOSPC),
    Fault("journal-full-lasting", "ENOSPC for the record for 4 s", error=errno.ENOSPC, lasts=True),
    Fault("clock-source-forward", "the source's clock is 3 days ahead for 8 s", stepping("a", 3)),
    Fault("clock-source-back", "the source's clock is 3 days back for 8 s", stepping("a", -3)),
    Fault("clock-destination-forward", "the destination's clock is 3 days ahead for 8 s", stepping("b", 3)),
    Fault("clock-destination-back", "the destination's clock is 3 days back for 8 s", stepping("b", -3)),
    *states.FAULTS,
    *fences.FAULTS,
    *recovery.FAULTS,
]  # fmt: skip
BY_NAME = {fault.name: fault for fault in FAULTS}

KILLS = ["kill-source-agent", "kill-destination-agent", "kill-both-agents", "kill-source-qemu", "kill-destination-qemu"]
STOPS = ["stop-source-agent", "stop-destination-agent"]
# Points at which the faults that take long are injected: one of each kind of moment.
STOP_POINTS = """
    accepted ready copy-source mirrors-ready memory-begun pre-switchover mirrors-ended prepare-due prepared continue-due
    continued release-due released own-due owner resumed confirm-due back-paused
""".split()
LINK_POINTS = """
    offered accepted ready mirror-begun copy-source copy-image mirrors-ready stream-due memory-begun memory-middle
    pre-switchover mirrors-ended prepared continue-due continued release-due released own-due owner announced confirmed
    back-memory
""".split()
WIRE_POINTS = "copy-image memory-middle pre-switchover prepared continued released".split()
SCOPED = {
    "link-reset-control": "copy-image mirrors-ready memory-middle mirrors-ended prepared continued".split(),
    "link-reset-stream": "memory-begun memory-middle pre-switchover continue-due continued".split(),
    "link-reset-nbd": "mirror-begun copy-source copy-image memory-middle pre-switchover mirrors-ending".split(),
    "link-silence": "copy-image memory-middle prepared released".split(),
    "kill-source-agent-and-watchdog": """
        memory-middle pre-switchover prepared continued fenced freeze-due frozen release-due release-written released
        release-sent own-due owner confirm-due end-due
    """.split(),
    "disk-full": "mirror-begun copy-image mirrors-ready memory-middle mirrors-ending".split(),
    "disk-full-real": ["mirror-due"],
    "image-sync-error": "copy-image pre-switchover mirrors-ended".split(),
}
DIE_POINTS = """
    offered accepted copy-source copy-image memory-middle prepare-written prepared continued fenced frozen release-written
    released own-written owner resumed confirmed back-there
""".split()
CLOCK_POINTS = "copy-image memory-due pre-switchover continued released owner".split()
LASTING = "prepared released owner confirmed".split()


def matrix():
    """Every run: pairs of a point and a fault."""
    runs = [(points.BY_NAME["check"], BY_NAME["none"])]

    def add(names, *faults):
        for name in names:
            for fault in faults:
                runs.append((points.BY_NAME[name], BY_NAME[fault]))

    for point in points.POINTS:
        add([point.name], *[name for name in KILLS if point.has_emulator or name != "kill-destination-qemu"])
    add(DIE_POINTS, "die")
    add(STOP_POINTS, *STOPS)
    add(LINK_POINTS, "link-reset", "link-black-hole")
    add(
        WIRE_POINTS, "link-outage", "link-half-open-forward", "link-half-open-back", "link-closed-forward",
        "link-closed-back", "link-corrupt", "link-corrupt-back", "link-duplicate", "link-reorder", "link-delay",
    )  # fmt: skip
    for name, where in SCOPED.items():
        if name != "disk-full-real" or os.geteuid() == 0:
            add(where, name)
    for point in points.POINTS:
        if point.path == "/journal" and point.call == SYNC:
            add([point.name], "journal-sync-error")
        if point.path == "/journal" and point.call == WRITE and (not point.after or point.phase == points.RUNS):
            add([point.name], "journal-full")
    add([name for name in LASTING if name in points.BY_NAME], "journal-sync-error-lasting")
    add("prepare-due release-due own-due confirm-due".split(), "journal-full-lasting")
    add(CLOCK_POINTS, *[fault.name for fault in FAULTS if fault.name.startswith("clock-")])
    for point, name in states.runs() + fences.runs() + recovery.runs():
        add([point], name)
    return list(dict.fromkeys(runs))


FAST = [
    ("check", "none"), ("copy-image", "kill-destination-agent"), ("copy-source", "link-reset"),
    ("copy-image", "disk-full"), ("memory-middle", "kill-source-agent"), ("pre-switchover", "kill-source-agent"),
    ("prepared", "link-black-hole"), ("continued", "kill-destination-qemu"), ("release-due", "kill-source-agent"),
    ("released", "journal-sync-error"), ("released", "kill-source-agent"), ("own-due", "kill-destination-agent"),
    ("owner", "kill-both-agents"), ("owner", "die"), ("check", "paused-before"), ("copy-source", "io-error"), ("copy-source", "stop"),
    ("copy-source", "image-replaced"), ("release-written", "cont"), ("released", "take-off-refused"),
    ("fenced", "hot-plug"), ("fenced", "reset"),
]  # fmt: skip

