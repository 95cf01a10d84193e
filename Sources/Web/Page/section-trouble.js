/**
 * What is undecided or broken, each with the command that repairs it. There is nothing to see when all is well.
 */
import { announce } from "./announce.js";
import { button, byId, copy, element, setShown, setText } from "./dom.js";
import { Rows } from "./rows.js";

const keyOf = (item) => [item.kind, item.guest, item.migration, item.evacuation].map((part) => part ?? "").join("\n");

function create() {
  const kind = element("strong", { class: "kind" });
  const guest = element("span", { class: "name" });
  const text = element("span");
  const code = element("code");
  const copying = button("Copy", () => copy(code.textContent, copying, announce));
  const command = element("p", { class: "command" }, code, copying);
  return { node: element("li", {}, element("p", {}, kind, " ", guest, " ", text), command), kind, guest, text, code, command };
}

function update(row, item) {
  setText(row.kind, item.kind);
  setText(row.guest, item.sentence?.includes(item.guest) ? "" : item.guest);
  setText(row.text, item.sentence);
  setText(row.code, item.command);
  setShown(row.command, Boolean(item.command));
}

export class TroubleSection {
  constructor() {
    this.rows = new Rows(byId("trouble-list"), { key: keyOf, create, update });
    this.known = new Set();
  }

  show(items) {
    setShown(byId("trouble"), items.length > 0);
    setShown(byId("nav-trouble"), items.length > 0);
    this.rows.show(items);
    for (const item of items) if (!this.known.has(keyOf(item))) announce(`Needs you: ${item.sentence}`);
    if (items.length === 0 && this.known.size > 0) announce("Nothing needs you any more.");
    this.known = new Set(items.map(keyOf));
  }
}
