"""What a screen reader has of the page, a narrow screen, and the console of the browser."""
from judgement import check, demand

REGIONS = {"Guests", "History", "Moves now"}

def named(nodes, role):
    return [node.get("name", {}).get("value", "") for node in nodes if node.get("role", {}).get("value") == role]

@check("looks", "a screen reader has landmarks, headings, named tables, a live region, and a name for whatever can be pressed")
def accessible(world):
    world.lab.guest("lost1")
    page = world.page(world.lab.a)
    page.wait_for_row("guests-table", "lost1")
    nodes = page.tab.accessibility()
    roles = {node.get("role", {}).get("value") for node in nodes}
    demand({"main", "navigation", "banner", "status", "table", "row", "rowheader", "columnheader", "search"} <= roles, f"{sorted(map(str, roles))}")
    tables = set(named(nodes, "table"))
    demand("" not in tables and "Guests of this host" in tables, f"{tables}")
    regions = named(nodes, "region")
    demand(all(any(name.startswith(wanted) for name in regions) for wanted in REGIONS), f"{regions}")
    for role in ("button", "link", "textbox", "searchbox", "combobox", "progressbar", "img", "image", "dialog"):
        names = named(nodes, role)
        demand(all(names), f"a {role} has no name: {names}")
    demand(named(nodes, "navigation") == ["Sections"], f"{named(nodes, 'navigation')}")
    headings = page.value("[...document.querySelectorAll('h1, h2, h3')].filter((node) => node.checkVisibility()).map((node) => node.tagName)")
    demand(headings[0] == "H1" and headings.count("H1") == 1 and len(headings) >= 4, f"{headings}")
    demand(page.value("document.documentElement.lang") == "en", "the page has no language")
    # The first thing that Tab finds leads past the rest.
    page.value("document.activeElement.blur()")
    page.press("Tab")
    demand(page.focused() == "Skip to the content", page.focused())
    page.press("Enter")
    world.nodes = len(nodes)
    page.tab.close()

@check("looks", "on a screen of 360 pixels nothing is cut off or moves sideways, in light and in dark")
def narrow(world):
    world.lab.guest("lost1")
    page = world.page(world.lab.a)
    page.wait_for_row("guests-table", "lost1")
    for scheme in ("light", "dark"):
        page.tab.show_as(360, 740, mobile=True, prefers_color_scheme=scheme)
        width = page.value("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        demand(width <= 360, f"in {scheme} the page is {width} pixels wide")
        # The names of the columns are beside the values there, and the table's head is for screen readers only.
        outside = page.value(
            "[...document.querySelectorAll('main *')].filter((node) => node.checkVisibility() && !node.closest('.unseen, thead') && "
            "node.getBoundingClientRect().right > 361).map((node) => node.outerHTML.slice(0, 100))")
        demand(outside == [], f"in {scheme} these reach over the edge: {outside[:3]}")
        colours = page.value("(({ color, backgroundColor }) => [color, backgroundColor])(getComputedStyle(document.body))")
        demand(contrast(*colours) >= 7, f"in {scheme} the text has a contrast of {contrast(*colours):.1f}")
    page.tab.close()

def contrast(one, other):
    """Of two colours as the browser writes them, `rgb(1, 2, 3)` (WCAG 2, 1.4.3)."""
    def luminance(colour):
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)

@check("looks", "in all of this no page has complained in its console: no error, no warning, no violation of the content security policy")
def silent(world):
    said = [f"{page.host.name}: {one}" for page in world.pages for one in page.complaints()]
    demand(not said, f"{len(said)} complaints, such as: {said[:3]}")
    world.note(f"{len(world.pages)} pages were open")
