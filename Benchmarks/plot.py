"""Plots as SVG, written by hand: nothing has to be installed, and a difference between two of them can be read."""
import dataclasses
import html
import math

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
GREY, LIGHT, INK = "#57606a", "#d0d7de", "#24292f"
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclasses.dataclass
class Series:
    """A line in a plot. `values` may have gaps (None); two that belong together share a colour, and one of them is dashed."""

    name: str
    values: list
    colour: int = 0
    is_dashed: bool = False


@dataclasses.dataclass
class Panel:
    title: str
    series: list


def text(x, y, words, anchor="start", colour=INK, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {FONT} {more}>{html.escape(words)}</text>'


def stroke(points, colour, width=2.0, dashed=False):
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'


def ticks(most, count=4):
    """Round numbers from 0 to at least `most`."""
    if most <= 0:
        return [0, 1]
    raw = most / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw - 1e-9)
    return [step * index for index in range(math.ceil(most / step - 1e-9) + 1)]


def frame(width, height, title, body):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    # A ground of its own: pages may be dark.
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    heading = text(16, 22, title, more='font-weight="600"')
    return "\n".join([head, f"<title>{html.escape(title)}</title>", ground, heading, *body, "</svg>"]) + "\n"


def scale(left, right, least, most):
    return lambda value: left + (right - left) * (value - least) / (most - least or 1)


def ordinates(left, right, marks, place):
    """Horizontal lines with their numbers."""
    out = []
    for mark in marks:
        out.append(stroke([(left, place(mark)), (right, place(mark))], LIGHT, 1))
        out.append(text(left - 6, place(mark) + 4, f"{mark:,g}", "end", GREY))
    return out


def legend(series, x, y):
    out = []
    for one in series:
        out.append(stroke([(x, y - 4), (x + 26, y - 4)], COLOURS[one.colour % len(COLOURS)], 2, one.is_dashed))
        out.append(text(x + 32, y, one.name))
        x += 48 + 7 * len(one.name)
    return out


def steps(title, axis, labels, panels):
    """Panels side by side with the same steps on their horizontal axis, which need not be evenly spaced."""
    width, height, top, bottom, gap = 920, 340, 56, 76, 70
    panel_width = (width - 20 - gap * len(panels)) / len(panels)
    body = []
    for number, panel in enumerate(panels):
        left = gap + number * (panel_width + gap)
        right = left + panel_width
        marks = ticks(max((value for one in panel.series for value in one.values if value is not None), default=1))
        up = scale(height - bottom, top, 0, marks[-1])
        along = scale(left + 16, right - 16, 0, max(len(labels) - 1, 1))
        body.append(text(left, top - 10, panel.title, colour=GREY))
        body += ordinates(left, right, marks, up)
        for index, label in enumerate(labels):
            body.append(text(along(index), height - bottom + 18, label, "middle", GREY))
        body.append(text((left + right) / 2, height - bottom + 36, axis, "middle", GREY))
        for one in panel.series:
            points = [(along(index), up(value)) for index, value in enumerate(one.values) if value is not None]
            colour = COLOURS[one.colour % len(COLOURS)]
            body.append(stroke(points, colour, 2, one.is_dashed))
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    body += legend(panels[0].series, gap, height - 14)
    return frame(width, height, title, body)


def distribution(title, axis, series, marks=(0.5, 0.9, 0.99)):
    """How many of the values are at most so large: one curve for each series, on a logarithmic axis."""
    width, height, left, top, bottom = 920, 360, 70, 44, 76
    right = width - 30
    values = [value for one in series for value in one.values if value > 0]
    least, most = (min(values), max(values)) if values else (1, 10)
    low, high = math.floor(math.log10(least) * 3) / 3, math.ceil(math.log10(most) * 3) / 3
    along, up = scale(left, right, low, max(high, low + 0.3)), scale(height - bottom, top, 0, 1)
    body = []
    for mark in (0, *marks, 1):
        # 99 and 100 would lie upon each other.
        body.append(stroke([(left, up(mark)), (right, up(mark))], LIGHT, 1))
        if mark != 1:
            body.append(text(left - 6, up(mark) + 4, f"{mark * 100:g} %", "end", GREY))
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            place = math.log10(factor) + exponent
            if low - 1e-9 <= place <= max(high, low + 0.3) + 1e-9:
                body.append(stroke([(along(place), top), (along(place), height - bottom)], LIGHT, 1))
                body.append(text(along(place), height - bottom + 18, f"{factor * 10**exponent:,g}", "middle", GREY))
    body.append(text((left + right) / 2, height - bottom + 36, axis, "middle", GREY))
    for one in series:
        ordered = sorted(value for value in one.values if value > 0)
        points, before = [], 0.0
        for index, value in enumerate(ordered):
            points += [(along(math.log10(value)), up(before)), (along(math.log10(value)), up((index + 1) / len(ordered)))]
            before = (index + 1) / len(ordered)
        body.append(stroke(points, COLOURS[one.colour % len(COLOURS)], 2, one.is_dashed))
    body += legend(series, left, height - 14)
    return frame(width, height, title, body)
