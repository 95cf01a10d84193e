/**
 * Who looks at this page. A ticket in the address (`#t=...`) leaves the address bar at once and becomes a cookie that no script can read;
 * what the cookie permits is asked of the host.
 */

/** Takes the ticket out of the address bar and out of the browser's history. */
export function takeTicket() {
  const ticket = ticketIn(location.hash);
  if (ticket) history.replaceState(null, "", location.pathname);
  return ticket;
}

/** The ticket in a link, or the ticket itself when it was copied without the rest. */
export function ticketIn(text) {
  const trimmed = text.trim();
  const found = /#t=([^&\s]+)/.exec(trimmed);
  if (found) return safelyDecoded(found[1]);
  return /^[\w.~+/=-]+$/.test(trimmed) && !trimmed.startsWith("#") ? trimmed : null;
}

function safelyDecoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

export class Session extends EventTarget {
  constructor() {
    super();
    /** What `GET /session` has answered; null without a session. */
    this.value = null;
    // A ticket that is used in one window serves the others too.
    this.windows = new BroadcastChannel("crossdock-session");
    this.windows.addEventListener("message", () => this.refresh().catch(() => {}));
  }

  get mayAct() { return this.has("act"); }
  get mayView() { return this.has("view"); }
  has(right) { return Boolean(this.value?.rights?.includes(right)); }

  /** Asks what the cookie, or the browser's certificate, permits. Throws when the host does not answer. */
  async refresh() {
    const answer = await fetch("/session", { cache: "no-store" });
    if (answer.status === 401 || answer.status === 403) this.set(null);
    else if (answer.ok) this.set(await answer.json());
    else throw new Error(`The host answered with ${answer.status}.`);
    return this.value;
  }

  /** Uses up a ticket. Returns a sentence when it was refused, null when all is well. */
  async signIn(ticket) {
    let answer;
    try { answer = await post("/session", { ticket }); } catch { return "The host does not answer. Try again in a moment."; }
    if (!answer.ok) return (await sentence(answer)) ?? "The ticket is used, unknown or expired.";
    await this.refresh().catch(() => {});
    this.windows.postMessage("changed");
    return null;
  }

  /**
   * Uses up the ticket that the page was opened with, if it was. Returns a sentence when that was refused, and null when all is well: also when a
   * link is opened once more by who is signed in, whose session may be for something else than the link was.
   */
  async enter(ticket, guest) {
    const refusal = ticket ? await this.signIn(ticket) : null;
    if (refusal === null) return null;
    await this.refresh().catch(() => {});
    const only = this.value?.guest;
    return this.mayView && (!only || only === guest) ? null : refusal;
  }

  async signOut() {
    await fetch("/session", { method: "DELETE" }).catch(() => {});
    await this.refresh().catch(() => {});
    this.windows.postMessage("changed");
  }

  set(value) {
    clearTimeout(this.timer);
    const before = JSON.stringify(this.value);
    this.value = value;
    if (value?.expires) {
      const left = value.expires * 1000 - Date.now();
      // The host's clock decides, and may be behind this one. A browser's timer takes no more than 24 days.
      const wait = left > 0 ? Math.min(left + 1000, 1 << 30) : 30_000;
      this.timer = setTimeout(() => this.refresh().catch(() => {}), wait);
    }
    if (before !== JSON.stringify(value)) this.dispatchEvent(new Event("change"));
  }
}

/** Sends JSON. */
export const post = (path, value) =>
  fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });

/** What an answer has to say, if it says something. */
export async function sentence(answer) {
  try {
    const value = await answer.json();
    return value.error ?? value.message ?? null;
  } catch { return null; }
}
