/**
 * What happens on the host, as it happens: JSON lines from the websocket `/events`. It connects again by itself, with a growing wait, and
 * knows how old the last word of the host is.
 *
 * Events: `line` (a value, in `detail`) and `change` (of `state`, which is `off`, `wait`, `connecting` or `live`).
 */

const LONGEST_WAIT = 30_000;
/** A host that says nothing for so long is taken for gone: of a line that was cut, a browser learns nothing. */
const SILENCE = 45_000;
/** A line that does not end is no line. */
const LONGEST_LINE = 16 << 20;

export class Feed extends EventTarget {
  /** @param admit asks whether there is a session; true, false, or an error when the host does not answer */
  constructor(admit) {
    super();
    this.admit = admit;
    this.state = "off";
    this.tries = 0;
    /** When the host was heard last, and when the next try is, by `Date.now()`. */
    this.heard = null;
    this.next = null;
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.hurry(); });
  }

  start() {
    if (this.state === "off") this.connect();
  }

  stop() {
    clearTimeout(this.timer);
    clearTimeout(this.silence);
    this.drop();
    this.change("off");
  }

  /** Does not wait for the next try. */
  hurry() {
    if (this.state === "wait") this.connect();
  }

  async connect() {
    clearTimeout(this.timer);
    this.change("connecting");
    // An attempt that is answered after another one has begun does not count.
    const attempt = (this.attempt = Symbol("attempt"));
    const isAdmitted = await this.admit().catch(() => null);
    if (this.state !== "connecting" || this.attempt !== attempt) return;
    if (isAdmitted === null) return this.wait();
    if (!isAdmitted) return this.stop();
    const socket = new WebSocket(`wss://${location.host}/events`);
    const decoder = new TextDecoder();
    let rest = "";
    socket.binaryType = "arraybuffer";
    socket.addEventListener("message", (message) => {
      if (socket !== this.socket) return;
      this.listen();
      const text = typeof message.data === "string" ? message.data : decoder.decode(message.data, { stream: true });
      const lines = (rest + text).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.trim()) this.take(line);
      if (rest.length > LONGEST_LINE) socket.close();
    });
    socket.addEventListener("close", () => {
      if (socket === this.socket) this.wait();
    });
    this.socket = socket;
    this.watch();
  }

  take(line) {
    let value;
    try { value = JSON.parse(line); } catch { return console.warn("A line of the host is no JSON."); }
    this.dispatchEvent(new CustomEvent("line", { detail: value }));
  }

  /** The host has said something. */
  listen() {
    this.heard = Date.now();
    this.tries = 0;
    this.watch();
    this.change("live");
  }

  watch() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.wait(), SILENCE);
  }

  wait() {
    clearTimeout(this.silence);
    clearTimeout(this.timer);
    this.drop();
    const most = Math.min(1000 * 2 ** this.tries, LONGEST_WAIT);
    this.tries += 1;
    // Not all pages at once, when the agent begins anew.
    const wait = most * (0.75 + Math.random() / 4);
    this.next = Date.now() + wait;
    this.timer = setTimeout(() => this.connect(), wait);
    this.change("wait");
  }

  drop() {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  change(state) {
    if (this.state === state) return;
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }
}
