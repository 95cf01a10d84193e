/**
 * The moves of this moment: from where to where, how far, how fast against what the guest writes, and how to stop one.
 */
import { announce } from "./announce.js";
import { ask } from "./ask.js";
import { button, byId, element, setAttribute, setProgress, setShown, setText } from "./dom.js";
import { milliseconds, percent, phase, rate, time } from "./format.js";
import { Rows, tableRow } from "./rows.js";

const COLUMNS = [
  ["Guest"], ["From → to", "wide"], ["Phase", "wide"], ["Done", "done"], ["Rate", "number"], ["Guest writes", "number"],
  ["Left", "number"], ["Expected pause", "number"], ["", "actions"],
];
/** Where the guest may be paused or gone already, a roll-back may come too late; the host says so then. */
const cancelText = (move) =>
  `The move of ${move.guest} to ${move.to} is rolled back. ${move.guest} goes on at ${move.from}, and what was copied is lost.`;

export class MovesSection {
  constructor() {
    this.warnings = new Map();
    this.rows = new Rows(byId("moves-rows"), {
      key: (move) => move.migration, create: () => this.create(), update: (row, move) => this.update(row, move),
    });
  }

  create() {
    const row = tableRow(COLUMNS);
    row.name = row.cells[0].appendChild(element("span", { class: "name" }));
    row.way = row.cells[1].appendChild(element("span"));
    row.phase = row.cells[2].appendChild(element("span"));
    row.warning = row.cells[2].appendChild(element("small", { class: "warn" }));
    row.bar = row.cells[3].appendChild(element("progress", { max: "100", value: "0" }));
    row.percent = row.cells[3].appendChild(element("span", { class: "percent" }));
    row.dirty = row.cells[5].appendChild(element("span"));
    row.cancel = row.cells[8].appendChild(button("Cancel…", () => this.cancel(row.item), "small danger"));
    return row;
  }

  update(row, move) {
    setText(row.name, move.guest);
    setText(row.way, `${move.from} → ${move.to}`);
    setText(row.phase, phase(move.phase));
    setText(row.warning, this.warnings.get(move.migration));
    setProgress(row.bar, move.percent);
    setAttribute(row.bar, "aria-label", `${move.guest}: ${phase(move.phase)}`);
    setText(row.percent, percent(move.percent));
    setText(row.cells[4], rate(move.bytes_per_second));
    const isFaster = move.dirty_bytes_per_second > move.bytes_per_second && move.phase !== "check";
    setText(row.dirty, rate(move.dirty_bytes_per_second) + (isFaster ? ", faster than sent" : ""));
    setAttribute(row.dirty, "class", isFaster ? "warn" : null);
    setText(row.cells[6], time(move.remaining_s));
    setText(row.cells[7], milliseconds(move.expected_pause_ms));
    setAttribute(row.cancel, "aria-label", `Cancel the move of ${move.guest}`);
    setShown(row.cancel, this.mayAct && Boolean(move.can_cancel));
  }

  /** @param only the guest that the ticket is for; others may move */
  show(moves, host, mayAct, only) {
    this.mayAct = mayAct;
    const here = host?.name ?? "this host";
    const items = moves.map((move) => {
      const [from, to] = move.direction === "in" ? [move.peer, here] : [here, move.peer];
      return { ...move, from, to };
    });
    for (const id of this.warnings.keys()) if (!moves.some((move) => move.migration === id)) this.warnings.delete(id);
    setShown(byId("moves-table"), items.length > 0);
    setShown(byId("moves-empty"), items.length === 0);
    setText(byId("moves-empty"), only ? `${only} does not move.` : "Nothing moves.");
    setText(byId("moves-count"), items.length || "");
    this.rows.show(items);
  }

  /** An event of a migration, as it happens. */
  tell({ migration, guest, event }) {
    if (event.event === "phase") announce(`${guest}: ${phase(event.phase)}.`);
    if (event.event === "warning") {
      this.warnings.set(migration, event.message);
      announce(`${guest}: ${event.message}`);
    }
    if (event.event === "finished") announce(ending(guest, event.report ?? {}));
  }

  cancel(move) {
    ask({
      title: `Cancel the move of ${move.guest}?`, text: cancelText(move), yes: "Cancel the move", no: "Let it go on", isDangerous: true,
      action: { action: "cancel", migration: move.migration },
    });
  }
}

function ending(guest, report) {
  if (report.outcome !== "migrated") return `${guest}: ${report.reason ?? report.outcome ?? "the move has ended"}.`;
  const pause = typeof report.blackout_ms === "number" ? `, paused for ${milliseconds(report.blackout_ms)}` : "";
  return `${guest} runs on ${report.destination ?? "the other host"}${pause}.`;
}
