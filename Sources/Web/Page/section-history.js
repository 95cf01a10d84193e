/**
 * What has moved: outcome, duration and pause, the pauses as a distribution, the rate of the last minutes, and the reports.
 */
import { byId, element, setAttribute, setShown, setText } from "./dom.js";
import { NOTHING, count, milliseconds, moment, rate, time } from "./format.js";
import { histogram, lines } from "./plot.js";
import { Limit, Rows, tableRow } from "./rows.js";

const COLUMNS = [
  ["Guest"], ["Began, UTC", "wide"], ["From → to", "wide"], ["Outcome", "reason"], ["Took", "number wide"], ["Pause", "number wide"],
  ["Report, console", "actions"],
];
const TONES = { migrated: "good", undecided: "bad", "rolled back": "warn", "rolled-back": "warn" };
const FIRST = 25;
/** The buckets of the pauses' distribution in milliseconds: those of the metric. */
const BUCKETS = [5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000];
/** What the plot of the rate remembers. */
const MINUTES = 10;

function create() {
  const row = tableRow(COLUMNS);
  row.name = row.cells[0].appendChild(element("span", { class: "name" }));
  row.outcome = row.cells[3].appendChild(element("span", { class: "tag" }));
  row.reason = row.cells[3].appendChild(element("small"));
  row.console = row.cells[6].appendChild(element("a", {}, "Console"));
  row.report = row.cells[6].appendChild(element("a", {}, "Download"));
  row.none = row.cells[6].appendChild(element("span", {}, NOTHING));
  return row;
}

function update(row, item) {
  setText(row.name, item.guest);
  setText(row.cells[1], moment(item.began));
  setText(row.cells[2], item.role === "destination" ? `${item.peer} → here` : `here → ${item.peer}`);
  setText(row.outcome, item.outcome);
  setAttribute(row.outcome, "data-tone", TONES[item.outcome] ?? null);
  setText(row.reason, item.reason);
  setText(row.cells[4], time(item.took_ms / 1000));
  setText(row.cells[5], milliseconds(item.pause_ms));
  setShown(row.report, Boolean(item.has_report));
  // Of a guest that has left, as long as its next host passes it on.
  const hasConsole = Boolean(item.console?.serial || item.console?.vnc);
  setShown(row.console, hasConsole);
  if (hasConsole) {
    setAttribute(row.console, "href", `/console/${encodeURIComponent(item.guest)}`);
    setAttribute(row.console, "aria-label", `Console of ${item.guest}, which is on ${item.peer}`);
  }
  setShown(row.none, !item.has_report && !hasConsole);
  if (item.has_report) {
    setAttribute(row.report, "href", `/reports/${encodeURIComponent(item.migration)}`);
    setAttribute(row.report, "download", `${item.guest}-${item.migration}.json`);
    setAttribute(row.report, "aria-label", `Download the report of ${item.guest}, ${moment(item.began)}`);
  }
}

/** The smallest value that so large a share of the sorted values does not exceed. */
const quantile = (sorted, share) => sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)];

export class HistorySection {
  constructor() {
    this.rows = new Rows(byId("history-rows"), { key: (item) => `${item.migration} ${item.role}`, create, update });
    this.limit = new Limit(byId("history-more"), FIRST, () => this.show(this.items, this.only));
    this.samples = [];
    let width = 0;
    new ResizeObserver(([{ contentRect }]) => {
      if (contentRect.width === width) return;
      width = contentRect.width;
      this.plotPauses(this.items ?? []);
      this.plotRates();
    }).observe(byId("pauses-plot"));
  }

  /** @param only the guest that the ticket is for; others may have moved */
  show(items, only) {
    this.only = only;
    setShown(byId("history-table"), items.length > 0);
    setText(byId("history-none"), only ? `${only} has not moved yet.` : "No guest has moved yet.");
    setShown(byId("history-empty"), items.length === 0);
    setText(byId("history-count"), items.length || "");
    this.rows.show(this.limit.of(items));
    if (this.items !== items) this.plotPauses(items);
    this.items = items;
  }

  plotPauses(items) {
    const pauses = items.map((item) => item.pause_ms).filter((pause) => typeof pause === "number").sort((a, b) => a - b);
    const [half, most, longest] = [quantile(pauses, 0.5), quantile(pauses, 0.99), pauses.at(-1)].map(milliseconds);
    setText(
      byId("pauses-text"),
      pauses.length === 0
        ? "No pause was measured yet."
        : `${count(pauses.length, "move")}: half of the pauses up to ${half}, 99% up to ${most}, the longest ${longest}.`,
    );
    const counts = new Array(BUCKETS.length + 1).fill(0);
    for (const pause of pauses) {
      const index = BUCKETS.findIndex((most) => pause <= most);
      counts[index < 0 ? BUCKETS.length : index] += 1;
    }
    const labels = BUCKETS.map((most) => (most < 1000 ? `${most}` : `${most / 1000} s`));
    histogram(byId("pauses-plot"), { counts, labels: [...labels, "more"], axis: "pause up to, ms" });
  }

  /** Remembers and shows how fast the moves are now; called once a second. */
  sample(moves, now = Date.now()) {
    const sum = (name) => moves.reduce((total, move) => total + (Number.isFinite(move[name]) ? move[name] : 0), 0);
    this.samples.push({ at: now, sent: sum("bytes_per_second"), dirty: sum("dirty_bytes_per_second") });
    while (this.samples[0].at < now - MINUTES * 60_000) this.samples.shift();
    if (this.samples.some(({ sent }) => sent > 0)) this.plotRates(now);
  }

  plotRates(now = Date.now()) {
    const most = this.samples.reduce((value, sample) => Math.max(value, sample.sent), 0);
    const latest = this.samples.at(-1);
    setText(
      byId("rates-text"),
      most > 0
        ? `Of all moves since this page was opened, ${MINUTES} minutes at most: now ${rate(latest.sent)}, at most ${rate(most)}.`
        : "Nothing has moved since this page was opened.",
    );
    const age = Math.max(60, Math.ceil((now - (this.samples[0]?.at ?? now)) / 60_000) * 60);
    lines(byId("rates-plot"), {
      span: Math.min(age, MINUTES * 60),
      series: [
        { name: "sent", points: this.samples.map(({ at, sent }) => [(at - now) / 1000, sent]) },
        { name: "written by the guests", isDashed: true, points: this.samples.map(({ at, dirty }) => [(at - now) / 1000, dirty]) },
      ],
    });
  }
}
