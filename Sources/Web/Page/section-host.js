/**
 * This host: how full it is, whether it takes guests, how long its certificate holds, and the hosts that it knows.
 */
import { announce } from "./announce.js";
import { ask } from "./ask.js";
import { byId, element, setAttribute, setShown, setText } from "./dom.js";
import { NOTHING, bytes, count, fineMilliseconds, moment, offset } from "./format.js";
import { Rows, tableRow } from "./rows.js";

/** Days of a certificate below which it is time to act, and below which it is late. */
const DAYS = { soon: 30, late: 14 };
/** Clocks further apart are warned of, as `crossdock doctor` does. */
const CLOCK_MS = 1000;

/** A bar of used, reserved and free, with its figures in words. */
class Gauge {
  constructor(parent, title) {
    this.parts = ["used", "reserved", "free"].map((kind) => ({ kind, bar: element("span", { class: kind }), text: element("span") }));
    this.total = element("span", { class: "quiet" });
    const key = this.parts.map(({ kind, text }) => element("li", {}, element("i", { class: kind, "aria-hidden": "true" }), text));
    parent.append(
      element("p", { class: "gauge-title" }, element("strong", {}, title), " ", this.total),
      element("div", { class: "gauge-bar", "aria-hidden": "true" }, ...this.parts.map((part) => part.bar)),
      element("ul", { class: "key" }, ...key),
    );
  }

  show(value, more) {
    setText(this.total, [value?.total ? `of ${bytes(value.total)}` : "not known", more].filter(Boolean).join(", "));
    for (const { kind, bar, text } of this.parts) {
      const size = value?.[kind];
      setText(text, `${bytes(size)} ${kind}`);
      const share = value?.total > 0 && size > 0 ? Math.min(size / value.total, 1) * 100 : 0;
      const width = `${share.toFixed(2)}%`;
      if (bar.shownWidth !== width) bar.style.width = bar.shownWidth = width;
    }
  }
}

const PEER_COLUMNS = [["Host"], ["State"], ["Round trip", "number"], ["Clock", "number"]];

function createPeer() {
  const row = tableRow(PEER_COLUMNS);
  row.name = row.cells[0].appendChild(element("span", { class: "name" }));
  row.address = row.cells[0].appendChild(element("small"));
  row.error = row.cells[0].appendChild(element("small", { class: "error" }));
  row.state = row.cells[1].appendChild(element("span", { class: "tag" }));
  row.clock = row.cells[3].appendChild(element("span"));
  row.warning = row.cells[3].appendChild(element("small", { class: "warn" }));
  return row;
}

function updatePeer(row, peer) {
  setText(row.name, peer.name);
  setText(row.address, peer.address);
  const isUp = peer.up ?? null;
  setText(row.state, isUp === null ? "not known" : isUp ? "up" : "down");
  setAttribute(row.state, "data-tone", isUp === null ? null : isUp ? "good" : "bad");
  setText(row.error, peer.error);
  setText(row.cells[2], fineMilliseconds(peer.round_trip_ms));
  const isOff = Math.abs(peer.clock_offset_ms ?? 0) > CLOCK_MS;
  setText(row.clock, offset(peer.clock_offset_ms));
  setText(row.warning, isOff ? "set the clocks" : "");
}

export class HostSection {
  constructor() {
    this.memory = new Gauge(byId("host-memory"), "Memory");
    this.disk = new Gauge(byId("host-disk"), "Disk");
    this.facts = new Map();
    this.peers = new Rows(byId("peers"), { key: (peer) => peer.name, create: createPeer, update: updatePeer });
    this.upBefore = new Map();
    byId("cordon").addEventListener("click", () => this.cordon());
    byId("uncordon").addEventListener("click", () => this.uncordon());
  }

  /** @param only the guest that the ticket is for: of the host, its name is known then, and no more */
  show(host, mayAct, only) {
    this.host = host;
    setText(byId("host-title"), `This host: ${host.name}`);
    setShown(byId("host-cards"), !only);
    setShown(byId("host-untold"), Boolean(only));
    if (only) return;
    this.memory.show(host.memory);
    this.disk.show(host.disk, host.disk?.directory);
    this.fact("Address", host.address);
    this.certificate(host.certificate);
    this.fact("QEMU", (host.emulators ?? []).join(", "));
    this.fact("Crossdock", [host.version, host.protocol && `protocol ${host.protocol}`].filter(Boolean).join(", "));
    this.showCordon(host.cordon ?? null, mayAct);
    this.showPeers(host.peers ?? []);
  }

  fact(name, value, tone = null) {
    let node = this.facts.get(name);
    if (!node) {
      node = element("dd");
      this.facts.set(name, node);
      byId("host-facts").append(element("div", {}, element("dt", {}, name), node));
    }
    setText(node, value || NOTHING);
    setAttribute(node, "class", tone);
  }

  certificate(value) {
    if (!value) return this.fact("Certificate", "not known");
    const days = Math.floor(value.days ?? 0);
    const tone = days < DAYS.late ? "error" : days < DAYS.soon ? "warn" : null;
    const left = days < 0 ? "has expired" : `${count(days, "day")} left`;
    this.fact("Certificate", `${value.name ?? ""} ${left}, until ${moment(value.expires).slice(0, 10)}`.trim(), tone);
  }

  showCordon(cordon, mayAct) {
    setText(byId("host-cordon"), cordon ? `Takes no new guests: cordoned ${cordon}` : "Takes new guests.");
    setAttribute(byId("host-cordon"), "data-tone", cordon ? "warn" : null);
    setShown(byId("host-buttons"), mayAct);
    setShown(byId("cordon"), !cordon);
    setShown(byId("uncordon"), Boolean(cordon));
    if (this.cordonBefore !== undefined && this.cordonBefore !== cordon) {
      announce(cordon ? "This host takes no new guests." : "This host takes new guests.");
    }
    this.cordonBefore = cordon;
  }

  showPeers(peers) {
    setShown(byId("peers-table"), peers.length > 0);
    setShown(byId("peers-empty"), peers.length === 0);
    this.peers.show(peers);
    for (const peer of peers) {
      const before = this.upBefore.get(peer.name);
      if (before !== undefined && before !== peer.up && peer.up !== null) announce(`${peer.name} is ${peer.up ? "up" : "down"}.`);
      this.upBefore.set(peer.name, peer.up);
    }
  }

  cordon() {
    ask({
      title: "Cordon this host?",
      text: `${this.host.name} takes no new guests from now on. Guests that run here or are on their way are not touched.`,
      yes: "Cordon",
      field: { label: "Why (others read this)" },
      action: (message) => ({ action: "cordon", message }),
    });
  }

  uncordon() {
    ask({
      title: "End the cordon?",
      text: `${this.host.name} takes new guests again.`,
      yes: "Uncordon",
      action: { action: "uncordon" },
    });
  }
}
