"""What `crossdock recover` does on the source when nobody works at the migration any more, against every kind of answer.

An answer is what the source gets from the other host; silence is none. Only the operator knows more, and says it.
"""
import os
import shutil
import signal

import guest
import points
from fault import DESTINATION_AGENT, SOURCE_AGENT, WATCHDOG, Fault, hit
from points import OWNED, RELEASED

# How long a command may take that finds nobody who answers; `recover` alone asks for 30 s.
LIMIT, ASKING = 60, 45
# Before the release the guest is the source's without anybody's word.
COMMANDS = {
    "recover": [],
    "take": ["--take-ownership"],
    "take-off": ["--take-ownership", "--other-host-is-off"],
    "take-erased": ["--take-ownership", "--other-host-was-erased"],
    "take-erased-other": ["--take-ownership", "--other-host-was-erased", "somebody-else"],
}


def stop_agent(scene):
    scene.stop_agent()
    scene.note("the destination agent is killed for good")


def start_agent(scene):
    scene.start_agent()
    scene.note("the destination agent is started again")


def refuse(scene):
    scene.link.refuse()
    stop_agent(scene)


def accept(scene):
    scene.link.listen()
    start_agent(scene)


def vanish(scene):
    scene.link.vanish()
    scene.note("the other host is silent, as if it were off")


def appear(scene):
    scene.link.reset()
    scene.link.let_go()
    scene.link.listen()
    scene.note("the link forwards again")


def change_certificate(scene):
    stop_agent(scene)
    scene.agent_credentials = scene.pair.pki["other"]
    start_agent(scene)


def restore_certificate(scene):
    stop_agent(scene)
    scene.agent_credentials = None
    start_agent(scene)


def close_list(scene):
    stop_agent(scene)
    scene.agent_options = ["--object", "authz-simple,id=auth0,identity=CN=nobody", "--tls-authz", "auth0"]
    start_agent(scene)


def open_list(scene):
    stop_agent(scene)
    scene.agent_options = []
    start_agent(scene)


def erase(scene):
    """Host b is installed anew: its QEMUs, images and state are gone, its agent answers."""
    stop_agent(scene)
    for one in scene.find("b", "emulator", "helper"):
        one.signal(signal.SIGKILL)
    for path in (scene.state("b"), scene.images):
        shutil.rmtree(path, ignore_errors=True)
    scene.note("host b is erased")
    start_agent(scene)


def nothing(scene):
    pass


# How it comes about, and how it ends.
ANSWERS = {
    "answering": ("the destination agent answers", nothing, nothing),
    "refused": ("connections are refused", refuse, accept),
    "reset": ("connections are reset", stop_agent, start_agent),
    "silent": ("nothing is answered", vanish, appear),
    "other-certificate": ("the other host has another certificate", change_certificate, restore_certificate),
    "other-list": ("the other host's authorisation list is another", close_list, open_list),
    "erased": ("the other host was installed anew", erase, nothing),
}


def kill_everybody(scene):
    hit(scene, signal.SIGKILL, SOURCE_AGENT, WATCHDOG)
    scene.wait(5, "the end of source agent and watchdog", lambda: not scene.source_agents())


def state_of_source(scene):
    rows = scene.status("a") or []
    return rows[-1]["state"] if rows else None


def recovering(command, answer):
    _, begin, end = ANSWERS[answer]

    def inject(scene, gate):
        point = scene.point
        kill_everybody(scene)
        if point.role == points.DESTINATION and answer not in ("silent", "answering"):
            # It does not take the next step either.
            hit(scene, signal.SIGKILL, DESTINATION_AGENT)
        if begin is vanish:
            begin(scene)
            gate.go()
        else:
            gate.go()
            begin(scene)
        options = list(COMMANDS[command])
        if command == "take-erased":
            options.append(scene.pair.seen_as)
        # The decision of an operator is about one migration.
        name = scene.migrations("a")[-1:] if options else []
        code, words = scene.crossdock("a", "recover", *name, *options, seconds=LIMIT if options else ASKING, shimmed=True)
        said = f"crossdock recover {' '.join(options)}: code {code}: {words.strip()[:600]}"
        scene.note(said)
        judge(scene, point, command, answer, code, said)
        end(scene)

    return inject


def judge(scene, point, command, answer, code, said):
    """What the command may have done, from where the migration stood and what was answered."""
    expects = scene.expects
    is_open = point.phase in (RELEASED, OWNED) and answer != "answering"
    if code == 124 and not (is_open and command == "recover"):
        expects.found.append(f"'crossdock recover' does not return within {LIMIT} s")
    if point.phase not in (RELEASED, OWNED):
        # The guest is the source's, whoever answers what. A host that cannot be told is told later.
        expects.homes = frozenset("a")
        is_alone = answer not in ("answering", "erased")
        expects.follows_up = is_alone
        if not is_alone and code == 0:
            expects.commands.append("crossdock recover")
        if command == "recover" and scene.watchers["a"].run_state() not in expects.states:
            expects.found.append(f"the guest was not released, and does not go on: {said}")
        return
    if answer == "answering":
        expects.homes = frozenset("b")
        if command == "recover":
            expects.commands.append("crossdock recover")
        return
    is_taken = (command, answer) in (("take-off", "silent"), ("take-erased", "erased"))
    if is_taken:
        expects.homes, expects.follows_up = frozenset("a"), True
        if code != 0:
            expects.found.append(f"the operator's word is not taken: {said}")
        return
    if answer == "erased":
        # Only the operator's word ends this.
        expects.homes = frozenset("a")
        expects.recovery = (*scene.migrations("a")[-1:], *COMMANDS["take-erased"], scene.pair.seen_as)
    else:
        expects.homes = frozenset("b")
    if code == 0:
        expects.found.append(f"nothing was decided, and the command says that all is well: {said}")
    if (state := state_of_source(scene)) != "undecided":
        expects.found.append(f"the guest is '{state}' on host a, though nobody knows what became of it: {said}")
    if scene.watchers["a"].run_state(1) == "running":
        expects.found.append(f"the old copy runs: {said}")


def offering(scene, gate):
    """A host that has nothing to do with it offers a guest of the same name, while the source stands still."""
    scene.offer_from_elsewhere()
    gate.go()


def offering_undecided(scene, gate):
    """The same, with nobody left who works at the migration."""
    kill_everybody(scene)
    gate.go()
    # Until the destination agent has noticed.
    scene.link.reset()
    scene.offer_from_elsewhere()


def offering_here(scene, gate):
    """The offer comes to the source, which receives guests as well."""
    kill_everybody(scene)
    gate.go()
    agent = scene.receive_on_source()
    scene.offer_from_elsewhere(to=scene.pair.addresses["a"])
    agent.terminate()
    agent.wait(20)
    scene.wait(5, "the end of host a's own agent", lambda: not scene.find("a", "destination"))


def fault(name, meaning, inject):
    return Fault(name, meaning, inject, kind=guest.IDLE, is_bounded=False)


WORDS = {
    "recover": "recover", "take": "recover --take-ownership", "take-off": "recover --take-ownership --other-host-is-off",
    "take-erased": "recover --take-ownership --other-host-was-erased NAME",
    "take-erased-other": "recover --take-ownership --other-host-was-erased with the name of another host",
}  # fmt: skip
FAULTS = [
    fault(f"{command}-{answer}", f"source agent and watchdog are killed, {meaning}; {WORDS[command]}",
          recovering(command, answer))
    for command in COMMANDS
    for answer, (meaning, _, _) in ANSWERS.items()
    if "erased" not in command or answer == "erased"
] + [
    fault("second-offer", "another host offers a guest of the same name", offering),
    fault("second-offer-undecided", "the same, when source agent and watchdog were killed", offering_undecided),
    fault("second-offer-here", "the same, and the offer is made to the source", offering_here),
]  # fmt: skip

HERE = "copy-image memory-middle pre-switchover prepared fenced frozen".split()
FAILURES = "refused reset other-certificate other-list".split()


def runs():
    """Pairs of the names of a point and a fault."""
    found = [(point, f"recover-{answer}") for point in HERE for answer in ANSWERS]
    found += [(point, f"{command}-{answer}") for point in ("copy-image", "pre-switchover", "frozen")
              for command in ("take", "take-off") for answer in ("refused", "silent")]  # fmt: skip
    for point in ("released", "own-due"):
        for answer in ANSWERS:
            found += [(point, f"{command}-{answer}") for command in ("recover", "take", "take-off")]
        found += [(point, f"{command}-erased") for command in ("take-erased", "take-erased-other")]
    # There the destination goes on by itself when its agent lives, so that its silence is no proof of anything.
    found.remove(("own-due", "take-off-silent"))
    for point in ("owner", "confirm-due"):
        found += [(point, f"{command}-{answer}") for command in ("recover", "take", "take-off") for answer in FAILURES]
        found += [(point, f"{command}-silent") for command in ("recover", "take")]
        found += [(point, f"{command}-answering") for command in ("recover", "take", "take-off")]
    here = "offered copy-source memory-begun pre-switchover continued fenced frozen released confirm-due".split()
    found += [(point, "second-offer") for point in here]
    found += [(point, "second-offer-undecided") for point in ("continued", "fenced", "frozen", "released", "release-sent")]
    found += [(point, "second-offer-here") for point in ("copy-image", "fenced", "released", "release-sent", "confirm-due")]
    return found
