"""A host of the package's tests: a fresh Debian in namespaces of its own, over whose files its changes lie."""
import os
import subprocess
import time


class Root:
    """A Debian with its own files, processes and network. Needs root. `close` ends everything in it and removes what it wrote."""

    def __init__(self, base, directory, name):
        self.base, self.directory, self.name = base, directory, name
        self.files = os.path.join(directory, "root")
        self.holder = None
        for part in ("root", "changes", "work", "changed"):
            os.makedirs(os.path.join(directory, part), exist_ok=True)
        # A file system of its own, for what is written: an overlay cannot lie on another one.
        script = f"""
            set -e
            mount --make-rprivate /
            mount -t tmpfs -o mode=755 none {directory}/changed
            mkdir {directory}/changed/upper {directory}/changed/work
            mount -t overlay -o lowerdir={base},upperdir={directory}/changed/upper,workdir={directory}/changed/work none {self.files}
            mount -t proc none {self.files}/proc
            mount -t tmpfs -o mode=755 none {self.files}/run
            mount -t tmpfs -o mode=755 none {self.files}/dev
            for device in null zero full random urandom tty; do
                touch {self.files}/dev/$device
                mount --bind /dev/$device {self.files}/dev/$device
            done
            mkdir {self.files}/dev/pts {self.files}/dev/shm
            mount -t devpts -o newinstance,ptmxmode=666 none {self.files}/dev/pts
            ln -s pts/ptmx {self.files}/dev/ptmx
            ln -s /proc/self/fd {self.files}/dev/fd
            ln -s /proc/self/fd/0 {self.files}/dev/stdin
            ln -s /proc/self/fd/1 {self.files}/dev/stdout
            ln -s /proc/self/fd/2 {self.files}/dev/stderr
            hostname {name}
            ip link set lo up
            touch {directory}/up
            exec chroot {self.files} sh -c 'while :; do sleep 1000 & wait; done'
        """
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "sh", "-c", script]
        )
        limit = time.monotonic() + 60
        while not os.path.exists(os.path.join(directory, "up")):
            if self.holder.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"package: the root of {name} did not come up")
            time.sleep(0.02)

    @property
    def process(self):
        """The first process in it, as the outside knows it."""
        with open(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children", encoding="utf-8") as children:
            return int(children.read().split()[0])

    def command(self, words):
        return ["nsenter", "-t", str(self.process), "-n", "-m", "-p", "-u", "-i", "-r", "-w", "--",
                "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb", *words]

    def run(self, *words, check=True, **options):
        """Runs a command in it; what it says, on both streams, is the answer's `stdout`."""
        answer = subprocess.run(self.command(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                                **options)
        if check and answer.returncode != 0:
            raise AssertionError(f"{self.name}: {' '.join(words)} ended with {answer.returncode}:\n{answer.stdout}")
        return answer

    def shell(self, text, **options):
        return self.run("sh", "-c", text, **options)

    def path(self, name):
        """A file of it, as the outside reads and writes it."""
        return f"/proc/{self.process}/root{name}"

    def write(self, name, text, mode=0o644):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.path(name), mode)

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def put(self, file, name):
        with open(file, "rb") as source, open(self.path(name), "wb") as target:
            target.write(source.read())

    def close(self):
        if self.holder is not None:
            self.holder.kill()
            self.holder.wait()
        subprocess.run(["rm", "-rf", self.directory], check=False)
