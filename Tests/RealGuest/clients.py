"""The guest's clients, in a namespace of their own: a probe, a ledger with a client that remembers, and pgbench for the load."""
import os
import re
import signal
import subprocess
import sys
import time

import measures
from guest import CouldNotGoOn
from hosts import wait
from lan import GUEST

HERE = os.path.dirname(os.path.abspath(__file__))
INTERVAL_MS = 5
LEDGER_CLIENTS = 3
BENCH_CLIENTS = 4
BENCH_SCALE = 3
BENCH_CHECK = """
SELECT count(*), coalesce(sum(delta), 0), (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches),
(SELECT sum(tbalance) FROM pgbench_tellers) FROM pgbench_history
"""


class Clients:
    def __init__(self, lan, fleet, images):
        self.lan, self.fleet = lan, fleet
        self.programs = os.path.join(images, "client")
        self.bench, self.bench_said = None, None
        self.answers = measures.Answers(self._file("probe.log"))
        self.ledger = measures.Ledger(self._file("ledger.log"))

    def _file(self, name):
        return os.path.join(self.fleet.base, name)

    def _start(self, words, **options):
        process = subprocess.Popen(self.lan.words(*words), **options)
        self.fleet.processes.append(process)
        return process

    def _database(self, program, *words):
        library = os.path.join(self.programs, "lib")
        return ["env", f"LD_LIBRARY_PATH={library}", os.path.join(self.programs, "bin", program), "-h", GUEST, "-U", "postgres", *words]

    def run_program(self, program, *words, seconds=900):
        """Carries out a program of PostgreSQL's against the guest's database; returns exit code and output."""
        words = self.lan.words(*self._database(program, *words))
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=seconds)
        return done.returncode, done.stdout.strip()

    def ask(self, statement):
        """The rows of an answer, each a list of words."""
        code, said = self.run_program("psql", "-X", "-A", "-t", "-F", " ", "-d", "postgres", "-c", statement)
        if code != 0:
            raise CouldNotGoOn(f"the database does not answer: {said}")
        return [line.split(" ") for line in said.splitlines()]

    def wait_for_database(self, guest):
        def answers():
            # While the system starts, what is sent to it may get lost.
            return self.run_program("psql", "-X", "-d", "dbname=postgres connect_timeout=10", "-c", "SELECT 1")[0] == 0

        end = time.monotonic() + 600
        while not answers():
            if guest.listed("a")["state"] != "running":
                raise CouldNotGoOn(f"the guest did not start; its console: {guest.last_words()}")
            if time.monotonic() > end:
                raise CouldNotGoOn(f"the database did not start; the guest's console: {guest.last_words()}")
            time.sleep(1)

    def begin(self):
        code, said = self.run_program("pgbench", "-i", "-q", "-I", "dtGvp", "-s", str(BENCH_SCALE), "postgres")
        if code != 0:
            raise CouldNotGoOn(f"pgbench could not make its tables: {said}")
        with open(self._file("probe.errors"), "wb") as log:
            self.probe = self._start([sys.executable, os.path.join(HERE, "probe.py"), GUEST, self.answers.path, str(INTERVAL_MS)], stderr=log)
        words = [sys.executable, os.path.join(HERE, "ledger.py"), GUEST, self.ledger.path, str(LEDGER_CLIENTS)]
        with open(self._file("ledger.errors"), "wb") as log:
            self.book = self._start(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self._expect("ready")
        self.once()
        wait("the probe's first answer", lambda: os.path.exists(self.answers.path) and self.answers.read().answers)

    def _expect(self, word):
        said = self.book.stdout.readline().strip()
        if said != word:
            raise CouldNotGoOn(f"the ledger's clients said {said!r}, not {word!r}: {open(self._file('ledger.errors')).read()[-600:]}")

    def _tell(self, word):
        self.book.stdin.write(word + "\n")
        self.book.stdin.flush()
        self._expect(word)

    def once(self):
        """One transaction of each client, on the connection that it has had all the time."""
        self._tell("once")

    def run(self):
        """Begins the load."""
        self._tell("run")
        words = self._database("pgbench", "-n", "-c", str(BENCH_CLIENTS), "-T", "86400", "-P", "5", "postgres")
        with open(self._file("pgbench.log"), "wb") as log:
            self.bench = self._start(words, stdout=log, stderr=log)

    def rest(self):
        """Ends the load, when what is under way is done."""
        self._tell("rest")
        # To pgbench this is the end of its time: transactions that are under way end, and it says what it did.
        self.bench.send_signal(signal.SIGALRM)
        code = self.bench.wait(300)
        with open(self._file("pgbench.log")) as log:
            self.bench_said = (code, log.read())

    def wait_for_answer(self, moment):
        """Until the guest answers what was asked after a moment."""
        wait("the guest's answer to the probe", lambda: self.answers.has_since(moment), 120)

    def end(self):
        """A last transaction of each client, and the end of their connections; the probe goes on."""
        self.once()
        self.book.stdin.close()
        self.book.wait(60)
        self.answers.read()
        self.ledger.read()

    # What the database has, next to what its clients remember.

    def ledger_wrong(self):
        rows = self.ask("SELECT client, number FROM ledger")
        wrong = self.ledger.compare({(int(client), int(number)) for client, number in rows})
        damaged = self.ask("SELECT count(*) FROM ledger WHERE words <> md5(client || ' ' || number)")[0][0]
        counts = self.ask("SELECT count(*) FROM ledger_counts c WHERE count <> (SELECT count(*) FROM ledger l WHERE l.client = c.client)")
        wrong += [f"{damaged} rows are damaged"] if damaged != "0" else []
        return wrong + ([f"{counts[0][0]} clients' counts are not their rows'"] if counts[0][0] != "0" else [])

    def bench_wrong(self):
        """pgbench counts what was acknowledged; the database's history is to have exactly that, and all its sums are to agree."""
        code, said = self.bench_said
        done = re.search(r"transactions actually processed: (\d+)", said)
        failed = re.search(r"number of failed transactions: (\d+)", said)
        if code != 0 or not done or (failed and failed[1] != "0") or "abort" in said.lower():
            return [f"pgbench ended with code {code}: {said[-400:]}"]
        count, *sums = self.ask(BENCH_CHECK)[0]
        wrong = [f"{done[1]} transactions were acknowledged, and the history has {count}"] if done[1] != count else []
        return wrong + ([f"the sums of the balances differ: {' '.join(sums)}"] if len(set(sums)) != 1 else [])

    def bench_count(self):
        return int(re.search(r"transactions actually processed: (\d+)", self.bench_said[1])[1])
