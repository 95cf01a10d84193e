/**
 * A plain terminal: a grid of characters with colours, a cursor, and lines that have gone out at the top. It knows what shells, boot loaders and
 * full-screen programs use most (ECMA-48: cursor movement, erasing, inserting, a scrolling region, SGR colours, the other screen); everything else
 * is read to its end and dropped. It is a value without a document: `Screen` shows it.
 */

const MOST_LINES = 2000;
const LONGEST_SEQUENCE = 256;
const PLAIN = Object.freeze({ fg: null, bg: null, bold: false, faint: false, italic: false, underline: false, inverse: false, hidden: false });

export class Terminal {
  constructor(columns = 80, rows = 24) {
    this.columns = columns;
    this.rows = rows;
    this.decoder = new TextDecoder();
    /** Lines that have gone out at the top, oldest first, and how many ever did. */
    this.history = [];
    this.gone = 0;
    /** What the guest asks the terminal, and wants answered. */
    this.answers = [];
    this.reset();
  }

  reset() {
    this.grid = Array.from({ length: this.rows }, () => this.line());
    this.other = null;
    this.cursor = { x: 0, y: 0 };
    this.saved = { x: 0, y: 0, style: PLAIN };
    this.style = PLAIN;
    this.top = 0;
    this.bottom = this.rows - 1;
    this.isShown = true;
    this.wraps = true;
    this.sendsApplicationKeys = false;
    this.isWrapping = false;
    this.state = "text";
    this.sequence = "";
  }

  line() { return Array.from({ length: this.columns }, () => ({ text: " ", style: PLAIN })); }

  /** Takes bytes; a character or a sequence may be cut anywhere. */
  write(bytes) {
    for (const character of this.decoder.decode(bytes, { stream: true })) this.take(character);
  }

  take(character) {
    const code = character.codePointAt(0);
    switch (this.state) {
    case "escape": return this.escape(character, code);
    case "csi":
      if (code === 0x1b) { this.state = "escape"; return; }
      if (code === 0x18 || code === 0x1a) { this.state = "text"; return; }
      if (code < 0x20) return this.control(code);
      if (code >= 0x40 && code <= 0x7e) {
        this.state = "text";
        return this.command(character, this.sequence);
      }
      if (this.sequence.length >= LONGEST_SEQUENCE) this.state = "skip"; else this.sequence += character;
      return;
    case "skip": if (code === 0x1b) this.state = "escape"; else if (code >= 0x40 && code <= 0x7e) this.state = "text"; return;
    case "charset": this.state = "text"; return;
    case "string": // A title, a clipboard, anything: to its end, and nothing of it is done.
      if (code === 0x07 || code === 0x9c || code === 0x18) this.state = "text"; else if (code === 0x1b) this.state = "string-end";
      return;
    case "string-end": if (character === "\\") { this.state = "text"; return; } return this.escape(character, code);
    default:
      if (code === 0x1b) { this.state = "escape"; return; }
      if (code < 0x20 || code === 0x7f) return this.control(code);
      if (code === 0x9b) { this.state = "csi"; this.sequence = ""; return; }
      if (code >= 0x80 && code < 0xa0) return;
      this.put(character);
    }
  }

  control(code) {
    const { cursor } = this;
    if (code === 8) cursor.x = Math.max(cursor.x - 1, 0);
    else if (code === 9) cursor.x = Math.min((cursor.x >> 3) * 8 + 8, this.columns - 1);
    else if (code === 10 || code === 11 || code === 12) this.down();
    else if (code === 13) cursor.x = 0;
    else return;
    this.isWrapping = false;
  }

  put(character) {
    const { cursor } = this;
    if (this.isWrapping && this.wraps) {
      cursor.x = 0;
      this.down();
    }
    this.isWrapping = false;
    this.grid[cursor.y][cursor.x] = { text: character, style: this.style };
    if (cursor.x === this.columns - 1) this.isWrapping = true; else cursor.x += 1;
  }

  down() {
    if (this.cursor.y === this.bottom) this.scroll(1); else if (this.cursor.y < this.rows - 1) this.cursor.y += 1;
  }

  up() {
    if (this.cursor.y === this.top) this.scroll(-1); else if (this.cursor.y > 0) this.cursor.y -= 1;
  }

  /** Moves the region's lines up by `count`, or down by as many when it is less than zero. */
  scroll(count, from = this.top) {
    for (let n = Math.min(Math.abs(count), this.rows); n > 0; n--) {
      if (count > 0) {
        const [line] = this.grid.splice(from, 1);
        this.grid.splice(this.bottom, 0, this.line());
        if (from === 0 && !this.other) {
          this.history.push(line);
          this.gone += 1;
          if (this.history.length > MOST_LINES) this.history.shift();
        }
      } else {
        this.grid.splice(this.bottom, 1);
        this.grid.splice(from, 0, this.line());
      }
    }
  }

  escape(character, code) {
    this.state = "text";
    switch (character) {
    case "[": this.state = "csi"; this.sequence = ""; break;
    case "]": case "P": case "X": case "^": case "_": this.state = "string"; break;
    case "(": case ")": case "*": case "+": case "#": case "%": case " ": this.state = "charset"; break;
    case "7": this.save(); break;
    case "8": this.restore(); break;
    case "D": this.down(); break;
    case "E": this.cursor.x = 0; this.down(); break;
    case "M": this.up(); break;
    case "c": this.reset(); break;
    default: if (code === 0x1b) this.state = "escape";
    }
  }

  save() { this.saved = { ...this.cursor, style: this.style }; }
  restore() {
    this.move(this.saved.x, this.saved.y);
    this.style = this.saved.style;
  }

  move(x, y) {
    this.cursor.x = Math.min(Math.max(x, 0), this.columns - 1);
    this.cursor.y = Math.min(Math.max(y, 0), this.rows - 1);
    this.isWrapping = false;
  }

  command(final, sequence) {
    const isPrivate = sequence.startsWith("?");
    if (/[^0-9;:?]/.test(sequence) || sequence.lastIndexOf("?") > 0) return;
    const numbers = sequence.replace("?", "").split(/[;:]/).slice(0, 32).map((text) => Math.min(Number(text || 0), 9999));
    const first = numbers[0];
    const count = Math.max(first, 1);
    const { x, y } = this.cursor;
    if (isPrivate) {
      if (final === "h" || final === "l") for (const number of numbers) this.mode(number, final === "h");
      return;
    }
    switch (final) {
    case "A": return this.move(x, Math.max(y - count, y >= this.top ? this.top : 0));
    case "B": case "e": return this.move(x, Math.min(y + count, y <= this.bottom ? this.bottom : this.rows - 1));
    case "C": case "a": return this.move(x + count, y);
    case "D": return this.move(x - count, y);
    case "E": return this.move(0, y + count);
    case "F": return this.move(0, y - count);
    case "G": case "`": return this.move(count - 1, y);
    case "d": return this.move(x, count - 1);
    case "H": case "f": return this.move(Math.max(numbers[1] ?? 1, 1) - 1, count - 1);
    case "J":
      if (first === 0) { this.erase(y, x, this.columns); for (let row = y + 1; row < this.rows; row++) this.erase(row); }
      if (first === 1) { for (let row = 0; row < y; row++) this.erase(row); this.erase(y, 0, x + 1); }
      if (first === 2) for (let row = 0; row < this.rows; row++) this.erase(row);
      return;
    case "K": return this.erase(y, first === 0 ? x : 0, first === 1 ? x + 1 : this.columns);
    case "X": return this.erase(y, x, Math.min(x + count, this.columns));
    case "@": case "P": {
      const line = this.grid[y];
      for (let n = Math.min(count, this.columns - x); n > 0; n--) {
        if (final === "@") { line.splice(x, 0, this.blank()); line.pop(); } else { line.splice(x, 1); line.push(this.blank()); }
      }
      return;
    }
    case "L": case "M":
      if (y >= this.top && y <= this.bottom) this.shift(final === "M" ? count : -count, y);
      return;
    case "S": return this.scroll(count);
    case "T": return this.scroll(-count);
    case "r": {
      const [top, bottom] = [count - 1, (numbers[1] || this.rows) - 1];
      if (top >= bottom || bottom >= this.rows) return;
      [this.top, this.bottom] = [top, bottom];
      return this.move(0, 0);
    }
    case "s": return this.save();
    case "u": return this.restore();
    case "m": return this.color(numbers);
    case "n": if (first === 6 && this.answers.length < 16) this.answers.push(`\x1b[${y + 1};${x + 1}R`); return;
    case "c": if (this.answers.length < 16) this.answers.push("\x1b[?6c"); return;
    default:
    }
  }

  /** Takes out lines from `row` on, or puts some in, within the region; none of them goes into the history. */
  shift(count, row) {
    for (let n = Math.min(Math.abs(count), this.bottom - row + 1); n > 0; n--) {
      this.grid.splice(count > 0 ? row : this.bottom, 1);
      this.grid.splice(count > 0 ? this.bottom : row, 0, this.line());
    }
  }

  mode(number, isOn) {
    if (number === 1) this.sendsApplicationKeys = isOn;
    else if (number === 7) this.wraps = isOn;
    else if (number === 25) this.isShown = isOn;
    else if ((number === 47 || number === 1047 || number === 1049) && isOn !== Boolean(this.other)) {
      if (isOn) {
        if (number === 1049) this.save();
        this.other = this.grid;
        this.grid = Array.from({ length: this.rows }, () => this.line());
      } else {
        this.grid = this.other;
        this.other = null;
        if (number === 1049) this.restore();
      }
    }
  }

  blank() { return { text: " ", style: this.style.bg === null ? PLAIN : { ...PLAIN, bg: this.style.bg } }; }
  erase(row, from = 0, to = this.columns) {
    for (let x = from; x < to; x++) this.grid[row][x] = this.blank();
    this.isWrapping = false;
  }

  color(numbers) {
    let style = { ...this.style };
    for (let index = 0; index < numbers.length; index++) {
      const number = numbers[index];
      if (number === 0) style = { ...PLAIN };
      else if (number === 1) style.bold = true;
      else if (number === 2) style.faint = true;
      else if (number === 3) style.italic = true;
      else if (number === 4) style.underline = true;
      else if (number === 7) style.inverse = true;
      else if (number === 8) style.hidden = true;
      else if (number === 22) style.bold = style.faint = false;
      else if (number === 23) style.italic = false;
      else if (number === 24) style.underline = false;
      else if (number === 27) style.inverse = false;
      else if (number === 28) style.hidden = false;
      else if (number >= 30 && number <= 37) style.fg = number - 30;
      else if (number >= 40 && number <= 47) style.bg = number - 40;
      else if (number >= 90 && number <= 97) style.fg = number - 82;
      else if (number >= 100 && number <= 107) style.bg = number - 92;
      else if (number === 39) style.fg = null;
      else if (number === 49) style.bg = null;
      else if (number === 38 || number === 48) {
        const key = number === 38 ? "fg" : "bg";
        if (numbers[index + 1] === 5) { style[key] = Math.min(numbers[index + 2] ?? 0, 255); index += 2; }
        else if (numbers[index + 1] === 2) {
          style[key] = numbers.slice(index + 2, index + 5).map((part) => Math.min(part, 255));
          if (style[key].length < 3) style[key] = null;
          index += 4;
        }
      }
    }
    this.style = Object.freeze(style);
  }
}

const NAMED = [
  "#1b2026", "#c0392b", "#2e8b57", "#b8860b", "#2f6fbf", "#8e44ad", "#178a94", "#c9d1d9",
  "#66707a", "#ff6b5e", "#4fc27f", "#e6b84c", "#6aa9ff", "#c48be0", "#4cc3cc", "#ffffff",
];

/** A colour for CSS: of the sixteen, of the two hundred and fifty-six, or of three parts. */
export function css(color) {
  if (color === null) return null;
  if (Array.isArray(color)) return `rgb(${color.join(" ")})`;
  if (color < 16) return NAMED[color];
  if (color >= 232) return `rgb(${Array(3).fill(8 + (color - 232) * 10).join(" ")})`;
  const part = (value) => (value === 0 ? 0 : 55 + value * 40);
  const index = color - 16;
  return `rgb(${part(Math.floor(index / 36))} ${part(Math.floor(index / 6) % 6)} ${part(index % 6)})`;
}

/** Shows a terminal in an element: a block for each line, a span for each piece of one style, text as text. */
export class Screen {
  constructor(terminal, node) {
    [this.terminal, this.node] = [terminal, node];
    this.lines = [];
    this.gone = 0;
    this.rest = null;
    /** How far it was scrolled last, so that the cursor is seen: who has scrolled back from there reads what was before. */
    this.followed = 0;
  }

  /** Shows what there is, once for all that comes before the next picture. */
  show() { this.rest ??= requestAnimationFrame(() => { this.rest = null; this.draw(); }); }

  draw() {
    const { terminal, node } = this;
    const follows = node.scrollTop >= this.followed - 4;
    const added = Math.min(terminal.gone - this.gone, terminal.history.length);
    this.gone = terminal.gone;
    for (const line of terminal.history.slice(terminal.history.length - added)) {
      const made = document.createElement("div");
      fill(made, line, -1);
      node.insertBefore(made, this.lines[0] ?? null);
    }
    while (node.childElementCount - this.lines.length > MOST_LINES) node.firstElementChild.remove();
    while (this.lines.length < terminal.rows) {
      const made = document.createElement("div");
      node.append(made);
      this.lines.push(made);
    }
    terminal.grid.forEach((line, y) => {
      const x = y === terminal.cursor.y && terminal.isShown ? terminal.cursor.x : -1;
      const shown = `${x}${line.map((cell) => cell.text + JSON.stringify(cell.style)).join("")}`;
      if (this.lines[y].shown === shown) return;
      this.lines[y].shown = shown;
      fill(this.lines[y], line, x);
    });
    if (!follows) return;
    const line = this.lines[terminal.cursor.y];
    node.scrollTop = Math.max(0, line.offsetTop + line.offsetHeight + 8 - node.clientHeight);
    this.followed = node.scrollTop;
  }
}

function fill(node, line, cursor) {
  node.replaceChildren();
  let [text, style] = ["", null];
  const end = () => {
    if (!text) return;
    const span = document.createElement("span");
    span.textContent = text;
    const [fg, bg] = style.inverse ? [css(style.bg) ?? "var(--screen)", css(style.fg) ?? "var(--text)"] : [css(style.fg), css(style.bg)];
    if (fg) span.style.color = style.hidden ? bg ?? "transparent" : fg;
    if (bg) span.style.backgroundColor = bg;
    if (style.bold) span.style.fontWeight = "700";
    if (style.faint) span.style.opacity = "0.6";
    if (style.italic) span.style.fontStyle = "italic";
    if (style.underline) span.style.textDecoration = "underline";
    node.append(span);
    text = "";
  };
  line.forEach((cell, x) => {
    if (cell.style !== style || x === cursor || x === cursor + 1) end();
    style = cell.style;
    text += cell.text;
    if (x === cursor) {
      end();
      node.lastElementChild.className = "cursor";
    }
  });
  end();
}

const CURSOR = { ArrowUp: "A", ArrowDown: "B", ArrowRight: "C", ArrowLeft: "D", Home: "H", End: "F" };
const OTHER = {
  Enter: "\r", Backspace: "\x7f", Tab: "\t", Escape: "\x1b", Insert: "\x1b[2~", Delete: "\x1b[3~", PageUp: "\x1b[5~", PageDown: "\x1b[6~",
  F1: "\x1bOP", F2: "\x1bOQ", F3: "\x1bOR", F4: "\x1bOS", F5: "\x1b[15~", F6: "\x1b[17~", F7: "\x1b[18~", F8: "\x1b[19~", F9: "\x1b[20~",
  F10: "\x1b[21~", F11: "\x1b[23~", F12: "\x1b[24~",
};

/** What a key sends; null for one that is the browser's. */
export function sent(event, terminal) {
  const { key } = event;
  if (event.metaKey || event.isComposing) return null;
  if (CURSOR[key]) return `\x1b${terminal.sendsApplicationKeys ? "O" : "["}${CURSOR[key]}`;
  if (key === "Tab" && event.shiftKey) return "\x1b[Z";
  if (OTHER[key]) return OTHER[key];
  if (event.ctrlKey && !event.altKey) {
    // Shift is for the browser: copying and pasting.
    if (event.shiftKey && /^[cv]$/i.test(key)) return null;
    if (key === " ") return "\0";
    const code = key.toUpperCase().charCodeAt(0);
    return key.length === 1 && code >= 0x40 && code <= 0x5f ? String.fromCharCode(code & 0x1f) : null;
  }
  if ([...key].length !== 1) return null;
  return event.altKey && !event.ctrlKey ? `\x1b${key}` : key;
}
