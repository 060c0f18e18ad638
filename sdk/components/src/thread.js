import { h, icon } from "./dom.js";
import { TidingsElement } from "./element.js";

/**
 * One message and the replies to it, with a place to write another. The attribute `message` says which one. Tells
 * `tidings-thread-closed`.
 */
export class Thread extends TidingsElement {
  static observedAttributes = [...TidingsElement.observedAttributes, "message", "theme"];
  /** @type {any} */ #composer;

  constructor() {
    super();
    this.root.addEventListener("tidings-edit", (/** @type {any} */ event) => {
      // Done here, and not by another composer of the page.
      event.stopPropagation();
      this.#composer?.edit(event.detail.message);
    });
    this.root.addEventListener("keydown", (/** @type {any} */ event) => {
      if (event.key !== "Escape" || event.defaultPrevented) return;
      event.preventDefault();
      this.#close();
    });
  }

  begin() {
    const id = this.getAttribute("channel");
    const message = this.getAttribute("message");
    if (!id || !message) return this.root.replaceChildren();
    const source = sourceOf(this.client.channel(id), this.client.channel(id).thread(message));
    const count = h("p", { "aria-live": "polite" });
    const list = document.createElement("tidings-message-list");
    this.#composer = document.createElement("tidings-composer");
    this.#composer.setAttribute("hint", this.say("reply_in_thread"));
    for (const element of /** @type {any[]} */ ([list, this.#composer])) {
      if (this.hasAttribute("theme")) element.setAttribute("theme", this.theme);
      element.setAttribute("lang", this.words.lang);
      element.strings = this.strings;
      element.source = source;
      element.client = this.client;
    }
    const close = h("button", { type: "button", class: "round", "aria-label": this.say("close_thread"), title: this.say("close_thread"), onclick: () => this.#close() }, icon("close"));
    this.root.replaceChildren(
      h(
        "section",
        { class: "thread", "aria-label": this.say("thread") },
        h("header", { class: "head", part: "head" }, h("div", { class: "words" }, h("h2", {}, this.say("thread")), count), close),
        list,
        this.#composer,
      ),
    );
    source.open();
    this.atEnd(() => source.close());
    this.watch(source.replies, (/** @type {any[]} */ replies) => (count.textContent = this.say("replies", { count: replies.length })));
  }

  /** @param {string} name @param {string | null} before @param {string | null} now */
  attributeChangedCallback(name, before, now) {
    if (name !== "theme") return super.attributeChangedCallback(name, before, now);
    for (const element of this.root.querySelectorAll("tidings-message-list, tidings-composer")) {
      if (now === null) element.removeAttribute("theme");
      else element.setAttribute("theme", now);
    }
  }

  focus() {
    this.#composer?.focus();
  }

  #close() {
    this.tell("thread-closed", { channel: this.getAttribute("channel"), message: this.getAttribute("message") });
  }
}

/**
 * A thread in the shape of a channel, as the message list and the composer know it.
 * @param {any} channel @param {any} thread
 */
function sourceOf(channel, thread) {
  const fixed = (/** @type {any} */ value) => ({ get: () => value, subscribe: (/** @type {any} */ fn) => (fn(value), () => {}) });
  const all = () => (thread.root.get() ? [thread.root.get(), ...thread.messages.get()] : thread.messages.get());
  const nothing = async () => {};
  return {
    id: channel.id,
    rootId: thread.id,
    isOpen: false,
    state: thread.state,
    replies: thread.messages,
    messages: {
      get: all,
      subscribe: (/** @type {any} */ fn) => {
        const ends = [thread.root.subscribe(() => fn(all())), thread.messages.subscribe(() => fn(all()))];
        return () => ends.forEach((end) => end());
      },
    },
    receipts: channel.receipts,
    summary: channel.summary,
    members: channel.members,
    loadMembers: () => channel.loadMembers(),
    firstUnread: fixed(null),
    draft: fixed(""),
    setDraft() {},
    read() {},
    open: () => thread.open(),
    close: () => thread.close(),
    setTyping: (/** @type {boolean | undefined} */ on) => channel.setTyping(on),
    send: (/** @type {any} */ message) => thread.send(message),
    loadBefore: nothing,
    loadAfter: () => thread.loadAfter(),
    jumpTo: nothing,
    jumpToLatest: nothing,
    ...Object.fromEntries(["edit", "delete", "react", "unreact", "retry", "discard"].map((name) => [name, (/** @type {any[]} */ ...all) => channel[name](...all)])),
  };
}
