"""What a fault is, and what a run with it may end in."""
import dataclasses
import signal
import typing

import guest
from points import RELEASED, SOURCE, STANDS
from shim import DIE, FAIL

RUNNING = frozenset({"running"})


@dataclasses.dataclass
class Expectation:
    """What may have become of the guest; a fault's `inject` narrows it down, or widens it."""

    states: frozenset = RUNNING  # as QEMU names them
    homes: frozenset = frozenset("ab")
    boots: int = 0  # how often the guest may boot again
    image: str = ""  # where the source's image is, when somebody has moved it
    recovery: tuple = ()  # what `crossdock recover` has to be told
    repair: object = None  # what an operator does first when the guest does not go on by itself
    follows_up: bool = False  # whether a decision of the operator may have to be told to the other host
    checks: list = dataclasses.field(default_factory=list)  # called with the scene and the home; sentences
    found: list = dataclasses.field(default_factory=list)  # violations that were seen on the way
    commands: list = dataclasses.field(default_factory=list)  # of an operator


@dataclasses.dataclass(frozen=True)
class Fault:
    """`inject` gets the scene and the gate at which the process stands, and opens the gate when the fault is there.

    A fault with an `error` needs no gate: the call of the point itself fails with it. Nor does one that `dies`: the
    process kills itself within the call, so that none of its threads goes on meanwhile.
    """

    name: str
    meaning: str
    inject: typing.Callable = None
    prepare: typing.Callable = None  # before the agents start
    error: int = 0
    lasts: bool = False  # whether the error comes again
    dies: bool = False
    kills: str = ""  # the host whose QEMU it kills, or makes end
    kind: guest.Kind = guest.LINUX
    options: typing.Union[tuple, typing.Callable] = ()  # what the guest's command line has besides
    arrange: typing.Callable = None  # before the guest starts, when its disk is there
    settle: typing.Callable = None  # when the guest runs, before anything is moved
    is_bounded: bool = True
    must_migrate: bool = False
    may_end_before: bool = False  # whether the migration may end before the point

    def bounds(self, point):
        """Whether the guest, if it stays on the source, may not stand still for longer than the blackout deadline."""
        if self.kills or self.lasts or not self.is_bounded:
            return False
        # A RELEASED that could not be written is none.
        return point.phase == STANDS or bool(self.error) and point.phase == RELEASED and point.role == SOURCE

    @property
    def is_passing(self):
        """Whether the other host is there again afterwards, so that a migration may go on."""
        names = ("link-", "disk-full", "clock-", "kill-destination-", "stop-destination-")
        return self.name.startswith(names)

    def arm(self, scene, point):
        return scene.table.add(
            point.call, DIE if self.dies else FAIL, role=point.role, path=point.path, text=point.text,
            after=self.dies and point.after, skip=point.skip, error=self.error, left=-1 if self.lasts else 1,
        )  # fmt: skip


def hit(scene, number, *targets):
    """Sends a signal to processes of (host, role), all of which must be there; on the way back they may have ended already."""
    found = []

    def look():
        found[:] = [one for host, role in targets for one in scene.find(host, role)]
        return {(one.host, one.role) for one in found} == set(targets)

    if look() or not scene.point.cancels:
        scene.wait(2, f"the processes {targets}", look)
    else:
        scene.note(f"of the processes {targets} there are {found}")
    for one in found:
        scene.note(f"signal {number} to {one}")
        one.signal(number)
    return found


SOURCE_AGENT, DESTINATION_AGENT = ("a", "source-agent"), ("b", "destination")
WATCHDOG = ("a", "source-watchdog")
