"""The page of a host in a browser, as a person has it: its tables by their columns, its dialog, its keyboard."""
import json

# The rows of a table by the names of its columns, as they are shown; None when the table is not shown.
ROWS = """(() => {
  const table = document.getElementById(%s);
  if (!table?.checkVisibility()) return null;
  const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
  // Below the phase is what the move has warned of.
  const text = (cell, name) => name === "Phase" ? cell.innerText.trim().split("\\n")[0] : cell.innerText.trim();
  return [...table.querySelectorAll("tbody tr")].map((row) =>
    Object.fromEntries([...row.children].map((cell, index) => [names[index], text(cell, names[index])])));
})()"""

# Notes what a table shows each time that the page has changed.
FOLLOW = """(() => {
  window.noted = window.noted ?? {};
  const look = () => %s;
  let before = "";
  const note = () => {
    const value = look();
    const text = JSON.stringify(value);
    if (text !== before) window.noted[%s].push(value);
    before = text;
  };
  window.noted[%s] = [];
  note();
  new MutationObserver(note).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
})()"""


class Page:
    """A tab with the page of a host, signed in by a ticket unless `url` says what to open."""

    def __init__(self, world, host, *ticket, url=None, context=None):
        self.host = host
        # What the browser itself says of answers that a check asks for.
        self.expected = {"status of 401"}
        self.context = context or world.browser.context()
        self.tab = world.browser.open(context=self.context)
        world.pages.append(self)
        self.tab.command("Accessibility.enable")
        self.tab.show_as(1180, 820, prefers_color_scheme="light")
        self.tab.goto(url or host.ticket(*ticket))
        if url is None:
            self.wait("document.getElementById('connection').dataset.state === 'live' && !document.getElementById('content').hidden")

    def wait(self, condition, timeout=60):
        self.tab.wait_for(condition, timeout)

    def value(self, expression):
        return self.tab.evaluate(expression)

    def text(self, element):
        return self.tab.text(f"#{element}") or ""

    def is_shown(self, selector):
        return self.value(f"document.querySelector({json.dumps(selector)})?.checkVisibility() ?? false")

    def rows(self, table):
        return self.value(ROWS % json.dumps(table)) or []

    def row(self, table, name):
        """The first row of this name; None without one."""
        return next((row for row in self.rows(table) if row[next(iter(row))].split("\n")[0] == name), None)

    def wait_for_row(self, table, name, condition="true", timeout=60):
        """Waits until a row of this name is shown, and `condition`, of `row`, holds."""
        self.wait(
            f"({ROWS % json.dumps(table)} ?? []).some((row) => Object.values(row)[0].split('\\n')[0] === {json.dumps(name)} && ({condition}))",
            timeout,
        )
        return self.row(table, name)

    def wait_for_no_row(self, table, name, timeout=60):
        self.wait(f"!({ROWS % json.dumps(table)} ?? []).some((row) => Object.values(row)[0].split('\\n')[0] === {json.dumps(name)})", timeout)

    def follow(self, name, expression):
        """From now on, notes each value that an expression has."""
        self.value(FOLLOW % (expression, json.dumps(name), json.dumps(name)))

    def noted(self, name):
        return self.value(f"window.noted[{json.dumps(name)}]")

    # By keyboard only.

    def focused(self):
        """The id or the name of what has the focus."""
        return self.value("(() => { const { activeElement: e } = document; return e.id || e.getAttribute('aria-label') || e.innerText; })()")

    def tab_to(self, name, most=200):
        """Presses Tab until something of this id or name has the focus."""
        for _ in range(most):
            if self.focused() == name:
                return
            self.tab.press("Tab")
        raise TimeoutError(f"{name} was not reached with {most} times Tab; {self.focused()} has the focus")

    def press(self, *keys):
        self.tab.press(*keys)

    def wait_for_dialog(self, is_open=True):
        self.wait(f"document.getElementById('ask').open === {json.dumps(is_open)}")

    # By script: what a page could do.

    def fetch(self, method, path, body=None):
        """Status and text of a request that a script in the page makes."""
        options = {"method": method, "cache": "no-store"}
        if body is not None:
            options.update(body=json.dumps(body), headers={"Content-Type": "application/json"})
        return self.value(
            f"fetch({json.dumps(path)}, {json.dumps(options)}).then(async (answer) => [answer.status, await answer.text()])")

    def screenshot(self, path, width, height, scheme, mobile, place):
        """A picture of a window of this size, with an element of this id on top."""
        self.tab.show_as(width, height, mobile=mobile, prefers_color_scheme=scheme)
        self.value(f"document.getElementById({json.dumps(place)}).scrollIntoView({{ behavior: 'instant' }})")
        self.value("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(true))))")
        self.tab.screenshot(path)
        self.value("scrollTo(0, 0)")
        self.tab.show_as(1180, 820, prefers_color_scheme="light")

    def complaints(self):
        return [one for one in self.tab.complaints() if not any(words in one.text for words in self.expected)]
