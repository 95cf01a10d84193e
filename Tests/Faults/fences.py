"""Faults of what the old copy is fenced with: names of the image that cannot be changed, or have been."""
import errno
import os

import guest
from fault import Fault
from shim import FAIL, RENAME, TRUNCATE

MADE = "an image was made on host b, though the check must refuse the guest"


def directory(scene):
    return os.path.join(scene.directory, "a")


def identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


def names(scene, file):
    """Every name that a file has below the source's directory."""
    found = []
    for where, _, files in os.walk(directory(scene)):
        for name in files:
            path = os.path.join(where, name)
            if not os.path.islink(path) and os.path.exists(path) and identity(path) == file:
                found.append(path)
    return found


def expect_the_file_itself(scene, path):
    """What is fenced in the end is the file that the guest wrote to, under each of its names."""
    file = identity(path)

    def check(scene, home):
        found = names(scene, file)
        plain = [name for name in found if ".released-" not in name]
        if home == "b" and plain:
            return [f"host a still has the guest's image under the name {name}" for name in plain]
        if home == "a" and len(plain) != len(found):
            return [f"the guest is on host a, and its image is called {found}"]
        return []

    scene.expects.checks.append(check)


def refusing(scene):
    """The check has to refuse the guest: nothing may have been made there."""
    scene.expects.homes = frozenset("a")
    # A rule that lets everything pass, and counts.
    rule = scene.table.add(TRUNCATE, FAIL, role="destination", path="/images/" + guest.NAME, left=-1, error=0)
    scene.expects.checks.append(lambda scene, home: [MADE] if rule.hits else [])
    scene.expects.checks.append(
        lambda scene, home: [] if scene.command.wait(5) else ["crossdock migrate says that the guest has moved"]
    )


def bind(scene):
    other = os.path.join(directory(scene), "other.raw")
    os.rename(scene.disk, other)
    open(scene.disk, "w").close()
    scene.mount("--bind", other, scene.disk)
    scene.expects.checks.append(lambda scene, home: [] if os.path.exists(scene.disk) else ["the bound name is gone"])


def link_symbolically(scene):
    real = os.path.join(directory(scene), "real")
    os.makedirs(real)
    path = os.path.join(real, "image")
    os.rename(scene.disk, path)
    os.symlink(path, scene.disk)
    expect_the_file_itself(scene, path)


def link_hard(scene):
    other = os.path.join(directory(scene), "other.raw")
    os.link(scene.disk, other)
    expect_the_file_itself(scene, other)


def lengthen(scene):
    path = os.path.join(directory(scene), "d" * 251 + ".raw")
    os.rename(scene.disk, path)
    scene.disk = path


def letting_go(scene, gate):
    gate.go()


def moving(scene, gate):
    """Somebody renames the image under the guest."""
    path = scene.disk + ".moved"
    os.rename(scene.disk, path)
    scene.note("the image was renamed")
    scene.expects.image = path
    expect_the_file_itself(scene, path)

    def put_back():
        os.rename(path, scene.disk)
        scene.expects.image = ""
        scene.note("the image has its name again")

    scene.expects.repair = put_back
    gate.go()


def replacing(scene, gate):
    """Somebody puts another file in the place of the image, which the guest goes on to use."""
    path = scene.disk + ".moved"
    os.rename(scene.disk, path)
    scene.kind.make_disk(scene.disk)
    scene.note("the image was replaced")
    scene.expects.image = path
    expect_the_file_itself(scene, path)
    stranger = identity(scene.disk)
    aside = scene.disk + ".aside"

    def put_back():
        os.rename(scene.disk, aside)
        os.rename(path, scene.disk)
        scene.expects.image = ""
        scene.note("the image has its name again")

    scene.expects.repair = put_back

    def check(scene, home):
        if any(os.path.exists(one) and identity(one) == stranger for one in (scene.disk, aside)):
            return []
        return ["the file that was put in the place of the image is not there any more"]

    scene.expects.checks.append(check)
    gate.go()


def failing(error):
    def inject(scene, gate):
        scene.table.add(RENAME, FAIL, role="source-agent", text=b".released-", error=error, left=-1)
        # Without a fence there is no release.
        scene.expects.homes = frozenset("a")
        gate.go()

    return inject


def fault(name, meaning, inject=letting_go, **more):
    # What is found by the check is refused there.
    is_early = "arrange" in more
    return Fault(name, meaning, inject, kind=guest.IDLE, is_bounded=False, may_end_before=is_early, **more)


FAULTS = [
    fault("image-bound", "the image's name is a mount point", arrange=bind, settle=refusing),
    fault("image-symbolic", "the image's name is a symbolic link", arrange=link_symbolically),
    fault("image-hard", "the image has two names", arrange=link_hard, settle=refusing),
    fault("image-long", "the image's name has 255 bytes", arrange=lengthen, settle=refusing),
    fault("image-renamed", "somebody renames the image", moving),
    fault("image-replaced", "somebody puts another file in the image's place", replacing),
    fault("fence-refused", "EPERM from the fence", failing(errno.EPERM)),
    fault("fence-unreadable", "EIO from the fence", failing(errno.EIO)),
]


def runs():
    found = [("check", one.name) for one in FAULTS[:4] if one.name != "image-bound" or os.geteuid() == 0]
    found += [
        (point, name)
        for name in ("image-renamed", "image-replaced")
        for point in "check offered accepted ready copy-source memory-middle pre-switchover prepared continued".split()
    ]
    found += [(point, "fence-refused") for point in "copy-source pre-switchover prepared continued".split()]
    return found + [("continued", "fence-unreadable")]
