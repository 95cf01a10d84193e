#!/usr/bin/env python3
"""The proofs of the demo. Each works from evidence that Crossdock did not make: consoles, images, recorded bytes.

    proofs.py records CONSOLE... [--image DISK=FILE]...   the guest's record numbers have no gap and no repeat
    proofs.py digest IMAGE                                a disk's digest, by this program's own reckoning
    proofs.py tls RECORDING... [--nbd]                    everything is TLS records, without the guest's marker
"""
import argparse
import hashlib
import os
import re
import struct
import sys

RECORD = 4096
MARKER = b"CROSSDOCK-GUEST-DATA-MARKER"
CHUNK = 65536


class ProofFailed(Exception):
    """A proof does not hold; the text says what was seen."""


def fnv(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def records(consoles, images=None):
    """Checks the consoles, oldest first, and the records in the images. Returns the count of records by disk.

    A console that ends in the middle of a line goes on in the next one.
    """
    text = "".join(open(path, encoding="latin-1").read() for path in consoles)
    # The last line may still be on its way.
    lines = text.replace("\r", "").split("\n")[:-1]
    seen = {}
    sums = {}
    for line in lines:
        if line.startswith("FAIL"):
            raise ProofFailed(f"the guest could not write: {line!r}")
        if not line.startswith("REC"):
            continue
        match = re.fullmatch(r"REC (\d+) (\d+) ([0-9a-f]{16})", line)
        if not match:
            raise ProofFailed(f"a damaged line on the console: {line!r}")
        disk, number = int(match[1]), int(match[2])
        expected = seen.get(disk, -1) + 1
        if number < expected:
            raise ProofFailed(f"disk {disk}: record {number} is repeated, {expected} was due")
        if number > expected:
            raise ProofFailed(f"disk {disk}: the records {expected} to {number - 1} are missing")
        seen[disk] = number
        sums[disk, number] = int(match[3], 16)
    if not seen:
        raise ProofFailed("the consoles have no records")
    for disk, path in (images or {}).items():
        check_image(disk, path, seen, sums)
    return {disk: number + 1 for disk, number in seen.items()}


def check_image(disk, path, seen, sums):
    if disk not in seen:
        raise ProofFailed(f"disk {disk}: no records on the console")
    with open(path, "rb") as image:
        for number in range(seen[disk] + 1):
            image.seek(number * RECORD)
            record = image.read(RECORD)
            magic, found, owner = struct.unpack_from("<8sQI", record)
            if magic != b"XDRECORD" or found != number or owner != disk:
                raise ProofFailed(f"disk {disk}: record {number} is not in {path}")
            (stored,) = struct.unpack_from("<Q", record, RECORD - 8)
            if stored != sums[disk, number] or fnv(record[: RECORD - 8]) != stored:
                raise ProofFailed(f"disk {disk}: record {number} in {path} has a bad checksum")


def digest(path):
    """SHA-256 over the SHA-256 values of consecutive 64 KiB chunks, the last one as it is."""
    zero = hashlib.sha256(bytes(CHUNK)).digest()
    blank = bytes(CHUNK)
    total = hashlib.sha256()
    with open(path, "rb") as image:
        while chunk := image.read(CHUNK):
            total.update(zero if chunk == blank else hashlib.sha256(chunk).digest())
    return total.hexdigest()


def same_digest(path, *claimed):
    own = digest(path)
    for claim in claimed:
        if claim != own:
            raise ProofFailed(f"{path} has the digest {own}, but {claim} was claimed")
    return own


def skip_nbd_negotiation(data, from_client, path):
    """The offset behind STARTTLS; before it there may be nothing but the negotiation's first steps."""
    if from_client:
        start = 4
        if data[:start] not in (b"\0\0\0\3", b"\0\0\0\1"):
            raise ProofFailed(f"{path}: the client did not begin with its flags")
        if data[start : start + 16] != b"IHAVEOPT" + struct.pack(">II", 5, 0):
            raise ProofFailed(f"{path}: the first option is not STARTTLS")
        return start + 16
    if data[:16] != b"NBDMAGICIHAVEOPT":
        raise ProofFailed(f"{path}: no NBD greeting")
    if data[18:38] != struct.pack(">QIII", 0x3E889045565A9, 5, 1, 0):
        raise ProofFailed(f"{path}: STARTTLS was not acknowledged first")
    return 38


def check_tls(path, nbd=False, from_client=False):
    """Parses a recorded direction of a connection. Returns how many bytes of application data it carried."""
    data = open(path, "rb").read()
    if MARKER in data:
        raise ProofFailed(f"{path}: the guest's data went over the link in clear text")
    if not data:
        return 0
    position = skip_nbd_negotiation(data, from_client, path) if nbd else 0
    carried = 0
    while position < len(data):
        if position + 5 > len(data):
            break  # a connection may be cut within a record
        kind, version, length = struct.unpack_from(">BHH", data, position)
        if kind not in (20, 21, 22, 23) or version not in (0x0301, 0x0303) or not 0 < length <= 16384 + 256:
            raise ProofFailed(f"{path}: at {position} there is no TLS record but {data[position:position + 16]!r}")
        if kind == 23:
            carried += length
        position += 5 + length
    return carried


def tls(recordings, nbd_ports=(10809,)):
    """Checks recordings named PORT-NUMBER.client and PORT-NUMBER.server. Returns the bytes of application data."""
    carried = 0
    for path in recordings:
        port = int(os.path.basename(path).split("-")[0])
        carried += check_tls(path, nbd=port in nbd_ports, from_client=path.endswith(".client"))
    if carried == 0:
        raise ProofFailed("nothing was recorded, so nothing is proved")
    return carried


def only_there(destination, source):
    """The guest's state on both hosts: QEMU's run state, and whether there is a process."""
    if source["process"]:
        raise ProofFailed(f"the source still has process {source['process']} for the guest")
    if source["state"] == "running":
        raise ProofFailed("the guest runs on the source")
    if destination["state"] != "running":
        raise ProofFailed(f"the guest is {destination['state']} on the destination, not running")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("records")
    part.add_argument("console", nargs="+")
    part.add_argument("--image", action="append", default=[], metavar="DISK=FILE")
    part = commands.add_parser("digest")
    part.add_argument("image")
    part = commands.add_parser("tls")
    part.add_argument("recording", nargs="+")
    part.add_argument("--nbd-port", type=int, action="append", default=[])
    arguments = parser.parse_args()
    try:
        if arguments.command == "records":
            images = {int(disk): path for disk, path in (item.split("=", 1) for item in arguments.image)}
            print(records(arguments.console, images))
        elif arguments.command == "digest":
            print(digest(arguments.image))
        else:
            print(tls(arguments.recording, arguments.nbd_port or (10809,)))
    except ProofFailed as failure:
        sys.exit(f"proof failed: {failure}")


if __name__ == "__main__":
    main()
