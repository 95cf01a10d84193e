"""Many viewers, and slow ones."""
import collections
import json
import os
import time

from judgement import check, demand
from visitors import Crowd, gather

SECTIONS = ("host", "trouble", "moves", "evacuation", "guests", "history")
MANY, SLOW, HONEST = 200, 10, 10


def told(viewer):
    """What has to be the same for all: the events, in their order."""
    return [json.dumps(line, sort_keys=True) for line in viewer.events()]


@check("crowd", f"{MANY} viewers see a move alike: the same events in the same order, and the same sections at the end")
def many(world):
    a = world.lab.a
    world.lab.guest("crowd1")
    before, began = a.usage(), time.monotonic()
    viewers = gather(world.tls, a, MANY)
    took = time.monotonic() - began
    crowd = Crowd(viewers)
    try:
        demand(crowd.read_until(lambda: all(all(viewer.sections(name) for name in SECTIONS) for viewer in viewers), 60), "not all got all sections")
        for viewer in viewers:
            demand([line["section"] for line in viewer.lines if "section" in line][:6] == list(SECTIONS), "the first sections came in another order")
            viewer.lines.clear()
        opened, start = a.usage(), time.monotonic()
        process, _ = a.migrate("crowd1", "host-b", "--bandwidth", "16M")

        def is_over(viewer):
            return viewer.latest("moves") == [] and any(one["event"]["event"] == "finished" for one in viewer.events()) and viewer.latest("history")

        done = crowd.read_until(lambda: process.poll() is not None and all(map(is_over, viewers)), 100)
        lasted, after = time.monotonic() - start, a.usage()
        demand(process.wait(60) == 0, "the move has failed")
        demand(done, f"{sum(not is_over(viewer) for viewer in viewers)} viewers did not see the end; {sum(bool(v.ended) for v in viewers)} were closed")
        kinds = collections.Counter(map(tuple, map(told, viewers)))
        demand(len(kinds) == 1, f"{len(kinds)} different sequences of events")
        events = viewers[0].events()
        phases = [one["event"]["phase"] for one in events if one["event"]["event"] == "phase"]
        demand(phases == ["check", "disks", "verify", "memory", "switchover", "release", "done"], f"{phases}")
        for name in ("moves", "guests", "history"):
            last = {json.dumps(viewer.latest(name), sort_keys=True) for viewer in viewers}
            demand(len(last) == 1, f"{len(last)} different last values of '{name}'")
            # Who is slow misses states, and sees those that he sees in the order in which they were.
            fullest = max((viewer.sections(name) for viewer in viewers), key=len)
            for viewer in viewers:
                rest = iter(fullest)
                demand(all(any(value == other for other in rest) for value in viewer.sections(name)), f"'{name}' came in another order")
        whole = collections.Counter(json.dumps(viewer.sections("moves")) for viewer in viewers).most_common(1)[0][1]
        longest = max(viewer.longest for viewer in viewers)
    finally:
        crowd.close()
    world.note(f"{took:.1f} s to open; {len(events)} events each; {whole} of {MANY} saw every state of the moves that any saw")
    world.note(f"the agent: {before[0] / 2**20:.0f} MiB before, {opened[0] / 2**20:.0f} with {MANY} viewers, {after[0] / 2**20:.0f} after the move; "
               f"{100 * (after[1] - opened[1]) / lasted:.0f}% of a processor during {lasted:.0f} s of it; the longest silence {longest:.1f} s")  # fmt: skip
    demand(after[0] - before[0] < 256 << 20, "the agent has grown by more than 256 MiB")


def buffers(most):
    """The most that the kernel keeps for a connection of this network that is made from now on; what it was."""
    path = "/proc/sys/net/ipv4/tcp_wmem"
    with open(path, encoding="ascii") as file:
        before = file.read()
    with open(path, "w", encoding="ascii") as file:
        file.write(most)
    return before


@check("crowd", f"{SLOW} viewers that read nothing are closed within the documented time, and {HONEST} others are not held up by them")
def slow(world):
    a = world.lab.a
    world.lab.guest("lost1")
    process, _ = a.migrate("lost1", "host-b", "--bandwidth", "200K")
    # With the kernel's usual megabytes it would take long until the agent notices that nobody reads.
    usual = buffers("4096 4096 8192")
    try:
        sluggish = gather(world.tls, a, SLOW, of_session=SLOW, receive=2304)
    finally:
        buffers(usual)
    honest = gather(world.tls, a, HONEST, of_session=HONEST)
    crowd = Crowd(honest)
    began, ended = time.monotonic(), {}
    try:
        while len(ended) < SLOW and time.monotonic() - began < 90 and process.poll() is None:
            crowd.read_once(0.2)
            for index, viewer in enumerate(sluggish):
                if index not in ended and is_closed(viewer.connection):
                    ended[index] = time.monotonic() - began
        longest = max(viewer.longest for viewer in honest)
        demand(process.poll() is None, "the move has ended meanwhile")
        demand(len(ended) == SLOW, f"{SLOW - len(ended)} of the slow ones are open after 90 s")
        demand(not any(viewer.ended for viewer in honest), "an honest viewer was closed")
        # 30 s from the time when nothing goes in any more, which takes a while to come.
        demand(max(ended.values()) < 75 and min(ended.values()) > 15, f"they were closed after {sorted(ended.values())} s")
        demand(longest < 2, f"an honest viewer heard nothing for {longest:.1f} s")
        world.note(f"they were closed after {min(ended.values()):.0f} to {max(ended.values()):.0f} s; the others' longest silence was {longest:.2f} s, "
                   f"with {min(len(viewer.lines) for viewer in honest)} lines")  # fmt: skip
    finally:
        crowd.close()
        for viewer in sluggish:
            viewer.connection.close()
        migration = max(name for name in os.listdir(f"{a.state}/migrations"))
        a.run("crossdock", "cancel", migration, code=None)
        process.wait(60)
    demand(world.lab.where("lost1") == {"a": "running"}, f"{world.lab.where('lost1')}")


def is_closed(connection):
    """Whether the agent has closed its end. With the other end's window shut, only the kernel can tell that."""
    own, other = (f":{name[1]:04X}" for name in (connection.getsockname(), connection.getpeername()))
    with open("/proc/net/tcp", encoding="ascii") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    # 01 is established.
    return not any(row[1].endswith(other) and row[2].endswith(own) and row[3] == "01" for row in rows)
