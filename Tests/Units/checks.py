"""What has to hold of the shipped units, in the order in which one host's life shows it.

Each check is a function with a sentence; it raises `Wrong` with what it saw instead. Later checks go on with what earlier
ones have left on the hosts.
"""
import re

from machine import wait

AGENT = "crossdock-destination"
# What systemd says of a unit whose processes it finds when it starts or stops it.
LEFT_OVER = r"left-over process|remains running after unit stopped"
# What the kernel and systemd say of a program that has run into a sandbox. Type 1326 is seccomp's audit record.
DENIED = r"type=1326|audit\[\d+\]: SECCOMP|status=31/SYS|Bad system call|SIGSYS|apparmor=.DENIED|type=1423|domain=[0-9a-f]+ blockers"
# The machine's second disk, and an image on its first.
DEVICE, LEAVING = "/dev/vdb", "/srv/leaving.raw"
# Bytes per second at which the middle of a copy takes more than half a minute.
SLOW = "250000"
# At this one it goes on while another migration begins and gets to its own.
SLOWEST = "25000"
CHECKS = []


class Wrong(Exception):
    pass


def check(sentence):
    def register(function):
        CHECKS.append((sentence, function))
        return function

    return register


def demand(condition, words):
    if not condition:
        raise Wrong(words)


class Lab:
    """Both hosts, and what the checks hand on to each other."""

    def __init__(self, outside, inside):
        self.outside, self.inside = outside, inside
        # The migration to the machine that its reset interrupts.
        self.coming = None

    def whereabouts(self, guest):
        """The hosts on which a guest runs."""
        found = []
        for name, host in (("outside", self.outside), ("machine", self.inside)):
            if host.guests().get(guest, {}).get("state") == "running":
                found.append(name)
        return found

    def settled(self, guest):
        """The one host on which the guest runs, as soon as neither host waits for the other one."""
        def is_settled():
            states = [host.guests().get(guest, {}).get("state") for host in (self.outside, self.inside)]
            waiting = [one for one in states if one in ("arriving", "frozen", "unknown", "damaged")]
            return not waiting and "running" in states

        wait(f"the guest {guest} to run somewhere", is_settled)
        return self.whereabouts(guest)

    def receive(self, name, disk, form="raw", more=(), options=()):
        """Moves a new guest from outside into the machine."""
        self.outside.start_guest(name, disk, form, more)
        self.move(name, *options)
        places = self.whereabouts(name)
        demand(places == ["machine"], f"the guest runs here: {places or 'nowhere'}")

    def move(self, name, *options):
        for is_last in (False, False, True):
            migration = self.outside.migrate(name, *options)
            code = migration.end()
            if code == "0":
                return
            # A machine that hardly gets a processor may be silent for longer than an agent believes in it.
            is_slow = code == "11" or "has been silent" in migration.words()
            demand(is_slow and not is_last, f"crossdock migrate ended with code {code}: {migration.words()}")

    def journal(self, more):
        return self.inside.run(f"journalctl -o short-monotonic --no-pager {more}")

    def emulators(self):
        """The processes of guests on the machine, by their names: what `crossdock guest list` says takes long here."""
        lines = self.inside.run(
            f"""for record in {self.inside.state}/guests/*/guest.json; do
                [ -e "$record" ] || continue
                process=$(sed -n 's/.*"pid" *: *\\([0-9]*\\).*/\\1/p' "$record")
                [ "$(cat "/proc/$process/comm" 2>/dev/null)" != qemu-system-x86 ] || echo "$(basename "$(dirname "$record")") $process"
            done"""
        ).splitlines()
        return dict(line.split() for line in lines)


def demand_none(lines, pattern):
    found = [line.strip() for line in lines.splitlines() if re.search(pattern, line)]
    demand(not found, f"{len(found)} such lines, such as: {found[0] if found else ''}")


def demand_nothing_left_over(lab):
    demand_none(lab.journal(f"-b -u {AGENT}"), LEFT_OVER)


@check("systemd finds nothing wrong in the units")
def verify(lab):
    units = " ".join(f"/etc/systemd/system/{unit}.service" for unit in lab.inside.UNITS)
    code, output = lab.inside.run(f"systemd-analyze verify --man=no {units}", check=False)
    output = "\n".join(line for line in output.splitlines() if "crossdock" in line)
    demand(code == 0 and not output, output or f"systemd-analyze verify ended with code {code}")


@check("the units are enabled and start, and the agent listens")
def start(lab):
    services = " ".join(lab.inside.UNITS)
    lab.inside.run(f"systemctl daemon-reload && systemctl enable --now {services}")
    lab.inside.wait_for_agent()
    for unit in ("crossdock-hold", AGENT):
        state = lab.inside.property(unit, "ActiveState")
        demand(state == "active", f"{unit} is {state}")
    wait("crossdock-recover to end", lambda: lab.inside.property("crossdock-recover", "ActiveState") == "inactive")
    result = lab.inside.property("crossdock-recover", "Result")
    demand(result == "success", f"crossdock-recover ended with {result}")


@check("a guest with a raw image is received, in a scope of its own")
def receive_raw(lab):
    lab.receive("raw", lab.outside.make_disk("raw"))
    process = lab.emulators()["raw"]
    group = lab.inside.run(f"cat /proc/{process}/cgroup").strip()
    demand(f"crossdock-guests.slice/crossdock-guest-raw-{process}.scope" in group, f"the guest is in {group}")


@check("a guest with a qcow2 image is received")
def receive_qcow2(lab):
    lab.receive("qcow2", lab.outside.make_disk("qcow2", "qcow2"), "qcow2")


@check("a guest with a tap in a bridge is received, and the tap has its carrier")
def receive_tap(lab):
    lines = [
        "ip link add xdbr0 type bridge", "ip tuntap add dev xdtap0 mode tap", "ip link set xdtap0 master xdbr0",
        "ip link set xdbr0 up", "ip link set xdtap0 up",
    ]  # fmt: skip
    lab.inside.run(" && ".join(lines))
    for line in lines[1:2] + lines[4:]:
        code, output = lab.outside.run_words(line.split())
        demand(code == 0, f"{line}: {output}")
    # Its network boot, which waits for an answer with all of a processor, is left out.
    more = ["-netdev", "tap,id=n0,ifname=xdtap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0,rombar=0"]
    lab.receive("tap", lab.outside.make_disk("tap"), more=more)
    seen = lab.inside.run("cat /sys/class/net/xdtap0/carrier; basename $(readlink /sys/class/net/xdtap0/master)").split()
    demand(seen == ["1", "xdbr0"], f"carrier and bridge of the tap: {seen}")


@check("the agent is restarted with guests running: they live on, and systemd finds nothing left over")
def restart(lab):
    before, old = lab.emulators(), lab.inside.agent_process()
    demand(before, "no guest runs")
    lab.inside.run(f"systemctl restart {AGENT}")
    lab.inside.wait_for_agent()
    demand(lab.inside.agent_process() != old, "the agent is the old one")
    demand(lab.emulators() == before, f"before: {before}; after: {lab.emulators()}")
    demand_nothing_left_over(lab)


@check("the restarted agent receives guests")
def receive_again(lab):
    lab.receive("again", lab.outside.make_disk("again"))


@check("a guest that the system kills for its memory takes nobody with it")
def out_of_memory(lab):
    before, agent = lab.emulators(), lab.inside.agent_process()
    victim = before.pop("again")
    group = lab.inside.run(f"cat /proc/{victim}/cgroup")
    # The kernel's own way, with the victim made the obvious one.
    lab.inside.run(f"echo 1000 >/proc/{victim}/oom_score_adj && echo f >/proc/sysrq-trigger")
    wait("the end of the victim", lambda: "again" not in lab.emulators())
    # What systemd does then it does after it has said so.
    if AGENT in group:
        words = "killed by the OOM killer"
        wait("systemd to hear of it", lambda: words in lab.journal(f"-b -u {AGENT}"))
    lab.inside.wait_for_agent()
    demand(lab.inside.agent_process() == agent, "the agent has another process, or none")
    demand(lab.emulators() == before, f"before: {before}; after: {lab.emulators()}")


@check("an agent that is killed twelve times in a row comes back each time, and systemd finds nothing left over")
def kill_often(lab):
    before = lab.emulators()
    # A machine that is slow may not kill it often enough in the time for which systemd counts.
    interval = lab.inside.property(AGENT, "StartLimitIntervalUSec")
    demand(interval == "0", f"StartLimitIntervalUSec is {interval}")
    code, output = lab.inside.run(
        f"""for time in 1 2 3 4 5 6 7 8 9 10 11 12; do
            old=$(systemctl show -P MainPID {AGENT})
            kill -KILL "$old"
            until new=$(systemctl show -P MainPID {AGENT}); [ "$new" != 0 ] && [ "$new" != "$old" ]; do
                ! systemctl is-failed -q {AGENT} || exit 1
            done
        done""",
        check=False,
    )
    demand(code == 0, f"systemd gave the agent up: {lab.inside.property(AGENT, 'Result')} {output}")
    lab.inside.wait_for_agent()
    demand(lab.emulators() == before, f"before: {before}; after: {lab.emulators()}")
    demand_nothing_left_over(lab)


@check("the agent is killed in the middle of a migration: the guest ends up in one place")
def kill_in_the_middle(lab):
    lab.outside.start_guest("killed", lab.outside.make_disk("killed", filled=12, size=12))
    migration = lab.outside.migrate("killed", "--bandwidth", SLOW)
    migration.wait_for_middle()
    lab.inside.run(f"systemctl kill --signal=KILL --kill-who=main {AGENT}")
    code = migration.end()
    expected = ["machine"] if code == "0" else ["outside"]
    places = lab.settled("killed")
    demand(places == expected, f"crossdock migrate ended with code {code}, and the guest runs here: {places}")
    lab.inside.wait_for_agent()


@check("the limits are there for 64 guests")
def limits(lab):
    tasks = lab.inside.property(AGENT, "TasksMax")
    # A guest has its processors, a thread for each block request that waits (64), and a few of its own.
    demand(tasks == "infinity" or int(tasks) >= 64 * 100, f"TasksMax is {tasks}")
    for name, process in {"agent": lab.inside.agent_process(), **lab.emulators()}.items():
        text = lab.inside.run(f"cat /proc/{process}/limits")
        for limit, least in (("Max open files", 1024), ("Max locked memory", 8 << 20)):
            value = re.search(rf"{limit} +(\S+)", text)[1]
            demand(value == "unlimited" or int(value) >= least, f"{limit} of {name}: {value}")
    policy = lab.inside.property(AGENT, "OOMPolicy")
    demand(policy == "continue", f"OOMPolicy is {policy}")


@check("a guest on a block device leaves the host")
def leave(lab):
    lab.inside.start_guest("device", DEVICE)
    migration = lab.inside.migrate("device")
    code = migration.end()
    demand(code == "0", f"crossdock migrate ended with code {code}: {migration.words()}")
    demand(lab.whereabouts("device") == ["outside"], f"the guest runs here: {lab.whereabouts('device')}")


@check("the host is reset in the middle of a migration to it and of one from it, and its units start")
def reset(lab):
    inside = lab.inside
    lab.outside.start_guest("coming", lab.outside.make_disk("coming", filled=12, size=12))
    # The first sector says that there is nothing to boot.
    inside.run(
        f"mkdir -p /srv && head -c 12M /dev/urandom >{LEAVING} && "
        f"dd if=/dev/zero of={LEAVING} bs=512 count=1 conv=notrunc && sync"
    )
    inside.start_guest("leaving", LEAVING)
    lab.coming = lab.outside.migrate("coming", "--bandwidth", SLOWEST)
    lab.coming.wait_for_middle()
    leaving = inside.migrate("leaving", "--bandwidth", SLOW)
    leaving.wait_for_middle()
    demand(lab.coming.is_copying(), f"the migration to the host was over too early: {lab.coming.words()}")
    inside.machine.reset()
    inside.wait_for_agent()
    for unit in ("crossdock-hold", AGENT):
        seen = inside.property(unit, "ActiveState")
        demand(seen == "active", f"{unit} is {seen}")


@check("the guest that was on its way to the host is in one place")
def came(lab):
    code = lab.coming.end()
    expected = ["machine"] if code == "0" else ["outside"]
    places = lab.settled("coming")
    demand(places == expected, f"crossdock migrate ended with code {code}, and the guest runs here: {places}")
    if expected == ["outside"]:
        wait("the machine to have nothing of the guest", lambda: "coming" not in lab.inside.guests())


@check("the guest that was on its way from the host is the host's, without a command, and starts")
def left(lab):
    inside = lab.inside
    # Its QEMU went with the host.
    wait("crossdock-recover to end", lambda: inside.property("crossdock-recover", "ActiveState") == "inactive")
    result = inside.property("crossdock-recover", "Result")
    demand(result == "success", f"crossdock-recover ended with {result}: {lab.journal('-b -u crossdock-recover')}")
    status = inside.status("leaving")
    demand(status.get("state") == "rolled back", f"crossdock status says of it: {status}")
    wait("the other host to have nothing of the guest", lambda: "leaving" not in lab.outside.guests())
    inside.start_guest("leaving", LEAVING)
    demand(lab.whereabouts("leaving") == ["machine"], f"it runs here: {lab.whereabouts('leaving')}")


@check("the block device of the guest that has left is held, since before the ordinary units were started")
def held(lab):
    code, output = lab.inside.run(f"qemu-io -f raw -c 'read 0 512' {DEVICE}", check=False)
    demand(code != 0, "qemu-io could open the device")
    demand("lock" in output, f"qemu-io could not open the device, but for another reason: {output}")
    held, basic = (
        int(lab.inside.property(unit, "ActiveEnterTimestampMonotonic")) for unit in ("crossdock-hold", "basic.target")
    )
    demand(0 < held <= basic, f"held at {held} µs, basic.target at {basic} µs")
    demand(lab.whereabouts("device") == ["outside"], f"the guest runs here: {lab.whereabouts('device')}")


@check("a guest that was received before the reset starts again, from what the agent has kept")
def start_again(lab):
    lab.inside.crossdock("guest", "start", "raw", "--state-dir", lab.inside.state)
    demand(lab.whereabouts("raw") == ["machine"], f"it runs here: {lab.whereabouts('raw')}")


@check("no process ran into a sandbox, in any of the starts of the host")
def no_denials(lab):
    demand_none(lab.journal("-m --boot=all"), DENIED)


@check("the journal has no crash and no failed unit")
def no_failures(lab):
    failed = lab.inside.run("systemctl list-units --failed --no-legend --plain 'crossdock*'").strip()
    demand(not failed, failed)
    crashes = r"segfault|general protection|status=(?:4|5|6|7|11)/(?:ILL|TRAP|ABRT|BUS|SEGV)|Fatal error"
    demand_none(lab.journal("-m --boot=all"), crashes)
