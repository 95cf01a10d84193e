#!/usr/bin/env python3
"""Tests the shipped systemd units under a real systemd, in a virtual machine that is emulated.

    units.py CROSSDOCK IMAGES [--units DIR] [--only PATTERN] [--keep DIR]

A line for each check; the exit code is 0 when all hold, 1 when one does not, 2 when the test itself could not go on.
"""
import argparse
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, os.path.join(REPOSITORY, "deploy", "demo")]
import checks  # noqa: E402
from hosts import Inside, Outside  # noqa: E402
from machine import MachineFailed  # noqa: E402

# Set in the network namespace that is the test's own: its ports and its tap are nobody else's.
APART = "XD_UNITS_APART"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("images", type=os.path.realpath, help="what Tests/Units/image made")
    parser.add_argument("--units", type=os.path.realpath, default=os.path.join(REPOSITORY, "deploy", "systemd"))
    parser.add_argument("--only", metavar="PATTERN", help="only checks whose function's name fits, beside the start of the units")
    parser.add_argument("--keep", metavar="DIR", type=os.path.realpath, help="keep everything there")
    options = parser.parse_args()
    if APART not in os.environ:
        namespaces = ["--net"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--net"]
        os.execvpe("unshare", ["unshare", *namespaces, sys.executable, *sys.argv], {**os.environ, APART: "1"})
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # Whoever ends the test leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    base = options.keep or tempfile.mkdtemp(prefix="xd-units-")
    os.makedirs(base, exist_ok=True)
    try:
        sys.exit(test(options, base))
    except MachineFailed as error:
        print(f"units: the test could not go on: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if not options.keep:
            shutil.rmtree(base, ignore_errors=True)


def test(options, base):
    outside = Outside(base, options.crossdock)
    inside = None
    try:
        outside.make_credentials()
        second = os.path.join(base, "second.raw")
        with open(second, "wb") as file:
            file.truncate(32 << 20)
        began = time.monotonic()
        inside = Inside(base, options.images, outside, options.units)
        inside.machine.start(second)
        outside.start_agent()
        print(f"the machine is up after {time.monotonic() - began:.0f} s")
        return judge(options, checks.Lab(outside, inside))
    finally:
        if inside is not None:
            if options.keep and inside.machine.process is not None:
                keep_journal(inside, base)
            inside.machine.close()
        outside.close()


def judge(options, lab):
    wrong = 0
    chosen = [
        one for one in checks.CHECKS
        if not options.only or one[1] is checks.start or any(fnmatch.fnmatch(one[1].__name__, word) for word in options.only.split(","))
    ]  # fmt: skip
    for sentence, function in chosen:
        began = time.monotonic()
        try:
            function(lab)
            words = "ok     "
        except (checks.Wrong, MachineFailed) as error:
            wrong += 1
            words, sentence = "WRONG  ", f"{sentence}\n         {error}"
        print(f"{words}{time.monotonic() - began:5.0f} s  {sentence}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} checks hold")
    return 1 if wrong else 0


def keep_journal(inside, base):
    try:
        with open(os.path.join(base, "journal.log"), "w") as file:
            file.write(inside.run("journalctl -m --boot=all -o short-precise --no-pager"))
    except (MachineFailed, OSError) as error:
        print(f"units: the journal could not be kept: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
