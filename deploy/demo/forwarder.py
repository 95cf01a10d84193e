#!/usr/bin/env python3
"""Forwards TCP connections and records what goes by: DIRECTORY/PORT-NUMBER.client and .server.

    forwarder.py DIRECTORY LISTEN-ADDRESS TARGET-ADDRESS PORT...
"""
import itertools
import os
import socket
import sys
import threading

# A recording that is larger than this is not kept further: the proof reads it into memory.
LIMIT = 512 << 20


def pump(source, target, path):
    kept = 0
    with open(path, "wb") as recording:
        try:
            while data := source.recv(1 << 20):
                if kept < LIMIT:
                    recording.write(data)
                    kept += len(data)
                target.sendall(data)
        except OSError:
            pass
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        try:
            end.shutdown(how)
        except OSError:
            pass


def forward(directory, listen, target, port):
    numbers = itertools.count()
    server = socket.create_server((listen, port), backlog=64)
    print(f"forwarding {listen}:{port} to {target}:{port}", flush=True)
    while True:
        near, _ = server.accept()
        try:
            far = socket.create_connection((target, port), timeout=10)
            far.settimeout(None)
        except OSError:
            near.close()
            continue
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = os.path.join(directory, f"{port}-{next(numbers)}")
        threading.Thread(target=pump, args=(near, far, name + ".client"), daemon=True).start()
        threading.Thread(target=pump, args=(far, near, name + ".server"), daemon=True).start()


def main():
    directory, listen, target, *ports = sys.argv[1:]
    os.makedirs(directory, exist_ok=True)
    threads = [threading.Thread(target=forward, args=(directory, listen, target, int(port))) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
