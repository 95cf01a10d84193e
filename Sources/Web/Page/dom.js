/**
 * Making and changing nodes. Text goes in as text and never as markup, and a node is touched only when something of it is different.
 */

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element. `attributes` are set as such; children are nodes or text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A button that does not submit. */
export function button(label, action, kind = "small") {
  const made = element("button", { type: "button", class: kind }, label);
  made.addEventListener("click", action);
  return made;
}

/** Shows `text` in a node that holds nothing but text. */
export function setText(node, text) {
  const wanted = String(text ?? "");
  if (node.shownText === wanted) return;
  node.shownText = wanted;
  node.textContent = wanted;
}

/** Sets an attribute; null takes it away. */
export function setAttribute(node, name, value) {
  if (value === null || value === undefined) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, String(value));
}

/** Shows or hides a node. */
export function setShown(node, isShown) {
  if (node.hidden === isShown) node.hidden = !isShown;
}

/** A bar from 0 to `max`, of a share that may not be known. */
export function setProgress(node, value, max = 100) {
  if (node.max !== max) node.max = max;
  const known = typeof value === "number" && Number.isFinite(value) ? Math.min(Math.max(value, 0), max) : 0;
  if (node.value !== known) node.value = known;
}

/** Does something that may take away what has the focus: the heading of its section has it then, or the content where that is gone too. */
export function keepingFocus(change) {
  const focused = document.activeElement;
  const section = focused?.closest("section");
  change();
  if (!focused || focused === document.body || focused === document.activeElement && focused.checkVisibility()) return;
  const heading = section?.querySelector("h2");
  const next = [focused, heading].find((node) => node?.isConnected && node.checkVisibility()) ?? byId("main");
  next.focus({ preventScroll: true });
}

/** Puts text into the clipboard and says so on the button for a moment. */
export async function copy(text, source, announce) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
    const label = source.dataset.label ?? source.textContent;
    source.dataset.label = label;
    source.textContent = "Copied";
    setTimeout(() => { source.textContent = label; }, 2000);
  } catch {
    announce("The browser does not permit copying. Select the command and copy it by hand.");
  }
}
