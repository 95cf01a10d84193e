#!/usr/bin/env python3
"""Tests the page of an agent with a real Chromium, real agents and real guests.

    web.py CROSSDOCK GUEST-DIRECTORY [--only GROUP[,GROUP]] [--screenshots DIR] [--keep DIR]

Three hosts in one network of the test's own; the guests are small Linux systems under emulation. A line for each check, and what was measured
on the way; the exit code is 0 when all hold, 1 when one does not, 2 when the test itself could not go on. Needs root.
"""
import argparse
import os
import shutil
import signal
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, HERE)
import judgement  # noqa: E402
from browser import Browser, BrowserError  # noqa: E402
from judgement import CHECKS, Wrong  # noqa: E402
from lab import CouldNotGoOn, Lab, go_apart  # noqa: E402
from page import Page  # noqa: E402
from visitors import Visitor, context  # noqa: E402

# In this order: what the earlier ones leave on the hosts is what the later ones find.
import check_moves  # noqa: E402, F401
import check_evacuation  # noqa: E402, F401
import check_trouble  # noqa: E402, F401
import check_tickets  # noqa: E402, F401
import check_certificates  # noqa: E402, F401
import check_crowd  # noqa: E402, F401
import check_malformed  # noqa: E402, F401
import check_looks  # noqa: E402, F401


class World:
    """What the checks have: the hosts, the browser and its pages, visitors without a browser, and a place for pictures."""

    def __init__(self, lab, browser, options):
        self.lab, self.browser = lab, browser
        self.pictures = options.screenshots
        self.scratch = os.path.join(lab.base, "scratch")
        os.makedirs(self.scratch)
        self.pages = []
        self.tls = context(os.path.join(lab.base, "ca", "ca-cert.pem"))

    def page(self, host, *ticket, **options):
        return Page(self, host, *ticket, **options)

    def visitor(self, host, *ticket, signs_in=True):
        visitor = Visitor(self.tls, host.origin)
        if signs_in:
            answer = visitor.sign_in(host.ticket(*ticket))
            judgement.demand(answer.status == 204, f"a fresh ticket was answered with {answer}")
        return visitor

    def picture(self, page, name, width, height, scheme="light", mobile=False, place="main"):
        page.screenshot(os.path.join(self.pictures, f"{name}.png"), width, height, scheme, mobile, place)

    def note(self, words):
        print(f"                 {words}", flush=True)


def judge(world, only):
    chosen = [one for one in CHECKS if not only or one[0] in only.split(",")]
    wrong = 0
    for group, sentence, function in chosen:
        began = time.monotonic()
        try:
            function(world)
            words = "ok     "
        except (Wrong, CouldNotGoOn, TimeoutError, BrowserError, OSError) as error:
            wrong += 1
            words, sentence = "WRONG  ", f"{sentence}\n                 {type(error).__name__}: {error}"
        print(f"{words}{time.monotonic() - began:5.0f} s  {group}: {sentence}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} checks hold")
    return 1 if wrong else 0


def main():
    groups = list(dict.fromkeys(group for group, _, _ in CHECKS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock", type=os.path.realpath)
    parser.add_argument("guest", type=os.path.realpath, help="what deploy/guest/build made")
    parser.add_argument("--only", metavar="GROUP", help=f"only these: {', '.join(groups)}")
    parser.add_argument(
        "--screenshots", metavar="DIR", type=os.path.realpath, default=os.path.join(REPOSITORY, ".build", "web"),
        help="where pictures of the page go (default: .build/web)")
    parser.add_argument("--keep", metavar="DIR", type=os.path.realpath, help="keep logs and reports there")
    options = parser.parse_args()
    if unknown := set((options.only or "").split(",")) - {"", *groups}:
        parser.error(f"there is no group {', '.join(sorted(unknown))}")
    code = 2
    began = time.monotonic()
    try:
        base = go_apart()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        os.makedirs(options.screenshots, exist_ok=True)
        lab = Lab(options.crossdock, options.guest, base)
        try:
            with Browser(ignore_certificate_errors=True) as browser:
                print(f"{browser.version}; three agents, after {time.monotonic() - began:.0f} s")
                code = judge(World(lab, browser, options), options.only)
        finally:
            if options.keep:
                shutil.rmtree(options.keep, ignore_errors=True)
                lab.keep(options.keep)
    except (CouldNotGoOn, BrowserError, OSError) as error:
        print(f"web: the test could not go on: {error}", file=sys.stderr)
    print(f"It took {time.monotonic() - began:.0f} s.")
    sys.exit(code)


if __name__ == "__main__":
    main()
