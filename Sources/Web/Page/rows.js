/**
 * The rows of a table or a list, one for each item, kept by a key. A change of an item changes its cells and nothing else, so that five
 * hundred of them may change every second, and so that selection and place stay where they are.
 */
import { element, keepingFocus, setShown, setText } from "./dom.js";

export class Rows {
  /**
   * @param parent what the rows are children of
   * @param key the text that an item is known by
   * @param create makes a row: `{node, ...parts}`
   * @param update shows an item: `update(row, item)`
   */
  constructor(parent, { key, create, update }) {
    Object.assign(this, { parent, key, create, update });
    this.rows = new Map();
  }

  /** Shows these items, in this order, and no others. */
  show(items) {
    const wanted = new Map();
    for (const item of items) wanted.set(this.key(item), item);
    for (const [key, row] of this.rows) {
      if (wanted.has(key)) continue;
      row.node.remove();
      this.rows.delete(key);
    }
    let place = this.parent.firstElementChild;
    for (const [key, item] of wanted) {
      let row = this.rows.get(key);
      if (!row) {
        row = this.create(item);
        this.rows.set(key, row);
      }
      row.item = item;
      this.update(row, item);
      if (row.node === place) place = place.nextElementSibling;
      else this.parent.insertBefore(row.node, place);
    }
  }
}

/**
 * A row of a table whose first cell is its header. `columns` are the columns' names and classes (`plain` when none is named); the names
 * are shown beside the values where the screen is too narrow for columns.
 */
export function tableRow(columns) {
  const cells = columns.map(([label, kind = "plain"], index) => {
    const attributes = { "data-label": label, class: kind };
    return index === 0 ? element("th", { ...attributes, scope: "row" }) : element("td", attributes);
  });
  return { node: element("tr", {}, ...cells), cells };
}

/** Shows no more than so many at first, and the rest when asked. */
export class Limit {
  constructor(paragraph, most, changed) {
    Object.assign(this, { paragraph, most, isOpen: false });
    this.button = paragraph.querySelector("button");
    this.button.addEventListener("click", () => {
      this.isOpen = true;
      keepingFocus(changed);
    });
  }

  of(items) {
    const isCut = !this.isOpen && items.length > this.most;
    setShown(this.paragraph, isCut);
    if (!isCut) return items;
    setText(this.button, `Show all ${items.length}`);
    return items.slice(0, this.most);
  }
}
