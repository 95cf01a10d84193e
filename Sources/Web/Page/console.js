/**
 * The consoles of a guest: its screen, by display.js, and its serial console, by the websocket `/consoles/GUEST/serial`, whose stream is made of
 * frames (a byte that says what it is, a length in three bytes, and as many bytes). It connects again by itself, and goes on at its offset.
 */
import { announce } from "./announce.js";
import { Display } from "./display.js";
import { byId, copy, setAttribute, setShown, setText } from "./dom.js";
import { troubleText } from "./format.js";
import { Session, takeTicket, ticketIn } from "./session.js";
import { Screen, sent, Terminal } from "./terminal.js";

const NOTE = 0;
const OUTPUT = 1;
const INPUT = 2;
/** The agent pings; a browser learns nothing of that, so a quiet guest is asked after, by HTTP, when nothing has come for so long. */
const SILENCE = 30_000;
const LONGEST_WAIT = 15_000;

const guest = guestName();
const ticket = takeTicket();
const session = new Session();
const terminal = new Terminal();
const screen = new Screen(terminal, byId("screen"));
const display = new Display(guest);
const encoder = new TextEncoder();
/** What is shown: `serial` or `display`; null before that is known. */
let shown = null;
let socket = null;
let rest = new Uint8Array();
let standing = null;
let ring = null;
let position = null;
let wanted = true;
let tries = 0;
let timer = null;
let silence = null;
let over = null;
/** What the agent has said of the end of this connection: a Close frame holds half a sentence only. */
let parting = null;

function guestName() {
  try { return decodeURIComponent(location.pathname.split("/")[2] ?? ""); } catch { return ""; }
}

function frame(kind, body) {
  const bytes = new Uint8Array(4 + body.length);
  bytes.set([kind, body.length >> 16, body.length >> 8 & 255, body.length & 255]);
  bytes.set(body, 4);
  return bytes;
}

function send(kind, body) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(frame(kind, body));
}

function type(text) {
  const bytes = encoder.encode(text);
  if (!standing?.writes) return byId("typing").classList.add("asked");
  for (let at = 0; at < bytes.length; at += 16384) send(INPUT, bytes.subarray(at, at + 16384));
}

// Connecting.

async function connect() {
  clearTimeout(timer);
  if (over || shown !== "serial") return;
  let answer;
  try { answer = await fetch(`/consoles/${encodeURIComponent(guest)}`, { cache: "no-store" }); } catch { return again("The host does not answer."); }
  if (answer.status === 401) { await session.refresh().catch(() => {}); return signedOut(); }
  if (!answer.ok) {
    const value = await answer.json().catch(() => ({}));
    return again(value.error ?? `The host answers with ${answer.status}.`);
  }
  const from = position === null || ring === null ? "" : `?from=${position}&ring=${ring}`;
  const scheme = location.protocol === "http:" ? "ws" : "wss";
  const made = new WebSocket(`${scheme}://${location.host}/consoles/${encodeURIComponent(guest)}/serial${from}`);
  made.binaryType = "arraybuffer";
  socket = made;
  parting = null;
  rest = new Uint8Array();
  made.addEventListener("open", () => {
    tries = 0;
    if (wanted) send(NOTE, encoder.encode('{"write":true}'));
    watch();
  });
  made.addEventListener("message", ({ data }) => {
    if (made !== socket || typeof data === "string") return;
    watch();
    try { take(new Uint8Array(data)); } catch { made.close(); }
  });
  made.addEventListener("close", ({ code, reason }) => {
    if (made !== socket) return;
    if (code === 4001) over = `The guest has moved to ${reason}: open its console there.`;
    // The agent may have it again: it is asked.
    again(over ?? (code === 4000 ? `The console is closed: ${parting ?? reason}.` : "Not connected."));
  });
}

/** Takes what has come of the stream; what is no whole frame waits. */
function take(bytes) {
  const all = new Uint8Array(rest.length + bytes.length);
  all.set(rest);
  all.set(bytes, rest.length);
  let at = 0;
  while (all.length - at >= 4) {
    const count = all[at + 1] << 16 | all[at + 2] << 8 | all[at + 3];
    if (all.length - at - 4 < count) break;
    const body = all.subarray(at + 4, at + 4 + count);
    if (all[at] === NOTE) note(JSON.parse(new TextDecoder().decode(body)));
    if (all[at] === OUTPUT) output(body);
    at += 4 + count;
  }
  rest = all.slice(at);
}

function output(body) {
  const offset = Number(new DataView(body.buffer, body.byteOffset, 8).getBigUint64(0));
  const text = body.subarray(8);
  if (position !== null && offset > position) say(`${offset - position} bytes are left out: they came faster than they were read.`);
  position = offset + text.length;
  ring = standing?.ring ?? null;
  terminal.write(text);
  // What was asked long ago is not answered now.
  const answers = terminal.answers.splice(0).join("");
  if (answers && standing?.writes && position >= standing.next) type(answers);
  screen.show();
}

function note(value) {
  if (value.ending) { parting = value.ending; return; }
  if (ring !== null && value.ring !== ring) {
    [ring, position] = [null, null];
    say("The host has begun a new record of this console.");
  }
  standing = value;
  if (value.notice) say(`${value.notice}.`);
  if (value.may_write) wanted = Boolean(value.writes);
  show();
}

function watch() {
  clearTimeout(silence);
  silence = setTimeout(async () => {
    const asked = socket;
    const answer = await fetch(`/consoles/${encodeURIComponent(guest)}`, { cache: "no-store", signal: AbortSignal.timeout(10_000) }).catch(() => null);
    if (asked !== socket) return;
    if (answer?.ok) return watch();
    again("The host does not answer.");
  }, SILENCE);
}

function drop() {
  clearTimeout(timer);
  clearTimeout(silence);
  const old = socket;
  socket = null;
  old?.close();
  standing = null;
}

function again(reason) {
  drop();
  show(reason);
  if (over || shown !== "serial") return;
  const wait = Math.min(500 * 2 ** tries, LONGEST_WAIT);
  tries += 1;
  timer = setTimeout(connect, wait * (0.75 + Math.random() / 4));
}

// Showing.

function tell(tone, text) {
  if (byId("connection-text").textContent !== text && byId("connection-text").dataset.said) announce(text);
  byId("connection-text").dataset.said = "yes";
  setText(byId("connection-text"), text);
  setAttribute(byId("connection"), "data-state", tone);
}

function show(reason) {
  if (shown === "display") return;
  const isLive = Boolean(standing?.connected && socket);
  const live = standing?.host ? `Connected, the guest is on ${standing.host}` : "Connected";
  const trouble = standing?.trouble ? troubleText(standing.trouble) : null;
  const text = reason ?? trouble ?? (standing?.connected ? live : standing ? `Waiting: ${standing.reason ?? "the agent connects"}` : "Connecting…");
  tell(isLive && !trouble ? "live" : standing ? "connecting" : "wait", text);
  byId("screen").classList.toggle("stale", !isLive);
  setShown(byId("lost"), !isLive || trouble !== null);
  setText(byId("lost"), text);
  const mayWrite = Boolean(standing?.may_write);
  setShown(byId("take"), mayWrite && !standing.writes);
  setShown(byId("leave"), Boolean(standing?.writes));
  let typing = standing?.writes ? "You write." : standing?.writer ? `${standing.writer} writes.` : "Nobody writes.";
  if (standing && !mayWrite) typing = `You may look. ${standing.writer ? `${standing.writer} writes.` : ""}`;
  setText(byId("typing"), standing ? `${typing} ${standing.readers === 1 ? "1 reader" : `${standing.readers} readers`}.` : "");
  byId("typing").classList.remove("asked");
}

function say(text) {
  setText(byId("said"), text);
  announce(text);
}

// Typing.

byId("screen").addEventListener("keydown", (event) => {
  const text = sent(event, terminal);
  if (text === null) return;
  event.preventDefault();
  byId("screen").scrollTop = screen.followed;
  type(text);
});
byId("screen").addEventListener("paste", (event) => {
  event.preventDefault();
  const text = event.clipboardData?.getData("text/plain") ?? "";
  if (text) type(text.replace(/\r?\n/g, "\r"));
});
byId("take").addEventListener("click", () => {
  wanted = true;
  send(NOTE, encoder.encode('{"write":true}'));
  byId("screen").focus();
});
byId("leave").addEventListener("click", () => {
  wanted = false;
  send(NOTE, encoder.encode('{"write":false}'));
});

// Which of them.

/** What the host says at a path: null when it says nothing. */
async function asked(path) {
  const answer = await fetch(path, { cache: "no-store" }).catch(() => null);
  if (answer?.status === 401) await session.refresh().catch(() => {});
  return answer?.ok ? answer.json().catch(() => null) : null;
}

/** The serial console, unless the guest has a screen and no such console; a button leads to the other one. */
async function choose() {
  const path = `/consoles/${encodeURIComponent(guest)}`;
  const picture = (await asked(`${path}/vnc`))?.exists === true;
  const serial = picture && (await asked(path)) !== null;
  setShown(byId("which"), serial && picture);
  pick(picture && !serial ? "display" : "serial");
}

function pick(which) {
  if (shown === which) return;
  shown = which;
  setShown(byId("serial"), which === "serial");
  setShown(byId("picture"), which === "display");
  setAttribute(byId("show-serial"), "aria-pressed", which === "serial");
  setAttribute(byId("show-display"), "aria-pressed", which === "display");
  if (which === "display") {
    drop();
    for (const id of ["take", "leave"]) setShown(byId(id), false);
    setText(byId("typing"), "");
    display.start();
  } else {
    display.stop();
    over = null;
    tries = 0;
    byId("screen").focus();
    connect();
  }
}

display.addEventListener("state", ({ detail }) => {
  if (shown !== "display") return;
  tell(detail.tone, detail.text);
  setText(byId("typing"), detail.tone !== "live" ? "" : detail.mayType ? "You may type." : "You may look.");
});
display.addEventListener("signed-out", () => session.refresh().catch(() => {}).then(() => signedOut()));
byId("show-serial").addEventListener("click", () => pick("serial"));
byId("show-display").addEventListener("click", () => pick("display"));

// The session.

function signedOut(reason) {
  setShown(byId("sign-in"), true);
  if (reason) setText(byId("sign-in-error"), reason);
  display.stop();
  tell("wait", "Not signed in");
  show("Not signed in");
}

byId("sign-in-copy").addEventListener("click", (event) => copy(command, event.currentTarget, announce));
byId("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const typed = ticketIn(byId("sign-in-ticket").value);
  byId("sign-in-ticket").value = "";
  const refusal = typed ? await session.signIn(typed) : "This is no link of 'crossdock web ticket'.";
  if (refusal) return signedOut(refusal);
  setShown(byId("sign-in"), false);
  display.stop();
  shown = null;
  choose();
});
addEventListener("online", () => { if (!socket) connect(); });

const command = `crossdock web ticket --guest ${guest}`;
setText(byId("title"), guest);
document.title = `${guest}: console`;
setText(byId("sign-in-command"), command);
screen.draw();
const refusal = await session.enter(ticket, guest);
if (refusal) signedOut(refusal);
choose();
