#!/usr/bin/env python3
"""What the Debian package does: each printed line is a check.

    package.py PACKAGE ROOTS GUEST PROGRAM

PACKAGE is the .deb, ROOTS the directory of Tests/Package/roots, GUEST that of deploy/guest/build, PROGRAM what was packed. Needs root.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from root import Root

BUILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../deploy/package/build")
MOST_BYTES = 16 << 20
ENABLED = {f"crossdock-{name}.service" for name in ("hold", "destination", "evacuate", "guests", "recover")}
ENABLED |= {f"crossdock-{name}.timer" for name in ("prune", "renew")}


def say(text):
    print(f"ok    {text}", flush=True)


def expect(condition, text, detail=""):
    if not condition:
        raise AssertionError(f"{text}\n{detail}")
    say(text)


def field(package, name):
    return subprocess.run(["dpkg-deb", "-f", package, name], check=True, capture_output=True, text=True).stdout.strip()


def check_file(package):
    """What the file says of itself."""
    lint = subprocess.run(["lintian", "--allow-root", "--fail-on", "error,warning", package], capture_output=True, text=True, check=False)
    expect(lint.returncode == 0 and not re.search("^[EW]:", lint.stdout, re.M), "lintian has nothing to say", lint.stdout + lint.stderr)
    size = os.path.getsize(package)
    expect(size < MOST_BYTES, f"the package has {size / 1e6:.1f} MB, {int(field(package, 'Installed-Size')) / 1024:.0f} MiB installed")
    depends = field(package, "Depends")
    expect("swift" not in depends.lower(), f"it depends on {depends}")


def check_bytes(package, program):
    """The same program packed again."""
    with open(package, "rb") as file:
        before = file.read()
    subprocess.run([BUILD, program], check=True, stdout=subprocess.DEVNULL)
    with open(package, "rb") as file:
        expect(file.read() == before, "the same program gives the same package, byte for byte")


def another_version(package, version, directory):
    """The same package with another version."""
    tree = os.path.join(directory, "tree")
    shutil.rmtree(tree, ignore_errors=True)
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
    control = os.path.join(tree, "DEBIAN", "control")
    with open(control, encoding="utf-8") as file:
        text = re.sub(r"^Version: .*$", f"Version: {version}", file.read(), flags=re.M)
    with open(control, "w", encoding="utf-8") as file:
        file.write(text)
    path = os.path.join(directory, f"crossdock-{version}.deb")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, path], check=True, stdout=subprocess.DEVNULL)
    return path


def emulators(root):
    answer = root.run("pgrep", "-x", "qemu-system-x86", check=False).stdout.split()
    return [int(word) for word in answer if word.isdigit()]


def check_root(suite, package, roots, guest, directory):
    """Install, use, upgrade, remove and purge, on one release."""
    root = Root(os.path.join(roots, suite), os.path.join(directory, suite), "host-a")
    try:
        root.put(another_version(package, "0.0.1", directory), "/old.deb")
        root.put(package, "/new.deb")
        for name in ("vmlinuz", "initrd"):
            root.put(os.path.join(guest, name), f"/{name}")
        began = time.monotonic()
        install = root.run("apt-get", "install", "-y", "--no-install-recommends", "/old.deb")
        expect(True, f"{suite}: it installs in {time.monotonic() - began:.1f} s")
        expect("0 newly installed" not in install.stdout, f"{suite}: nothing else is needed", install.stdout)
        libraries = root.run("ldd", "/usr/bin/crossdock").stdout
        expect("swift" not in libraries and "not found" not in libraries, f"{suite}: the program runs without Swift's libraries", libraries)
        version = field(package, "Version")
        expect(root.run("crossdock", "--version").stdout.strip() == f"crossdock {version}", f"{suite}: crossdock --version says {version}")

        verified = root.run("sh", "-c", "systemd-analyze verify --man=no /*/systemd/system/crossdock-* /usr/lib/systemd/system/crossdock-*.service "
                            "2>&1 | grep -i crossdock", check=False).stdout
        expect(verified == "", f"{suite}: systemd understands the units", verified)
        enabled = root.run("sh", "-c", "cd /etc/systemd/system && find . -name 'crossdock-*' | sort").stdout.split()
        expect({os.path.basename(link) for link in enabled} == ENABLED, f"{suite}: {len(ENABLED)} units are enabled", "\n".join(enabled))
        expect("RestartPreventExitStatus" in root.shell("cat /usr/lib/systemd/system/crossdock-destination.service").stdout,
               f"{suite}: the units are where systemd looks")
        conf = root.run("crossdock", "destination", check=False)
        expect(conf.returncode == 12 and "crossdock pki" in conf.stdout, f"{suite}: a host without certificates is told what to do", conf.stdout)
        for page in ("crossdock.1", "crossdock-migrate.1", "crossdock.7"):
            found = root.shell(f"ls /usr/share/man/man{page[-1]}/{page}.gz", check=False)
            expect(found.returncode == 0, f"{suite}: there is {page}", found.stdout)
        expect(root.shell(". /usr/share/bash-completion/completions/crossdock && type _crossdock >/dev/null", check=False).returncode == 0
               or root.run("bash", "-c", ". /usr/share/bash-completion/completions/crossdock && complete -p crossdock").returncode == 0,
               f"{suite}: bash completes")
        flags = json.loads(root.run("crossdock", "--experimental-dump-help").stdout)["command"]["subcommands"]
        flags = next(c for c in flags if c["commandName"] == "destination")["arguments"]
        known = root.read("/etc/crossdock/destination")
        missing = [a["names"][-1]["name"] for a in flags if a["shouldDisplay"] and f"--{a['names'][-1]['name']}" not in known]
        expect(set(missing) <= {"help", "version"}, f"{suite}: /etc/crossdock/destination explains every flag", " ".join(missing))

        # A guest, which nothing that happens to the package may end.
        root.run("crossdock", "guest", "start", "web1", "--", "qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults",
                 "-display", "none", "-kernel", "/vmlinuz", "-initrd", "/initrd")
        running = emulators(root)
        expect(len(running) == 1, f"{suite}: a guest runs")
        root.shell("echo '# of the operator' >>/etc/crossdock/policy")
        root.run("apt-get", "install", "-y", "--no-install-recommends", "/new.deb")
        expect(emulators(root) == running, f"{suite}: an upgrade leaves the guest running")
        expect("# of the operator" in root.read("/etc/crossdock/policy"), f"{suite}: and the configuration as it was")
        listed = root.run("crossdock", "guest", "list").stdout
        expect("web1" in listed, f"{suite}: the new version knows the guest", listed)

        gone = root.run("apt-get", "remove", "-y", "crossdock")
        expect(emulators(root) == running, f"{suite}: a removal leaves the guest running")
        expect("web1" in gone.stdout and "/var/lib/crossdock" in gone.stdout, f"{suite}: and says what it leaves", gone.stdout)
        expect(os.path.exists(root.path("/etc/crossdock/policy")), f"{suite}: and leaves the configuration")
        root.run("apt-get", "purge", "-y", "crossdock")
        left = root.shell("find / -xdev -path /proc -prune -o -iname '*crossdock*' -print | grep -v '^/var/lib/crossdock'", check=False).stdout
        expect(left == "", f"{suite}: a purge leaves /var/lib/crossdock alone", left)
        expect(emulators(root) == running, f"{suite}: with the guest running still")
    finally:
        root.close()


def main(package, roots, guest, program):
    if os.geteuid() != 0:
        sys.exit("package: needs root, for namespaces and fresh systems")
    directory = tempfile.mkdtemp(prefix="xd-package-", dir="/tmp")
    began = time.monotonic()
    try:
        check_file(package)
        check_bytes(package, program)
        for suite in ("bookworm", "trixie"):
            check_root(suite, package, roots, guest, directory)
    except AssertionError as error:
        sys.exit(f"FAILED {error}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"All checks passed in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main(*sys.argv[1:5])
