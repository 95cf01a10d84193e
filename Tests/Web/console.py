"""The console's page in a real Chromium, with a real guest:  python3 Tests/Web/console.py CROSSDOCK GUEST-FILES [SCREENSHOT]

Each line that it prints is a check.
"""
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(__file__))
from browser import Browser  # noqa: E402

crossdock, files = sys.argv[1], pathlib.Path(sys.argv[2])
SCREEN = "document.getElementById('screen').innerText"
SHOWS = "(text) => document.getElementById('screen').innerText.includes(text)"


def run(*arguments):
    return subprocess.run([crossdock, *arguments], check=True, capture_output=True, text=True).stdout


def check(what, holds=True):
    print(f"{'ok' if holds else 'FAILED'}  {what}", flush=True)
    if not holds:
        sys.exit(1)


with tempfile.TemporaryDirectory(prefix="console-") as work:
    state, other, pki = f"{work}/s", f"{work}/t", f"{work}/pki"
    run("pki", "init", f"{work}/ca")
    run("pki", "issue", f"{work}/ca", pki, "localhost", "127.0.0.1")
    credentials = ["--object", f"tls-creds-x509,id=tls0,dir={pki}", "--tls-creds", "tls0"]
    agent = host = None

    def start(port, state=state):
        """Starts an agent: the process, the port of its page, and its own."""
        process = subprocess.Popen(
            [crossdock, "destination", "--state-dir", state, "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0"]
            + [*credentials, "--web", f"127.0.0.1:{port}", "--guest-network", "host"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        control = None
        for line in process.stdout:
            found = re.search(r"listening on 127.0.0.1:(\d+)", line)
            control = int(found[1]) if found else control
            found = re.search(r"page at https://127.0.0.1:(\d+)", line)
            if found:
                return process, int(found[1]), control
        raise SystemExit("the agent has ended")

    try:
        agent, port, home = start(0)
        host, _, away = start(0, other)
        subprocess.run(["truncate", "-s", "16M", f"{work}/disk.raw"], check=True)
        run("guest", "start", "web1", "--state-dir", state, "--", "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max",
            "-m", "256", "-nodefaults", "-display", "none", "-kernel", str(files / "vmlinuz"), "-initrd", str(files / "initrd"),
            "-append", "console=ttyS0 quiet no_timer_check cryptomgr.notests xd.interval=100000",
            "-drive", f"file={work}/disk.raw,format=raw,if=virtio", "-serial", f"unix:{work}/serial.sock,server=on,wait=off")  # fmt: skip
        run("guest", "set", "web1", "--state-dir", state, "--console", "serial0")

        def ticket(*more):
            return re.search(r"#t=\w+", run("web", "ticket", "--state-dir", state, *more))[0]

        with Browser(ignore_certificate_errors=True) as browser:
            link = ticket("--guest", "web1")
            tab = browser.open(f"https://localhost:{port}/{link}")
            tab.wait_for("[...document.querySelectorAll('a')].some((a) => a.textContent === 'Console' && a.checkVisibility())")
            check("the page has a link to the console of a guest that is given to the agent")
            # The ticket is used up, and the browser is signed in.
            tab.goto(f"https://localhost:{port}/console/web1{link}")
            tab.wait_for(f"({SHOWS})('REC 0')", timeout=90)
            tab.wait_for("document.getElementById('connection').dataset.state === 'live'")
            check("what the guest writes is on the screen")
            check("a link that was used shows the page to who is signed in", not tab.evaluate("document.getElementById('sign-in').checkVisibility()"))
            tab.wait_for("document.getElementById('typing').textContent.startsWith('You write.')")
            tab.evaluate("document.getElementById('screen').focus()")
            tab.press("~")
            tab.wait_for(f"({SHOWS})('~')")
            check("a key goes to the guest, and its echo comes back")
            tab.wait_for("((cursor, screen) => cursor.top >= screen.top && cursor.bottom <= screen.bottom)("
                         "document.querySelector('.cursor').getBoundingClientRect(), "
                         "document.getElementById('screen').getBoundingClientRect())")  # fmt: skip
            check("the line of the cursor is seen")
            if len(sys.argv) > 3:
                tab.screenshot(sys.argv[3])

            # From here on each websocket of the page is counted.
            tab.evaluate("window.opened = 0; window.WebSocket = class extends WebSocket { "
                         "constructor(...all) { super(...all); window.opened += 1; } }; 0")  # fmt: skip

            def records():
                text = re.sub("[~@]", "", tab.evaluate(SCREEN))
                return [int(number) for number in re.findall(r"REC \S+ (\d+) \S+ *\n", text)]

            def more(what):
                last = records()[-1]
                tab.wait_for(f"Number([...document.getElementById('screen').innerText.replace(/[~@]/g, '')"
                             f".matchAll(/REC \\S+ (\\d+) \\S+ *\\n/g)].at(-1)?.[1]) > {last + 20}", timeout=90)  # fmt: skip
                found = records()
                gaps = [pair for pair in zip(found, found[1:]) if pair[1] != pair[0] + 1]
                check(f"{what}: no record is missing {gaps or ''}", not gaps)

            more("before the guest moves")
            run("migrate", "web1", f"localhost:{away}", "--state-dir", state, *credentials)
            tab.wait_for("document.getElementById('connection-text').textContent === 'Connected, the guest is on localhost'", timeout=30)
            check("the page says where the guest is")
            more("on the other host")
            tab.press("@")
            tab.wait_for(f"({SHOWS})('@')", timeout=30)
            check("a key goes to the guest on the other host")
            run("migrate", "web1", f"localhost:{home}", "--state-dir", other, *credentials)
            tab.wait_for("document.getElementById('connection-text').textContent === 'Connected'", timeout=30)
            more("at home again")
            check("the websocket was never closed", tab.evaluate("window.opened") == 0)
            check("who wrote goes on writing", tab.evaluate("document.getElementById('typing').textContent").startswith("You write."))

            reader = subprocess.Popen([crossdock, "console", "web1", "--state-dir", state], stdin=subprocess.PIPE,
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            tab.wait_for("document.getElementById('said').textContent.includes('has taken over the writing')")
            tab.wait_for("document.getElementById('take').checkVisibility()")
            check("the page says who has taken over the writing")
            tab.click("#take")
            tab.wait_for("document.getElementById('typing').textContent.startsWith('You write.')")
            check("a button takes it back")
            reader.send_signal(signal.SIGTERM)
            check("the command ends on a signal", reader.wait(10) == 128 + signal.SIGTERM)

            agent.kill()
            agent.wait()
            tab.wait_for("document.getElementById('lost').checkVisibility()", timeout=60)
            check("a sign says that the page is not connected")
            agent, _, home = start(port)
            tab.wait_for("document.getElementById('sign-in').checkVisibility()", timeout=60)
            check("a new agent knows no session of the old one: the page asks for a ticket")
            tab.goto("about:blank")
            tab.goto(f"https://localhost:{port}/console/web1{ticket('--guest', 'web1', '--view-only')}")
            tab.wait_for("document.getElementById('connection').dataset.state === 'live'")
            tab.wait_for("document.getElementById('typing').textContent.startsWith('You may look.')")
            tab.wait_for(f"({SHOWS})('REC 0')")
            check("a ticket to look lets look", not tab.evaluate("document.getElementById('take').checkVisibility()"))
            check("the ticket has left the address bar", "#" not in tab.evaluate("location.href"))
            complaints = [one for one in tab.complaints() if "401" not in str(one) and "ERR_CONNECTION" not in str(one)
                          and "WebSocket connection" not in str(one) and "403" not in str(one)]  # fmt: skip
            check(f"the browser complains of nothing {complaints or ''}", not complaints)
    finally:
        for directory in (state, other):
            subprocess.run([crossdock, "guest", "stop", "web1", "--force", "--state-dir", directory], capture_output=True)
        for process in (agent, host):
            if process:
                process.kill()
                process.wait()
