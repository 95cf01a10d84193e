"""Requests and frames that are none, by the thousand, and honest clients meanwhile."""
import base64
import random
import ssl
import threading
import time

from judgement import check, demand
from visitors import frame

REQUESTS, FRAMES, SEED = 2400, 1200, 21
INTERESTING = [b"\0", b"\r\n", b"\r\n\r\n", b" ", b":", b"%", b"%00", b"..", b"\xff\xfe", b"Content-Length: 99999999999999999999\r\n",
               b"Transfer-Encoding: chunked\r\n", b"Content-Length: -1\r\n", b"A" * 20000, b"X: y\r\n" * 150, b"{" * 3000, b"[" * 3000, b"\\u0000"]  # fmt: skip


def mutated(data, chance):
    """A few changes at random places."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made) + 1)
        kind = chance.randrange(6)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del made[at : at + chance.randrange(1, 20)]
        elif kind == 2:
            made[at:at] = chance.choice(INTERESTING)
        elif kind == 3:
            made[at:at] = chance.randbytes(chance.randrange(1, 30))
        elif kind == 4:
            del made[at:]
        else:
            made[at:at] = made[: chance.randrange(len(made) + 1)]
    return bytes(made)


def requests(visitor):
    """Whole requests of each kind, to be changed."""
    body = b'{"action":"move","guest":"nobody","host":"nowhere"}'
    kinds = [visitor.head("GET", path) for path in ("/", "/page/app.js", "/session", "/healthz", "/readyz", "/metrics", "/reports/1796075514-5c538c")]
    kinds.append(visitor.head("POST", "/actions", {"Content-Length": str(len(body))}) + body)
    kinds.append(visitor.head("POST", "/session", {"Content-Length": "14"}) + b'{"ticket":"0"}')
    kinds.append(visitor.head("GET", "/events", upgrade()))
    return kinds


def upgrade():
    return {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": base64.b64encode(b"k" * 16).decode()}


def ask_badly(visitor, data, counts):
    try:
        visitor.connect()
        visitor.socket.sendall(data)
        visitor.socket.settimeout(0.25)
        answer = visitor.socket.recv(4096)
        status = answer.split(b" ", 2)[1].decode(errors="replace") if answer.startswith(b"HTTP/1.1 ") else "an end"
    except TimeoutError:
        status = "waits for more"
    except (ssl.SSLError, OSError):
        status = "an end"
    finally:
        visitor.close()
    counts[status] = counts.get(status, 0) + 1


def frame_badly(visitor, data, counts):
    try:
        status, _ = visitor.watch()
        if status != 101:
            counts[f"refused with {status}"] = counts.get(f"refused with {status}", 0) + 1
            return
        visitor.socket.sendall(data)
        counts["sent"] = counts.get("sent", 0) + 1
    except (ssl.SSLError, OSError):
        counts["an end"] = counts.get("an end", 0) + 1
    finally:
        visitor.close()


class Honest(threading.Thread):
    """Asks for the page, for its session and for readiness, each time over a connection of its own."""

    def __init__(self, visitor):
        super().__init__(daemon=True)
        self.visitor, self.times, self.wrong, self.is_over = visitor, [], [], threading.Event()

    def run(self):
        while not self.is_over.is_set():
            for path in ("/session", "/", "/healthz"):
                began = time.monotonic()
                try:
                    answer = self.visitor.ask("GET", path)
                    if answer.status != 200:
                        self.wrong.append(f"{path}: {answer}")
                except OSError as error:
                    self.wrong.append(f"{path}: {error}")
                self.times.append(time.monotonic() - began)


@check("malformed", f"{REQUESTS} mutated requests and {FRAMES} mutated frames leave the agent alive, honest clients served within a second, and the log short")
def malformed(world):
    b = world.lab.b
    honest = Honest(world.visitor(b))
    signed = [world.visitor(b, "--view-only") for _ in range(3)] + [world.visitor(b, signs_in=False)]
    before, log, began = b.usage(), b.log_size(), time.monotonic()
    answers, frames = {}, {}
    honest.start()

    def attack(number, visitor):
        chance = random.Random(SEED + number)
        kinds = requests(visitor)
        for _ in range(REQUESTS // len(signed)):
            ask_badly(visitor, mutated(chance.choice(kinds), chance), answers)
        # A feed is for who has a right.
        for _ in range(FRAMES // (len(signed) - 1) if visitor.cookie else 0):
            opcode, payload = chance.choice([0, 1, 2, 3, 8, 9, 10, 11, 15]), chance.randbytes(chance.choice([0, 5, 130, 70000]))
            frame_badly(visitor, mutated(frame(opcode, payload, is_final=chance.random() < 0.7), chance), frames)

    threads = [threading.Thread(target=attack, args=pair, daemon=True) for pair in enumerate(signed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(110)
    honest.is_over.set()
    honest.join(30)
    lasted = time.monotonic() - began
    demand(not any(thread.is_alive() for thread in threads), "it takes too long")
    demand(b.agent.poll() is None, f"the agent has ended: {b.logged(log)[-1500:]}")
    lines = b.logged(log).splitlines()
    after = b.usage()
    world.note(f"{lasted:.0f} s; answers {dict(sorted(answers.items()))}; frames {frames}")
    world.note(f"{len(honest.times)} honest requests, the slowest {max(honest.times):.2f} s; {len(lines)} lines in the log; "
               f"the agent: {before[0] / 2**20:.0f} MiB before, {after[0] / 2**20:.0f} after, {after[1] - before[1]:.0f} s of processors")  # fmt: skip
    for line in lines[:3] + lines[-1:]:
        world.note(line[:200])
    demand(not honest.wrong, f"{len(honest.wrong)} honest requests failed: {honest.wrong[:3]}")
    demand(max(honest.times) < 1, f"an honest client waited for {max(honest.times):.1f} s")
    demand(len(lines) <= 25 * (1 + int(lasted / 60)), f"{len(lines)} lines in the log")
    demand(after[0] - before[0] < 128 << 20, "the agent has grown by more than 128 MiB")
    demand("500" not in answers, f"{answers}")
