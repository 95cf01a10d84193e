/**
 * Asks before something is changed: a dialog that says in a sentence what will happen, and stays when it could not be done, with the
 * host's reason.
 */
import { announce } from "./announce.js";
import { byId, element, keepingFocus, setShown, setText } from "./dom.js";
import { post, sentence } from "./session.js";

const LOST = "The host does not answer, so it is not known whether it was done. Look before you try again.";
const dialog = byId("ask");
let current = null;

/**
 * @param question `{title, text, yes, no, isDangerous, field: {label, value, choices, isNeeded, tell}, action}`: `action` is what is
 *   POSTed to /actions, or makes it of the field's text; `tell` makes the sentence of the field's text.
 */
export function ask(question) {
  current = question;
  const { title, text, yes, no = "Do nothing", field, isDangerous } = question;
  setText(byId("ask-title"), title);
  setText(byId("ask-text"), text);
  setText(byId("ask-yes"), yes);
  setText(byId("ask-no"), no);
  setText(byId("ask-error"), "");
  byId("ask-yes").className = isDangerous ? "danger" : "main";
  byId("ask-yes").disabled = false;
  setShown(byId("ask-field"), Boolean(field));
  const input = byId("ask-input");
  input.required = Boolean(field?.isNeeded);
  if (field) {
    setText(byId("ask-label"), field.label);
    input.value = field.value ?? "";
    byId("ask-choices").replaceChildren(...(field.choices ?? []).map((value) => element("option", { value })));
    tell();
  }
  dialog.showModal();
  (field ? input : byId("ask-no")).focus();
}

function tell() {
  const { field } = current;
  if (field?.tell) setText(byId("ask-text"), field.tell(byId("ask-input").value.trim()));
}

async function act() {
  const question = current;
  const { action } = question;
  const order = typeof action === "function" ? action(byId("ask-input").value.trim()) : action;
  byId("ask-yes").disabled = true;
  const refusal = await send(order);
  if (current !== question || !dialog.open) return;
  byId("ask-yes").disabled = false;
  if (refusal) setText(byId("ask-error"), refusal);
  else dialog.close();
}

/** Returns why it was not done, null when the host does it. */
async function send(order) {
  let answer;
  try { answer = await post("/actions", order); } catch { return LOST; }
  const words = await sentence(answer);
  if (answer.ok) return notify(words ?? "The host does it.");
  if (answer.status === 401) return "Your session has ended. Sign in again: crossdock web ticket";
  if (answer.status === 403) return words ?? "Your ticket permits looking only.";
  return words ?? `The host answered with ${answer.status}.`;
}

function notify(words) {
  setText(byId("notice-text"), words);
  setShown(byId("notice"), true);
  announce(words);
  return null;
}

byId("ask-input").addEventListener("input", tell);
byId("ask-no").addEventListener("click", () => dialog.close());
byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act();
});
// What was done may have taken away the button that asked for it.
dialog.addEventListener("close", () => {
  if (document.activeElement === document.body) byId("main").focus({ preventScroll: true });
});
byId("notice-close").addEventListener("click", () => keepingFocus(() => setShown(byId("notice"), false)));
