"""The page during moves."""
import json
import os
import re

from judgement import check, demand
from page import ROWS

PHASES = [
    "checking both sides", "copying disks", "verifying disks", "sending memory", "switching over", "handing over", "finishing",
]  # fmt: skip
# Each is shown on its way, the others are over faster than a page is drawn.
SEEN = ["copying disks", "sending memory"]
MOVES = ROWS % '"moves-table"'


def code_of(process):
    return process.wait(180)


@check("moves", "a page that is opened shows the host, its guests, and that nothing moves")
def opened(world):
    a = world.lab.a
    world.lab.guest("web1")
    world.page_a = page = world.page(a)
    world.page_b = world.page(world.lab.b, "--view-only")
    demand(page.text("title") == "Crossdock on host-a", page.text("title"))
    demand(page.text("connection-text") == "Live", page.text("connection-text"))
    demand("root" in page.text("session-text") and "may act" in page.text("session-text"), page.text("session-text"))
    demand(page.text("moves-empty") == "Nothing moves.", page.text("moves-empty"))
    row = page.wait_for_row("guests-table", "web1", "row['Can it move?'].startsWith('yes')", 90)
    demand(row["State"] == "running" and row["Memory"] == "96 MiB" and row["Disks"] == "64 MiB" and row["CPUs"] == "1", f"{row}")
    demand(page.value("document.title") == "host-a", page.value("document.title"))
    demand(not page.is_shown("#trouble"), f"there is trouble: {page.text('trouble-list')}")
    demand(page.text("host-cordon") == "Takes new guests.", page.text("host-cordon"))
    demand("may look" in world.page_b.text("session-text"), world.page_b.text("session-text"))
    demand(world.page_b.text("guests-empty") == "No guests on this host.", world.page_b.text("guests-empty"))


@check("moves", "a move is followed on the pages of both hosts: phases in order, a percentage that rises, rates, and what is left")
def followed(world):
    a, page, other = world.lab.a, world.page_a, world.page_b
    page.follow("moves", MOVES)
    other.follow("moves", MOVES)
    page.follow("said", "document.getElementById('announcer').textContent")
    process, world.report = a.migrate("web1", "host-b", "--bandwidth", "8M")
    page.wait_for_row("moves-table", "web1", "row.Phase === 'copying disks' && parseInt(row.Done) >= 40")
    world.picture(page, "move-light", 1180, 860)
    world.picture(page, "phone", 360, 740, "light", mobile=True, place="moves")
    arriving = other.wait_for_row("moves-table", "web1")
    demand(arriving["From → to"] == "CN=host-a → host-b" and arriving["Phase"] == "receiving", f"on host-b: {arriving}")
    demand(page.row("guests-table", "web1")["Can it move?"].startswith("moves now"), f"{page.row('guests-table', 'web1')}")
    demand(page.value("document.title") == "host-a – 1 moving", page.value("document.title"))
    demand(code_of(process) == 0, "the move has failed")
    page.wait_for_no_row("moves-table", "web1")
    noted = [rows[0] for rows in page.noted("moves") if rows]
    phases = list(dict.fromkeys(row["Phase"].split("\n")[0] for row in noted))
    order = [PHASES.index(phase) for phase in phases if phase in PHASES]
    demand(order == sorted(order) and all(phase in phases for phase in SEEN) and len(order) == len(phases), f"the phases were {phases}")
    for phase in SEEN:
        shown = [int(row["Done"].rstrip("%")) for row in noted if row["Phase"] == phase and row["Done"].endswith("%")]
        demand(shown == sorted(shown) and len(set(shown)) >= 5, f"the percentages of '{phase}' were {shown}")
        rates = [row["Rate"] for row in noted if row["Phase"] == phase and row["Rate"].endswith("iB/s")]
        demand(rates, f"no rate was shown in '{phase}'")
        demand(any(re.fullmatch(r"[\d.]+ s", row["Left"]) for row in noted if row["Phase"] == phase), f"'{phase}' does not say what is left")
    demand(any(row["Guest writes"] != "–" for row in noted), "what the guest writes was never shown")
    demand(any(row["Expected pause"].endswith(" ms") for row in noted), "no pause was expected")
    demand(all(row["From → to"] == "host-a → host-b" for row in noted), "the way was shown wrongly")
    page.wait("window.noted.said.join(' ').includes('runs on')")
    said = " ".join(page.noted("said"))
    demand("web1: copying disks." in said and re.search(r"web1 runs on host-b\S*, paused for \d+ ms\.", said), f"said was: {said}")


@check("moves", "afterwards the row is gone, the history has the move with its pause, and the guest is on the page of the other host only")
def history(world):
    page, other = world.page_a, world.page_b
    with open(world.report, encoding="utf-8") as file:
        report = json.load(file)
    # The report is written when the guest has moved already.
    row = page.wait_for_row("history-table", "web1", "row.Pause.endsWith(' ms')")
    demand(row["Outcome"] == "migrated" and row["From → to"] == "here → host-b", f"{row}")
    demand(row["Pause"] == f"{report['blackout_ms']:.0f} ms", f"the pause is {row['Pause']}, and of the report {report['blackout_ms']}")
    page.wait_for_no_row("guests-table", "web1")
    row = other.wait_for_row("guests-table", "web1", "row.State === 'running'")
    demand("from CN=host-a" in row["Guest"] or "from host-a" in row["Guest"], f"{row}")
    row = other.wait_for_row("history-table", "web1")
    demand(row["From → to"].endswith("host-a → here"), f"{row}")
    demand("1 move" in page.text("pauses-text") and "at most" in page.text("rates-text"), page.text("pauses-text") + page.text("rates-text"))
    demand(world.lab.where("web1") == {"b": "running"}, f"{world.lab.where('web1')}")


@check("moves", "the report that the page gives to download is that of --report")
def download(world):
    page, directory = world.page_a, os.path.join(world.scratch, "downloads")
    os.makedirs(directory, exist_ok=True)
    page.tab.command("Page.setDownloadBehavior", behavior="allow", downloadPath=directory)
    since = len(page.tab.events)
    page.tab.click("#history-rows tr a[download]")
    began = page.tab.wait_for_event("Page.downloadWillBegin", since=since)
    page.tab.wait_for_event("Page.downloadProgress", lambda values: values["state"] == "completed", since=since)
    (name,) = os.listdir(directory)
    with open(os.path.join(directory, name), encoding="utf-8") as got, open(world.report, encoding="utf-8") as wanted:
        found, report = json.load(got), json.load(wanted)
    demand(found == report, f"they differ: {sorted(key for key in report.keys() | found.keys() if report.get(key) != found.get(key))}")
    demand(began["suggestedFilename"].endswith(f"{report['migration']}.json"), began["suggestedFilename"])


def answer_dialog(page, name, *, press="Enter", before=None):
    """By keyboard alone: to the button, into the dialog, and to what it does."""
    page.tab_to(name)
    page.press("Enter")
    page.wait_for_dialog()
    if before:
        before()
    page.press(press)


@check("moves", "a move is begun on the page with the keyboard alone, and moves the guest")
def moved_from_page(world):
    page = world.page_owner_b = world.page(world.lab.b)
    page.wait_for_row("guests-table", "web1", "row['Can it move?'].startsWith('yes')", 90)

    def name_host():
        demand(page.focused() == "ask-input", f"the focus is on {page.focused()}")
        page.tab.type("host-a")
        demand("web1 moves to host-a with 96 MiB of memory" in page.text("ask-text"), page.text("ask-text"))

    answer_dialog(page, "Move web1", before=name_host)
    page.wait_for_dialog(False)
    demand(re.fullmatch(r"Guest 'web1' begins to move to host-a: migration \S+", page.text("notice-text")), page.text("notice-text"))
    page.wait_for_no_row("guests-table", "web1")
    world.page_a.wait_for_row("guests-table", "web1", "row.State === 'running'")
    page.wait_for_row("history-table", "web1", "row.Outcome === 'migrated' && row['From → to'] === 'here → host-a'")
    demand(world.lab.where("web1") == {"a": "running"}, f"{world.lab.where('web1')}")


@check("moves", "a move is cancelled on the page with the keyboard alone: Escape does nothing, the button rolls back, and the guest stays")
def cancelled(world):
    a, page = world.lab.a, world.page_a
    # The other host has the disk from before, so that it is the memory that takes long.
    process, _ = a.migrate("web1", "host-b", "--bandwidth", "1M")
    page.wait_for_row("moves-table", "web1", "['copying disks', 'sending memory'].includes(row.Phase) && parseInt(row.Done) > 0")
    page.wait("document.querySelector('#moves-rows button').checkVisibility()")
    answer_dialog(page, "Cancel the move of web1", press="Escape")
    page.wait_for_dialog(False)
    demand(page.focused() == "Cancel the move of web1", f"after Escape the focus is on {page.focused()}")
    demand(process.poll() is None, "Escape has ended the move")

    def look():
        demand(page.focused() == "ask-no", f"the focus is on {page.focused()}, and Enter would cancel")
        words = "The move of web1 to host-b is rolled back. web1 goes on at host-a, and what was copied is lost."
        demand(page.text("ask-text") == words, page.text("ask-text"))
        page.tab_to("ask-yes", 3)

    answer_dialog(page, "Cancel the move of web1", before=look)
    page.wait_for_dialog(False)
    demand("was asked to roll back" in page.text("notice-text"), page.text("notice-text"))
    demand(code_of(process) == 18, "the migration did not end as a cancelled one")
    page.wait_for_no_row("moves-table", "web1")
    row = page.wait_for_row("history-table", "web1", "row.Outcome.startsWith('rolled')")
    world.note(f"the history says: {row['Outcome']!r}")
    demand(world.lab.where("web1") == {"a": "running"}, f"{world.lab.where('web1')}")


@check("moves", "the host is cordoned and uncordoned on the page, and refuses guests meanwhile")
def cordoned(world):
    a, page = world.lab.a, world.page_a
    visitor = world.visitor(a, signs_in=False)

    def say_why():
        page.tab.type("a new disk <b>& more</b>")

    answer_dialog(page, "cordon", before=say_why)
    page.wait_for_dialog(False)
    page.wait("document.getElementById('host-cordon').textContent.includes('a new disk <b>& more</b>')")
    said = page.text("host-cordon")
    demand(re.fullmatch(r"Takes no new guests: cordoned by root since .*: a new disk <b>& more</b>", said), said)
    ready = visitor.ask("GET", "/readyz")
    demand(ready.status == 503 and b"a new disk" in ready.body, f"{ready}")
    answer_dialog(page, "uncordon", before=lambda: page.tab_to("ask-yes", 3))
    page.wait_for_dialog(False)
    page.wait("document.getElementById('host-cordon').textContent === 'Takes new guests.'")
    demand(visitor.ask("GET", "/readyz").status == 200, "it is not ready")


@check("moves", "what the host refuses is said in the dialog, which stays")
def refused(world):
    page = world.page_a
    page.expected |= {"status of 409", "status of 400"}
    page.wait_for_row("guests-table", "web1")
    page.tab_to("Move web1")
    page.press("Enter")
    page.wait_for_dialog()
    page.tab.type("host-b:99999")
    page.press("Enter")
    page.wait("document.getElementById('ask-error').textContent !== ''")
    world.note(f"host-b:99999: {page.text('ask-error')!r}")
    demand("99999" in page.text("ask-error") or "port" in page.text("ask-error"), page.text("ask-error"))
    demand(page.value("document.getElementById('ask').open"), "the dialog has gone")
    page.press("Escape")
    page.wait_for_dialog(False)
    status, text = page.fetch("POST", "/actions", {"action": "cancel", "migration": "1-aaaaaa"})
    demand(status == 409 and json.loads(text)["error"], f"{status} {text}")
    world.note(f"no such migration: {json.loads(text)['error']!r}")
    status, text = page.fetch("POST", "/actions", {"action": "move", "guest": "nobody", "host": "host-b"})
    demand(status == 409 and "nobody" in json.loads(text)["error"], f"{status} {text}")
    world.note(f"no such guest: {json.loads(text)['error']!r}")
