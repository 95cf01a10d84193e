#!/usr/bin/env python3
"""A long line between two hosts on this machine: `Line/line.c`, started and read; and whether it does what it says.

    line.py [--quick]        measures the line itself: its delay, window, rate, fairness, ends, refusals and resets
"""
import argparse
import bisect
import contextlib
import hashlib
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(HERE)
PROGRAM = os.path.join(REPOSITORY, ".build", "line")
TICK = os.sysconf("SC_CLK_TCK")
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror"]


def build():
    source = os.path.join(HERE, "Line", "line.c")
    if not os.path.exists(PROGRAM) or os.path.getmtime(PROGRAM) < os.path.getmtime(source):
        os.makedirs(os.path.dirname(PROGRAM), exist_ok=True)
        new = f"{PROGRAM}.{os.getpid()}"
        subprocess.run(["gcc", "-O2", *WARNINGS, "-o", new, source], check=True)
        os.replace(new, PROGRAM)
    return PROGRAM


def in_own_network():
    """Starts this program again where nobody else uses the loopback addresses, if it may."""
    if os.environ.get("XD_OWN_NETWORK") or os.geteuid() != 0:
        return
    if subprocess.run(["unshare", "--net", "true"], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        return
    command = 'ip link set lo up && exec "$@"'
    os.execvpe("unshare", ["unshare", "--net", "sh", "-c", command, "sh", sys.executable, *sys.argv], {**os.environ, "XD_OWN_NETWORK": "1"})


def processor_seconds(pid):
    """What a process has used, or None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / TICK


def listens(address, port):
    """Whether somebody listens there, without a connection that would be noticed."""
    wanted = f"{struct.unpack('=I', socket.inet_aton(address))[0]:08X}:{port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as table:
        return any(fields[1] == wanted and fields[3] == "0A" for fields in map(str.split, table))


def wait_for(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {seconds} s for {what} in vain")
        time.sleep(0.005)


class Line:
    """The line between `pairs` of ((address, port), (address, port)): where who connects, and whom that reaches."""

    def __init__(self, directory, pairs, rtt=0, window=0, rate=0, resets=0, reset_from=0, memory=1024):
        handle, self.counts_file = tempfile.mkstemp(prefix="counts.", dir=directory)
        os.close(handle)
        words = [build(), "--rtt", str(rtt), "--window", str(window), "--rate", str(rate), "--reset-every", str(resets)]
        words += ["--reset-from", str(reset_from), "--memory", str(memory), "--count", self.counts_file]
        words += [f"{near[0]}:{near[1]}={far[0]}:{far[1]}" for near, far in pairs]
        self.pairs = pairs
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("the line did not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def is_open(self):
        """Waits until everyone who shall be reached listens."""
        for near, _ in self.pairs:
            wait_for(f"{near} on the line", lambda: listens(*near))

    def processor_seconds(self):
        return processor_seconds(self.process.pid) or 0

    def counts(self):
        return Counts(self.counts_file, len(self.pairs))

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


class Counts:
    """What the line has handed on, by time."""

    def __init__(self, path, pairs):
        with open(path, encoding="ascii") as file:
            # The last line may be half written.
            rows = [line.split() for line in file.read().split("\n")[:-1]]
        rows = [row for row in rows if len(row) == 2 * pairs + 3]
        self.times = [float(row[0]) for row in rows]
        self.columns = [[int(row[column]) for row in rows] for column in range(1, 2 * pairs + 1)]
        self.resets, self.starvations = (int(rows[-1][-2]), int(rows[-1][-1])) if rows else (0, 0)

    def at(self, instant, pair, back=False):
        column = self.columns[2 * pair + back]
        after = bisect.bisect_left(self.times, instant)
        if after == 0:
            return 0
        if after == len(self.times):
            return column[-1]
        share = (instant - self.times[after - 1]) / (self.times[after] - self.times[after - 1])
        return column[after - 1] + share * (column[after] - column[after - 1])

    def reached(self, count, pair):
        """When so much was forwarded."""
        column = self.columns[2 * pair]
        after = bisect.bisect_left(column, count)
        if after in (0, len(column)):
            return self.times[min(after, len(column) - 1)]
        share = (count - column[after - 1]) / (column[after] - column[after - 1])
        return self.times[after - 1] + share * (self.times[after] - self.times[after - 1])

    def rate(self, pair, begin, end, payload, skip=2.0):
        """Bytes of payload in a second after the first two seconds, or in the second half of what takes less than four; and how much was
        left out. What is asked for and answered at the end does not count: the last half per cent of the bytes."""
        first = self.at(begin, pair)
        total = self.at(end, pair) - first
        if total <= 0:
            return 0.0, 0.0
        last = self.reached(first + 0.995 * total, pair)
        skip = min(skip, (last - begin) / 2)
        rest = last - begin - skip
        moved = (first + 0.995 * total - self.at(begin + skip, pair)) / total
        return (payload * moved / rest if rest > 0 else 0.0), skip


# The self-test

NEAR, FAR = "127.94.9.3", "127.94.9.2"


class Peer:
    """Somebody at the far end who does `serve(socket)` for each connection."""

    def __init__(self, port, serve):
        self.socket = socket.create_server((FAR, port))
        self.serve = serve
        self.threads = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                thread = threading.Thread(target=self.attend, args=(connection,), daemon=True)
                self.threads.append(thread)
                thread.start()

    def attend(self, connection):
        with connection, contextlib.suppress(OSError):
            self.serve(connection)

    def close(self):
        # A thread that waits in accept() keeps the socket listening.
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def echo(connection):
    while data := connection.recv(65536):
        connection.sendall(data)


def swallow(connection):
    while connection.recv(1 << 20):
        pass


def dial(port):
    connection = socket.create_connection((NEAR, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class SelfTest:
    def __init__(self, directory, quick):
        self.directory, self.quick, self.failed, self.port = directory, quick, 0, 21000

    @contextlib.contextmanager
    def line(self, serve, **settings):
        """A line to a peer, and the port."""
        self.port += 1
        peer = Peer(self.port, serve)
        with Line(self.directory, [((NEAR, self.port), (FAR, self.port))], **settings) as line:
            line.is_open()
            try:
                yield line, self.port
            finally:
                peer.close()

    def check(self, name, value, unit, least, most):
        is_good = least <= value <= most
        self.failed += not is_good
        bounds = f"{least:g} to {most:g}" if most != float("inf") else f"at least {least:g}"
        print(f"{'ok  ' if is_good else 'FAIL'} {name}: {value:.2f} {unit} ({bounds})", flush=True)

    def ping(self):
        for rtt in (0, 1, 20, 100):
            with self.line(echo, rtt=rtt) as (_, port):
                begin, times = time.monotonic(), []
                with dial(port) as connection:
                    for _ in range(20 if self.quick else 40):
                        connection.sendall(b"x")
                        connection.recv(1)
                        times.append((time.monotonic() - begin) * 1000)
                        begin = time.monotonic()
            # The first one waits for the connection itself.
            self.check(f"round trip of {rtt} ms: shortest", min(times[1:]), "ms", rtt, rtt + 1)
            self.check(f"round trip of {rtt} ms: median", statistics.median(times[1:]), "ms", rtt, rtt + 2)
            self.check(f"round trip of {rtt} ms: first answer on a new connection", times[0], "ms", 2 * rtt, 2 * rtt + 25)

    def one_way(self):
        """Each piece carries the time at which it was sent; a bulk stream in the other direction does not disturb it."""
        late = []

        def receive(connection):
            file = connection.makefile("rb")
            while data := file.read(8):
                late.append((time.monotonic() - struct.unpack("d", data)[0]) * 1000)

        with self.line(receive, rtt=50) as (_, port), dial(port) as connection:
            time.sleep(0.1)
            for _ in range(200):
                connection.sendall(struct.pack("d", time.monotonic()))
                time.sleep(0.003)
            time.sleep(0.1)
        self.check("one way of 25 ms: shortest", min(late), "ms", 25, 25.5)
        self.check("one way of 25 ms: median", statistics.median(late), "ms", 25, 26)

    def throughput(self, seconds, connections=1, **settings):
        """Bytes in a second through each connection and the line, after the first second."""
        shares = [0] * connections
        measured = threading.Event()

        def send(index, port):
            piece = bytes(64 << 10)
            with contextlib.suppress(OSError), dial(port) as connection:
                while True:
                    connection.sendall(piece)

        def receive(connection):
            index = struct.unpack("I", connection.recv(4))[0] if connections > 1 else 0
            while data := connection.recv(1 << 20):
                if measured.is_set():
                    shares[index] += len(data)

        def send_named(index, port):
            with contextlib.suppress(OSError), dial(port) as connection:
                connection.sendall(struct.pack("I", index))
                piece = bytes(64 << 10)
                while True:
                    connection.sendall(piece)

        with self.line(receive, **settings) as (_, port):
            for index in range(connections):
                threading.Thread(target=send_named if connections > 1 else send, args=(index, port), daemon=True).start()
            time.sleep(1)
            measured.set()
            begin = time.monotonic()
            time.sleep(seconds)
            measured.clear()
            elapsed = time.monotonic() - begin
        return [share / elapsed for share in shares]

    def window(self):
        for window, rtt in ((1024, 100), (4096, 50), (256, 20)):
            rate = self.throughput(3, window=window, rtt=rtt)[0] / (1 << 20)
            expected = window / 1024 / (rtt / 1000)
            self.check(f"window of {window} KiB at {rtt} ms: {expected:.1f} MiB/s", rate / expected * 100, "%", 92, 103)

    def rates(self):
        for rate, connections, rtt in ((100, 1, 0), (100, 4, 100), (1000, 1, 0), (1000, 4, 20)):
            shares = self.throughput(2, connections, rate=rate, rtt=rtt)
            name = f"{rate} Mbit/s, {connections} connections, {rtt} ms"
            self.check(f"{name}: carried", sum(shares) * 8 / rate / 1e4, "%", 96, 103)
            if connections > 1:
                self.check(f"{name}: smallest share of the mean", min(shares) / statistics.mean(shares) * 100, "%", 90, 100)

    def integrity(self):
        """Several connections at once, with pieces of all sizes, in both directions, through a window: not a byte is changed or lost."""
        size = 32 << 20
        good = []

        def trade(port, seed):
            data = hashlib.shake_128(bytes([seed])).digest(size)
            received = hashlib.sha256()
            with dial(port) as connection:

                def send():
                    at, piece = 0, 1
                    while at < size:
                        connection.sendall(data[at : at + piece])
                        at, piece = at + piece, piece * 3 % 200003 + 1
                    connection.shutdown(socket.SHUT_WR)

                sender = threading.Thread(target=send)
                sender.start()
                while answer := connection.recv(1 << 18):
                    received.update(answer)
                sender.join()
            good.append(received.digest() == hashlib.sha256(data).digest())

        with self.line(echo, rtt=4, window=512, memory=4) as (_, port):
            threads = [threading.Thread(target=trade, args=(port, seed)) for seed in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.check("echoes of 32 MiB that are what was sent", sum(good), "of 3", 3, 3)

    def half_close(self):
        """Who has said all it has to say still hears the answer; the end of the stream takes as long as bytes do."""

        def answer_late(connection):
            data = b""
            while piece := connection.recv(65536):
                data += piece
            time.sleep(0.05)
            connection.sendall(data[::-1])

        with self.line(answer_late, rtt=40) as (_, port), dial(port) as connection:
            time.sleep(0.1)
            begin = time.monotonic()
            connection.sendall(b"abc")
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(100):
                answer += piece
            took = (time.monotonic() - begin) * 1000
        self.check("half close: bytes of the answer", len(answer) if answer == b"cba" else 0, "of 3", 3, 3)
        self.check("half close: time of the answer", took, "ms", 90, 96)

    def refusal(self):
        with self.line(echo, rtt=20) as (_, port):
            pass
        near, far = (NEAR, port), (FAR, port)
        with Line(self.directory, [(near, far)], rtt=20):
            refused = 0
            for _ in range(3):
                try:
                    dial(port).close()
                except ConnectionRefusedError:
                    refused += 1
            self.check("nobody listens: refused", refused, "of 3", 3, 3)
            peer = Peer(port, echo)
            wait_for("the line", lambda: listens(*near))
            with dial(port) as connection:
                connection.sendall(b"x")
                self.check("somebody listens again: bytes", len(connection.recv(1)), "of 1", 1, 1)
            peer.close()
            wait_for("the line", lambda: not listens(*near))
            try:
                dial(port).close()
                refused = 0
            except ConnectionRefusedError:
                refused = 1
            self.check("and then nobody: refused", refused, "of 1", 1, 1)

    def resets(self):
        """Connections are reset in the order in which they came."""
        order, began = [], time.monotonic()

        def wait_for_reset(connection, index):
            try:
                connection.recv(1)
            except ConnectionResetError:
                order.append((index, time.monotonic() - began))

        with self.line(swallow, resets=0.4) as (line, port):
            began = time.monotonic()
            threads = []
            for index in range(3):
                connection = dial(port)
                threads.append(threading.Thread(target=wait_for_reset, args=(connection, index)))
                threads[-1].start()
            for thread in threads:
                thread.join(5)
            time.sleep(0.1)
            counted = line.counts().resets
        self.check("resets in turns", [index for index, _ in order] == [0, 1, 2], "of 1", 1, 1)
        self.check("time between resets", (order[-1][1] - order[0][1]) / 2 if len(order) == 3 else 0, "s", 0.38, 0.45)
        self.check("counted resets", counted, "of 3", 3, 3)

    def cost(self):
        """What the line itself costs, and how much memory it takes at most."""
        size = (256 if self.quick else 1024) << 20
        for rtt, limit in ((0, 256), (50, 256)):
            done = threading.Event()

            def receive(connection):
                swallow(connection)
                done.set()

            with self.line(receive, rtt=rtt, memory=limit) as (line, port):
                before = line.processor_seconds()
                begin = time.monotonic()
                with dial(port) as connection:
                    piece = bytes(1 << 20)
                    for _ in range(size >> 20):
                        connection.sendall(piece)
                    connection.shutdown(socket.SHUT_WR)
                    done.wait(60)
                elapsed = time.monotonic() - begin
                used = line.processor_seconds() - before
                with open(f"/proc/{line.process.pid}/status", encoding="ascii") as status:
                    peak = int(re.search(r"VmHWM:\s+(\d+)", status.read())[1]) / 1024
                counted = line.counts().columns[0][-1]
            gib = size / (1 << 30)
            self.check(f"{rtt} ms, no limits: rate", size / (1 << 20) / elapsed, "MiB/s", 200, float("inf"))
            self.check(f"{rtt} ms, no limits: processor seconds of the line a GiB", used / gib, "s", 0, 1)
            # At 0 ms nothing is under way: a receiver that is slow must not be hidden.
            self.check(f"{rtt} ms, no limits: memory at most", peak, "MiB", 0, limit + 16 if rtt else 32)
            self.check(f"{rtt} ms, no limits: bytes counted", counted / size * 100, "%", 80, 100)

    def run(self):
        for part in (self.ping, self.one_way, self.window, self.rates, self.integrity, self.half_close, self.refusal, self.resets, self.cost):
            part()
        print("the line does what it says" if not self.failed else f"{self.failed} of the line's properties do not hold")
        return self.failed == 0


def self_test(quick=False):
    with tempfile.TemporaryDirectory(prefix="xd-line-") as directory:
        return SelfTest(directory, quick).run()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and bytes")
    options = parser.parse_args()
    in_own_network()
    sys.exit(0 if self_test(options.quick) else 1)


if __name__ == "__main__":
    main()
