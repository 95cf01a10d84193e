"""Watches the QEMUs of one host's guest through a monitor of the harness's own, which Crossdock does not use."""
import itertools
import json
import os
import socket
import struct
import threading
import time


class Emulator:
    """What was seen of one QEMU: when it ran, by its own events."""

    def __init__(self, host, process):
        self.host, self.process = host, process
        self.state = "unknown"
        self.running = []  # [from, to]; `to` is None while it runs
        self.events = []
        self.passes = 0  # how often the memory was gone through in the latest migration
        self.passes_before_stop = 0

    def note(self, when, name, data=None):
        self.events.append((when, name, data or {}))
        if name == "MIGRATION_PASS":
            self.passes = data["pass"]
        if name == "RESUME" and not self.is_running:
            self.running.append([when, None])
        elif name in ("STOP", "SHUTDOWN", "GONE") and self.is_running:
            self.running[-1][1] = when
            self.passes_before_stop = self.passes

    @property
    def is_running(self):
        return bool(self.running) and self.running[-1][1] is None


class Watcher(threading.Thread):
    """Follows every QEMU that opens a monitor under one path. Ends with `close`."""

    def __init__(self, host, path):
        super().__init__(daemon=True, name=f"watch-{host}")
        self.host, self.path = host, path
        self.emulators = []
        self.current = None
        self.connection = None
        self.answers = {}
        self.answered = threading.Condition()
        self.ids = itertools.count()
        self.is_over = False
        self.start()

    @property
    def is_running(self):
        """Whether the guest runs here now."""
        current = self.current
        return current is not None and current.is_running

    def run(self):
        while not self.is_over:
            try:
                self._follow()
            except (OSError, ValueError):
                pass
            self._gone()
            time.sleep(0.01)

    def _follow(self):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(self.path)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            process = struct.unpack("3i", credentials)[0]
            if not self.emulators or self.emulators[-1].process != process:
                self.emulators.append(Emulator(self.host, process))
            emulator = self.emulators[-1]
            self.connection = connection
            lines = connection.makefile("rb")
            connection.sendall(b'{"execute":"qmp_capabilities"}\n{"execute":"query-status","id":"first"}\n')
            for line in lines:
                message = json.loads(line)
                if "event" in message:
                    stamp = message["timestamp"]
                    when = stamp["seconds"] + stamp["microseconds"] / 1e6
                    emulator.note(when, message["event"], message.get("data"))
                elif message.get("id") == "first":
                    emulator.state = message["return"]["status"]
                    if message["return"]["running"]:
                        emulator.note(time.time(), "RESUME")
                    self.current = emulator
                elif "id" in message:
                    with self.answered:
                        self.answers[message["id"]] = message
                        self.answered.notify_all()
        finally:
            connection.close()

    def _gone(self):
        if self.current is not None:
            self.current.note(time.time(), "GONE")
        self.current = None
        with self.answered:
            self.answered.notify_all()

    def ask(self, command, seconds=5, **arguments):
        """What a command returns; None when there is no QEMU, it does not answer, or refuses."""
        return (self.execute(command, seconds, **arguments) or {}).get("return")

    def execute(self, command, seconds=5, **arguments):
        """Executes a command and returns the whole answer; None when there is no QEMU or it does not answer."""
        current, number = self.current, f"w{next(self.ids)}"
        if current is None:
            return None
        text = json.dumps({"execute": command, "arguments": arguments, "id": number}) + "\n"
        try:
            self.connection.sendall(text.encode())
        except OSError:
            return None
        with self.answered:
            self.answered.wait_for(lambda: number in self.answers or self.current is not current, seconds)
            return self.answers.pop(number, None)

    def run_state(self, seconds=2):
        """As QEMU names it; "off" when there is none, "silent" when it does not answer."""
        if self.current is None:
            return "off"
        return (self.ask("query-status", seconds) or {}).get("status", "silent")

    def close(self):
        self.is_over = True
        connection = self.connection
        if connection is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.join(5)


class Console:
    """Everything that a guest printed on one host, also after the file was removed or made anew."""

    def __init__(self, path):
        self.path = path
        self.files = []

    def look(self):
        """Takes hold of the file that is there now."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return
        if not self.files or (status.st_dev, status.st_ino) != self.files[-1][0]:
            try:
                self.files.append(((status.st_dev, status.st_ino), open(self.path, "rb")))
            except FileNotFoundError:
                pass

    @property
    def text(self):
        parts = []
        for _, file in self.files:
            file.seek(0)
            parts.append(file.read())
        return b"".join(parts).decode("latin-1")

    @property
    def size(self):
        return sum(os.fstat(file.fileno()).st_size for _, file in self.files)

    def close(self):
        for _, file in self.files:
            file.close()
        self.files = []
