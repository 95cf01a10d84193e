"""Faults of the guest's own state: what the guest, its administrator or its devices do while it is moved.

They happen to a guest without an operating system, through the harness's own monitor of its QEMU: to that an `o` of the
human monitor is what the guest's own access to a port is.
"""
import hashlib
import json
import os
import re
import socket
import time

import guest
import points
from fault import DESTINATION_AGENT, RUNNING, SOURCE_AGENT, Fault, hit

PANIC = ("-device", "pvpanic")
USB = ("-device", "qemu-xhci,id=x")
MEMORY = ["memory-due", "memory-middle"]
# What QEMU says when the guest gets into a state.
SIGNS = {
    "paused": "STOP", "io-error": "BLOCK_IO_ERROR", "guest-panicked": "GUEST_PANICKED", "watchdog": "WATCHDOG",
    "shutdown": "SHUTDOWN",
}  # fmt: skip
# The states in which QEMU says nothing about the guest, whatever it was before.
AT_SWITCHOVER = {"finish-migrate", "postmigrate"}


def say(scene, line, host="a"):
    """A command of the human monitor."""
    answer = scene.watchers[host].execute("human-monitor-command", 1, **{"command-line": line})
    scene.note(f"host {host}: {line}: {json.dumps(answer)[:200]}")
    return answer


def tell(scene, command, host="a", **arguments):
    answer = scene.watchers[host].execute(command, 1, **arguments)
    scene.note(f"host {host}: {command} {json.dumps(arguments)}: {json.dumps(answer)[:200]}")
    return answer


def changing(act, *states):
    """`act` brings the source's guest into one of `states`, in which it has to stay.

    While QEMU is at the switchover it does not. A pause in the memory copy looks the same as QEMU's own when convergence
    follows at once.
    """
    wanted = frozenset(states)
    own = {SIGNS[state] for state in states} | {"STOP"}

    def inject(scene, gate):
        watcher = scene.watchers["a"]
        emulator = watcher.current
        before = len(emulator.events) if emulator else 0
        act(scene)

        def is_there():
            # QEMU says nothing more when it waits for the copy, which waits at the gate.
            return emulator is not None and own <= {name for _, name, _ in emulator.events[before:]}

        limit = time.monotonic() + 2
        while not is_there() and time.monotonic() < limit:
            if watcher.run_state(0.5) in AT_SWITCHOVER | {"off"}:
                break
            scene.sleep(0.02)
        is_plain = is_there() and not (wanted == {"paused"} and scene.point.name in MEMORY)
        scene.note(f"the guest is {'' if is_there() else 'not '}{' or '.join(states)}")
        scene.expects.states = wanted if is_plain else wanted | RUNNING
        keep_after_rollback(scene)
        gate.go()

    return inject


def keep_after_rollback(scene):
    """QEMU 7.2 forgets at pre-switchover in which state a guest was, and only one that was paused is brought back to it."""
    if scene.expects.states & {"guest-panicked", "watchdog", "shutdown", "io-error"}:
        scene.expects.states |= {"postmigrate"}


def settling(act, state):
    """`act` has brought the guest into the state before anything is moved."""

    def settle(scene):
        act(scene)
        scene.wait(5, f"the state {state}", lambda: scene.watchers["a"].run_state() == state)
        scene.expects.states = frozenset({state})
        keep_after_rollback(scene)

    return settle


def doing(*acts, boots=0):
    """Something that leaves the guest running, if it does anything."""

    def inject(scene, gate):
        scene.expects.boots = boots
        for act in acts:
            act(scene)
        gate.go()

    return inject


def stop(scene):
    tell(scene, "stop")


def cont(scene):
    tell(scene, "cont")


def fill(scene):
    scene.fill_source()
    scene.note("the file system of the source's image is full")


def panic(scene):
    say(scene, "o /b 0x505 1")


def run_the_watchdog_out(scene):
    say(scene, "o /b 0x443 0xf")


def power_off(scene):
    """S5, by the ACPI power management of the machine."""
    say(scene, "o /w 0x604 0x2000")


def reboot(scene):
    """As a guest does it: through its keyboard controller."""
    say(scene, "o /b 0x64 0xfe")


# What the guest can see of its machine.


def disks(scene, host):
    """The drives as far as the guest can tell, and their limits."""
    found = []
    for one in scene.watchers[host].ask("query-block") or []:
        inserted = one.get("inserted") or {}
        image = inserted.get("image", {})
        limits = {name: value for name, value in inserted.items() if re.match(r"(bps|iops)", name) and value}
        medium = ""
        if inserted.get("ro") and os.path.exists(image.get("filename", "")):
            with open(image["filename"], "rb") as file:
                medium = hashlib.sha256(file.read(1 << 20)).hexdigest()[:12]
        # A host may name parts without a name of their own in another way.
        place = re.sub(r"^.*/(peripheral|unattached|peripheral-anon)/", "", one.get("qdev", ""))
        place = place.removesuffix("/virtio-backend")
        found.append((place, bool(one.get("tray_open")), bool(inserted), image.get("virtual-size"), medium, limits))
    return sorted(found, key=str)


def devices(scene, host):
    """What is plugged in, by QEMU's own tree."""
    words = (scene.watchers[host].ask("human-monitor-command", **{"command-line": "info qtree"}) or "")
    return sorted(re.findall(r'dev: (\S+, id "[^"]*")', words))


def description(scene, host):
    return {"disks": disks(scene, host), "devices": devices(scene, host)}


def changing_description(act):
    """What the guest sees in the end is what it had here after the change."""

    def inject(scene, gate):
        before = description(scene, "a")
        act(scene)
        # After a hot-plug QEMU waits for the write to its stream that is under way (`drain_call_rcu`), and says nothing before whoever is to take
        # that goes on.
        if scene.point.name == "memory-middle":
            gate.go()
        scene.sleep(0.1)
        wanted = description(scene, "a")
        # A frozen QEMU says nothing, and does nothing.
        wanted = wanted if wanted["devices"] else before
        scene.note(f"it changed: {wanted != before}; {json.dumps(wanted)[:600]}")

        def check(scene, home):
            now = description(scene, home)
            found = []
            for part in wanted:
                more = [one for one in now[part] if one not in wanted[part]]
                less = [one for one in wanted[part] if one not in now[part]]
                if more or less:
                    found.append(f"the guest's {part} on host {home}: {more} instead of {less}")
            return found

        scene.expects.checks.append(check)
        gate.go()

    return inject


def disc(scene, name):
    return os.path.join(scene.directory, "a", name)


def lay_discs(scene):
    for number, name in enumerate(("old.iso", "new.iso")):
        with open(disc(scene, name), "wb") as file:
            file.write(bytes([number + 1]) * (64 << 10))


def with_disc(scene):
    drive = f"file={disc(scene, 'old.iso')},if=none,id=c0,media=cdrom,format=raw,readonly=on"
    return "-drive", drive, "-device", "ide-cd,id=cd0,drive=c0,bus=ide.1"


def change_disc(scene):
    tell(scene, "blockdev-change-medium", id="cd0", filename=disc(scene, "new.iso"), format="raw")


def eject_disc(scene):
    tell(scene, "eject", id="cd0", force=True)


def plug(scene):
    tell(scene, "device_add", driver="usb-tablet", id="hot1", bus="x.0")


def unplug(scene):
    tell(scene, "device_del", id="tablet")


def resize(scene):
    tell(scene, "block_resize", device="ide0-hd0", size=(scene.kind.disk + 1) << 20)


def throttle(scene):
    zero = {name: 0 for name in ("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr")}
    tell(scene, "block_set_io_throttle", device="ide0-hd0", iops=4000, **zero)


# Other monitors of the destination's QEMU.


def greets(path):
    """Whether a monitor answers at a socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0.5)
        try:
            connection.connect(path)
            return b'"QMP"' in connection.recv(4096)
        except OSError:
            return False


def meddling(command):
    """Everybody who can tells the destination's QEMU something before it may run the guest."""

    def inject(scene, gate):
        watcher = scene.watchers["b"]
        if watcher.current is not None:
            scene.expects.found.append("another monitor of the guest's QEMU answers on host b, which does not own it")
            tell(scene, command, "b")
        for where, _, files in os.walk(os.path.join(scene.state("b"), "guests")):
            for name in files:
                path = os.path.join(where, name)
                if name.endswith(".sock") and name not in ("qmp.sock", "w.sock") and greets(path):
                    scene.expects.found.append(f"a monitor of the guest's QEMU answers on host b: {name}")
        gate.go()

    return inject


def asking(scene, gate):
    """Commands on the source in the middle: each ends by itself, and none starts the guest."""
    for words in (["status"], ["guest", "list"], ["guest", "show", guest.NAME], ["guest", "start", guest.NAME]):
        code, said = scene.crossdock("a", *words, seconds=15)
        scene.note(f"crossdock {' '.join(words)}: code {code}: {said.strip()[:300]}")
        if code == 124:
            scene.expects.found.append(f"crossdock {' '.join(words)} does not end")
        if code == 0 and words[1:2] == ["start"]:
            scene.expects.found.append("crossdock guest start starts a guest that is being moved")
    gate.go()


def fault(name, meaning, inject, options=(), **more):
    return Fault(name, meaning, inject, options=options, kind=guest.IDLE, is_bounded=False, **more)


ACTION = "-action"
NO_HURRY = ("-no-shutdown",)
DISCS = {"options": with_disc, "arrange": lay_discs}
FAULTS = [
    fault("io-error", "no room for the guest's writes: QEMU stops it", changing(fill, "io-error")),
    fault(
        "panic-pause", "the guest panics, and QEMU pauses it", changing(panic, "guest-panicked"),
        (*PANIC, ACTION, "panic=pause"),
    ),
    fault(
        "panic-reset", "the guest panics and resets its machine", doing(panic, reboot, boots=1),
        (*PANIC, ACTION, "panic=none"),
    ),
    fault(
        "panic-poweroff", "the guest panics, and QEMU ends", doing(panic), (*PANIC, ACTION, "panic=shutdown"), kills="a",
    ),
    fault(
        "watchdog", "the guest's watchdog runs out: QEMU pauses it", changing(run_the_watchdog_out, "watchdog"),
        ("-device", "ib700", ACTION, "watchdog=pause"),
    ),
    fault("stop", "another client pauses the guest", changing(stop, "paused")),
    fault("stop-cont", "another client pauses the guest and lets it go on", doing(stop, cont)),
    fault("cont", "another client lets the guest go on, whatever it does", doing(cont)),
    fault("reset", "another client resets the machine", doing(lambda scene: tell(scene, "system_reset"), boots=1)),
    fault("powerdown", "another client presses the power button", doing(lambda scene: tell(scene, "system_powerdown"))),
    fault("poweroff", "the guest powers its machine off, and QEMU ends", doing(power_off), kills="a"),
    fault(
        "poweroff-pause", "the guest powers its machine off, and QEMU stays", changing(power_off, "shutdown"), NO_HURRY,
    ),
    fault("reboot", "the guest resets its machine", doing(reboot, boots=1)),
    fault("disc-change", "another disc is put in", changing_description(change_disc), **DISCS),
    fault("disc-eject", "the disc is taken out", changing_description(eject_disc), **DISCS),
    fault("hot-plug", "a device is plugged in", changing_description(plug), USB),
    fault(
        "hot-unplug", "a device is taken out", changing_description(unplug),
        (*USB, "-device", "usb-tablet,id=tablet,bus=x.0"),
    ),
    fault("resize", "the disk gets larger", changing_description(resize)),
    fault("throttle", "the disk gets a limit", changing_description(throttle)),
    fault("other-cont", "cont on every monitor of the destination's QEMU", meddling("cont")),
    fault("other-stop", "stop on every monitor of the destination's QEMU", meddling("stop")),
    fault("other-reset", "system_reset on every monitor of the destination's QEMU", meddling("system_reset")),
    fault("asked", "status, list, show and start on the source meanwhile", asking),
]  # fmt: skip


def let_go(scene, gate):
    gate.go()


def killing(*targets):
    def inject(scene, gate):
        hit(scene, 9, *targets)
        gate.go()

    return inject


def resetting(scene, gate):
    scene.link.reset()
    gate.go()


# Guests that did not run when the migration began, and what goes wrong then.
BEFORE = {
    "paused": (stop, "paused", ()),
    "io-error": (fill, "io-error", ()),
    "panicked": (panic, "guest-panicked", (*PANIC, ACTION, "panic=pause")),
    "shut-down": (power_off, "shutdown", NO_HURRY),
}
WRONG = {
    "": ("nothing is wrong", let_go),
    "-kill-source-agent": ("SIGKILL of the source agent", killing(SOURCE_AGENT)),
    "-kill-both-agents": ("SIGKILL of both agents", killing(SOURCE_AGENT, DESTINATION_AGENT)),
    "-link-reset": ("every connection ends with RST", resetting),
}
for _name, (_act, _state, _options) in BEFORE.items():
    for _end, (_meaning, _inject) in WRONG.items():
        FAULTS.append(
            fault(
                f"{_name}-before{_end}", f"the guest was {_state} before; {_meaning}", _inject, _options,
                settle=settling(_act, _state), may_end_before=True, must_migrate=_name == "paused" and not _end,
            )  # fmt: skip
        )

EARLY = "offered accepted ready mirror-due copy-source copy-image mirrors-ready stream-due".split()
STILL = "pre-switchover mirrors-ended prepared continued fenced freeze-due frozen".split()
LATE = "release-written released own-due owner".split()
HERE = ["check", *EARLY, *MEMORY, *STILL, "released"]
STATE_POINTS = {
    **{name: HERE for name in ("io-error", "panic-pause", "stop", "poweroff-pause")},
    "watchdog": ["accepted", "copy-source", "mirrors-ready", "memory-middle", "pre-switchover", "continued", "fenced"],
    "panic-reset": ["accepted", "copy-source", "memory-middle", "pre-switchover", "continued", "fenced", "released"],
    "panic-poweroff": ["accepted", "copy-source", "memory-middle", "pre-switchover", "continued", "fenced", "released"],
    "poweroff": ["offered", "copy-source", "memory-middle", "pre-switchover", "continued", "fenced", "frozen", "released"],
    "stop-cont": ["accepted", "copy-source", "memory-middle", *STILL, "released", "confirm-due"],
    "cont": ["copy-source", "memory-middle", *STILL, *LATE, "announced", "confirm-due", "back-paused"],
    "reset": ["offered", "copy-source", "memory-middle", *STILL, "released", "back-paused"],
    "reboot": ["offered", "copy-source", "memory-middle", *STILL, "released"],
    "powerdown": ["copy-source", "pre-switchover", "continued", "fenced", "released"],
    **{
        name: ["offered", "accepted", "ready", "mirror-due", "copy-source", "mirrors-ready", "memory-middle",
               "pre-switchover", "continued", "fenced"]
        for name in ("disc-change", "disc-eject", "hot-plug", "hot-unplug", "resize", "throttle")
    },
    **{
        name: ["ready", "copy-image", "stream-due", "memory-middle", "prepare-due", "prepared", "continued", "released",
               "own-due", "own-written"]
        for name in ("other-cont", "other-stop")
    },
    "other-reset": ["stream-due", "memory-middle", "prepared", "own-due"],
    "asked": ["copy-source", "pre-switchover", "fenced", "frozen", "release-written", "released", "confirm-due"],
}  # fmt: skip
BROKEN = "memory-middle pre-switchover prepared continued fenced frozen released own-due".split()


def runs():
    """Pairs of the names of a point and a fault."""
    found = [(point, name) for name, where in STATE_POINTS.items() for point in where]
    for name in BEFORE:
        found.append(("check", f"{name}-before"))
        # A guest that was shut down is not released.
        where = BROKEN if name != "shut-down" else BROKEN[:2]
        found += [(point, f"{name}-before{end}") for end in WRONG if end for point in where]
    return [(point, name) for point, name in found if point in points.BY_NAME]
