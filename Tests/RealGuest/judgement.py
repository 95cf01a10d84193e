"""The checks after the moves; each is a sentence, and what is wrong with it."""
import os
import subprocess

from guest import CouldNotGoOn

# The reported pause is an upper bound. What nobody answers beyond it is asked before the network knows where the guest is.
SILENCE_MS = 100
# A guest that goes on under emulation has everything to translate again, and shares the processors with both hosts: it takes requests, and
# answers them late. So it does after QEMU's own migration. This bound is for a guest that hangs; the table has what there was.
LATE_MS = 2000
# What the database says when something is not as it left it.
COMPLAINTS = ("PANIC", "crash", "could not", "invalid page", "corrupt", "not properly shut down")


class Judgement:
    def __init__(self, guest, clients, trips):
        self.guest, self.clients, self.trips = guest, clients, trips

    def pronounce(self, say):
        """Says a line for each check; returns the exit code."""
        checks = [
            *((f"{trip.name}: every move succeeded, with equal digests ({len(trip.rows)} moves)", lambda trip=trip: moved(trip))
              for trip in self.trips),
            *((f"{trip.name}: nobody answers for no longer than the reported blackout, and {SILENCE_MS} ms", lambda trip=trip: silences(trip))
              for trip in self.trips),
            *((f"{trip.name}: no gap is longer than the reported blackout by more than {allowance(trip):.0f} ms", lambda trip=trip: gaps(trip))
              for trip in self.trips),
            ("the guest runs on one host, and only there", self.only_here),
            (f"no request was answered twice ({len(self.clients.answers.answers)} answers)", self.doubles),
            ("no client lost its connection, in the moves under load and in those without", lambda: self.clients.ledger.of("lost")),
            ("no transaction failed", lambda: self.clients.ledger.of("failed")),
            (f"the database has what it has acknowledged ({len(self.clients.ledger.acknowledged)} transactions remembered outside)",
             self.clients.ledger_wrong),
            *self.bench(),
            ("pg_amcheck finds every table and index in order", self.amcheck),
            ("no page has a wrong checksum", self.checksums),
            ("the guest's kernel has not complained", lambda: sorted(self.guest.complaints)),
            ("the guest shuts down when it is asked to", self.shut_down),
            *((f"e2fsck -n finds the file system of the {form} disk in order", lambda form=form: self.file_system(form))
              for form in ("qcow2", "raw")),
            ("the database was started once, and has been shut down in order", self.database_log),
            ("qemu-img check finds the qcow2 image in order", self.image),
        ]  # fmt: skip
        held = sum([self.check(say, sentence, function) for sentence, function in checks])
        say(f"{held} of {len(checks)} checks hold")
        return 0 if held == len(checks) else 1

    def check(self, say, sentence, function):
        try:
            wrong = function()
        except (CouldNotGoOn, subprocess.SubprocessError, OSError, ValueError) as error:
            wrong = [str(error)]
        say(f"{'WRONG' if wrong else 'ok   '}  {sentence}" + "".join(f"\n         {one}" for one in wrong[:5]))
        return not wrong

    def only_here(self):
        here, there = self.guest.listed(self.guest.here), self.guest.listed(self.guest.there)
        wrong = [f"it is {here['state']} on host {self.guest.here}"] if here["state"] != "running" else []
        return wrong + ([f"host {self.guest.there} has process {there['process']} for it"] if there.get("process") else [])

    def doubles(self):
        count = self.clients.answers.doubles
        return [f"{count} were"] if count else []

    def bench(self):
        if self.clients.bench_said is None:
            return []
        return [("pgbench: no transaction failed, its history has each acknowledged one once, its sums agree", self.clients.bench_wrong)]

    def amcheck(self):
        code, said = self.clients.run_program("pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--parent-check")
        return [f"it ended with code {code}: {said[-400:]}"] if code != 0 or said else []

    def checksums(self):
        failures = self.clients.ask("SELECT current_setting('data_checksums'), coalesce(sum(checksum_failures), 0) FROM pg_stat_database")
        return [] if failures == [["on", "0"]] else [f"checksums are {failures[0][0]}, failures: {failures[0][1]}"]

    def shut_down(self):
        self.paths = self.guest.disks()
        code, said = self.guest.shut_down()
        return [f"it ended with code {code}: {said}"] if code != 0 else []

    def plain(self, form):
        """A disk as plain bytes, which e2fsck wants."""
        if form == "raw":
            return self.paths["raw"]
        plain = os.path.join(self.guest.fleet.base, "system.plain")
        if not os.path.exists(plain):
            subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", self.paths[form], plain], check=True)
        return plain

    def file_system(self, form):
        done = run("e2fsck", "-n", "-f", self.plain(form))
        is_clean = done.returncode == 0 and "journal recovery" not in done.stdout
        return [] if is_clean else [f"it ended with code {done.returncode}: {done.stdout[-400:]}"]

    def database_log(self):
        """The guest's own log: a database that had found itself torn off would have started again."""
        listed = run("debugfs", "-R", "ls -p /var/log/postgresql", self.plain("qcow2")).stdout
        names = [words[5] for words in (line.split("/") for line in listed.splitlines()) if len(words) > 5 and words[5].endswith("-main.log")]
        text = "".join(run("debugfs", "-R", f"cat /var/log/postgresql/{name}", self.plain("qcow2")).stdout for name in names)
        wrong = [line for line in text.splitlines() if any(word in line for word in COMPLAINTS)]
        starts, ends = (text.count(word) for word in ("database system is ready to accept", "database system is shut down"))
        return wrong + ([f"it was started {starts} times and shut down {ends} times"] if (starts, ends) != (1, 1) else [])

    def image(self):
        done = run("qemu-img", "check", "-f", "qcow2", self.paths["qcow2"])
        return [] if done.returncode == 0 else [f"it ended with code {done.returncode}: {done.stdout[-400:]}"]


def run(*words):
    return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)


def allowance(trip):
    return trip.rest[1] + LATE_MS


def moved(trip):
    wrong = list(trip.failures)
    for row, report in zip(trip.rows, trip.reports):
        for disk in report["disks"]:
            if not disk.get("digest_source") or disk["digest_source"] != disk.get("digest_destination"):
                wrong.append(f"{row[0]}: the digests of {disk['name']} differ, or one is missing")
    return wrong


def silences(trip):
    return longer(trip, "nobody answered for", 2, SILENCE_MS)


def gaps(trip):
    return longer(trip, "the gap was", 3, allowance(trip))


def longer(trip, words, column, allowed):
    """The moves in which what was seen is longer than what was reported, by more than is allowed."""
    if not trip.rows:
        return ["nothing was measured"]
    return [
        f"{row[0]}: {words} {row[column]:.0f} ms, the reported blackout {row[1]:.0f} ms" for row in trip.rows if row[column] > row[1] + allowed
    ]
