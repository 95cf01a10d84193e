"""Who gets in, and what a page of somebody else can do."""
import http.server
import json
import ssl
import threading
import time

from judgement import check, demand
from lab import wait_until


def entry(world, url, context=None):
    """A page with a ticket that is not expected to be good; what it says."""
    page = world.page(world.lab.a, url=url, context=context)
    page.expected.add("status of 403")
    page.wait("document.getElementById('sign-in').checkVisibility()")
    return page, page.text("sign-in-reason")


def places(page):
    """The addresses that the browser knows of: where it is, and where it was."""
    entries = page.tab.command("Page.getNavigationHistory")["entries"]
    return [page.value("location.href"), page.value("document.referrer"), *(one["url"] for one in entries)]


@check("tickets", "a ticket leaves the address bar and the browser's history, is good once, and says so the second time")
def once(world):
    a = world.lab.a
    url = a.ticket()
    secret = url.split("#t=")[1]
    page = world.page(a, url=url)
    page.wait("document.getElementById('connection').dataset.state === 'live'")
    demand(not any(secret in place for place in places(page)), f"{places(page)}")
    kept = page.value("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])")
    demand(kept == '["",{},{}]', f"the page keeps {kept}")
    cookies = page.tab.command("Network.getCookies")["cookies"]
    demand(len(cookies) == 1, f"{cookies}")
    cookie = cookies[0]
    demand(cookie["name"] == "__Host-crossdock" and cookie["httpOnly"] and cookie["secure"] and cookie["sameSite"] == "Strict", f"{cookie}")
    again, said = entry(world, url)
    demand("was used" in said, said)
    demand(not any(secret in place for place in places(again)), f"{places(again)}")
    world.note(f"used: {said!r}")
    # The link that is typed into the field of the page opens it as well.
    fresh = a.ticket("--view-only")
    again.tab_to("sign-in-ticket")
    again.tab.type(fresh)
    again.press("Enter")
    again.wait("document.getElementById('connection').dataset.state === 'live'")
    demand(not again.is_shown("#sign-in"), "the page still asks for a ticket")
    again.tab.close()
    page.tab.close()


@check("tickets", "a ticket that has expired is refused, as is one that never was")
def expired(world):
    made = time.monotonic()
    url = world.lab.a.ticket("--ttl", "1s")
    wait_until("the end of the ticket", lambda: time.monotonic() - made > 1.5)
    page, said = entry(world, url)
    demand("expired" in said, said)
    page.tab.close()
    page, said = entry(world, url.split("#")[0] + "#t=" + "0" * 64)
    demand("none such" in said, said)
    page.tab.close()
    page, said = entry(world, url.split("#")[0])
    demand(said == "This page shows nothing without a ticket.", said)
    page.tab.close()


class Thief:
    """A server of somebody else's page, by TLS with a certificate that the browser takes."""

    def __init__(self, address, pki):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = b"<!doctype html><title>A page of somebody else</title><p>Look at this."
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer((address, 0), Handler)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(f"{pki}/server-cert.pem", f"{pki}/server-key.pem")
        self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://{address}:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def steal(world, page, thief):
    """What a page of the thief gets when the browser has a session of the agent: the statuses of its requests."""
    a = world.lab.a
    other = world.page(a, url=thief.url, context=page.context)
    other.expected |= {"", "status of"}
    order = json.dumps({"action": "cordon", "message": "stolen"})
    got = {}
    for name, path, options in (
        ("an action by fetch", "/actions", {"method": "POST", "mode": "no-cors", "credentials": "include", "body": order}),
        ("an action by fetch with CORS", "/actions", {"method": "POST", "mode": "cors", "credentials": "include", "body": order,
                                                      "headers": {"Content-Type": "application/json"}}),
        ("a sign-out", "/session", {"method": "DELETE", "mode": "cors", "credentials": "include"}),
        ("reading the session", "/session", {"mode": "cors", "credentials": "include"}),
    ):  # fmt: skip
        got[name] = other.value(
            f"fetch({json.dumps(a.origin + path)}, {json.dumps(options)}).then((answer) => answer.type === 'opaque' ? 'opaque' : "
            "'read ' + answer.status, () => 'refused')")
    got["the feed"] = other.value(
        f"new Promise((resolve) => {{ const socket = new WebSocket({json.dumps(a.origin.replace('https', 'wss') + '/events')});"
        "socket.onopen = () => resolve('open'); socket.onerror = () => resolve('refused'); })")
    got["a frame"] = other.value(
        "new Promise((resolve) => { const frame = document.createElement('iframe'); frame.onload = () => resolve('shown'); "
        f"frame.src = {json.dumps(a.origin + '/')}; document.body.append(frame); }})")
    since = len(other.tab.events)
    # A form can send text that is JSON; where it leads is the answer.
    form = (
        "(() => { const form = document.createElement('form'); const field = document.createElement('input');"
        f"form.method = 'post'; form.enctype = 'text/plain'; form.action = {json.dumps(a.origin + '/actions')};"
        """field.name = '{"action":"cordon","message":"stolen'; field.value = '"}'; form.append(field);"""
        "document.body.append(form); form.submit(); return true; })()"
    )
    other.value(form)
    answer = other.tab.wait_for_event(
        "Network.responseReceived", lambda values: values["response"]["url"] == a.origin + "/actions" and values["type"] == "Document", since)
    got["an action by a form"] = answer["response"]["status"]
    refusals = [
        values["response"]["status"] for method, values in other.tab.events
        if method == "Network.responseReceived" and values["response"]["url"].startswith(a.origin) and values["response"]["url"] != a.origin + "/"
    ]  # fmt: skip
    if any("frame-ancestors" in one.text for one in other.tab.console):
        got["a frame"] = "refused"
    other.tab.close()
    return got, refusals


@check("tickets", "a page of another site, and one of the same host with another port, can neither act, look nor sign out with the browser's session")
def stolen(world):
    a = world.lab.a
    page = world.page(a)
    for address in ("127.0.0.1", a.address):
        thief = Thief(address, f"{a.etc}/pki/crossdock")
        try:
            got, refusals = steal(world, page, thief)
        finally:
            thief.close()
        name = f"from {'another site' if address != a.address else 'the same host and another port'}"
        world.note(f"{name}: {got}, answered with {sorted(set(refusals))}")
        demand(got["an action by fetch"] in ("opaque", "refused"), f"{name}: {got}")
        for what in ("an action by fetch with CORS", "a sign-out", "reading the session", "the feed", "a frame"):
            demand(got[what] == "refused", f"{name}: {what}: {got[what]}")
        demand(got["an action by a form"] in (401, 403), f"{name}: {got}")
        demand(set(refusals) <= {401, 403, 404, 405, 200}, f"{name}: {refusals}")
        demand(page.fetch("GET", "/session")[0] == 200, f"{name}: the session has ended")
        demand(page.text("host-cordon") == "Takes new guests.", f"{name}: {page.text('host-cordon')}")
    demand("stolen" not in a.run("crossdock", "status"), "the host was cordoned")
    demand(world.visitor(a, signs_in=False).ask("GET", "/readyz").status == 200, "the host was cordoned")
    page.tab.close()


@check("tickets", "who may look only is shown nothing that acts, and a script's POST is refused with a sentence; a guest's ticket shows that guest")
def view_only(world):
    a = world.lab.a
    world.lab.guest("lost1")
    page = world.page(a, "--view-only")
    page.expected |= {"status of 403", "status of 409"}
    page.wait_for_row("guests-table", "lost1")
    shown = page.value("[...document.querySelectorAll('main button')].filter((button) => button.checkVisibility()).map((button) => button.innerText)")
    demand(shown == [], f"these buttons are shown: {shown}")
    for action in ({"action": "cordon", "message": "x"}, {"action": "move", "guest": "lost1", "host": "host-b"}, {"action": "uncordon"}):
        status, text = page.fetch("POST", "/actions", action)
        demand(status == 403 and "may look here, and not act" in json.loads(text)["error"], f"{status} {text}")
    page.tab.close()
    # Another one, which the ticket does not tell of.
    if "web1" not in a.guests():
        a.start_guest("other1", data=1)
    page = world.page(a, "--guest", "lost1")
    page.expected |= {"status of 403", "status of 409"}
    page.wait_for_row("guests-table", "lost1")
    demand(len(page.rows("guests-table")) == 1, f"{page.rows('guests-table')}")
    names = page.value("document.body.innerText")
    demand("other1" not in names and "web1" not in names, "other guests are named on the page")
    status, text = page.fetch("POST", "/actions", {"action": "cordon", "message": "x"})
    demand(status == 403 and "for guest 'lost1' only" in json.loads(text)["error"], f"{status} {text}")
    demand("lost1 only" in page.text("session-text"), page.text("session-text"))
    # What such a ticket does not tell is not taken for none.
    demand(page.is_shown("#host-untold") and not page.is_shown("#host-cards"), "the page says something of the host that it was not told")
    demand(page.text("moves-empty") == "lost1 does not move.", page.text("moves-empty"))
    page.tab.close()


@check("tickets", "who signs out is out in all windows, within five seconds")
def signed_out(world):
    a = world.lab.a
    page = world.page(a)
    other = world.page(a, url=f"{a.origin}/", context=page.context)
    other.wait("document.getElementById('connection').dataset.state === 'live'")
    page.tab.click("#sign-out")
    page.wait("document.getElementById('sign-in')?.checkVisibility() && !document.getElementById('content').checkVisibility()")
    began = time.monotonic()
    other.wait("document.getElementById('sign-in').checkVisibility()", 10)
    took = time.monotonic() - began
    demand(took < 6, f"the other window has looked on for {took:.1f} s")
    demand("Your session has ended" in other.text("sign-in-reason"), other.text("sign-in-reason"))
    demand(other.is_shown("#content") and other.value("document.body.classList.contains('stale')"), "what was shown is not marked as old")
    demand(page.tab.command("Network.getCookies")["cookies"] == [], "the cookie is still there")
    demand(page.fetch("GET", "/session")[0] == 401, "the session goes on")
    page.tab.close()
    other.tab.close()


@check("tickets", "when the agent begins anew the session is over: the page says so, keeps what it showed, and goes on with a new ticket")
def restarted(world):
    c = world.lab.c
    page = world.page(c)
    page.expected |= {"WebSocket connection to", "ERR_CONNECTION_REFUSED"}
    c.stop_agent()
    page.wait("document.getElementById('connection').dataset.state === 'wait'", 10)
    said = page.text("connection-text")
    demand(said.startswith("Not connected, what is shown is ") and "next try in" in said, said)
    c.start_agent("--web", f"{c.address}:{c.port}")
    page.wait("document.getElementById('sign-in').checkVisibility()")
    demand(page.text("sign-in-title") == "Sign in again" and "Your session has ended" in page.text("sign-in-reason"), page.text("sign-in-reason"))
    demand(page.text("sign-in-host") == "host-c", page.text("sign-in-host"))
    demand(page.is_shown("#content"), "what was shown is gone")
    # A ticket that is opened in the same window.
    page.value(f"location.hash = {json.dumps('t=' + c.ticket().split('#t=')[1])}")
    page.wait("document.getElementById('connection').dataset.state === 'live' && !document.getElementById('sign-in').checkVisibility()")
    demand("#t=" not in page.value("location.href"), page.value("location.href"))
    page.tab.close()
