#!/usr/bin/env python3
"""Injects faults into real migrations of a real guest, and judges what became of the guest.

    faults.py CROSSDOCK GUEST-FILES [--fast] [--only POINT:FAULT[,...]] [--list] [--selftest] [--json FILE]
              [--again] [--markdown FILE] [--jobs N] [--keep DIR] [--keep-all] [--patience SECONDS] [--round-trip MS]
"""
import argparse
import collections
import dataclasses
import fnmatch
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
# The forwarder is the demo's as well.
sys.path[:0] = [HERE, os.path.join(os.path.dirname(os.path.dirname(HERE)), "deploy", "demo")]
import injection  # noqa: E402
import points  # noqa: E402
import report  # noqa: E402
import selftest  # noqa: E402
import shim  # noqa: E402
from lab import Pair, Site  # noqa: E402
from run import Result, Run  # noqa: E402


def choose(options):
    """The runs that were asked for."""
    if options.only:
        runs = []
        everything = [(point, fault) for point in points.POINTS for fault in injection.FAULTS]
        known = injection.matrix()
        for text in options.only.split(","):
            point, _, fault = text.partition(":")
            fault = fault or "*"
            # A pattern takes from the matrix; a pair that is spelled out is made in any case.
            source = known if any(mark in text for mark in "*?[") or ":" not in text else everything
            found = [
                pair for pair in source if fnmatch.fnmatch(pair[0].name, point) and fnmatch.fnmatch(pair[1].name, fault)
            ]
            if not found:
                sys.exit(f"faults.py: there is no run {text}; see --list")
            runs += found
        return list(dict.fromkeys(runs))
    if options.fast:
        return [(points.BY_NAME[point], injection.BY_NAME[fault]) for point, fault in injection.FAST]
    return injection.matrix()


def earlier(options):
    """The good results of an earlier matrix, by the names of point and fault."""
    if not options.again or not options.json or not os.path.exists(options.json):
        return {}
    with open(options.json) as file:
        results = [Result(**one) for one in json.load(file)]
    return {(one.point, one.fault): one for one in results if one.is_good}


def show(runs):
    print("Points:")
    for point in points.POINTS:
        print(f"  {point.name:18} {point.phase:9} {point.role:13} {point.meaning}")
    print("\nFaults:")
    for fault in injection.FAULTS:
        print(f"  {fault.name:32} {fault.meaning}")
    print(f"\n{len(runs)} runs:")
    for point in points.POINTS:
        names = [fault.name for other, fault in runs if other is point]
        if names:
            print(f"  {point.name}: {', '.join(names)}")


class Matrix:
    """Carries runs out, some beside each other."""

    def __init__(self, site, runs, keep, keeps_all):
        self.site, self.keep, self.keeps_all = site, keep, keeps_all
        self.waiting = queue.Queue()
        for number, run in enumerate(runs):
            self.waiting.put((number, *run))
        self.count = len(runs)
        self.results = []
        self.lock = threading.Lock()

    def work(self, number):
        pair = Pair(self.site, number)
        try:
            while not self.site.ending.is_set():
                try:
                    index, point, fault = self.waiting.get_nowait()
                except queue.Empty:
                    return
                directory = os.path.join(self.site.base, f"r{index:04}")
                result = Run(pair, directory, point, fault, self.keep, self.keeps_all).carry_out()
                if self.site.ending.is_set():
                    return
                with self.lock:
                    self.results.append(result)
                    print(report.line(result, len(self.results), self.count), flush=True)
        finally:
            pair.close()

    def carry_out(self, jobs):
        workers = [threading.Thread(target=self.work, args=(number,)) for number in range(jobs)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
        except BaseException:
            # The runs under way end their processes.
            self.site.ending.set()
            print("faults.py: ending the runs under way", file=sys.stderr, flush=True)
            for worker in workers:
                worker.join()
            raise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossdock")
    parser.add_argument("files", metavar="GUEST-FILES", help="the directory with vmlinuz and initrd")
    parser.add_argument("--fast", action="store_true", help="a few representative runs")
    parser.add_argument("--only", metavar="POINT:FAULT[,...]", help="these runs; * stands for anything")
    parser.add_argument("--list", action="store_true", help="show points, faults and runs")
    parser.add_argument("--selftest", action="store_true", help="test the judge with evidence that was tampered with")
    parser.add_argument("--json", metavar="FILE", help="where the results are written, also when the matrix is stopped")
    parser.add_argument("--again", action="store_true", help="keep the good results that FILE has, and make the other runs")
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", metavar="DIR", help="where the evidence of failed runs is kept")
    parser.add_argument("--keep-all", action="store_true", help="keep the evidence of every run")
    parser.add_argument("--patience", type=int, default=20, help="how long Crossdock waits for an outage")
    parser.add_argument("--round-trip", type=float, default=0, help="milliseconds between the hosts: from 2 on several connections carry the memory")
    options = parser.parse_args()
    runs = choose(options)
    if options.list:
        return show(runs)
    if options.selftest:
        with tempfile.TemporaryDirectory() as directory:
            wrong = selftest.run(directory, shim.build("records.c", os.path.join(directory, "records.so")))
        for sentence in wrong:
            print(f"WRONG: {sentence}")
        sys.exit(1 if wrong else 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    known = earlier(options)
    runs = [(point, fault) for point, fault in runs if (point.name, fault.name) not in known]
    site = Site(options.crossdock, options.files, options.patience, options.round_trip / 1000)
    keep = options.keep or tempfile.mkdtemp(prefix="xf-evidence-")
    matrix = Matrix(site, runs, os.path.abspath(keep), options.keep_all)
    results = []
    try:
        matrix.carry_out(max(1, options.jobs))
    finally:
        site.close()
        if not options.keep and not os.listdir(keep):
            os.rmdir(keep)
        results = sorted([*known.values(), *matrix.results], key=lambda result: report.order(result))
        if options.json:
            with open(options.json, "w") as file:
                json.dump([dataclasses.asdict(result) for result in results], file, indent=1)
    print(report.summary(results, time.monotonic() - began))
    if options.markdown:
        with open(options.markdown, "w") as file:
            file.write(report.markdown(results))
    counts = collections.Counter(result.is_good for result in results)
    sys.exit(1 if counts[False] else 0)


if __name__ == "__main__":
    main()
