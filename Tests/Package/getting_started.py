#!/usr/bin/env python3
"""The getting-started page, word for word, between two fresh systems with a stopwatch: each printed line is a check.

    getting_started.py PAGE PACKAGE ROOTS

The systems are namespaces and have no systemd: what the page says of that is tried too. Needs root.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from root import Root

MOST_COMMANDS, MOST_SECONDS = 5, 60


def commands(page):
    """What the page has the reader type: (host, command line)."""
    with open(page, encoding="utf-8") as file:
        return re.findall(r"^    (host-[ab])# (.*)$", file.read(), re.M)


def connect(one, other):
    """A cable between two roots, and names that lead to their ends."""
    subprocess.run(["ip", "link", "add", "eth0", "netns", str(one.process), "type", "veth", "peer", "name", "eth0",
                    "netns", str(other.process)], check=True)
    for root, address in ((one, "10.96.0.1"), (other, "10.96.0.2")):
        root.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        root.run("ip", "link", "set", "eth0", "up")
        root.write("/etc/hosts", "127.0.0.1 localhost\n10.96.0.1 host-a\n10.96.0.2 host-b\n")


def serve_ssh(client, server):
    """What the page asks for before it begins: `ssh root@host-b` works."""
    client.shell("mkdir -pm 700 /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519")
    server.shell("mkdir -pm 700 /root/.ssh /run/sshd")
    server.write("/root/.ssh/authorized_keys", client.read("/root/.ssh/id_ed25519.pub"), 0o600)
    key = server.shell("cat /etc/ssh/ssh_host_ed25519_key.pub").stdout
    client.write("/root/.ssh/known_hosts", f"host-b {key}", 0o600)
    daemon = subprocess.Popen(server.command(["/usr/sbin/sshd", "-D"]))
    limit = time.monotonic() + 60
    while client.run("ssh", "-o", "BatchMode=yes", "root@host-b", "true", check=False).returncode != 0:
        if time.monotonic() > limit:
            raise AssertionError("ssh root@host-b does not work")
        time.sleep(0.1)
    return daemon


def start_agents(said, roots):
    """Without systemd the operator starts what `pair` names: `note  on HOST, start its agent: COMMAND`."""
    agents = []
    for name, command in re.findall(r"^note  on (host-[ab]), start its agent: (.*)$", said, re.M):
        agents.append(subprocess.Popen(roots[name].command(command.split()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        limit = time.monotonic() + 60
        while roots[name].shell("ss -ltn | grep -q :10808", check=False).returncode != 0:
            if time.monotonic() > limit:
                raise AssertionError(f"the agent of {name} does not listen")
            time.sleep(0.05)
    if len(agents) != 2:
        raise AssertionError(f"pair did not say how to start the agents:\n{said}")
    return agents


def follow(suite, page, package, roots, directory):
    """Does what the page says, on one release."""
    one = Root(os.path.join(roots, suite), os.path.join(directory, "a"), "host-a")
    other = Root(os.path.join(roots, suite), os.path.join(directory, "b"), "host-b")
    hosts = {"host-a": one, "host-b": other}
    processes = []
    try:
        connect(one, other)
        processes.append(serve_ssh(one, other))
        one.put(package, f"/root/{os.path.basename(package)}")
        one.shell("truncate -s 32M /srv/web1.raw && dd if=/dev/urandom of=/srv/web1.raw bs=1M count=4 seek=9 conv=notrunc status=none")
        words = commands(page)
        if not 0 < len(words) <= MOST_COMMANDS:
            raise AssertionError(f"the page has {len(words)} commands")
        spent = 0.0
        for host, command in words:
            began = time.monotonic()
            answer = hosts[host].shell(f"cd /root && {command}")
            seconds = time.monotonic() - began
            spent += seconds
            print(f"ok    {suite}: {seconds:5.1f} s  {host}# {command[:90]}", flush=True)
            if command.startswith("crossdock pair"):
                processes += start_agents(answer.stdout, hosts)
            if command.startswith("crossdock doctor") and "Guests can move" not in answer.stdout:
                raise AssertionError(answer.stdout)
        there = other.run("crossdock", "guest", "list").stdout
        here = one.run("crossdock", "guest", "list").stdout
        if not re.search(r"web1\s+running", there) or re.search(r"web1\s+running", here):
            raise AssertionError(f"web1 does not run on host-b alone:\n{here}\n{there}")
        print(f"ok    {suite}: web1 runs on host-b, and only there")
        keys = [root.read("/etc/pki/crossdock/server-key.pem") for root in (one, other)]
        if keys[0] == keys[1] or os.path.exists(other.path("/etc/pki/crossdock-ca")):
            raise AssertionError("a key has left its host")
        print(f"ok    {suite}: each host has made its own key, and the authority's is on one of them")
        print(f"{'ok   ' if spent < MOST_SECONDS else 'slow '} {suite}: {len(words)} commands, {spent:.1f} s")
    finally:
        for process in processes:
            process.kill()
        one.close()
        other.close()


def main(page, package, roots):
    if os.geteuid() != 0:
        sys.exit("package: needs root, for namespaces and fresh systems")
    for suite in ("bookworm", "trixie"):
        directory = tempfile.mkdtemp(prefix="xd-start-", dir="/tmp")
        try:
            follow(suite, page, package, roots, directory)
        except AssertionError as error:
            sys.exit(f"FAILED {suite}: {error}")
        finally:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
