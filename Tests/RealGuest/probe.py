#!/usr/bin/env python3
"""Asks a guest for an echo every few milliseconds, and notes each answer; runs until it is ended.

    probe.py ADDRESS LOG MILLISECONDS

A line of LOG is an answer: the request's number, when it was sent, when the answer came (CLOCK_MONOTONIC, ns). "late" and a
duration instead of a number is a pause of this program's own. Needs root. The answers come from the guest's kernel.
"""
import os
import select
import signal
import socket
import struct
import sys
import time

IDENTIFIER = 0x7264
HEADER = struct.Struct("!BBHHH")
PAYLOAD = struct.Struct("!QQ")
LATE = 20_000_000


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def request(number, now):
    """An ICMP echo request that carries its number and its time."""
    payload = PAYLOAD.pack(number, now)
    header = HEADER.pack(8, 0, 0, IDENTIFIER, number & 0xFFFF)
    return HEADER.pack(8, 0, checksum(header + payload), IDENTIFIER, number & 0xFFFF) + payload


def answer(packet):
    """The number and the time of the request that a packet answers; nothing when it is none of ours."""
    body = packet[(packet[0] & 15) * 4 :]
    if len(body) < HEADER.size + PAYLOAD.size:
        return None
    kind, _, _, identifier, _ = HEADER.unpack_from(body)
    return PAYLOAD.unpack_from(body, HEADER.size) if (kind, identifier) == (0, IDENTIFIER) else None


def send(line, address, number, now):
    try:
        line.sendto(request(number, now), (address, 0))
    except OSError:
        pass  # nobody knows the guest's address at the moment: an answer that does not come


def probe(address, log, interval):
    line = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    line.setblocking(False)
    number, due = 0, time.monotonic_ns()
    while True:
        now = time.monotonic_ns()
        if now >= due:
            if now - due > LATE:
                log.write(f"late {due} {now}\n")
            send(line, address, number, now)
            number += 1
            due = max(due + interval, now)
        readable, _, _ = select.select([line], [], [], max(0, due - time.monotonic_ns()) / 1e9)
        if readable:
            found = answer(line.recv(2048))
            if found:
                log.write(f"{found[0]} {found[1]} {time.monotonic_ns()}\n")


def main():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        # On a busy machine it would measure its own waiting.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pass
    with open(sys.argv[2], "w", buffering=1) as log:
        probe(sys.argv[1], log, int(float(sys.argv[3]) * 1e6))


if __name__ == "__main__":
    main()
