/**
 * Says changes of state to a screen reader, politely: a few at a time. When more happens than anybody could listen to, the newest are said,
 * and how many there were before.
 */
import { byId } from "./dom.js";

const PAUSE = 1500;
const AT_ONCE = 3;
const MOST = 12;
const waiting = [];
let timer = null;

export function announce(text) {
  if (waiting.at(-1) === text) return;
  waiting.push(text);
  timer ??= setTimeout(speak, 100);
}

function speak() {
  timer = null;
  if (waiting.length === 0) return;
  const skipped = waiting.length > MOST ? waiting.splice(0, waiting.length - AT_ONCE).length : 0;
  const said = waiting.splice(0, AT_ONCE).join(" ");
  byId("announcer").textContent = skipped > 0 ? `${skipped} other changes. ${said}` : said;
  timer = setTimeout(speak, PAUSE);
}
