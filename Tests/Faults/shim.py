"""The rules that the shim (shim.c) obeys: a table in a file that the harness shares with all processes of a run."""
import mmap
import os
import struct
import subprocess
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MAGIC, RULES, TEXT = 0x58464C31, 16, 128
HEADER = struct.Struct("<Iiqq")
NUMBERS = struct.Struct("<10i")
RULE = NUMBERS.size + 3 * TEXT
OFF, ARMED, REACHED = range(3)
GATE, FAIL, DIE = 1, 2, 3
WRITE, SEND, PWRITE, SYNC, RENAME, TRUNCATE, ALLOCATE, SIGNAL = range(8)


def build(source, target, *options):
    """Compiles one of the C files of this directory as a shared library."""
    command = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", target, os.path.join(HERE, source), *options]
    subprocess.run(command, check=True)
    return target


def build_guest(source, target, slots):
    """Compiles the guest without an operating system: a multiboot kernel."""
    part = target + ".o"
    options = "-m32 -Os -Wall -ffreestanding -fno-pic -fno-pie -fno-stack-protector -fno-toplevel-reorder".split()
    options += "-fno-asynchronous-unwind-tables -mno-sse -mno-mmx".split() + [f"-DSLOTS={slots}"]
    subprocess.run(["gcc", *options, "-c", "-o", part, os.path.join(HERE, source)], check=True)
    line = ["ld", "-m", "elf_i386", "-N", "--no-warn-rwx-segments", "-Ttext=0x100000", "-e", "_start", "-o", target, part]
    subprocess.run(line, check=True)
    os.unlink(part)
    return target


class Table:
    """A run's rules. Processes find it by its path in XF_TABLE."""

    def __init__(self, path):
        self.path = path
        with open(path, "wb") as file:
            file.write(HEADER.pack(MAGIC, os.getpid(), 0, 0) + bytes(RULES * RULE))
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)
        self.used = 0

    def add(self, call, action=GATE, *, role="", path="", text=b"", after=False, skip=0, left=1, error=0):
        """Arms a rule. `left` is how often it acts, -1 for ever; `skip` is how many matches pass before."""
        if self.used == RULES:
            raise RuntimeError("the table of rules is full")
        rule = Rule(self, HEADER.size + self.used * RULE)
        self.used += 1
        texts = [part.encode() if isinstance(part, str) else part for part in (role, path, text)]
        if any(len(part) >= TEXT for part in texts):
            raise ValueError("a text of a rule is too long")
        numbers = NUMBERS.pack(OFF, action, call, int(after), error, skip, left, 0, 0, 0)
        self.memory[rule.offset : rule.offset + RULE] = numbers + b"".join(part.ljust(TEXT, b"\0") for part in texts)
        # The state comes last: from then on the shim looks at the rest.
        rule.state = ARMED
        return rule

    def step_clock(self, host, seconds):
        """Sets by how much the time of day of one host's agents is wrong; their monotonic clocks stay."""
        struct.pack_into("<q", self.memory, 8 + 8 * ("a", "b").index(host), seconds)

    def release(self):
        """Lets everything go on, for good."""
        for number in range(self.used):
            Rule(self, HEADER.size + number * RULE).state = OFF


class Rule:
    """A rule in its table."""

    def __init__(self, table, offset):
        self.table, self.offset = table, offset

    def _number(self, index):
        return struct.unpack_from("<i", self.table.memory, self.offset + 4 * index)[0]

    @property
    def state(self):
        return self._number(0)

    @state.setter
    def state(self, value):
        struct.pack_into("<i", self.table.memory, self.offset, value)

    @property
    def hits(self):
        """How often it has acted."""
        return self._number(7)

    @property
    def process(self):
        """Who stands at the gate."""
        return self._number(8)

    def wait(self, seconds, end=lambda: False):
        """Whether it acted in time. `end` tells that there is nothing left to wait for."""
        limit = time.monotonic() + seconds
        while self.hits == 0 or (self._number(1) == GATE and self.state == ARMED):
            if time.monotonic() > limit or end():
                return self.hits > 0 and self.state == REACHED
            time.sleep(0.001)
        return True

    def go(self):
        """Opens the gate, or ends what failed so far."""
        self.state = OFF
