/**
 * Figures as people read them, and as the command line prints them: `65.6 MiB`, `142 ms`, `1 min 5 s`, `2025-11-29 03:31:07`.
 * What is not known is a dash.
 */

export const NOTHING = "–";

const isKnown = (value) => typeof value === "number" && Number.isFinite(value);

/** `512 MiB`. Three digits are enough. */
export function bytes(count) {
  if (!isKnown(count)) return NOTHING;
  let value = count;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (value < 1000 || unit === "TiB") {
      const digits = unit === "B" || value >= 100 ? Math.round(value) : Math.round(value * 10) / 10;
      return `${digits} ${unit}`;
    }
    value /= 1024;
  }
  return NOTHING;
}

/** `512 MiB/s`. */
export const rate = (count) => (isKnown(count) ? `${bytes(count)}/s` : NOTHING);

/** `9.1 s`, `2 min 5 s`. */
export function time(seconds) {
  if (!isKnown(seconds)) return NOTHING;
  if (seconds < 9.95) return `${(Math.round(seconds * 10) / 10).toFixed(1)} s`;
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** `142 ms`. Pauses are always in milliseconds, so that they can be compared. */
export const milliseconds = (value) => (isKnown(value) ? `${Math.round(value)} ms` : NOTHING);

/** `0.4 ms`, for round trips and clocks. */
export function fineMilliseconds(value) {
  if (!isKnown(value)) return NOTHING;
  return Math.abs(value) < 10 ? `${(Math.round(value * 10) / 10).toFixed(1)} ms` : `${Math.round(value)} ms`;
}

/** `+1.2 ms`, `−30 ms`. */
export function offset(value) {
  if (!isKnown(value)) return NOTHING;
  const size = fineMilliseconds(Math.abs(value));
  return size === "0.0 ms" ? size : `${value < 0 ? "−" : "+"}${size}`;
}

/** `47%`. */
export const percent = (value) => (isKnown(value) ? `${Math.floor(value)}%` : NOTHING);

/** `2025-11-29 03:31:07`, UTC, of seconds since 1970. */
export function moment(seconds) {
  if (!isKnown(seconds)) return NOTHING;
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.valueOf()) ? NOTHING : date.toISOString().slice(0, 19).replace("T", " ");
}

/** `1 guest`, `2 guests`. */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

const PHASES = {
  check: "checking both sides", queue: "waiting to copy", disks: "copying disks", verify: "verifying disks",
  turn: "waiting to pause", memory: "sending memory", switchover: "switching over", release: "handing over", done: "finishing",
};

/** A phase in the words of `crossdock migrate`. */
export const phase = (name) => (Object.hasOwn(PHASES, name) ? PHASES[name] : (name ?? NOTHING));

/** What somebody has to mend: {`sentence`, `command`, `host`}, of which the last two may be missing. */
export const troubleText = ({ sentence, command, host }) =>
  command ? `${sentence}. On ${host ?? "its host"}, '${command}' mends that.` : `${sentence}.`;
