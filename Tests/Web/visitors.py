"""Who visits an agent's page without a browser: requests and viewers of the feed, with nothing but Python's standard library."""
import base64
import contextlib
import json
import os
import selectors
import socket
import ssl
import struct
import time
import urllib.parse

COOKIE = "__Host-crossdock"


def context(authority=None, certificate=None):
    """TLS as a browser does it; a certificate is a pair of files."""
    made = ssl.create_default_context(cafile=authority)
    if certificate:
        made.load_cert_chain(*certificate)
    return made


class Answer:
    def __init__(self, status, fields, body):
        self.status, self.fields, self.body = status, fields, body

    @property
    def json(self):
        return json.loads(self.body or b"null")

    def __str__(self):
        return f"{self.status} {self.body[:300].decode(errors='replace')}"


class Visitor:
    """A connection, with a session when it has signed in. `origin` is where a page that asks would be from."""

    def __init__(self, tls, url, timeout=20):
        address = urllib.parse.urlsplit(url)
        self.tls, self.host, self.port, self.timeout = tls, address.hostname, address.port, timeout
        self.authority = f"{self.host}:{self.port}"
        self.origin = f"https://{self.authority}"
        self.cookie, self.socket = None, None

    def connect(self):
        plain = socket.create_connection((self.host, self.port), self.timeout)
        self.socket = self.tls.wrap_socket(plain, server_hostname=self.host)
        return self.socket

    def close(self):
        if self.socket:
            self.socket.close()
            self.socket = None

    def head(self, method, path, fields=(), body=b""):
        given = {"Host": self.authority, "Origin": self.origin}
        if self.cookie:
            given["Cookie"] = self.cookie
        if body:
            given["Content-Length"] = str(len(body))
        given.update(fields)
        lines = [f"{method} {path} HTTP/1.1"] + [f"{name}: {value}" for name, value in given.items() if value is not None]
        return "\r\n".join([*lines, "", ""]).encode()

    def ask(self, method, path, body=None, fields=()):
        """A request over a connection of its own, or over the one that is open."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        is_own = self.socket is None
        if is_own:
            self.connect()
        try:
            self.socket.sendall(self.head(method, path, fields, data) + data)
            return read_answer(self.socket)
        finally:
            if is_own:
                self.close()

    def sign_in(self, url):
        answer = self.ask("POST", "/session", {"ticket": url.split("#t=")[1]})
        if answer.status == 204:
            self.cookie = answer.fields["set-cookie"].split(";")[0]
        return answer

    def watch(self, fields=()):
        """Asks for the feed; the status, and the connection when that is 101."""
        self.connect()
        key = base64.b64encode(os.urandom(16)).decode()
        more = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key, **dict(fields)}
        self.socket.sendall(self.head("GET", "/events", more))
        head, rest = read_head(self.socket)
        status = int(head.split(b" ", 2)[1])
        if status != 101:
            self.close()
        return status, rest


def read_head(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError(f"the connection has ended in a head: {data[:100]}")
        data += piece
    head, rest = data.split(b"\r\n\r\n", 1)
    return head, rest


def read_answer(connection):
    head, body = read_head(connection)
    lines = head.decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
    length = int(fields.get("content-length", 0))
    while len(body) < length:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError("the connection has ended in a body")
        body += piece
    return Answer(int(lines[0].split()[1]), fields, body)


def frame(opcode, payload=b"", mask=b"\1\2\3\4", is_final=True):
    """A frame of a client."""
    length = len(payload)
    size = bytes([128 | length]) if length < 126 else struct.pack(">BH", 254, length) if length < 65536 else struct.pack(">BQ", 255, length)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes([(128 if is_final else 0) | opcode]) + size + mask + masked


class Viewer:
    """Reads the feed from a socket that does not block: its lines, when they came, and how it ended."""

    def __init__(self, connection, rest=b"", keeps=True):
        connection.setblocking(False)
        self.connection, self.keeps = connection, keeps
        self.raw, self.text = bytearray(rest), b""
        self.lines, self.times, self.ended = [], [], None
        self.longest = 0.0
        self.parse()

    def read(self):
        try:
            while piece := self.connection.recv(1 << 18):
                self.raw += piece
            self.ended = self.ended or "end"
        except (ssl.SSLWantReadError, BlockingIOError):
            pass
        except OSError as error:
            self.ended = self.ended or str(error)
        self.parse()

    def parse(self):
        while len(self.raw) >= 2:
            length, at = self.raw[1] & 127, 2
            if length >= 126:
                size = 2 if length == 126 else 8
                if len(self.raw) < at + size:
                    return
                length, at = int.from_bytes(self.raw[at : at + size], "big"), at + size
            if len(self.raw) < at + length:
                return
            opcode, payload = self.raw[0] & 15, bytes(self.raw[at : at + length])
            del self.raw[: at + length]
            if opcode == 9:
                with contextlib.suppress(OSError):
                    self.connection.send(frame(10, payload))
            elif opcode == 8:
                self.ended = self.ended or "closed"
            elif opcode in (0, 1, 2):
                self.take(payload)

    def take(self, payload):
        *whole, self.text = (self.text + payload).split(b"\n")
        now = time.monotonic()
        if self.times and whole:
            self.longest = max(self.longest, now - self.times[-1])
        for line in whole:
            if line.strip():
                self.times.append(now)
                self.lines.append(json.loads(line) if self.keeps else None)

    def sections(self, name):
        return [line["value"] if "value" in line else None for line in self.lines if line.get("section") == name]

    def latest(self, name):
        return next((line.get("value") for line in reversed(self.lines) if line.get("section") == name), None)

    def events(self):
        return [line for line in self.lines if "event" in line]


class Crowd:
    """Many viewers in this process, whose sockets are looked at together."""

    def __init__(self, viewers):
        self.viewers = viewers
        self.selector = selectors.DefaultSelector()
        for viewer in viewers:
            self.selector.register(viewer.connection, selectors.EVENT_READ, viewer)

    def read_until(self, condition, seconds):
        """Reads until a condition holds; whether it did."""
        end = time.monotonic() + seconds
        for viewer in self.viewers:
            viewer.read()
        while not condition():
            if time.monotonic() > end:
                return False
            self.read_once()
        return True

    def read_once(self, patience=0.05):
        for key, _ in self.selector.select(patience):
            key.data.read()
            if key.data.ended:
                self.selector.unregister(key.data.connection)

    def close(self):
        self.selector.close()
        for viewer in self.viewers:
            viewer.connection.close()


def gather(tls, host, number, *, of_session=32, keeps=True, receive=None):
    """So many viewers of a host, with as many sessions as that takes."""
    viewers, visitor = [], None
    for index in range(number):
        if index % of_session == 0:
            cookie = Visitor(tls, host.origin)
            answer = cookie.sign_in(host.ticket("--view-only"))
            if answer.status != 204:
                raise ConnectionError(f"a ticket was refused: {answer}")
        visitor = Visitor(tls, host.origin)
        visitor.cookie = cookie.cookie
        if receive:
            visitor.connect = lambda visitor=visitor: narrow(visitor, receive)
        status, rest = visitor.watch()
        if status != 101:
            raise ConnectionError(f"viewer {index} was refused with {status}")
        viewers.append(Viewer(visitor.socket, rest, keeps))
    return viewers


def narrow(visitor, receive):
    """Connects with a small window."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    plain.settimeout(visitor.timeout)
    plain.connect((visitor.host, visitor.port))
    visitor.socket = visitor.tls.wrap_socket(plain, server_hostname=visitor.host)
    return visitor.socket


