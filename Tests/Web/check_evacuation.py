"""The page during evacuations."""
import re
import shlex

from check_moves import answer_dialog
from judgement import check, demand
from page import ROWS

GUESTS = ("web1", "db1", "db2")
ORDER = ["waiting", "rehearsing", "queued", "copying", "switching", "moved"]


@check("evacuation", "an evacuation is cancelled on the page with the keyboard alone; what is left is told on top, with a command")
def cancelled(world):
    a = world.lab.a
    for guest in GUESTS:
        world.lab.guest(guest)
    # The other hosts may have its disk from before: it would be copied at once, and a switchover that is under way is waited for.
    a.run("crossdock", "guest", "set", "web1", "--priority", "-1")
    page = world.page_evacuation = world.page(a)
    a.run("crossdock", "evacuate", "--to", "host-b,host-c", "--bandwidth", "1M", "--detach")
    page.wait("document.getElementById('evacuation-state').textContent === 'running'")
    page.wait("[...document.querySelectorAll('#evacuation-rows .tag')].some((tag) => tag.textContent === 'copying')", 120)
    answer_dialog(page, "evacuation-cancel", before=lambda: page.tab_to("ask-yes", 3))
    page.wait_for_dialog(False)
    world.note(f"the notice: {page.text('notice-text')!r}")
    page.wait("document.getElementById('evacuation-state').textContent === 'cancelled'")
    page.wait("document.getElementById('trouble').checkVisibility()")
    world.note(f"trouble: {page.text('trouble-list')!r}")
    demand(page.text("evacuation-text").startswith("0 of 3 guests moved, 0 moving, 0 waiting, 3 left."), page.text("evacuation-text"))
    command = page.value("document.querySelector('#trouble-list code').textContent")
    demand(command.startswith("crossdock evacuate --to host-b") and "host-c" in command, command)
    demand("cordoned" in page.text("host-cordon"), page.text("host-cordon"))
    world.command = command


@check("evacuation", "that command is followed on the page: states in order, counts that add up, and the end, after which nothing is on top")
def followed(world):
    a, page = world.lab.a, world.page_evacuation
    page.follow("evacuation", "({ text: document.getElementById('evacuation-text').textContent, rows: "
                f"""{ROWS % '"evacuation-table"'} }})""")  # fmt: skip
    process = a.begin(*shlex.split(world.command), "--bandwidth", "8M", log="evacuate.log")
    page.wait("((rows) => rows.some((row) => row[0] === 'switching' && row[1] > 20) && rows.some((row) => row[0] === 'copying' && row[1] > 20))("
              "[...document.querySelectorAll('#evacuation-rows tr')].map((row) => "
              "[row.querySelector('.tag').textContent, parseInt(row.querySelector('.percent').textContent)]))", 120)  # fmt: skip
    world.picture(page, "evacuation-dark", 1180, 760, "dark", place="moves")
    code = process.wait(240)
    with open(f"{a.directory}/evacuate.log", encoding="utf-8") as file:
        words = file.read()
    demand(code == 0, f"it has ended with code {code}: {words[-800:]}")
    page.wait("document.getElementById('evacuation-state').textContent === 'ended'")
    page.wait("document.getElementById('evacuation-text').textContent.startsWith('3 of 3 guests moved')")
    noted = [one for one in page.noted("evacuation") if one["rows"] and len(one["rows"]) == 3]
    for guest in GUESTS:
        states = [row["State"] for one in noted for row in one["rows"] if row["Guest"] == guest]
        # The first look may still be at the evacuation that was cancelled.
        states = [state for index, state in enumerate(states) if state != "left" or index > len(states) // 2]
        seen = list(dict.fromkeys(states))
        ranks = [ORDER.index(state) for state in states if state in ORDER]
        demand(ranks == sorted(ranks) and seen[-1] == "moved" and ("copying" in seen or guest == "web1") and len(ranks) == len(states), f"{guest}: {seen}")
    for one in noted:
        counts = [int(number) for number in re.match(r"(\d+) of 3 guests moved, (\d+) moving, (\d+) waiting, (\d+) left\.", one["text"]).groups()]
        demand(sum(counts) == 3, one["text"])
    rows = page.rows("evacuation-table")
    demand(all(row["Pause"].endswith(" ms") and row["Done"] == "100%" and row["To"].startswith("host-") for row in rows), f"{rows}")
    world.note(f"at the end: {page.text('evacuation-text')!r} {page.text('evacuation-message')!r}")
    page.wait("!document.getElementById('trouble').checkVisibility()")
    demand(page.text("guests-empty") == "No guests on this host.", page.text("guests-empty"))
    places = {guest: world.lab.where(guest) for guest in GUESTS}
    demand(all(len(where) == 1 and "a" not in where and "running" in where.values() for where in places.values()), f"{places}")
    a.run("crossdock", "uncordon")
