"""One run: a migration, a fault at a point, the healing, the evidence."""
import dataclasses
import json
import os
import shutil
import time

import guest
import judge
import points
from lab import LabFailed, Scene, Spoiled

# How long a point may take to be reached, and how long a run may heal by itself after the fault.
REACH, HEAL = 30, 45
# How long an open migration may have nobody on the source who works at it, until an operator steps in.
QUIET = 5
# The blackout deadline in milliseconds where the pause is measured, and elsewhere: on a machine that is busy with other
# things a migration without any trouble may stand still for a second.
DEADLINE, EASY_DEADLINE = 1500, 10_000
ATTEMPTS = 5  # to reach the point with a guest that is whole


class NotReached(LabFailed):
    """The migration took another way than through the point."""


@dataclasses.dataclass
class Result:
    point: str
    fault: str
    outcome: str = ""
    home: str = ""
    commands: list = dataclasses.field(default_factory=list)
    violations: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)
    error: str = ""  # of the harness
    seconds: float = 0.0
    healed: float = 0.0  # seconds from the fault until all was well
    pause: float = 0.0  # the longest time that the guest stood still, in seconds
    bounded: bool = False  # whether the blackout deadline bounds the pause
    gave_up: bool = False  # whether it rolled back where it could have gone on
    evidence: str = ""

    @property
    def is_good(self):
        return not self.violations and not self.error


class Run:
    """Carries a run out in a directory of its own."""

    def __init__(self, pair, directory, point, fault, keep, keeps_all=False):
        self.pair, self.point, self.fault, self.keep, self.keeps_all = pair, point, fault, keep, keeps_all
        self.directory = directory
        self.is_bounded = fault.bounds(point)
        self.result, self.scene = Result(point.name, fault.name), None
        self.frozen_consoles, self.image = None, ""

    def carry_out(self):
        began = time.monotonic()
        spoiled = []
        while self._attempt() and len(spoiled) < ATTEMPTS - 1 and not self.pair.site.ending.is_set():
            spoiled.append(f"made again: {self.result.error}")
        if self.result.is_good and not self.keeps_all:
            shutil.rmtree(self._evidence(), ignore_errors=True)
        self.result.notes += spoiled
        self.result.seconds = time.monotonic() - began
        return self.result

    def _attempt(self):
        """Returns whether another attempt makes sense."""
        self.result, self.scene = Result(self.point.name, self.fault.name), None
        self.frozen_consoles, self.image = None, ""
        try:
            os.makedirs(self.directory)
            deadline = DEADLINE if self.is_bounded else EASY_DEADLINE
            self.scene = Scene(self.pair, self.directory, deadline, self.fault.kind)
            self.scene.point = self.point
            self._play()
        except (NotReached, Spoiled) as error:
            self.result.error = str(error)
            return True
        except LabFailed as error:
            self.result.error = str(error)
        except Exception as error:  # a run must not end the matrix
            self.result.error = f"{type(error).__name__}: {error}"
        finally:
            self._end()
        return False

    def _play(self):
        scene = self.scene
        if self.fault.prepare:
            self.fault.prepare(scene)
        scene.start_guest(self.fault.options, self.fault.arrange)
        scene.start_agent()
        if self.fault.settle:
            self.fault.settle(scene)
        if self.fault.inject is None:
            self._let_fail()
        else:
            gate = points.reach(scene, self.point, REACH)
            is_over = scene.command.poll() is not None
            if gate is None and self.fault.may_end_before and is_over:
                scene.note("the migration ended before the point")
            elif gate is None:
                raise NotReached(f"the point was not reached; the last words: {scene.words()[-300:].strip()!r}")
            else:
                scene.note(f"at the point {self.point.name}, process {gate.process}")
                self.fault.inject(scene, gate)
        scene.note("the fault is over")
        hurt = time.monotonic()
        self._heal()
        self.result.healed = time.monotonic() - hurt
        self._judge()

    def _let_fail(self):
        scene = self.scene
        rule = self.fault.arm(scene, self.point)
        gate = None
        if self.point.cancels:
            gate = points.BY_NAME[self.point.cancels].arm(scene.table)
        scene.start_migration()
        if gate is not None:
            if not gate.wait(REACH, points.Over(scene)):
                raise NotReached("the point at which the operator cancels was not reached")
            points.cancel(scene)
            gate.go()
        if not rule.wait(REACH, points.Over(scene)):
            raise NotReached("the call that shall fail was not made")
        scene.note("the call was made to fail")
        if self.fault.lasts:
            # An operator makes room, or replaces the disk.
            scene.sleep(4)
            rule.go()
            scene.note("the call works again")

    # Healing.

    def _is_well(self):
        """The host where the guest is as it may be, with nothing left to do; empty when that is not so."""
        found = self.scene.in_order()
        if len(found) != 1 or self.scene.source_agents():
            return ""
        return "" if self._is_open() else found[0]

    def _is_open(self):
        """Whether the source does not know yet how the migration ended."""
        return any(state in ("interrupted", "undecided", "migrating") for state in self._states("a"))

    def _wait(self, seconds):
        """Waits until all is well, or nobody works at it any more."""
        scene = self.scene
        limit = time.monotonic() + seconds
        quiet = None
        while time.monotonic() < limit:
            home = self._is_well()
            if home:
                return home
            if scene.source_agents():
                quiet = None
            else:
                quiet = quiet or time.monotonic()
                waited = time.monotonic() - quiet
                # The destination may wait for a source that has given up: it has a patience, nobody has to help it.
                if waited > 2 and not self._has_emulator() or waited > QUIET and self._is_open():
                    return ""
            scene.sleep(0.05)
        return ""

    def _has_emulator(self):
        return any(watcher.current for watcher in self.scene.watchers.values())

    def _heal(self):
        """First nothing, then one command; which one follows from what `crossdock status` says."""
        home = self._wait(HEAL)
        if not home and self.scene.expects.repair:
            # QEMU does not go on with a file that is not its own.
            self.scene.expects.repair()
        if not home and self._has_emulator():
            home = self._recover()
        if not home and not self._has_emulator():
            home = self._start_again() or self._recover()
        self.result.home = home or self._probable_home()

    def _probable_home(self):
        """Where the guest is, though not all is as it should be; empty when that is not clear."""
        scene = self.scene
        alive = scene.alive()
        if len(alive) == 1:
            return alive[0]
        there = [host for host, watcher in scene.watchers.items() if watcher.current]
        return there[0] if len(there) == 1 and not alive and not self._is_open() else ""

    def _states(self, host):
        return [row["state"] for row in self.scene.status(host) or []]

    def _recover(self):
        scene = self.scene
        if scene.source_agents():
            return ""
        if not self._is_open() and not scene.expects.follows_up and not self._has_remains():
            return ""
        code, words = scene.crossdock("a", "recover", *scene.expects.recovery, seconds=60, shimmed=True)
        scene.note(f"crossdock recover: code {code}: {words.strip()}")
        scene.expects.commands.append("crossdock recover")
        return self._wait(12)

    def _has_remains(self):
        """Whether the guest has moved, and nobody is left on the source who ends its QEMU there."""
        return self._states("a")[-1:] == ["migrated"] and self.scene.watchers["a"].current is not None

    def _start_again(self):
        """The memory was lost with QEMU. What was acknowledged has to be on the disk before the guest starts again."""
        scene = self.scene
        here, there = self._states("a"), self._states("b")
        home = "b" if "owned" in there else "a"
        if home == "a" and any(state in ("undecided", "migrated") for state in here):
            return ""
        self.image = self._image(home)
        self.frozen_consoles = [scene.saved_console, scene.consoles["a"].text, scene.consoles["b"].text]
        sums, _ = judge.parse(self.frozen_consoles, scene.expects.boots)
        kept = os.path.join(self.directory, "image")
        if os.path.exists(self.image):
            guest.copy_sparse(self.image, kept)
        self.image = kept
        code, words = scene.crossdock(home, "guest", "start", guest.NAME)
        scene.note(f"crossdock guest start on host {home} ({len(sums)} records): code {code}: {words.strip()}")
        scene.expects.commands.append("crossdock guest start")
        if code != 0:
            return ""
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            if scene.alive() == [home] and scene.kind.mark in (text := scene.consoles[home].text) and text.count("REC 0 ") > 20:
                return home
        return ""

    def _image(self, home):
        if home == "a":
            return self.scene.expects.image or self.scene.disk
        return os.path.join(self.scene.images, guest.NAME, os.path.basename(self.scene.disk))

    # The judgement.

    def _judge(self):
        scene, result = self.scene, self.result
        home, expects = result.home, scene.expects
        result.commands = expects.commands
        for check in expects.checks if home else ():
            expects.found += check(scene, home)
        if home and expects.boots and not self.frozen_consoles:
            # Some records since the last boot.
            console = scene.consoles[home]
            scene.wait(10, "records", lambda: console.text.rpartition(scene.kind.mark)[2].count("REC ") > 3)
        consoles = self.frozen_consoles
        if consoles is None:
            # The consoles first: what they have is on the disk by then.
            consoles = [scene.saved_console, scene.consoles["a"].text, scene.consoles["b"].text]
            self.image = self._image(home) if home else ""
        evidence = judge.Evidence(
            home=home,
            is_alive=self._is_alive(home),
            state=self._state(home),
            states=expects.states,
            homes=expects.homes,
            boots=expects.boots,
            found=expects.found,
            running=scene.spans(),
            consoles=consoles,
            image=self.image,
            slots=scene.kind.slots,
            rows={host: scene.status(host) for host in ("a", "b")},
            guests={host: scene.guests(host) for host in ("a", "b")},
            leftovers=scene.leftovers(home) if home else [],
            commands=result.commands,
            emulator_killed=bool(self.fault.kills),
            may_freeze=not self.is_bounded,
            deadline=scene.deadline / 1000,
            must_migrate=self.fault.must_migrate,
            code=scene.code(),
        )  # fmt: skip
        self.evidence = evidence
        result.violations = judge.judge(evidence, scene.site.records)
        result.bounded = not evidence.may_freeze and home == "a"
        result.gave_up = home == "a" and self.point.can_go_on and self.fault.is_passing
        if not evidence.emulator_killed:
            result.pause = judge.longest_pause(evidence.running)
        result.notes += [f"not taken away: {path}" for path in scene.scraps()]
        result.outcome = self._outcome(home)

    def _is_alive(self, home):
        """Whether the guest is as it may be, there and nowhere else; a busy machine gives it its turn late."""
        scene = self.scene
        for _ in range(10):
            alive = scene.alive()
            if len(alive) > 1 or alive == [home] and "running" in scene.expects.states:
                break
            if home and not alive and self._state(home) in scene.expects.states - {"running"}:
                return True
        return alive == [home] and "running" in scene.expects.states

    def _state(self, home):
        return self.scene.watchers[home].run_state() if home else "off"

    def _outcome(self, home):
        if not home:
            return "lost"
        if "crossdock guest start" in self.result.commands:
            text = "started again on the " + ("source" if home == "a" else "destination")
        else:
            text = "rolled back" if home == "a" else "migrated"
        if "crossdock recover" in self.result.commands:
            text += " by crossdock recover"
        state = self._state(home)
        return text if state == "running" else f"{text}, {state}"

    # The end.

    def _end(self):
        scene = self.scene
        if scene is None:
            return
        if (self.keeps_all or not self.result.is_good) and not scene.site.ending.is_set():
            try:
                self._keep()
            except OSError as error:
                self.result.notes.append(f"the evidence could not be kept: {error}")
        scene.close()
        scene.forget()

    def _evidence(self):
        return os.path.join(self.keep, f"{self.point.name}--{self.fault.name}")

    def _keep(self):
        """Keeps what tells how the run went, without the images."""
        scene = self.scene
        target = self._evidence()
        shutil.rmtree(target, ignore_errors=True)
        os.makedirs(target)
        for host in ("a", "b", "c"):
            for where, _, files in os.walk(os.path.join(self.directory, host)):
                for name in files:
                    path = os.path.join(where, name)
                    if not os.path.isfile(path) or os.path.getsize(path) > 4 << 20:
                        continue
                    copy = os.path.join(target, os.path.relpath(path, self.directory))
                    os.makedirs(os.path.dirname(copy), exist_ok=True)
                    shutil.copy(path, copy)
            if host in scene.consoles:
                with open(os.path.join(target, f"console-{host}"), "w", encoding="latin-1") as file:
                    file.write(scene.consoles[host].text)
        lines = [(when, f"harness: {text}") for when, text in scene.log]
        for watcher in scene.watchers.values():
            for one in watcher.emulators:
                lines += [(when, f"QEMU {one.process} on host {one.host}: {name} {json.dumps(data)}")
                          for when, name, data in one.events]  # fmt: skip
        with open(os.path.join(target, "timeline"), "w") as file:
            for when, text in sorted(lines):
                file.write(f"{when - scene.began:9.3f} {text}\n")
        with open(os.path.join(target, "result.json"), "w") as file:
            known = dataclasses.asdict(self.result)
            known["processes"] = [repr(one) for one in scene.processes()]
            evidence = getattr(self, "evidence", None)
            if evidence is not None:
                known["status"] = evidence.rows
                known["guests"] = evidence.guests
                known["running"] = evidence.running
            json.dump(known, file, indent=1)
        self.result.evidence = target
