"""Crossdock as it is installed on one host of a test: its directories, its certificates, and its command lines."""
import os
import subprocess

CONTROL_PORT, NBD_PORT = 10808, 10809


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, program, directory):
        self.program, self.directory = program, directory
        self._pki("init", directory)

    def issue(self, directory, *names):
        """Makes a host's directory of credentials, good for all its names and addresses."""
        self._pki("issue", self.directory, directory, *names)

    def _pki(self, *words):
        subprocess.run([self.program, "pki", *words], check=True, stdout=subprocess.DEVNULL)


class Installation:
    def __init__(self, program, directory, pki=None, state="state"):
        self.program, self.directory = program, directory
        self.pki = pki or os.path.join(directory, "pki")
        self.state = os.path.join(directory, state)
        self.images = os.path.join(directory, "images")

    def run_directory(self, guest):
        """Where the sockets and files of a guest that came are, such as its console's."""
        return os.path.join(self.state, "guests", guest, "run")

    def credentials(self, pki=None):
        return ["--object", f"tls-creds-x509,id=tls0,dir={pki or self.pki}", "--tls-creds", "tls0"]

    def destination(self, address, *options, pki=None):
        """The agent that receives guests at an address."""
        os.makedirs(self.images, mode=0o711, exist_ok=True)
        words = [self.program, "destination", "--state-dir", self.state, "--image-dir", self.images]
        words += ["--listen", f"{address}:{CONTROL_PORT}", "--nbd-listen", f"{address}:{NBD_PORT}"]
        return words + self.credentials(pki) + list(options)

    def migrate(self, guest, host, *options):
        words = [self.program, "migrate", guest, f"{host}:{CONTROL_PORT}", "--state-dir", self.state]
        return words + self.credentials() + list(options)

    def start_guest(self, guest, line):
        return [self.program, "guest", "start", guest, "--state-dir", self.state, "--", *line]
