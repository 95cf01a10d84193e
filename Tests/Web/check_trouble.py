"""What the page shows on top, with the command that repairs it."""
import os
import shlex
import signal

from judgement import check, demand
from lab import wait_until


@check("trouble", "a migration whose processes were killed is on top with the command that repairs it, and gone when that was run")
def interrupted(world):
    a = world.lab.a
    world.lab.guest("lost1")
    page = world.page_trouble = world.page(a)
    process, _ = a.migrate("lost1", "host-c", "--bandwidth", "1M")
    page.wait_for_row("moves-table", "lost1", "row.Phase === 'copying disks' && row.Done !== '0%'")
    migration = max(os.listdir(f"{a.state}/migrations"))
    workers = a.workers(migration)
    demand(len(workers) == 2, f"these processes carry migration {migration}: {workers}")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    code = process.wait(60)
    with open(f"{a.directory}/lost1.migrate.log", encoding="utf-8") as file:
        world.note(f"crossdock migrate ended with code {code}: {file.read().splitlines()[-1][:300]!r}")
    page.wait("document.getElementById('trouble').checkVisibility()")
    world.note(f"trouble: {page.text('trouble-list')!r}")
    first = page.value("[...document.querySelectorAll('#content > section')].find((section) => section.checkVisibility()).id")
    demand(first == "trouble", f"on top is {first}")
    demand(page.value("document.title").startswith("(!) host-a"), page.value("document.title"))
    items = page.value("[...document.querySelectorAll('#trouble-list li')].map((item) => [item.querySelector('.kind').textContent, "
                       "item.querySelector('code').textContent, item.innerText])")  # fmt: skip
    mine = [item for item in items if migration in item[2]]
    demand(len(mine) == 1 and mine[0][0] == "interrupted" and "lost1" in mine[0][2], f"{items}")
    # The announcer says it too.
    page.wait("document.getElementById('announcer').textContent.includes('Needs you')")
    world.picture(page, "trouble", 1180, 760)
    words = a.run(*shlex.split(mine[0][1]), code=None)
    world.note(f"$ {mine[0][1]}: {words.strip().splitlines()[-1]!r}")
    page.wait(f"!document.getElementById('trouble-list').textContent.includes('{migration}')")
    page.wait("!document.getElementById('trouble').checkVisibility()")
    page.wait_for_no_row("moves-table", "lost1")
    page.wait_for_row("guests-table", "lost1", "row.State === 'running'")
    row = page.wait_for_row("history-table", "lost1")
    world.note(f"the history says: {row['Outcome']!r}")
    wait_until("host-c to forget what came", lambda: world.lab.where("lost1") == {"a": "running"})
