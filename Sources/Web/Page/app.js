/**
 * The page of an agent: puts the session, the feed and the sections together. What arrives is kept, and shown a few times a second
 * at most, however much of it there is.
 */
import { announce } from "./announce.js";
import { byId, copy, keepingFocus, setAttribute, setShown, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { moment, time } from "./format.js";
import { EvacuationSection } from "./section-evacuation.js";
import { GuestsSection } from "./section-guests.js";
import { HistorySection } from "./section-history.js";
import { HostSection } from "./section-host.js";
import { MovesSection } from "./section-moves.js";
import { TroubleSection } from "./section-trouble.js";
import { Session, takeTicket, ticketIn } from "./session.js";

/** Between two showings, in milliseconds. */
const REST = 200;

const ticket = takeTicket();
const session = new Session();
const feed = new Feed(async () => {
  await session.refresh();
  if (!session.mayView) showSession();
  return session.mayView;
});
const sections = {
  trouble: new TroubleSection(), host: new HostSection(), moves: new MovesSection(), evacuation: new EvacuationSection(),
  guests: new GuestsSection(), history: new HistorySection(),
};
/** The latest value of each section, and the names of those that are to be shown anew. */
const values = { trouble: [], host: null, moves: [], evacuation: null, guests: [], history: [] };
const changed = new Set();
let timer = null;
let hasContent = false;

// What arrives.

feed.addEventListener("line", ({ detail }) => {
  if (Object.hasOwn(values, detail.section)) {
    values[detail.section] = detail.value ?? (Array.isArray(values[detail.section]) ? [] : null);
    show(detail.section);
  } else if (detail.event && detail.migration) happened(detail);
});

/** An event of a migration: what it says of the progress is newer than the section. */
function happened(detail) {
  const { migration, event } = detail;
  const move = values.moves.find((one) => one.migration === migration);
  if (move && (event.event === "progress" || event.event === "phase")) {
    const isNewPhase = event.event === "phase";
    Object.assign(move, { phase: event.phase ?? move.phase, percent: isNewPhase ? 0 : event.percent });
    Object.assign(move, { bytes_per_second: isNewPhase ? null : event.rate, remaining_s: isNewPhase ? null : event.remaining });
  }
  sections.moves.tell(detail);
  show("moves");
}

/** What depends on a section is shown with it. */
const WITH = { host: ["moves", "evacuation"], moves: ["guests"] };

function show(...names) {
  for (const name of names) {
    changed.add(name);
    for (const other of WITH[name] ?? []) changed.add(other);
  }
  timer ??= setTimeout(() => requestAnimationFrame(() => keepingFocus(render)), REST);
}

function render() {
  timer = null;
  const { host, moves } = values;
  const { mayAct } = session;
  const only = session.value?.guest;
  const names = [...changed];
  changed.clear();
  for (const name of names) {
    if (name === "trouble") sections.trouble.show(values.trouble);
    if (name === "host" && host) sections.host.show(host, mayAct, only);
    if (name === "moves") sections.moves.show(moves, host, mayAct, only);
    if (name === "evacuation") sections.evacuation.show(values.evacuation, host, mayAct);
    if (name === "guests") sections.guests.show(values.guests, { moves, host, mayAct, only });
    if (name === "history") sections.history.show(values.history, only);
  }
  headings();
  hasContent ||= names.length > 0 && host !== null;
  setShown(byId("content"), hasContent);
  setShown(byId("nav"), hasContent);
}

function headings() {
  const name = values.host?.name ?? session.value?.host;
  setText(byId("title"), name ? `Crossdock on ${name}` : "Crossdock");
  const state = values.trouble.length > 0 ? "needs you" : values.moves.length > 0 ? `${values.moves.length} moving` : null;
  document.title = [values.trouble.length > 0 ? "(!)" : null, name ?? "Crossdock", state && `– ${state}`].filter(Boolean).join(" ");
  const { version, protocol } = values.host ?? {};
  setText(byId("versions"), version ? `Crossdock ${version}, protocol ${protocol}. Times are in UTC.` : "");
}

// The connection.

const SAID = { live: "Connected.", wait: "Not connected. What is shown grows old." };

feed.addEventListener("change", () => {
  if (SAID[feed.state] && feed.state !== byId("connection").dataset.said) {
    if (byId("connection").dataset.said || feed.state === "wait") announce(SAID[feed.state]);
    byId("connection").dataset.said = feed.state;
  }
  showConnection();
});

function showConnection() {
  const { state, heard, next } = feed;
  const age = heard ? time((Date.now() - heard) / 1000) : null;
  const old = age ? `what is shown is ${age} old` : "nothing is shown yet";
  const texts = {
    live: "Live",
    connecting: age ? `Connecting, ${old}` : "Connecting…",
    wait: `Not connected, ${old}; next try in ${Math.max(0, Math.ceil(((next ?? 0) - Date.now()) / 1000))} s`,
    off: session.value ? "Not connected" : `Not signed in${age ? `, ${old}` : ""}`,
  };
  setText(byId("connection-text"), texts[state]);
  setAttribute(byId("connection"), "data-state", state);
  setShown(byId("connect-now"), state === "wait");
  document.body.classList.toggle("stale", state !== "live" && hasContent);
}
setInterval(() => {
  if (feed.state === "live") sections.history.sample(values.moves);
  else showConnection();
}, 1000);
byId("connect-now").addEventListener("click", () => feed.hurry());

// The session.

session.addEventListener("change", () => {
  showSession();
  if (session.mayView) feed.start();
  else feed.stop();
  show(...Object.keys(values));
});

function showSession(reason) {
  const { value } = session;
  setShown(byId("session"), Boolean(value));
  setShown(byId("sign-in"), !session.mayView);
  setText(byId("sign-in-title"), hasContent ? "Sign in again" : "Sign in");
  setText(byId("sign-in-host"), value?.host ?? values.host?.name ?? "the host");
  if (value) {
    const rights = `${session.mayAct ? "may act" : "may look"}${value.guest ? ` (${value.guest} only)` : value.guests === false ? " (at the host, and at no guest)" : ""}`;
    setText(byId("session-text"), `${value.name}, ${rights}${value.expires ? `, until ${moment(value.expires).slice(11, 16)} UTC` : ""}`);
    if (session.mayView) return;
  }
  let text = reason ?? "This page shows nothing without a ticket.";
  if (value?.guest) text = `This ticket is for the console of ${value.guest} alone.`;
  else if (hasContent && !reason) text = "Your session has ended. What was shown stays, and is not kept up to date.";
  setText(byId("sign-in-reason"), text);
  setText(byId("sign-in-error"), "");
  if (hasContent) announce(text);
}

// Who leaves wants nothing to stay on the screen.
byId("sign-out").addEventListener("click", async () => {
  await session.signOut();
  location.reload();
});
byId("sign-in-copy").addEventListener("click", (event) => copy("crossdock web ticket", event.currentTarget, announce));
byId("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = byId("sign-in-ticket");
  const typed = ticketIn(input.value);
  const refusal = typed ? await session.signIn(typed) : "This is no link of 'crossdock web ticket'.";
  input.value = "";
  setText(byId("sign-in-error"), refusal ?? "");
  if (!refusal) byId("main").focus({ preventScroll: true });
});
// A link with a ticket may be opened where the page is open already.
addEventListener("hashchange", async () => {
  const fresh = location.hash.startsWith("#t=") ? takeTicket() : null;
  if (fresh) setText(byId("sign-in-error"), (await session.enter(fresh, session.value?.guest)) ?? "");
});

async function begin() {
  // Whatever the session is for, the page shows it.
  const refusal = await session.enter(ticket, null);
  try {
    if (session.value === null) await session.refresh();
  } catch { return feed.start(); } // It waits until the host answers.
  if (!session.mayView) showSession(refusal);
  showConnection();
}

setAttribute(byId("connection"), "data-state", "connecting");
begin();
