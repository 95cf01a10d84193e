/**
 * An evacuation of this host: what became of each guest, how much is left, and how to stop it.
 */
import { announce } from "./announce.js";
import { ask } from "./ask.js";
import { byId, element, setAttribute, setProgress, setShown, setText } from "./dom.js";
import { NOTHING, count, milliseconds, moment, percent, time } from "./format.js";
import { Rows, tableRow } from "./rows.js";

const COLUMNS = [["Guest"], ["To"], ["State"], ["Done", "done"], ["Left", "number"], ["Pause", "number"], ["Why", "reason"]];
const TONES = { moved: "good", failed: "bad", left: "warn", switching: "busy", copying: "busy", rehearsing: "busy" };

function create() {
  const row = tableRow(COLUMNS);
  row.name = row.cells[0].appendChild(element("span", { class: "name" }));
  row.state = row.cells[2].appendChild(element("span", { class: "tag" }));
  row.bar = row.cells[3].appendChild(element("progress", { max: "100", value: "0" }));
  row.percent = row.cells[3].appendChild(element("span", { class: "percent" }));
  return row;
}

function update(row, guest) {
  setText(row.name, guest.guest);
  setText(row.cells[1], guest.target ?? NOTHING);
  setText(row.state, guest.state);
  setAttribute(row.state, "data-tone", TONES[guest.state] ?? null);
  const isMoving = typeof guest.percent === "number" && guest.state !== "moved";
  setShown(row.bar, isMoving);
  setProgress(row.bar, guest.percent);
  setAttribute(row.bar, "aria-label", `${guest.guest}: ${guest.state}`);
  setText(row.percent, isMoving ? percent(guest.percent) : guest.state === "moved" ? percent(100) : NOTHING);
  setText(row.cells[4], time(guest.remaining_s));
  setText(row.cells[5], milliseconds(guest.pause_ms));
  setText(row.cells[6], guest.reason);
}

export class EvacuationSection {
  constructor() {
    this.rows = new Rows(byId("evacuation-rows"), { key: (guest) => guest.guest, create, update });
    byId("evacuation-cancel").addEventListener("click", () => this.cancel());
  }

  show(evacuation, host, mayAct) {
    const isNews = this.value !== undefined && (this.value?.id !== evacuation?.id || this.value?.state !== evacuation?.state);
    this.value = evacuation;
    this.host = host;
    setShown(byId("evacuation"), Boolean(evacuation));
    setShown(byId("nav-evacuation"), Boolean(evacuation));
    if (!evacuation) return;
    if (isNews) announce(`The evacuation: ${evacuation.state}.`);
    const counts = { moved: 0, moving: 0, waiting: 0, left: 0, ...evacuation.counts };
    const all = counts.moved + counts.moving + counts.waiting + counts.left;
    setText(byId("evacuation-state"), evacuation.state);
    setText(byId("evacuation-text"), this.summary(evacuation, counts, all));
    setText(byId("evacuation-message"), evacuation.message);
    setShown(byId("evacuation-message"), Boolean(evacuation.message));
    setProgress(byId("evacuation-progress"), counts.moved, Math.max(all, 1));
    setShown(byId("evacuation-cancel"), mayAct && evacuation.state === "running");
    this.rows.show(evacuation.guests ?? []);
  }

  summary(evacuation, counts, all) {
    const isRunning = evacuation.state === "running";
    const { moved, moving, waiting, left } = counts;
    const parts = [`${moved} of ${count(all, "guest")} moved, ${moving} moving, ${waiting} waiting, ${left} left.`];
    if (evacuation.targets?.length) parts.push(`To ${evacuation.targets.join(", ")}, ${evacuation.parallel_copies ?? 1} copied at a time.`);
    if (isRunning && typeof evacuation.remaining_s === "number") parts.push(`About ${time(evacuation.remaining_s)} left.`);
    parts.push(`Began ${moment(evacuation.began)} UTC.`);
    if (evacuation.deadline) {
      const late = isRunning && this.host?.now > evacuation.deadline;
      parts.push(`Deadline ${moment(evacuation.deadline)} UTC${late ? ", which is over" : ""}.`);
    }
    return parts.join(" ");
  }

  cancel() {
    const { id } = this.value;
    ask({
      title: "Cancel the evacuation?",
      text:
        "Copies are rolled back, switchovers end, and the guests that are here stay. Those that have moved stay where they are; " +
        "'crossdock restore' brings them home.",
      yes: "Cancel the evacuation", no: "Let it go on", isDangerous: true,
      action: { action: "cancel-evacuation", evacuation: id },
    });
  }
}
