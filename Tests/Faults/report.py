"""What the harness prints and writes about its runs."""
import collections

import injection
import points
from run import DEADLINE

RANKS = {point.name: number for number, point in enumerate(points.POINTS)}
SLOW = 3  # seconds
FAULT_RANKS = {fault.name: number for number, fault in enumerate(injection.FAULTS)}


def order(result):
    return RANKS[result.point], FAULT_RANKS[result.fault]


def verdict(result):
    if result.error:
        return "NOT RUN"
    return "VIOLATION" if result.violations else result.outcome


def line(result, number, count):
    text = f"[{number:3}/{count}] {result.point:16} {result.fault:30} {verdict(result):24}"
    text += f" healed {result.healed:5.1f} s, stood still {result.pause:5.2f} s"
    if result.error:
        text += f"\n    harness: {result.error}"
    if result.violations:
        text += f"\n    outcome: {result.outcome}"
        text += "".join(f"\n    {sentence}" for sentence in result.violations)
    if result.evidence:
        text += f"\n    evidence: {result.evidence}"
    return text.rstrip()


def overshoots(results):
    """By how much bounded pauses were longer than the deadline, in milliseconds."""
    return sorted(
        (result.pause * 1000 - DEADLINE, f"{result.point}:{result.fault}")
        for result in results
        if result.bounded and result.is_good and result.pause * 1000 > DEADLINE
    )


def summary(results, seconds):
    counts = collections.Counter(verdict(result) for result in results)
    parts = [f"{len(results)} runs in {seconds:.0f} s: " + ", ".join(f"{n} {name}" for name, n in counts.most_common())]
    over = overshoots(results)
    if over:
        middle, (most, where) = over[len(over) // 2][0], over[-1]
        parts.append(f"{len(over)} pauses beyond the deadline, by {middle:.0f} ms (median) to {most:.0f} ms ({where})")
    for result in results:
        parts += [f"{result.point}:{result.fault}: {note}" for note in result.notes if note.startswith("made again")]
    gave_up = [f"{result.point}:{result.fault}" for result in results if result.is_good and result.gave_up]
    if gave_up:
        parts.append(f"rolled back where it could have gone on: {', '.join(gave_up)}")
    slow = [result for result in results if result.pause > SLOW and result.is_good]
    if slow:
        listed = ", ".join(f"{result.point}:{result.fault} {result.pause:.1f} s" for result in slow)
        parts.append(f"stood still for more than {SLOW} s without a violation: {listed}")
    for result in results:
        if not result.is_good:
            reason = result.error or "; ".join(result.violations)
            parts.append(f"{verdict(result)} {result.point}:{result.fault}: {reason}")
    return "\n".join(parts)


def short(outcome):
    for words, shorter in (("rolled back", "back"), (" by crossdock recover", " (recover)"), ("again on the", "on")):
        outcome = outcome.replace(words, shorter)
    return outcome


def markdown(results):
    """A table with a row for each point and a column for each fault that was injected at many; the rest as lists."""
    by_pair = {(result.point, result.fault): result for result in results}
    columns = [name for name in injection.KILLS + injection.STOPS + ["link-reset", "link-black-hole"]]
    used = [name for name in columns if any(fault == name for _, fault in by_pair)]
    text = "| Point | " + " | ".join(name.replace("-", " ") for name in used) + " |\n"
    text += "|---" * (len(used) + 1) + "|\n"

    def cell(result):
        if result is None:
            return ""
        if result.is_good:
            return short(result.outcome)
        return f"**{verdict(result)}**"

    for point in points.POINTS:
        row = [by_pair.get((point.name, name)) for name in used]
        if any(row):
            text += f"| {point.name}: {point.meaning} | " + " | ".join(cell(result) for result in row) + " |\n"
    others = [fault for fault in injection.FAULTS if fault.name not in used]
    rows = []
    for fault in others:
        found = [result for result in results if result.fault == fault.name]
        if found:
            outcomes = ", ".join(f"{result.point}: {cell(result)}" for result in found)
            rows.append(f"| {fault.name}: {fault.meaning} | {outcomes} |\n")
    if rows:
        text += "\n| Fault | Outcome by point |\n|---|---|\n" + "".join(rows)
    return text
