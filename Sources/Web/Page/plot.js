/**
 * Two plots as SVG. Colours are the style sheet's; what they say in words stands beside them, so they are hidden from screen readers.
 */
import { rate } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const TOP = 22;
const BOTTOM = HEIGHT - 34;
const LEFT = 8;
/** Below so many pixels for each, only every other label is drawn. */
const LABEL_ROOM = 34;

/** A plot is as wide as its place, so that its text has the size of text. */
const widthOf = (parent) => Math.min(Math.max(parent.clientWidth, 260), 900);

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, typeof value === "number" ? value.toFixed(1) : value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function put(parent, width, shapes) {
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true", focusable: "false" });
  drawing.append(...shapes);
  parent.replaceChildren(drawing);
}

const label = (x, y, text, anchor = "start", kind = "label") => shape("text", { x, y, "text-anchor": anchor, class: kind }, text);
const line = (x1, y1, x2, y2, kind) => shape("line", { x1, y1, x2, y2, class: kind });

/** Bars, one for each count, named below. */
export function histogram(parent, { counts, labels, axis }) {
  const most = Math.max(1, ...counts);
  const width = widthOf(parent);
  const right = width - LEFT;
  const step = (right - LEFT) / counts.length;
  const shapes = [line(LEFT, BOTTOM, right, BOTTOM, "axis")];
  counts.forEach((value, index) => {
    const x = LEFT + index * step;
    const height = ((BOTTOM - TOP) * value) / most;
    if (value > 0) {
      shapes.push(shape("rect", { x: x + 2, y: BOTTOM - height, width: step - 4, height, rx: 2, class: "bar-1" }));
      shapes.push(label(x + step / 2, BOTTOM - height - 4, String(value), "middle", "value"));
    }
    if (step >= LABEL_ROOM || index % 2 === 0) shapes.push(label(x + step / 2, BOTTOM + 14, labels[index], "middle"));
  });
  shapes.push(label(right, HEIGHT - 4, axis, "end"));
  put(parent, width, shapes);
}

/** A round number that is not below `most`, in steps that bytes have. */
function ceiling(most) {
  let unit = 1;
  while (unit * 1000 < most) unit *= 1024;
  const factor = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((one) => one * unit >= most) ?? 1000;
  return factor * unit;
}

/** Rates over the last `span` seconds; `points` are `[seconds, rate]`, with 0 for now and what was before below it. */
export function lines(parent, { span, series }) {
  const most = ceiling(Math.max(1024, ...series.flatMap(({ points }) => points.map((point) => point[1]))));
  const width = widthOf(parent);
  const right = width - LEFT;
  const x = (seconds) => right + ((right - LEFT) * seconds) / span;
  const y = (value) => BOTTOM - ((BOTTOM - TOP) * value) / most;
  const shapes = [
    line(LEFT, y(most), right, y(most), "grid"), line(LEFT, y(most / 2), right, y(most / 2), "grid"),
    line(LEFT, BOTTOM, right, BOTTOM, "axis"),
  ];
  series.forEach(({ points, isDashed }, index) => {
    const inside = points.filter(([seconds]) => seconds >= -span);
    const path = inside.map(([seconds, value]) => `${x(seconds).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    if (inside.length > 1) shapes.push(shape("polyline", { points: path, class: `line-${index + 1}${isDashed ? " dashed" : ""}` }));
  });
  shapes.push(label(LEFT, y(most) - 5, rate(most)), label(LEFT, y(most / 2) - 5, rate(most / 2)));
  shapes.push(label(LEFT, BOTTOM + 14, `${span / 60} min ago`), label(right, BOTTOM + 14, "now", "end"));
  let left = LEFT;
  series.forEach(({ name, isDashed }, index) => {
    shapes.push(line(left, HEIGHT - 8, left + 22, HEIGHT - 8, `line-${index + 1}${isDashed ? " dashed" : ""}`));
    shapes.push(label(left + 28, HEIGHT - 4, name));
    left += 52 + 6.5 * name.length;
  });
  put(parent, width, shapes);
}
