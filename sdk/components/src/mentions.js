import { avatar, h } from "./dom.js";

/** As many people are offered at once. */
const OFFERED = 6;
/** What stands between an @ and the place where one writes: part of a name. */
const BEGUN = /(?:^|[\s(])@([\p{L}\p{N}._ -]{0,40})$/u;

/**
 * People to choose from after an at sign. Whoever owns it hands it the keys first; the text stays where the focus is
 * (a list box that belongs to a text field).
 */
export class Mentions {
  /** @type {any} */ #owner;
  /** @type {any} */ #channel;
  /** @type {HTMLTextAreaElement} */ #text;
  /** @type {{id: string, name: string}[]} */ #found = [];
  #at = 0;
  #asked = false;
  /** Whom somebody chose while writing, by the name that stands in the text. @type {Map<string, string>} */ #chosen = new Map();

  /** @param {any} owner the element that speaks @param {any} channel @param {HTMLTextAreaElement} text @param {() => void} changed */
  constructor(owner, channel, text, changed) {
    this.#owner = owner;
    this.#channel = channel;
    this.#text = text;
    this.changed = changed;
    this.list = h("ul", { id: "people", class: "people", part: "people", role: "listbox", "aria-label": owner.say("people"), hidden: true });
    this.said = h("div", { class: "hidden", role: "status" });
    text.setAttribute("aria-autocomplete", "list");
    text.setAttribute("aria-controls", "people");
    text.setAttribute("aria-haspopup", "listbox");
  }

  get open() {
    return !this.list.hidden;
  }

  /** Look at what has been written. */
  look() {
    const end = this.#text.selectionStart;
    const begun = end === this.#text.selectionEnd && BEGUN.exec(this.#text.value.slice(0, end));
    if (!begun) return this.close();
    this.#learn();
    const words = begun[1].toLocaleLowerCase();
    const known = this.#channel.members?.get().length ? this.#channel.members.get() : (this.#channel.summary?.get().members ?? []);
    this.#found = known
      .map((/** @type {any} */ { user }) => ({ id: user, name: this.#owner.nameOf(user) }))
      .filter((/** @type {{id: string, name: string}} */ { id, name }) => id !== this.#owner.client.user && (fits(name, words) || id.toLocaleLowerCase().startsWith(words)))
      .slice(0, OFFERED);
    // A name that stands there already is not offered again and again.
    if (!this.#found.length || this.#found.some(({ name }) => this.#chosen.has(name) && words.startsWith(name.toLocaleLowerCase()))) return this.close();
    this.#at = 0;
    this.list.hidden = false;
    this.said.textContent = this.#owner.say("found", { count: this.#found.length });
    this.#draw();
  }

  close() {
    this.list.hidden = true;
    this.said.textContent = "";
    this.#text.removeAttribute("aria-activedescendant");
  }

  #learn() {
    if (this.#asked) return;
    this.#asked = true;
    const { member_count = 0, members = [] } = this.#channel.summary?.get() ?? {};
    if (member_count > members.length) this.#channel.loadMembers?.().then(() => this.look(), () => (this.#asked = false));
    for (const { user } of members) this.#owner.nameOf(user);
  }

  #draw() {
    this.list.replaceChildren(
      ...this.#found.map(({ id, name }, place) =>
        h(
          "li",
          {
            id: `person-${place}`,
            role: "option",
            "aria-selected": place === this.#at ? "true" : "false",
            // The text field keeps the focus.
            onpointerdown: (/** @type {Event} */ event) => event.preventDefault(),
            onclick: () => this.#choose(place),
          },
          avatar(id, name, this.#owner.client.userOf(id).get().avatar_url),
          h("bdi", {}, name),
        ),
      ),
    );
    this.#text.setAttribute("aria-activedescendant", `person-${this.#at}`);
  }

  /** Whether a key was meant for the list. @param {KeyboardEvent} event */
  key(event) {
    if (!this.open) return false;
    const { length } = this.#found;
    if (event.key === "ArrowDown") this.#at = (this.#at + 1) % length;
    else if (event.key === "ArrowUp") this.#at = (this.#at + length - 1) % length;
    else if (event.key === "Enter" || event.key === "Tab") this.#choose(this.#at);
    else if (event.key === "Escape") this.close();
    else return false;
    event.preventDefault();
    if (this.open) this.#draw();
    return true;
  }

  /** @param {number} place */
  #choose(place) {
    const { id, name } = this.#found[place];
    const end = this.#text.selectionStart;
    const begun = /** @type {RegExpExecArray} */ (BEGUN.exec(this.#text.value.slice(0, end)));
    this.#text.setRangeText(`${name} `, end - begun[1].length, end, "end");
    this.#chosen.set(name, id);
    this.close();
    this.changed();
  }

  /** Who is mentioned in a text: chosen before, and still in it. @param {string} text @returns {string[]} */
  in(text) {
    const named = [...this.#chosen].filter(([name]) => text.includes(`@${name}`)).map(([, id]) => id);
    return [...new Set(named)];
  }

  /** What is there already, of a message that is changed. @param {string[]} users */
  keep(users) {
    for (const id of users) this.#chosen.set(this.#owner.nameOf(id), id);
  }

  forget() {
    this.#chosen.clear();
    this.close();
  }
}

/** Whether one of a name's words begins so, or the name itself. @param {string} name @param {string} words in small letters */
function fits(name, words) {
  const whole = name.toLocaleLowerCase();
  return whole.startsWith(words) || whole.split(/\s+/).some((one) => one.startsWith(words));
}

/**
 * Text with the names of those who are mentioned in it set apart.
 * @param {(string | HTMLElement)[]} parts as they come from `linked`
 * @param {{name: string, me: boolean}[]} people
 * @returns {(string | HTMLElement)[]}
 */
export function withMentions(parts, people) {
  const names = people.filter(({ name }) => name);
  if (!names.length) return parts;
  // The longest first: @Anna Lee is not @Anna.
  names.sort((one, other) => other.name.length - one.name.length);
  const pattern = new RegExp(`@(${names.map(({ name }) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gu");
  return parts.flatMap((part) => {
    if (typeof part !== "string") return [part];
    /** @type {(string | HTMLElement)[]} */ const found = [];
    let at = 0;
    for (const { 0: whole, 1: name, index } of part.matchAll(pattern)) {
      const me = names.some((one) => one.me && one.name === name);
      found.push(part.slice(at, index), h("span", { class: me ? "mention me" : "mention", part: "mention" }, whole));
      at = index + whole.length;
    }
    return [...found, part.slice(at)].filter((one) => one !== "");
  });
}
