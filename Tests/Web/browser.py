"""Drives a headless Chromium over its DevTools protocol, with nothing but Python's standard library.

    with Browser(ignore_certificate_errors=True) as browser:
        tab = browser.open("https://localhost:10810/")
        tab.wait_for("document.querySelector('h1')")
        tab.click("#sign-out")
        tab.screenshot("page.png")
        assert not tab.complaints()

Chromium's end of the protocol is a pipe: nothing listens, and nothing outlives it. Waiting is for a condition, always with a time limit.
"""
import base64
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time

TIMEOUT = 30.0
OPTIONS = [
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--no-default-browser-check", "--no-proxy-server", "--disable-background-networking", "--disable-component-update",
    "--disable-default-apps", "--disable-sync", "--disable-extensions", "--mute-audio", "--hide-scrollbars",
]  # fmt: skip

# Keys that are no characters: their code, and their number in Windows, which Chromium goes by.
KEYS = {
    "Enter": ("Enter", 13), "Tab": ("Tab", 9), "Escape": ("Escape", 27), "Backspace": ("Backspace", 8), "Delete": ("Delete", 46),
    "ArrowLeft": ("ArrowLeft", 37), "ArrowUp": ("ArrowUp", 38), "ArrowRight": ("ArrowRight", 39), "ArrowDown": ("ArrowDown", 40),
    "Home": ("Home", 36), "End": ("End", 35), "PageUp": ("PageUp", 33), "PageDown": ("PageDown", 34), "Insert": ("Insert", 45),
    "Shift": ("ShiftLeft", 16), "Control": ("ControlLeft", 17), "Alt": ("AltLeft", 18), "Meta": ("MetaLeft", 91),
    **{f"F{number}": (f"F{number}", 111 + number) for number in range(1, 13)},
}  # fmt: skip
PUNCTUATION = {
    " ": ("Space", 32), "-": ("Minus", 189), "=": ("Equal", 187), ",": ("Comma", 188), ".": ("Period", 190), "/": ("Slash", 191),
    ";": ("Semicolon", 186), "'": ("Quote", 222), "[": ("BracketLeft", 219), "]": ("BracketRight", 221), "\\": ("Backslash", 220),
    "`": ("Backquote", 192),
}  # fmt: skip
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}
BUTTONS = {"none": 0, "left": 1, "right": 2, "middle": 4}

# Runs in the page until the condition holds, which may be a promise: true, or why not at the end. While a page loads, a condition may fail
# that holds afterwards.
WAIT = """new Promise((resolve) => {
  const end = performance.now() + %d;
  const look = async () => {
    let why = "";
    try { if (await (%s)) return resolve(true); } catch (error) { why = String(error); }
    if (performance.now() > end) resolve(why);
    else setTimeout(look, 20);
  };
  look();
})"""


class BrowserError(Exception):
    """The browser has refused something, or is gone."""


@dataclasses.dataclass
class Message:
    """What a page has said in its console: `level` is `log`, `info`, `warning`, `error` and the like."""

    level: str
    text: str
    url: str = ""

    def __str__(self):
        return f"{self.level}: {self.text}" + (f" ({self.url})" if self.url else "")


class Connection:
    """The DevTools protocol over a pair of pipes: commands with their answers, and events."""

    def __init__(self, reading, writing):
        self.reading, self.writing = reading, writing
        self.numbers = itertools.count(1)
        self.changed = threading.Condition()
        self.answers, self.listeners, self.is_over = {}, {}, False
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        rest = bytearray()
        with contextlib.suppress(OSError):
            while chunk := os.read(self.reading, 1 << 16):
                rest += chunk
                if b"\0" not in chunk:
                    continue
                *messages, rest = rest.split(b"\0")
                for message in messages:
                    self.take(json.loads(message))
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    def take(self, message):
        with self.changed:
            if "id" in message:
                self.answers[message["id"]] = message
            elif listener := self.listeners.get(message.get("sessionId")):
                listener(message["method"], message["params"])
            self.changed.notify_all()

    def command(self, method, parameters, session=None, timeout=TIMEOUT):
        with self.changed:
            number = next(self.numbers)
            order = {"id": number, "method": method, "params": parameters}
            if session:
                order["sessionId"] = session
            data = memoryview(json.dumps(order).encode() + b"\0")
            try:
                while data:
                    data = data[os.write(self.writing, data) :]
            except OSError as error:
                raise BrowserError(f"{method}: the browser has ended") from error
            if not self.changed.wait_for(lambda: number in self.answers or self.is_over, timeout):
                raise TimeoutError(f"{method} was not answered in {timeout:g} s")
            if number not in self.answers:
                raise BrowserError(f"{method}: the browser has ended")
            answer = self.answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message', answer['error'])}")
        return answer["result"]

    def close(self):
        os.close(self.writing)
        self.thread.join(5)
        os.close(self.reading)


class Tab:
    """One page, with what it says in its console and the events of the domains Page, Runtime, Log and Network."""

    def __init__(self, browser, target, session):
        self.browser, self.target, self.session = browser, target, session
        self.events, self.console = [], []
        self.modifiers = 0
        browser.connection.listeners[session] = self.listen
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method, timeout=TIMEOUT, **parameters):
        """Anything else that the protocol has."""
        return self.browser.connection.command(method, parameters, self.session, timeout)

    def close(self):
        self.browser.command("Target.closeTarget", targetId=self.target)
        self.browser.connection.listeners.pop(self.session, None)

    # What it says.

    def listen(self, method, parameters):
        self.events.append((method, parameters))
        if method == "Runtime.consoleAPICalled":
            words = [str(one.get("value", one.get("description", one["type"]))) for one in parameters["args"]]
            self.console.append(Message(parameters["type"], " ".join(words)))
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            self.console.append(Message("error", text, details.get("url", "")))
        elif method == "Log.entryAdded":
            entry = parameters["entry"]
            self.console.append(Message(entry["level"], entry["text"], entry.get("url", "")))

    def complaints(self):
        """Errors and warnings, among them violations of the content security policy."""
        return [message for message in self.console if message.level in ("error", "warning", "assert")]

    def wait_for_event(self, method, condition=lambda parameters: True, since=0, timeout=TIMEOUT):
        """The parameters of the first such event since the one with number `since`: `len(tab.events)` before what causes it."""
        connection = self.browser.connection

        def found():
            fitting = (values for name, values in self.events[since:] if name == method and condition(values))
            return next(({"parameters": values} for values in fitting), None)

        with connection.changed:
            result = connection.changed.wait_for(lambda: found() or connection.is_over, timeout)
        if isinstance(result, dict):
            return result["parameters"]
        raise (BrowserError("The browser has ended") if result else TimeoutError(f"No {method} in {timeout:g} s"))

    # The page.

    def goto(self, url, timeout=TIMEOUT):
        """Shows an address; it has loaded when this returns. An address that differs in its fragment only loads nothing."""
        since = len(self.events)
        answer = self.command("Page.navigate", url=url)
        if "errorText" in answer:
            raise BrowserError(f"{url}: {answer['errorText']}")
        if "loaderId" in answer:
            self.wait_for_event("Page.loadEventFired", since=since, timeout=timeout)

    def evaluate(self, expression, timeout=TIMEOUT):
        """The value of a JavaScript expression, as JSON has it; a promise is waited for."""
        answer = self.command(
            "Runtime.evaluate", timeout, expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if details := answer.get("exceptionDetails"):
            raise BrowserError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def wait_for(self, condition, timeout=TIMEOUT):
        """Waits until a JavaScript expression is true, also across a navigation."""
        end = time.monotonic() + timeout
        why = ""
        while (left := end - time.monotonic()) > 0:
            try:
                why = self.evaluate(WAIT % (left * 1000, condition), left + TIMEOUT)
                if why is True:
                    return
            except BrowserError as error:
                # The page went away under the expression: the next one is asked.
                if not any(
                    words in str(error) for words in ("context was destroyed", "Cannot find context", "navigated or closed")
                ):
                    raise
        said = "".join(f"\n  {message}" for message in self.console[-10:])
        raise TimeoutError(f"Not in {timeout:g} s: {condition} {why}{said}")

    def text(self, selector):
        """What a reader sees of the first element that fits; None when there is none."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? null")

    def screenshot(self, path, whole=False):
        """A PNG of what is seen, or of the whole page."""
        picture = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(picture["data"]))

    def accessibility(self):
        """The nodes of the accessibility tree that are not ignored: what a screen reader has."""
        nodes = self.command("Accessibility.getFullAXTree")["nodes"]
        return [node for node in nodes if not node.get("ignored")]

    def show_as(self, width=1280, height=900, scale=1, mobile=False, **features):
        """The size of the window, and media features: `show_as(360, 740, mobile=True, prefers_color_scheme="dark")`."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile)
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.command("Emulation.setEmulatedMedia", features=wanted)

    # Keys and the mouse.

    def key_down(self, key):
        self.modifiers |= MODIFIERS.get(key, 0)
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        if self.modifiers & ~MODIFIERS["Shift"]:
            text = ""
        self.key("keyDown" if text else "rawKeyDown", key, **({"text": text} if text else {}))

    def key_up(self, key):
        self.modifiers &= ~MODIFIERS.get(key, 0)
        self.key("keyUp", key)

    def key(self, kind, key, **more):
        code, number = KEYS.get(key) or PUNCTUATION.get(key) or ("", 0)
        if not code and key.isascii() and key.isalnum():
            code, number = (f"Digit{key}" if key.isdigit() else f"Key{key.upper()}"), ord(key.upper())
        self.command(
            "Input.dispatchKeyEvent",
            type=kind,
            key=key,
            code=code,
            windowsVirtualKeyCode=number,
            modifiers=self.modifiers,
            **more,
        )

    def press(self, *keys):
        """Presses keys together: `press("Shift", "Tab")`, `press("a")`."""
        for key in keys:
            self.key_down(key)
        for key in reversed(keys):
            self.key_up(key)

    def type(self, text):
        """Types a text, key by key."""
        for character in text:
            self.press("Enter" if character == "\n" else character)

    def mouse(self, kind, x, y, button="none", **more):
        """`kind` is `mouseMoved`, `mousePressed`, `mouseReleased` or `mouseWheel`."""
        self.command(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, modifiers=self.modifiers,
            buttons=BUTTONS[button] if kind == "mousePressed" else 0, **more,
        )  # fmt: skip

    def click_at(self, x, y, button="left"):
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, button, clickCount=1)
        self.mouse("mouseReleased", x, y, button, clickCount=1)

    def click(self, selector):
        """Clicks into the middle of the first element that fits, as a person does: it must be there, seen, and not covered."""
        quoted = json.dumps(selector)
        place = self.evaluate(f"""(() => {{
          const node = document.querySelector({quoted});
          if (!node) return null;
          node.scrollIntoView({{ block: "center", behavior: "instant" }});
          const {{ x, y, width, height }} = node.getBoundingClientRect();
          const [left, top] = [x + width / 2, y + height / 2];
          const hit = document.elementFromPoint(left, top);
          return node === hit || node.contains(hit) ? [left, top] : null;
        }})()""")
        if place is None:
            raise BrowserError(f"There is nothing to click on at {selector}")
        self.click_at(*place)


class Browser:
    """A Chromium with a profile of its own, which ends and is removed with this."""

    def __init__(self, ignore_certificate_errors=False, program=None, options=()):
        self.program = program or shutil.which("chromium") or shutil.which("chromium-browser")
        if not self.program:
            raise BrowserError("There is no chromium: apt-get install chromium")
        self.profile = tempfile.mkdtemp(prefix="crossdock-browser-")
        command = [self.program, *OPTIONS, f"--user-data-dir={self.profile}", *options]
        if ignore_certificate_errors:
            command.append("--ignore-certificate-errors")
        command.append("about:blank")
        # Chromium reads descriptor 3 and writes to 4, whatever numbers the pipes have here.
        orders, answers = os.pipe(), os.pipe()
        shell = f'exec "$@" 3</dev/fd/{orders[0]} 4>/dev/fd/{answers[1]}'
        environment = {**os.environ, "HOME": self.profile}
        log = os.path.join(self.profile, "browser.log")
        with open(log, "wb") as said:
            self.process = subprocess.Popen(
                ["sh", "-c", shell, "sh", *command], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                pass_fds=(orders[0], answers[1]), start_new_session=True, env=environment,
            )  # fmt: skip
        os.close(orders[0])
        os.close(answers[1])
        self.connection = Connection(answers[0], orders[1])
        try:
            self.version = self.command("Browser.getVersion")["product"]
        except BaseException as error:
            with open(log, encoding="utf-8", errors="replace") as said:
                error.add_note(said.read()[-2000:])
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def command(self, method, timeout=TIMEOUT, **parameters):
        return self.connection.command(method, parameters, timeout=timeout)

    def context(self):
        """Cookies and storage of their own, for `open`: another person's browser."""
        return self.command("Target.createBrowserContext")["browserContextId"]

    def open(self, url="about:blank", context=None):
        """A new tab with this address, which has loaded when this returns."""
        where = {"browserContextId": context} if context else {}
        target = self.command("Target.createTarget", url="about:blank", **where)["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        if url != "about:blank":
            tab.goto(url)
        return tab

    def close(self):
        with contextlib.suppress(BrowserError, TimeoutError):
            self.command("Browser.close", timeout=5)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()
        shutil.rmtree(self.profile, ignore_errors=True)
