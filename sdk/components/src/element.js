import { Words } from "./strings.js";
import { styles } from "./theme.js";

/** What all elements share: a client, a language, and subscriptions that end with the element. */
export class TidingsElement extends HTMLElement {
  static observedAttributes = ["lang", "channel"];
  /** @type {any} */ #client;
  /** @type {any} */ #strings = {};
  /** @type {(() => void)[]} */ #ends = [];
  /** @type {ShadowRoot} */ root;

  constructor() {
    super();
    this.root = this.attachShadow({ mode: "open", delegatesFocus: false });
    this.root.adoptedStyleSheets = [styles()];
    this.words = new Words("en");
  }

  /** The SDK's `Client`. */
  get client() {
    return this.#client;
  }

  set client(client) {
    this.#client = client;
    this.#restart();
  }

  /** What stands in for the client's channel: a thread, say. Set it before `client`. @type {any} */ source;

  /** Words of one's own, by the names of `strings.js`. */
  get strings() {
    return this.#strings;
  }

  set strings(strings) {
    this.#strings = strings;
    this.#restart();
  }

  /** `auto`, `light` or `dark`. */
  get theme() {
    return this.getAttribute("theme") ?? "auto";
  }

  set theme(theme) {
    this.setAttribute("theme", theme);
  }

  connectedCallback() {
    this.#restart();
  }

  disconnectedCallback() {
    this.#end();
  }

  /** @param {string} name @param {string | null} before @param {string | null} now */
  attributeChangedCallback(name, before, now) {
    if (this.isConnected && before !== now) this.#restart();
  }

  #restart() {
    this.#end();
    if (!this.#client || !this.isConnected) return;
    const lang = this.closest("[lang]")?.getAttribute("lang") || document.documentElement.lang || navigator.language || "en";
    this.words = new Words(lang, this.#strings);
    this.begin();
  }

  #end() {
    for (const end of this.#ends.splice(0)) end();
  }

  /** Build what is shown. Called anew when client, language or channel change. */
  begin() {}

  /**
   * Hear of a value until the element goes or begins anew.
   * @template T
   * @param {{subscribe(fn: (value: T) => void): () => void}} readable
   * @param {(value: T) => void} fn
   */
  watch(readable, fn) {
    this.#ends.push(readable.subscribe(fn));
  }

  /** @param {() => void} end */
  atEnd(end) {
    this.#ends.push(end);
  }

  /** @param {string} name @param {Record<string, any>} [values] */
  say(name, values) {
    return this.words.say(name, values);
  }

  /** @param {string} type @param {any} detail */
  tell(type, detail) {
    return this.dispatchEvent(new CustomEvent(`tidings-${type}`, { detail, bubbles: true, composed: true, cancelable: true }));
  }

  /** What a user is called. @param {string | undefined} id */
  nameOf(id) {
    return id === undefined || id === null ? "" : (this.#client.userOf(id).get().name ?? id);
  }

  /** What a channel is called here: by its own name, or by its other members. @param {any} summary */
  titleOf(summary) {
    if (summary.name) return summary.name;
    const others = (summary.members ?? []).filter((/** @type {any} */ { user }) => user !== this.#client.user);
    return others.map((/** @type {any} */ { user }) => this.nameOf(user)).join(", ") || summary.id;
  }

  /** The other one of a conversation of two. @param {any} summary @returns {string | undefined} */
  otherOf(summary) {
    const others = (summary.members ?? []).filter((/** @type {any} */ { user }) => user !== this.#client.user);
    return others.length === 1 && summary.member_count === 2 ? others[0].user : undefined;
  }
}
