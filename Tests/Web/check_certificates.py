"""Client certificates, with Python in the place of a browser: headless Chromium has no way to choose one."""
import os
import ssl
import subprocess

from judgement import check, demand
from visitors import Viewer, Visitor, Crowd, context


@check("certificates", "who has a certificate of the authority may look, and read the figures, and may not act; one of another authority ends the connection")
def certificates(world):
    a, base = world.lab.a, world.lab.base
    pki = f"{world.lab.b.etc}/pki/crossdock"
    authority = os.path.join(base, "ca", "ca-cert.pem")
    visitor = Visitor(context(authority, (f"{pki}/client-cert.pem", f"{pki}/client-key.pem")), a.origin)
    session = visitor.ask("GET", "/session")
    demand(session.status == 200 and session.json["rights"] == ["view"] and "host-b" in session.json["name"], f"{session}")
    demand(visitor.ask("GET", "/metrics").status == 200, "no figures")
    refused = visitor.ask("POST", "/actions", {"action": "cordon", "message": "x"})
    demand(refused.status == 403 and "may look here, and not act" in refused.json["error"], f"{refused}")
    status, rest = visitor.watch()
    demand(status == 101, f"the feed was refused with {status}")
    viewer = Viewer(visitor.socket, rest)
    crowd = Crowd([viewer])
    sections = ("host", "trouble", "moves", "evacuation", "guests", "history")
    came = crowd.read_until(lambda: all(viewer.sections(name) for name in sections), 10)
    crowd.close()
    demand(came, "not all sections came")
    visitor.socket = None
    status, _ = visitor.watch({"Origin": "https://elsewhere.example"})
    demand(status == 403, f"a page of elsewhere has the feed: {status}")
    for words in (["init", f"{base}/foreign-ca"], ["issue", f"{base}/foreign-ca", f"{base}/foreign", "host-b"]):
        subprocess.run([world.lab.crossdock, "pki", *words], check=True, stdout=subprocess.DEVNULL)
    foreign = Visitor(context(authority, (f"{base}/foreign/client-cert.pem", f"{base}/foreign/client-key.pem")), a.origin)
    try:
        answer = foreign.ask("GET", "/session")
    except (ssl.SSLError, ConnectionError) as error:
        world.note(f"a certificate of another authority: {error}")
    else:
        demand(False, f"a certificate of another authority was answered with {answer}")
    nobody = world.visitor(a, signs_in=False).ask("GET", "/metrics")
    demand(nobody.status == 401, f"nobody reads the figures: {nobody}")
