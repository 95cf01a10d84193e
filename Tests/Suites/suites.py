#!/usr/bin/env python3
"""Runs the test suites of other NBD projects with Crossdock's programs in place of theirs.

    suites.py CROSSDOCK [--table FILE] [SUITE...]

Tests/Suites/sources brings the suites. Each runs in a network namespace of its own, one test after the other. A test that fails is run
once more with the program that the suite is made for: what fails with that, too, says nothing about Crossdock. What else fails must be in
Tests/Suites/known, with its reason, or this program ends with 1. With --table the part of FILE between the lines `<!-- suites -->` and
`<!-- end of suites -->` is replaced.
"""
import argparse
import collections
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
Result = collections.namedtuple("Result", "outcome detail")


def isolated(command, **options):
    """Runs a command whose network is its own loopback."""
    namespace = ["unshare", "-n"] if os.getuid() == 0 else ["unshare", "-Urn"]
    return subprocess.run(namespace + ["sh", "-c", 'ip link set lo up; exec "$@"', "sh"] + command, **options)


def tail(path):
    """The line of a log that most likely says what went wrong."""
    try:
        with open(path, errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError:
        return ""
    lines = [line for line in lines if not re.match(r"FAIL |\+ |.*cleanup hooks|.*exit status|libnbd: debug|nbdkit: ", line)]
    return lines[-1][:200] if lines else ""


class Suite:
    """One suite with one side replaced."""

    name = title = ""
    programs = ""

    def __init__(self, crossdock, sources, work):
        self.crossdock, self.sources, self.work = crossdock, sources, work
        self.log = os.path.join(work, self.name + ".log")
        # Sockets are made there: their paths are short.
        self.scratch = os.path.join(work, "s")
        os.makedirs(self.scratch, exist_ok=True)

    def environment(self, replaced):
        """The tests' environment, with Crossdock's programs or with the suite's own."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "SUITES_"))}
        environment.update(
            PATH=SYSTEM_PATH, CROSSDOCK=self.crossdock, SUITES_TIMEOUT="240", SUITES_LOG=self.log,
            SUITES_PROGRAMS=os.path.join(HERE, "programs", self.programs) if replaced else self.originals(),
            SUITES_SCRATCH=self.scratch, SUITES_NBDKIT="/usr/bin/nbdkit", SUITES_QEMU_NBD="/usr/bin/qemu-nbd",
            LC_ALL="C.UTF-8", HOME=self.work,
        )
        return environment

    def originals(self):
        """Where the programs are that Crossdock's are put in place of: libnbd's are of the same age as the suites."""
        return ":".join([os.path.join(self.sources, "libnbd", name) for name in ("copy", "info")] + [SYSTEM_PATH])

    def version(self, source):
        with open(os.path.join(self.sources, source + ".version")) as file:
            return re.sub(r"^\d+:|[-+].*", "", file.read().strip())

    def judge(self, known):
        """(results of all tests, {failed test: (whose, reason)})."""
        if os.path.exists(self.log):
            os.unlink(self.log)
        results = self.run(True, None)
        failed = sorted(name for name, result in results.items() if result.outcome == "fail")
        ours = self.served()
        results = {
            name: result if ours is None or name in ours or result.outcome == "skip" else Result("other", "")
            for name, result in results.items()
        }
        shutil.rmtree(self.scratch, ignore_errors=True)
        os.makedirs(self.scratch)
        reasons = {}
        again = self.run(False, failed) if failed else {}
        for name in failed:
            peer = again.get(name, Result("skip", "")).outcome
            if (self.name, name) in known:
                reasons[name] = ("known", known[self.name, name])
            elif peer == "fail":
                reasons[name] = ("peer", "fails here with the suite's own program, too")
                results[name] = Result("other", "")
            else:
                reasons[name] = ("new", results[name].detail)
        return results, reasons

    def served(self):
        """The tests in which Crossdock had a part; None for all."""
        if not os.path.exists(self.log):
            return set()
        with open(self.log) as file:
            entries = [json.loads(line) for line in file]
        return {entry["test"] for entry in entries if entry["by"] == "crossdock"}


class Automake(Suite):
    """A suite that `make check` runs, from some of its directories, with libnbd's tools where it wants them."""

    source, directories = "", []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.launcher = [os.path.join(self.sources, "libnbd", "run")]

    def tests(self, directory):
        """The tests of a directory; None for all."""
        return None

    def run(self, replaced, only):
        results = {}
        for directory in self.directories:
            path = os.path.join(self.sources, self.source, directory)
            tests = self.tests(path)
            if only is not None:
                tests = [name.removeprefix(directory + "/") for name in only if name.startswith(directory + "/")]
                if not tests:
                    continue
            for old in glob.glob(os.path.join(path, "*.trs")):
                os.unlink(old)
            launcher = " ".join(self.launcher + [os.path.join(HERE, "in-front")])
            command = self.launcher + ["make", "-k", "-C", path, "check", f"LOG_COMPILER={launcher}"]
            command += [f"TESTS={' '.join(tests)}"] if tests is not None else []
            with open(os.path.join(self.work, f"{self.name}.make.log"), "a") as log:
                isolated(command, env=self.environment(replaced), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            for trs in glob.glob(os.path.join(path, "*.trs")):
                with open(trs) as file:
                    outcome = re.search(r":test-result: (\w+)", file.read()).group(1)
                name = f"{directory}/{os.path.basename(trs)[:-4]}"
                results[name] = Result({"PASS": "pass", "SKIP": "skip"}.get(outcome, "fail"), tail(trs[:-4] + ".log"))
        return results


class Libnbd(Automake):
    source = "libnbd"


class LibnbdServer(Libnbd):
    name, programs = "libnbd-server", "server"
    directories = ["tests", "interop", "copy", "dump", "info", "sh"]

    @property
    def title(self):
        return f"libnbd {self.version('libnbd')}, `nbd serve` as qemu-nbd and nbdkit"

    def run(self, replaced, only):
        results = super().run(replaced, only)
        # One test of the suite, which stops at the first script that fails.
        path = os.path.join(self.sources, "libnbd/python")
        for script in sorted(glob.glob(os.path.join(path, "t", "*.py"))):
            name = f"python/{os.path.basename(script)}"
            if only is not None and name not in only:
                continue
            environment = self.environment(replaced)
            environment.update(SUITES_TEST=name, srcdir=".", NBDKIT="nbdkit",
                               PATH=environment["SUITES_PROGRAMS"] + ":" + SYSTEM_PATH)
            command = [*self.launcher, "timeout", "120", "/usr/bin/python3", script]
            done = isolated(command, env=environment, cwd=path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, errors="replace")
            outcome = {0: "pass", 77: "skip"}.get(done.returncode, "fail")
            lines = done.stdout.strip().splitlines()
            results[name] = Result(outcome, lines[-1][:200] if lines else f"ended with {done.returncode}")
        return results


class LibnbdClient(Libnbd):
    name, programs = "libnbd-client", "client"
    directories = ["copy", "info"]

    @property
    def title(self):
        return f"libnbd {self.version('libnbd')}, `nbd copy` and `nbd info` as nbdcopy and nbdinfo"


class NbdkitClient(Automake):
    name, source, programs, directories = "nbdkit-client", "nbdkit", "client", ["tests"]

    @property
    def title(self):
        return f"nbdkit {self.version('nbdkit')}, `nbd copy` and `nbd info` as nbdcopy and nbdinfo"

    def tests(self, directory):
        found = []
        for path in sorted(glob.glob(os.path.join(directory, "test-*.sh"))):
            with open(path) as file:
                lines = [line for line in file if not line.lstrip().startswith(("#", "requires"))]
            if any(re.search(r"\bnbd(copy|info)\b", line) for line in lines):
                found.append(os.path.basename(path))
        return found


class Iotests(Suite):
    """Some of QEMU's tests, as (format, protocol, tests)."""

    programs = "server"
    groups = []

    def served(self):
        return None

    def run(self, replaced, only):
        results = {}
        path = os.path.join(self.sources, "qemu/tests/qemu-iotests")
        scratch = os.path.join(self.work, "iotests")
        for image, protocol, tests in self.groups:
            label = image if protocol == "file" else f"{image}-{protocol}"
            wanted = tests if only is None else [name.split("/", 1)[1] for name in only if name.startswith(label + "/")]
            if only is not None and not wanted:
                continue
            shutil.rmtree(scratch, ignore_errors=True)
            environment = self.environment(replaced)
            program = os.path.join(HERE, "programs/server/qemu-nbd") if replaced else "/usr/bin/qemu-nbd"
            environment.update(
                QEMU_PROG=os.path.join(HERE, "qemu-without-qtest"), QEMU_IMG_PROG="/usr/bin/qemu-img", QEMU_IO_PROG="/usr/bin/qemu-io",
                QSD_PROG="/usr/bin/qemu-storage-daemon", QEMU_NBD_PROG=program, TEST_DIR=scratch,
            )
            command = ["/usr/bin/python3", "./check", "-tap", f"-{image}"] + ([f"-{protocol}"] if protocol != "file" else [])
            done = isolated(command + wanted, env=environment, cwd=path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, errors="replace")
            with open(os.path.join(self.work, f"{self.name}.check.log"), "a") as log:
                log.write(done.stdout)
            current = None
            for line in done.stdout.splitlines():
                match = re.match(r"(not )?ok \S+ (\S+)(?: # SKIP (.*))?", line)
                if match:
                    current = f"{label}/{match.group(2)}"
                    outcome = "fail" if match.group(1) else "skip" if match.group(3) is not None else "pass"
                    results[current] = Result(outcome, match.group(3) or "")
                elif current and line.startswith("# +") and not line.startswith("# +++") and not results[current].detail:
                    results[current] = results[current]._replace(detail=line[3:203])
        return results


class QemuServer(Iotests):
    name = "qemu"
    groups = [
        ("raw", "file", ["233"]), ("qcow2", "file", ["233", "264", "nbd-qemu-allocation", "nbd-reconnect-on-open"]),
        # Those that support raw images over NBD, and have a server.
        ("raw", "nbd", (
            "001 002 003 004 008 009 010 011 021 032 033 077 093 094 104 119 123 136 143 145 147 181 184 194 197 205 208 215 218 236 238 "
            "240 241 259 307").split()),
    ]

    @property
    def title(self):
        return f"QEMU {self.version('qemu')}'s iotests 233, 241, 264, nbd-\\*, and 34 others with `-raw -nbd`, `nbd serve` as qemu-nbd"


class NbdServer(Suite):
    name, programs = "nbd", "server"

    @property
    def title(self):
        return f"nbd {self.version('nbd')}'s tests with nbd-tester-client, `nbd serve` as nbd-server"

    def served(self):
        return None

    def run(self, replaced, only):
        source = os.path.join(self.sources, "nbd")
        with open(os.path.join(source, "tests/run/Makefile.am")) as file:
            tests = re.search(r"^TESTS = ((?:.*\\\n)*.*)$", file.read(), re.MULTILINE).group(1).replace("\\\n", " ").split()
        # The tests run what lies two folders above.
        top = tempfile.mkdtemp(prefix="nbd", dir=self.work)
        below = os.path.join(top, "tests/run")
        os.makedirs(below)
        os.symlink(os.path.join(source, "tests/run/nbd-tester-client"), os.path.join(below, "nbd-tester-client"))
        os.symlink(os.path.join(source, "nbd-client"), os.path.join(top, "nbd-client"))
        server = os.path.join(HERE, "programs/server/nbd-server") if replaced else os.path.join(source, "nbd-server")
        os.symlink(server, os.path.join(top, "nbd-server"))
        results = {}
        for name in tests:
            if only is not None and name not in only:
                continue
            command = ["timeout", "-k", "5", "300", os.path.join(source, "tests/run/simple_test"), "./" + name]
            done = isolated(command, env=self.environment(replaced), cwd=below, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
            with open(os.path.join(self.work, "nbd.tests.log"), "a") as log:
                log.write(f"== {name}\n{done.stdout}")
            lines = [line for line in done.stdout.strip().splitlines() if not line.startswith(("crossdock nbd serve: listening", "./"))]
            outcome = {0: "pass", 77: "skip"}.get(done.returncode, "fail")
            results[name] = Result(outcome, lines[-1][:200] if lines else f"ended with {done.returncode}")
        return results


SUITES = [LibnbdServer, LibnbdClient, NbdkitClient, QemuServer, NbdServer]


def read_known():
    """{(suite, test): reason}."""
    known = {}
    with open(os.path.join(HERE, "known")) as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                where, reason = line.rstrip("\n").split(": ", 1)
                suite, test = where.split(" ", 1)
                known[suite, test] = reason
    return known


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("crossdock")
    parser.add_argument("--table", metavar="FILE")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(suite.name for suite in SUITES))
    options = parser.parse_args()
    sources = os.environ.get("SUITES_SOURCES", os.path.join(os.path.dirname(os.path.dirname(HERE)), ".cache/suites"))
    work = tempfile.mkdtemp(prefix="suites")
    known = read_known()
    rows, failures, is_new = [], [], False
    for kind in SUITES:
        if options.suites and kind.name not in options.suites:
            continue
        suite = kind(os.path.abspath(options.crossdock), sources, work)
        results, reasons = suite.judge(known)
        counts = collections.Counter(result.outcome for result in results.values())
        rows.append(f"| {suite.title} | {counts['pass']} | {counts['fail']} | {counts['skip']} | {counts['other']} |")
        print(rows[-1], flush=True)
        for name, (whose, reason) in sorted(reasons.items()):
            print(f"    {kind.name} {name}: {whose}: {reason}", flush=True)
            is_new = is_new or whose == "new"
            if whose != "peer":
                failures.append(f"- {kind.name}, {name}: {reason}")
    text = "\n".join(["| suite | pass | fail | skipped | not about ours |", "| --- | --- | --- | --- | --- |", *rows, ""])
    if failures:
        text += "\n".join(["", "What failed:", "", *failures, ""])
    if options.table:
        with open(options.table) as file:
            page = file.read()
        begin, end = "<!-- suites -->\n", "<!-- end of suites -->"
        head, rest = page.split(begin, 1)
        with open(options.table, "w") as file:
            file.write(head + begin + "\n" + text + "\n" + end + rest.split(end, 1)[1])
    print(f"The logs are in {work}")
    sys.exit(1 if is_new else 0)


if __name__ == "__main__":
    main()
