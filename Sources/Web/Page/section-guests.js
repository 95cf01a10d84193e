/**
 * The guests of this host: how large they are, whether they can move, and why not. A filter finds one among hundreds.
 */
import { ask } from "./ask.js";
import { button, byId, element, setAttribute, setShown, setText } from "./dom.js";
import { NOTHING, bytes, count } from "./format.js";
import { Limit, Rows, tableRow } from "./rows.js";

const COLUMNS = [
  ["Guest"], ["State"], ["Memory", "number plain"], ["Disks", "number plain"], ["CPUs", "number plain"], ["Can it move?", "reason"],
  ["", "actions"],
];
const TONES = { running: "good", paused: "warn" };
const MOVABLE = new Map([[true, ["yes", "good"]], [false, ["no", "bad"]]]);
const EVACUATIONS = { stop: "is stopped in an evacuation", leave: "stays in an evacuation" };
const FIRST = 100;

const movable = (guest) => MOVABLE.get(guest.movable)?.[0] ?? "unknown";

function details(guest) {
  const parts = Object.entries(guest.labels ?? {}).map(([key, value]) => `${key}=${value}`);
  if (guest.origin) parts.push(`from ${guest.origin}`);
  if (EVACUATIONS[guest.evacuation]) parts.push(EVACUATIONS[guest.evacuation]);
  return parts.join(" · ");
}

const textOf = (guest) => [guest.name, guest.state, guest.reason, details(guest)].filter(Boolean).join(" ").toLowerCase();

export class GuestsSection {
  constructor() {
    this.rows = new Rows(byId("guests-rows"), {
      key: (guest) => guest.name, create: () => this.create(), update: (row, guest) => this.update(row, guest),
    });
    this.limit = new Limit(byId("guests-more"), FIRST, () => this.render());
    this.guests = [];
    this.moving = new Set();
    byId("guests-filter").addEventListener("input", () => this.render());
    byId("guests-which").addEventListener("change", () => this.render());
  }

  create() {
    const row = tableRow(COLUMNS);
    row.name = row.cells[0].appendChild(element("span", { class: "name" }));
    row.details = row.cells[0].appendChild(element("small"));
    row.state = row.cells[1].appendChild(element("span", { class: "tag" }));
    row.movable = row.cells[5].appendChild(element("span", { class: "tag" }));
    row.reason = row.cells[5].appendChild(element("small"));
    row.console = row.cells[6].appendChild(element("a", {}, "Console"));
    row.move = row.cells[6].appendChild(button("Move…", () => this.move(row.item)));
    return row;
  }

  update(row, guest) {
    setText(row.name, guest.name);
    setText(row.details, details(guest));
    setText(row.state, guest.state);
    setAttribute(row.state, "data-tone", TONES[guest.state] ?? null);
    setText(row.cells[2], bytes(guest.memory));
    setText(row.cells[3], bytes(guest.disk));
    setText(row.cells[4], guest.processors ?? NOTHING);
    const [word, tone] = this.moving.has(guest.name) ? ["moves now", "busy"] : (MOVABLE.get(guest.movable) ?? ["not looked at", null]);
    setText(row.movable, word);
    setAttribute(row.movable, "data-tone", tone);
    setText(row.reason, guest.reason);
    const hasConsole = Boolean(guest.console?.serial || guest.console?.vnc);
    setShown(row.console, hasConsole);
    if (hasConsole) {
      setAttribute(row.console, "href", `/console/${encodeURIComponent(guest.name)}`);
      setAttribute(row.console, "aria-label", `Console of ${guest.name}`);
    }
    setShown(row.move, this.mayAct && guest.movable !== false && !this.moving.has(guest.name));
    setAttribute(row.move, "aria-label", `Move ${guest.name}`);
  }

  /** @param only the guest that the ticket is for; others may be there */
  show(guests, { moves, host, mayAct, only }) {
    Object.assign(this, { guests, host, mayAct, only, moving: new Set(moves.map((move) => move.guest)) });
    setText(byId("guests-count"), guests.length);
    this.render();
  }

  render() {
    const words = byId("guests-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const which = byId("guests-which").value;
    const isFiltered = words.length > 0 || which !== "";
    const found = isFiltered ? this.guests.filter((guest) => this.matches(guest, words, which)) : this.guests;
    setText(byId("guests-found"), isFiltered ? `${found.length} of ${count(this.guests.length, "guest")}` : "");
    setShown(byId("guests-table"), found.length > 0);
    setShown(byId("guests-empty"), found.length === 0);
    setText(byId("guests-empty"), isFiltered ? "No guest is like that." : this.only ? `${this.only} is not on this host.` : "No guests on this host.");
    this.rows.show(this.limit.of(found));
  }

  matches(guest, words, which) {
    if (which && movable(guest) !== which) return false;
    const text = textOf(guest);
    return words.every((word) => text.includes(word));
  }

  move(guest) {
    const peers = (this.host?.peers ?? []).map((peer) => peer.name);
    const up = (this.host?.peers ?? []).find((peer) => peer.up)?.name;
    ask({
      title: `Move ${guest.name}?`,
      yes: "Move",
      field: {
        label: "To the host", value: up ?? peers[0], choices: peers, isNeeded: true,
        tell: (host) =>
          `${guest.name} moves to ${host || "…"} with ${bytes(guest.memory)} of memory and ${bytes(guest.disk)} of disks. ` +
          (guest.state === "running" ? "It runs on meanwhile and is paused for a moment at the end. " : "") +
          "Should anything fail before it is handed over, it stays here as it is.",
      },
      action: (host) => ({ action: "move", guest: guest.name, host }),
    });
  }
}
