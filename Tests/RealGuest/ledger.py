#!/usr/bin/env python3
"""Clients of a guest's database that remember, outside the guest, each transaction that was acknowledged.

    ledger.py ADDRESS LOG CLIENTS

Each client has one connection for all the time. Words on standard input: "once" is one transaction of each client, "run" is one after
the other until "rest". Each is answered with a line: "once", "run", "rest". Lines of LOG: "begin" and "acknowledged" with the client, the
transaction's number and the time (CLOCK_MONOTONIC, ns); "failed" and "lost" with the client and why.
"""
import sys
import threading
import time

from postgres import Connection, ConnectionLost, Refused

TABLES = """
CREATE TABLE IF NOT EXISTS ledger (client int, number int, words text, PRIMARY KEY (client, number));
CREATE TABLE IF NOT EXISTS ledger_counts (client int PRIMARY KEY, count int NOT NULL);
"""

NOTING = threading.Lock()


class Client(threading.Thread):
    def __init__(self, identity, address, log):
        super().__init__(daemon=True)
        self.identity, self.log = identity, log
        self.connection = Connection(address)
        self.number = 0
        self.wanted = threading.Semaphore(0)
        self.is_running, self.is_resting = threading.Event(), threading.Event()
        self.is_resting.set()

    def note(self, word, *more):
        with NOTING:
            self.log.write(" ".join(map(str, (word, self.identity, *more))) + "\n")

    def transact(self):
        self.note("begin", self.number, time.monotonic_ns())
        self.connection.execute(
            f"BEGIN; INSERT INTO ledger VALUES ({self.identity}, {self.number}, md5('{self.identity} {self.number}'));"
            f"UPDATE ledger_counts SET count = count + 1 WHERE client = {self.identity}; COMMIT"
        )
        self.note("acknowledged", self.number, time.monotonic_ns())

    def run(self):
        try:
            while True:
                self.wanted.acquire()
                self.work()
        except ConnectionLost as error:
            self.note("lost", error)
        finally:
            self.is_resting.set()

    def work(self):
        is_last = False
        while not is_last:
            # Looked at before the transaction: "once" is one, and "rest" waits for the one that is under way.
            is_last = not self.is_running.is_set()
            try:
                self.transact()
            except Refused as error:
                self.note("failed", error)
            self.number += 1
        self.is_resting.set()

    def begin(self, is_running):
        self.is_resting.clear()
        if is_running:
            self.is_running.set()
        self.wanted.release()

    def rest(self):
        self.is_running.clear()
        while self.is_alive() and not self.is_resting.wait(0.1):
            pass


def main():
    address, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    setup = Connection(address)
    setup.execute(TABLES)
    setup.execute("".join(f"INSERT INTO ledger_counts VALUES ({client}, 0);" for client in range(count)))
    with open(path, "w", buffering=1) as log:
        clients = [Client(identity, address, log) for identity in range(count)]
        for client in clients:
            client.start()
        print("ready", flush=True)
        for line in sys.stdin:
            word = line.strip()
            for client in clients:
                if word in ("once", "run"):
                    client.begin(word == "run")
            for client in clients:
                if word in ("once", "rest"):
                    client.rest()
            print(word, flush=True)
        for client in clients:
            client.connection.close()


if __name__ == "__main__":
    main()
