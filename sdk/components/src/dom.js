/**
 * An element. Text is always text: nothing that somebody wrote is ever parsed as HTML.
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `on…` are listeners, `class`, `part` and the like attributes; undefined and false are left out
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child !== null && child !== undefined && child !== false) element.append(child);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
/** Drawings of 24 by 24, one line each. */
const PATHS = {
  send: "M4 12l16-7-6.500 16-2.800-6.200z",
  back: "M15 5l-7 7 7 7",
  down: "M12 5v13m-6-6l6 6 6-6",
  thread: "M5 5h14v10h-8l-4 4v-4H5z",
  reply: "M9 7l-5 5 5 5M4 12h9a7 7 0 0 1 7 7",
  edit: "M4 20h4L19 9l-4-4L4 16z",
  trash: "M5 7h14M10 7V5h4v2M7 7l1 13h8l1-13",
  close: "M6 6l12 12M18 6L6 18",
  smile: "M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM8.500 14.500a4.500 4.500 0 0 0 7 0M9 9.500v.01M15 9.500v.01",
  clock: "M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM12 7v5l3 2",
  tick: "M5 13l4 4L19 7",
  ticks: "M2 13l4 4L16 7M11 16l1 1L22 7",
  alert: "M12 8v5m0 3v.01M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18z",
  file: "M7 3h7l5 5v13H7zM14 3v5h5",
};

/** @param {keyof typeof PATHS} name */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `icon icon-${name}`);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

const LINK = /\bhttps?:\/\/[^\s<>"'`{}|\\^\u202a-\u202e\u2066-\u2069]+|\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b/gi;

/**
 * Message text with its links made clickable.
 * @param {string} text
 * @returns {(string | HTMLElement)[]}
 */
export function linked(text) {
  /** @type {(string | HTMLElement)[]} */ const parts = [];
  let at = 0;
  for (const found of text.matchAll(LINK)) {
    // What ends a sentence does not belong to the address; a closing bracket only if it opens one.
    let address = found[0].replace(/[.,;:!?'"…]+$/, "");
    if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
    const href = /^https?:/i.test(address) ? safeUrl(address) : `mailto:${address}`;
    if (!href) continue;
    parts.push(text.slice(at, found.index), h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, address));
    at = found.index + address.length;
  }
  parts.push(text.slice(at));
  return parts.filter((part) => part !== "");
}

/** The address if it is one of the web, else undefined. @param {string | undefined} url */
export function safeUrl(url) {
  try {
    const parsed = new URL(String(url));
    return parsed.protocol === "https:" || parsed.protocol === "http:" ? parsed.href : undefined;
  } catch {
    return undefined;
  }
}

/** Whether a text is nothing but a few emoji. @param {string} text */
export const onlyEmoji = (text) => text.length <= 24 && /^(?:\p{Extended_Pictographic}[\p{Emoji_Modifier}\u200d\ufe0f]*|\s)+$/u.test(text) && /\S/.test(text);

/** @param {string} name */
export function initials(name) {
  const words = name.replace(/^(dr|prof|mr|mrs|ms)\.?\s+/i, "").trim().split(/\s+/);
  return [words[0], words.length > 1 ? words.at(-1) : ""].map((word) => [...(word ?? "")][0] ?? "").join("").toUpperCase() || "?";
}

/** One of eight tints, the same for the same id for ever. @param {string} id */
export function tint(id) {
  let sum = 0;
  for (const letter of id) sum = (sum * 31 + /** @type {number} */ (letter.codePointAt(0))) >>> 0;
  return sum % 8;
}

/** @param {string} id @param {string} name @param {string | undefined} url */
export function avatar(id, name, url) {
  const safe = safeUrl(url);
  const box = h("span", { class: `avatar tint${tint(id)}`, part: "avatar", "aria-hidden": "true" }, initials(name));
  if (safe) box.append(h("img", { src: safe, alt: "", loading: "lazy", onerror: (/** @type {any} */ { target }) => target.remove() }));
  return box;
}
