"""The screen of a guest in a real Chromium with Debian's noVNC:  python3 Tests/Web/display.py CROSSDOCK [SCREENSHOT]

The guest is a boot sector that writes what its keyboard sends, as codes of set 1, to its serial port and onto its screen. Each line that is printed is
a check.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(__file__))
from browser import Browser  # noqa: E402

crossdock = sys.argv[1]
# The handler of the keyboard's interrupt writes two digits and a space for each code; an asterisk comes first. No cursor blinks.
PROGRAM = bytes.fromhex(
    "fa31c08ed88ed0bc007cc70624002a7ca32600bad403b80a20efb800b88ec031ffb02ae82700fbf4ebfd"
    "e46088c3c0e804e8110088d8240fe80a00b020e80d00b020e620cf04303c3976020407baf803eeb41fabc3"
)
CANVAS = "document.querySelector('#display canvas')"
# How many pixels are not black, and a number that tells one picture from another.
PICTURE = f"""((canvas) => {{
  if (!canvas || !canvas.width) return [0, 0];
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let [lit, sum] = [0, 0];
  for (let at = 0; at < pixels.length; at += 4) {{
    const value = pixels[at] + 256 * pixels[at + 1] + 65536 * pixels[at + 2];
    if (value) lit += 1;
    sum = (sum * 31 + value) % 4294967291;
  }}
  return [lit, sum];
}})({CANVAS})"""
SIGN = "document.getElementById('display-sign')"


def run(*arguments, check=True):
    return subprocess.run([crossdock, *arguments], check=check, capture_output=True, text=True).stdout


def check(what, holds=True):
    print(f"{'ok' if holds else 'FAILED'}  {what}", flush=True)
    if not holds:
        sys.exit(1)


def wait_for(what, condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            check(f"{what}; typed is {typed()!r}, {heard(state)!r}, {heard(f'{work}/b')!r}", False)
        time.sleep(0.05)


with tempfile.TemporaryDirectory(prefix="display-") as work:
    state, pki, serial = f"{work}/s", f"{work}/pki", pathlib.Path(f"{work}/serial")
    run("pki", "init", f"{work}/ca")
    run("pki", "issue", f"{work}/ca", pki, "localhost", "127.0.0.1")
    pathlib.Path(f"{work}/disk.raw").write_bytes(PROGRAM.ljust(510, b"\0") + b"\x55\xaa" + bytes((4 << 20) - 512))
    agents = []

    def typed():
        return serial.read_text().partition("*")[2] if serial.exists() else ""

    def start():
        serial.unlink(missing_ok=True)
        run("guest", "start", "web1", "--state-dir", state, "--", "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32",
            "-nodefaults", "-vga", "std", "-display", "none", "-drive", f"file={work}/disk.raw,format=raw,if=ide",
            "-serial", f"file:{serial}", "-vnc", f"unix:{work}/vnc.sock")  # fmt: skip
        wait_for("the guest begins", lambda: serial.exists() and "*" in serial.read_text())

    def heard(place):
        """What the guest's keyboard has sent on a host to which it has moved."""
        found = pathlib.Path(place, "guests", "web1", "run", "serial")
        return found.read_text() if found.exists() else ""

    credentials = ["--object", f"tls-creds-x509,id=tls0,dir={pki}", "--tls-creds", "tls0"]

    def ticket(*more):
        return re.search(r"#t=\w+", run("web", "ticket", "--state-dir", state, "--guest", "web1", *more))[0]

    try:
        ports = []
        for place in (state, f"{work}/b"):
            agent = subprocess.Popen(
                [crossdock, "destination", "--state-dir", place, "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0"]
                + [*credentials, "--web", "127.0.0.1:0", "--guest-network", "host"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            agents.append(agent)
            said = ""
            while not (page := re.search(r"page at https://127.0.0.1:(\d+)", said)):
                said += agent.stdout.readline() or sys.exit("an agent has ended")
            ports.append((re.search(r"listening on 127.0.0.1:(\d+)", said)[1], page[1]))
        (home, port), (there, _) = ports
        start()
        with Browser(ignore_certificate_errors=True) as browser:
            tab = browser.open(f"https://localhost:{port}/{ticket()}")
            tab.wait_for("[...document.querySelectorAll('a')].some((a) => a.textContent === 'Console' && a.checkVisibility())")
            check("the page has a link to the console of a guest that has a screen")
            tab.goto(f"https://localhost:{port}/console/web1")
            tab.wait_for("document.getElementById('connection').dataset.state === 'live'")
            tab.wait_for(f"{PICTURE}[0] > 100")
            check("the screen is shown where there is no serial console", not tab.evaluate("document.getElementById('serial').checkVisibility()"))
            if len(sys.argv) > 2:
                tab.screenshot(sys.argv[2])
            tab.click("#display canvas")
            before = tab.evaluate(PICTURE)
            tab.press("a")
            wait_for("a key goes to the guest", lambda: typed() == "1E 9E ")
            tab.wait_for(f"{PICTURE}[1] !== {before[1]}")
            check("a key goes to the guest, and the screen shows it")
            tab.press("Shift", "B")
            wait_for("modifiers go to the guest", lambda: typed() == "1E 9E 2A 30 B0 AA ")
            check("modifiers go to the guest")
            tab.click("#display-keys")
            wait_for("Ctrl-Alt-Del", lambda: typed().endswith("1D 38 E0 53 E0 D3 B8 9D "))
            check("a button presses Ctrl-Alt-Del")
            tab.click("#display-only")
            tab.click("#display canvas")
            tab.press("c")
            tab.click("#display-only")
            tab.click("#display canvas")
            count = len(typed())
            tab.press("d")
            wait_for("d", lambda: len(typed()) >= count + 6)
            check("who looks only presses nothing", typed()[count:] == "20 A0 ")

            def settled():
                """The picture, once QEMU has drawn what was typed."""
                last = None
                while (now := tab.evaluate(PICTURE)) != last:
                    last = now
                    time.sleep(1)
                return now

            sockets = [value for name, value in tab.events if name == "Network.webSocketCreated" and value["url"].endswith("/vnc")]
            check("there is one websocket for the screen", len(sockets) == 1)
            before = settled()
            run("guest", "stop", "web1", "--force", "--state-dir", state)
            tab.wait_for(f"{SIGN}.checkVisibility() && {SIGN}.textContent.includes('does not run')")
            check("a sign says why the picture stands still, and the picture stays", tab.evaluate(PICTURE) == before)
            start()
            tab.wait_for(f"!{SIGN}.checkVisibility() && document.getElementById('connection').dataset.state === 'live'")
            tab.wait_for(f"{PICTURE}[0] > 100 && {PICTURE}[1] !== {before[1]}")
            tab.press("a")
            wait_for("a key goes to the guest again", lambda: typed() == "1E 9E ")
            check("the guest that was started again is shown and typed to")
            closed = {value["requestId"] for name, value in tab.events if name == "Network.webSocketClosed"}
            created = [value for name, value in tab.events if name == "Network.webSocketCreated" and value["url"].endswith("/vnc")]
            check("the websocket was never closed", created == sockets and sockets[0]["requestId"] not in closed)

            other = browser.open(f"https://localhost:{port}/console/web1{ticket('--view-only')}", context=browser.context())
            other.wait_for("document.getElementById('connection').dataset.state === 'live'")
            other.wait_for(f"{PICTURE}[0] > 100")
            other.click("#display canvas")
            other.press("b")
            tab.press("c")
            wait_for("what the other types", lambda: len(typed()) >= len("1E 9E 2E AE "))
            check("a ticket to look lets look, and types nothing", typed() == "1E 9E 2E AE ")
            check("the ticket has left the address bar", "#" not in other.evaluate("location.href"))
            def press_until(key, condition):
                """What is typed while the guest is nowhere waits for two seconds only."""
                def pressed():
                    tab.press(key)
                    time.sleep(0.3)
                    return condition()

                wait_for(f"the guest hears {key}", pressed)

            moving = subprocess.Popen(
                [crossdock, "migrate", "web1", f"localhost:{there}", "--state-dir", state, *credentials, "--bandwidth", "1M"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            tab.wait_for(f"{SIGN}.checkVisibility() && /^Moving to localhost.*, \\d+ %, /.test({SIGN}.textContent)")
            check("a sign says how far a move is")
            before = settled()
            check("the guest moves", moving.wait(90) == 0)
            tab.click("#display canvas")
            press_until("e", lambda: heard(f"{work}/b").endswith("12 92 "))
            tab.wait_for(f"{PICTURE}[1] !== {before[1]} && !{SIGN}.checkVisibility()")
            check("the screen follows the guest to its next host, and so does what is typed")
            before = settled()
            back = subprocess.run(
                [crossdock, "migrate", "web1", f"localhost:{home}", "--state-dir", f"{work}/b", *credentials],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            check("the guest moves back", back.returncode == 0)
            press_until("f", lambda: heard(state).endswith("21 A1 "))
            tab.wait_for(f"{PICTURE}[1] !== {before[1]} && !{SIGN}.checkVisibility()")
            check("the screen is there and back, and so is what is typed")
            closed = {value["requestId"] for name, value in tab.events if name == "Network.webSocketClosed"}
            created = [value for name, value in tab.events if name == "Network.webSocketCreated" and value["url"].endswith("/vnc")]
            check("the websocket was never closed on the way", created == sockets and sockets[0]["requestId"] not in closed)
            complaints = [one for page in (tab, other) for one in page.complaints() if "404" not in str(one)
                          and "willReadFrequently" not in str(one)]  # fmt: skip
            check(f"the browser complains of nothing {complaints or ''}", not complaints)
    finally:
        for place in (state, f"{work}/b"):
            run("guest", "stop", "web1", "--force", "--state-dir", place, check=False)
        for agent in agents:
            agent.kill()
            agent.wait()
