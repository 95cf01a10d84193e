"""A web server over TLS with byte ranges and a password: what QEMU's https disks need.

    https.py DIRECTORY CERTIFICATES USER PASSWORD
"""
import base64
import http.server
import os
import ssl
import sys

directory, certificates, user, password = sys.argv[1:]
expected = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *arguments):
        pass

    def answer(self, with_body):
        if self.headers.get("Authorization") != expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="test"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = os.path.join(directory, os.path.basename(self.path))
        size = os.path.getsize(path)
        first, last = 0, size - 1
        wanted = self.headers.get("Range")
        if wanted:
            begin, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(begin), min(int(end or size - 1), size - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if with_body:
            with open(path, "rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))


server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(f"{certificates}/server-cert.pem", f"{certificates}/server-key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
print(f"port {server.server_address[1]}", flush=True)
server.serve_forever()
