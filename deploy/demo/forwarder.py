#!/usr/bin/env python3
"""The link between two hosts: a TCP forwarder that records what goes by, and can be told to misbehave.

    forwarder.py DIRECTORY LISTEN-ADDRESS TARGET-ADDRESS PORT...        records as DIRECTORY/PORT-NUMBER.client and .server
"""
import collections
import itertools
import os
import select
import socket
import struct
import sys
import threading
import time

from installation import CONTROL_PORT, NBD_PORT

FORWARD, BACK = "forward", "back"  # from the source to the destination, and the other way
PIECE = 256 << 10
# A recording that is larger than this is not kept further: who reads it does so into memory.
RECORDED = 512 << 20


class Flow:
    """One direction of a connection."""

    def __init__(self, connection, direction, source, sink):
        self.connection, self.direction, self.source, self.sink = connection, direction, source, sink
        self.pending = collections.deque()  # (when it is due, the bytes)
        self.recording, self.recorded = None, 0
        self.ended = False  # the source has no more
        self.shut = False  # the sink was told so

    def record(self, data):
        if self.recording is not None and self.recorded < RECORDED:
            self.recording.write(data)
            self.recorded += len(data)

    @property
    def is_full(self):
        return sum(len(data) for _, data in self.pending) > 4 * PIECE


class Connection:
    """A connection through the link; its flows exist once the other end was reached."""

    def __init__(self, port, near):
        self.port, self.near, self.far = port, near, None
        self.flows = []

    def open_flows(self, far):
        self.far = far
        self.flows = [Flow(self, FORWARD, self.near, far), Flow(self, BACK, far, self.near)]

    @property
    def sockets(self):
        return [end for end in (self.near, self.far) if end is not None]


class Link(threading.Thread):
    """Forwards ports of `target` from `listen`, each byte `delay` seconds later. One thread carries everything, so that a fault is one step."""

    def __init__(self, listen, target, ports=(CONTROL_PORT, NBD_PORT), recordings=None, delay=0.0):
        super().__init__(daemon=True, name=f"link-{target}")
        self.target, self.ports, self.recordings = target, ports, recordings
        self.numbers = {port: itertools.count() for port in ports}
        self.address, self.listeners = listen, {}
        self.walls = []  # sockets that keep others from connecting
        self._listen()
        self.lock = threading.Lock()
        self.connections = []
        self.held = set()  # (kind, direction) through which nothing goes
        self.transforms = []  # [kind, direction, function]: each is for the next piece that fits
        self.delay = self.usual_delay = delay
        self.is_over = False
        self.waker, self.wakened = socket.socketpair()
        self.wakened.setblocking(False)
        self.start()

    # What the harness asks for. `kinds` are "control", "stream" and "nbd"; every kind when None.

    def kind(self, connection):
        """TLS hides what a connection is for; the oldest one of the control port carries the messages."""
        if connection.port == NBD_PORT:
            return "nbd"
        first = next((other for other in self.connections if other.port == CONTROL_PORT), connection)
        return "control" if connection is first else "stream"

    def _listen(self):
        for port in self.ports:
            if port in [other for _, other in self.listeners.values()]:
                continue
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((self.address, port))
                server.listen(64)
            except OSError:
                server.close()
                raise
            self.listeners[server.fileno()] = (server, port)

    def refuse(self):
        """Refuses every new connection, and ends those that there are."""
        with self.lock:
            for server, _ in self.listeners.values():
                server.close()
            self.listeners.clear()
            for connection in list(self.connections):
                self._drop(connection, abort=True)
        self._changed()

    def vanish(self):
        """As if the host were off: nothing comes back any more, also not to who connects."""
        self.hold()
        with self.lock:
            # The kernel drops what asks for a connection when the queue of those that nobody has accepted is full.
            for server, port in self.listeners.values():
                server.listen(0)
                self.walls.append(server)
                for _ in range(4):
                    brick = socket.socket()
                    brick.setblocking(False)
                    brick.connect_ex((self.address, port))
                    self.walls.append(brick)
            self.listeners.clear()
        self._changed()

    def listen(self):
        """Accepts connections again."""
        limit = time.monotonic() + 5
        while True:
            with self.lock:
                for wall in self.walls:
                    wall.close()
                self.walls.clear()
                try:
                    self._listen()
                    break
                except OSError:
                    # A socket lives on while the thread still waits for it.
                    if time.monotonic() > limit:
                        raise
            self._changed()
            time.sleep(0.01)
        self._changed()

    def _fits(self, connection, kinds):
        return kinds is None or self.kind(connection) in kinds

    def _changed(self):
        self.waker.send(b"x")

    def reset(self, kinds=None):
        """Ends connections with an RST at both ends."""
        with self.lock:
            for connection in [one for one in self.connections if self._fits(one, kinds)]:
                self._drop(connection, abort=True)
        self._changed()

    def hold(self, kinds=None, directions=(FORWARD, BACK)):
        """Forwards nothing any more: neither bytes nor ends of streams nor new connections."""
        with self.lock:
            self.held |= {(kind, way) for kind in kinds or ("control", "stream", "nbd") for way in directions}
        self._changed()

    def let_go(self):
        """Forwards everything again, also what was held back."""
        with self.lock:
            self.held.clear()
            self.delay = self.usual_delay
            self.transforms.clear()
        self._changed()

    def transform(self, function, kinds=None, direction=FORWARD):
        """Changes the next piece of each kind on its way."""
        with self.lock:
            for kind in kinds or ("control", "stream", "nbd"):
                self.transforms.append([kind, direction, function])

    def half_close(self, kinds=None, direction=FORWARD):
        """Tells the receivers of one direction that nothing more comes."""
        with self.lock:
            for connection in self.connections:
                if self._fits(connection, kinds):
                    for flow in connection.flows:
                        if flow.direction == direction:
                            flow.ended = True
                            flow.pending.clear()
        self._changed()

    def slow_down(self, seconds):
        """Delays everything in both directions, by so much more than usual."""
        with self.lock:
            self.delay = self.usual_delay + seconds

    def close(self):
        with self.lock:
            self.is_over = True
        self._changed()
        self.join()

    # The thread.

    def _drop(self, connection, abort=False):
        if connection in self.connections:
            self.connections.remove(connection)
        for end in connection.sockets:
            if abort:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()
        for flow in connection.flows:
            if flow.recording is not None:
                flow.recording.close()
        connection.flows = []

    def run(self):
        while True:
            with self.lock:
                if self.is_over:
                    for connection in list(self.connections):
                        self._drop(connection, abort=True)
                    for server in [server for server, _ in self.listeners.values()] + self.walls:
                        server.close()
                    return
                poll, actions, timeout = self._prepare()
            ready = poll.poll(timeout)
            with self.lock:
                for descriptor, events in ready:
                    for action in actions.get(descriptor, ()):
                        action(events)

    def _prepare(self):
        """What to wait for, and what to do then. Called with the lock."""
        poll = select.poll()
        actions = collections.defaultdict(list)
        wanted = collections.Counter()
        timeout = 1000.0
        now = time.monotonic()

        def want(descriptor, events, action):
            wanted[descriptor] |= events
            actions[descriptor].append(action)

        want(self.wakened.fileno(), select.POLLIN, lambda _: self.wakened.recv(4096))
        for descriptor, (server, port) in self.listeners.items():
            want(descriptor, select.POLLIN, lambda _, server=server, port=port: self._accept(server, port))
        for connection in list(self.connections):
            kind = self.kind(connection)
            if connection.far is None:
                # A new connection gets nowhere as long as anything of it is held.
                if any((kind, way) in self.held for way in (FORWARD, BACK)):
                    continue
                if not self._reach(connection):
                    continue
            for flow in connection.flows:
                if (kind, flow.direction) in self.held:
                    continue
                if not flow.ended and not flow.is_full:
                    want(flow.source.fileno(), select.POLLIN, lambda events, flow=flow: self._read(flow, events))
                if flow.pending:
                    if flow.pending[0][0] <= now:
                        want(flow.sink.fileno(), select.POLLOUT, lambda events, flow=flow: self._write(flow, events))
                    else:
                        timeout = min(timeout, (flow.pending[0][0] - now) * 1000 + 1)
                elif flow.ended and not flow.shut:
                    flow.shut = True
                    try:
                        flow.sink.shutdown(socket.SHUT_WR)
                    except OSError:
                        pass
            if connection.flows and all(flow.shut for flow in connection.flows):
                self._drop(connection)
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        return poll, actions, timeout

    def _accept(self, server, port):
        if server.fileno() not in self.listeners:
            return  # closed, or full, since the poll
        near, _ = server.accept()
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections.append(Connection(port, near))

    def _reach(self, connection):
        try:
            far = socket.create_connection((self.target, connection.port), timeout=2)
        except OSError:
            self._drop(connection, abort=True)
            return False
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.setblocking(False)
        connection.near.setblocking(False)
        connection.open_flows(far)
        if self.recordings:
            name = os.path.join(self.recordings, f"{connection.port}-{next(self.numbers[connection.port])}")
            for flow, end in zip(connection.flows, ("client", "server")):
                flow.recording = open(f"{name}.{end}", "wb", buffering=0)
        return True

    def _read(self, flow, events):
        if flow not in flow.connection.flows or not events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return
        try:
            data = flow.source.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            return self._drop(flow.connection, abort=True)
        if not data:
            flow.ended = True
            return None
        flow.record(data)
        for item in self.transforms:
            if item[0] == self.kind(flow.connection) and item[1] == flow.direction:
                data = item[2](data)
                self.transforms.remove(item)
                break
        flow.pending.append((time.monotonic() + self.delay, data))
        return None

    def _write(self, flow, events):
        if flow not in flow.connection.flows or not events & (select.POLLOUT | select.POLLHUP | select.POLLERR):
            return
        while flow.pending and flow.pending[0][0] <= time.monotonic():
            due, data = flow.pending[0]
            try:
                count = flow.sink.send(data)
            except BlockingIOError:
                return
            except OSError:
                return self._drop(flow.connection, abort=True)
            if count < len(data):
                flow.pending[0] = (due, data[count:])
                return None
            flow.pending.popleft()


def corrupted(data):
    """A bit in the middle is flipped."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def duplicated(data):
    return data + data


def reordered(data):
    middle = len(data) // 2
    return data[middle:] + data[:middle]


def main():
    directory, listen, target, *ports = sys.argv[1:]
    os.makedirs(directory, exist_ok=True)
    link = Link(listen, target, tuple(int(port) for port in ports), directory)
    for port in ports:
        print(f"forwarding {listen}:{port} to {target}:{port}", flush=True)
    link.join()


if __name__ == "__main__":
    main()
