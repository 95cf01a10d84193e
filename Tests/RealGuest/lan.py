"""The network that the guest serves: a bridge on each host, which the host calls as it likes, and a switch with the clients between them.

It has wires of its own, so that what goes between the hosts does not stand in the clients' way.
"""
import os
import subprocess

from hosts import quiet, wait

CLIENTS, GUEST = "10.95.0.1", "10.95.0.10"
BRIDGES = {"a": "br-front", "b": "br-guests"}
# The tap that the operator of the guest's first host has made for it.
TAP = "tap-db1"


class Lan:
    """Belongs to a fleet: what is made here ends with the fleet's namespaces."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        fleet.processes.append(self.holder)
        wait("the clients' namespace", lambda: os.readlink(f"/proc/{self.holder.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        self._make_bridge(self.words(), "lan")
        quiet(*self.words("ip", "address", "add", CLIENTS + "/24", "dev", "lan"))
        for host in fleet.hosts.values():
            self._connect(host)
        first = self._inside(fleet.hosts["a"])
        quiet(*first, "ip", "tuntap", "add", TAP, "mode", "tap")
        quiet(*first, "ip", "link", "set", TAP, "master", BRIDGES["a"], "up")

    def words(self, *words):
        """The words that carry out something where the clients are."""
        return ["nsenter", "-t", str(self.holder.pid), "-n", "--", *words]

    def _inside(self, host):
        return ["nsenter", "-t", str(host.holder_child()), "-n", "--"]

    def _make_bridge(self, inside, name):
        # There can be no loop: a new port need not wait.
        quiet(*inside, "ip", "link", "add", name, "type", "bridge", "forward_delay", "0")
        quiet(*inside, "ip", "link", "set", name, "up")

    def _connect(self, host):
        wire = f"xg{os.getpid() % 100000}{host.name}"
        quiet("ip", "link", "add", wire, "type", "veth", "peer", "name", wire + "m")
        quiet("ip", "link", "set", wire, "netns", str(host.holder_child()))
        quiet("ip", "link", "set", wire + "m", "netns", str(self.holder.pid))
        self._mount(host)
        self._make_bridge(self._inside(host), BRIDGES[host.name])
        quiet(*self._inside(host), "ip", "link", "set", wire, "master", BRIDGES[host.name], "up")
        quiet(*self.words("ip", "link", "set", wire + "m", "master", "lan", "up"))

    def _mount(self, host):
        """What an installed host has: a /sys that tells of its own network, and a way to taps for every user, as udev makes it."""
        tun = os.path.join(host.directory, "tun")
        quiet("mknod", "-m", "0666", tun, "c", "10", "200")
        inside = ["nsenter", "-t", str(host.holder_child()), "-n", "-m", "--", "mount"]
        quiet(*inside, "-t", "sysfs", "none", "/sys")
        quiet(*inside, "--bind", tun, "/dev/net/tun")
