/**
 * The screen of a guest: noVNC over the websocket `/consoles/GUEST/vnc`, which stays open while the guest moves or is started again. What the host
 * has to say meanwhile comes as the name of the desktop, `GUEST: why there is no picture`; how far a move is, and that somebody has to mend one,
 * from `/events`.
 *
 * Event: `state` with `detail` {`tone`, `text`, `mayType`}; `signed-out`.
 */
import { byId, setShown, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { phase, troubleText } from "./format.js";

const LIBRARY = "/novnc/core";
const LONGEST_WAIT = 15_000;
/** What is said of it when the host closes the websocket. */
const MOVED = 4001;
const CUT = 4002;

export class Display extends EventTarget {
  constructor(guest) {
    super();
    this.guest = guest;
    this.path = `/consoles/${encodeURIComponent(guest)}/vnc`;
    this.rfb = null;
    this.isOn = false;
    this.isOver = false;
    this.tries = 0;
    this.sign = "";
    this.move = null;
    this.trouble = null;
    this.mayType = false;
    this.feed = new Feed(async () => this.isOn);
    this.feed.addEventListener("line", ({ detail }) => {
      if (detail.section === "moves") this.move = detail.value.find((move) => move.guest === this.guest && move.direction !== "in") ?? null;
      else if (detail.section === "trouble") this.trouble = detail.value.find((trouble) => trouble.guest === this.guest && trouble.migration) ?? null;
      else return;
      this.showSign();
    });
    byId("display-keys").addEventListener("click", () => this.rfb?.sendCtrlAltDel());
    byId("display-only").addEventListener("change", () => this.restrict());
    byId("display-type").addEventListener("click", () => this.rfb?.focus());
  }

  start() {
    if (this.isOn) return;
    this.isOn = true;
    this.isOver = false;
    this.connect();
    this.feed.start();
  }

  stop() {
    this.isOn = false;
    clearTimeout(this.timer);
    this.feed.stop();
    this.drop();
  }

  drop() {
    const rfb = this.rfb;
    this.rfb = null;
    rfb?.disconnect();
  }

  async connect() {
    clearTimeout(this.timer);
    if (!this.isOn || this.isOver) return;
    this.say("connecting", "Connecting…");
    let answer;
    try { answer = await fetch(this.path, { cache: "no-store" }); } catch { return this.again("The host does not answer."); }
    if (!this.isOn) return;
    if (answer.status === 401) return this.dispatchEvent(new Event("signed-out"));
    const standing = await answer.json().catch(() => ({}));
    if (!answer.ok) return this.again(sentence(standing.error ?? `the host answers with ${answer.status}`));
    if (!standing.exists) return this.again(sentence(standing.reason ?? "the guest has no screen here"));
    if (standing.browsers) return this.again(sentence(standing.browsers));
    if (!standing.available) return this.again(`Waiting: ${standing.reason ?? "the guest has no picture"}.`);
    let RFB;
    try { RFB = await viewer(); } catch { return this.again("The host does not give the viewer of screens (noVNC)."); }
    if (!this.isOn) return;
    this.mayType = Boolean(standing.may_write);
    this.open(RFB);
  }

  open(RFB) {
    const scheme = location.protocol === "http:" ? "ws" : "wss";
    const socket = new WebSocket(`${scheme}://${location.host}${this.path}`);
    let closing = null;
    // Before noVNC, which keeps the code to itself.
    socket.addEventListener("close", (event) => { closing = event; });
    this.drop();
    const rfb = new RFB(byId("display"), socket, { shared: true });
    this.rfb = rfb;
    rfb.scaleViewport = true;
    rfb.background = "transparent";
    this.restrict();
    rfb.addEventListener("connect", () => {
      this.tries = 0;
      this.sign = "";
      this.say("live", "Connected");
      this.showSign();
      rfb.focus();
    });
    rfb.addEventListener("desktopname", ({ detail }) => {
      const prefix = `${this.guest}: `;
      this.sign = detail.name.startsWith(prefix) ? detail.name.slice(prefix.length) : "";
      this.say(this.sign ? "connecting" : "live", this.sign ? `Waiting: ${this.sign}` : "Connected");
      this.showSign();
    });
    rfb.addEventListener("disconnect", () => {
      if (rfb !== this.rfb) return;
      this.rfb = null;
      if (closing?.code === MOVED) {
        this.isOver = true;
        this.say("wait", `The guest has moved to ${closing.reason}: open its console there.`);
        return this.showSign();
      }
      // What was cut is drawn anew at once.
      if (closing?.code === CUT && this.tries === 0) {
        this.tries = 1;
        return this.connect();
      }
      this.again(closing?.code === 4000 ? sentence(closing.reason) : "Not connected.");
    });
  }

  again(reason) {
    clearTimeout(this.timer);
    this.say("wait", reason);
    const wait = Math.min(500 * 2 ** this.tries, LONGEST_WAIT);
    this.tries += 1;
    this.timer = setTimeout(() => this.connect(), wait * (0.75 + Math.random() / 4));
  }

  /** Who may look only, or wants to, presses nothing. */
  restrict() {
    const only = !this.mayType || byId("display-only").checked;
    if (this.rfb) this.rfb.viewOnly = only;
    setShown(byId("display-keys"), !only);
    setShown(byId("display-type"), !only);
    setShown(byId("display-choice"), this.mayType);
    this.dispatchEvent(new CustomEvent("state", { detail: { ...this.said, mayType: !only } }));
  }

  say(tone, text) {
    this.said = { tone, text };
    byId("display").classList.toggle("stale", tone !== "live");
    this.dispatchEvent(new CustomEvent("state", { detail: { tone, text, mayType: this.mayType } }));
  }

  /** A small sign over the picture: where the guest moves, and why the picture stands still. */
  showSign() {
    const parts = [];
    if (this.move) {
      const percent = typeof this.move.percent === "number" ? `, ${Math.floor(this.move.percent)} %` : "";
      parts.push(`Moving to ${this.move.peer}${percent}, ${phase(this.move.phase)}`);
    }
    if (this.trouble) parts.push(troubleText(this.trouble));
    // The host says the trouble as the name, too.
    if (this.sign && !(this.trouble?.command && this.sign.includes(this.trouble.command))) parts.push(this.sign);
    setText(byId("display-sign"), parts.map(sentence).join(" "));
    setShown(byId("display-sign"), parts.length > 0);
  }
}

/** noVNC's class. */
async function viewer() {
  const [{ default: RFB }, { default: Inflator }] = await Promise.all([import(`${LIBRARY}/rfb.js`), import(`${LIBRARY}/inflator.js`)]);
  // A stream that is reset keeps a window of no size (pako's inflateReset), so that what refers back to an earlier rectangle fails. Each display
  // after the first begins with such a reset.
  Inflator.prototype.reset = function reset() { Object.assign(this, new Inflator()); };
  return RFB;
}

/** Half a sentence, made whole. */
function sentence(text) {
  const trimmed = text.trim();
  return `${trimmed.charAt(0).toUpperCase()}${trimmed.slice(1)}${/[.!?]$/.test(trimmed) ? "" : "."}`;
}
