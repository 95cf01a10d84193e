"""As much of PostgreSQL's protocol as a client needs that must know exactly what was acknowledged, and when."""
import socket
import struct

VERSION = 196608


class Refused(Exception):
    """The server has answered with an error; the text is the server's."""


class ConnectionLost(Exception):
    """The connection was closed, or broke."""


class Connection:
    def __init__(self, address, user="postgres", database="postgres"):
        self.socket = socket.create_connection((address, 5432))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = self.socket.makefile("rb")
        words = f"user\0{user}\0database\0{database}\0\0".encode()
        self._send(struct.pack("!II", len(words) + 8, VERSION) + words)
        self._until_ready()

    def execute(self, statements):
        """Carries out statements. When it returns, the server has acknowledged all of them, and no transaction is open."""
        text = statements.encode() + b"\0"
        self._send(b"Q" + struct.pack("!I", len(text) + 4) + text)
        if self._until_ready() != b"I":
            raise Refused("the server says that the transaction is still open")

    def close(self):
        """Says goodbye, so that the server need not wonder."""
        try:
            self._send(b"X" + struct.pack("!I", 4))
        except ConnectionLost:
            pass
        self.socket.close()

    def _send(self, data):
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def _read(self, count):
        try:
            data = self.reader.read(count)
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if len(data) < count:
            raise ConnectionLost("the server has closed the connection")
        return data

    def _until_ready(self):
        """Reads what the server says up to its being ready; returns the state of the transaction then."""
        error = None
        while True:
            kind = self._read(1)
            body = self._read(struct.unpack("!I", self._read(4))[0] - 4)
            if kind == b"R" and body[:4] != bytes(4):
                raise Refused("the server wants a password")
            if kind == b"E":
                fields = dict((field[:1], field[1:]) for field in body.split(b"\0") if field)
                error = fields.get(b"M", b"an error without words").decode(errors="replace")
                if fields.get(b"S") in (b"FATAL", b"PANIC"):
                    raise ConnectionLost(error)
            if kind == b"Z":
                if error:
                    raise Refused(error)
                return body
