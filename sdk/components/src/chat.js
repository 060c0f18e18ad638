import { h, icon, avatar } from "./dom.js";
import { TidingsElement } from "./element.js";

/** Below this width, in px, the list and the conversation take turns. */
const NARROW = 640;
/** Below this one a thread takes the place of its conversation. */
const MIDDLE = 1040;

/** Everything at once: the channels, and the conversation that is chosen. */
export class Chat extends TidingsElement {
  /** @type {any} */ #frame;
  /** @type {any} */ #list;
  /** @type {any} */ #talk;
  /** @type {any} */ #banner;
  /** @type {any} */ #messages;
  /** @type {any} */ #composer;
  /** @type {any} */ #aside;
  /** @type {(() => void)[]} */ #shown = [];
  /** @type {string | null} */ #id = null;

  constructor() {
    super();
    const { root } = this;
    root.addEventListener("tidings-channel-selected", (/** @type {any} */ event) => this.#select(event.detail.channel, true));
    root.addEventListener("tidings-reply", (/** @type {any} */ event) => this.#composer?.reply(event.detail.message));
    root.addEventListener("tidings-edit", (/** @type {any} */ event) => this.#composer?.edit(event.detail.message));
    root.addEventListener("tidings-thread", (/** @type {any} */ event) => this.#openThread(event.detail));
    root.addEventListener("tidings-thread-closed", (/** @type {any} */ event) => {
      this.#closeThread();
      if (!this.#messages?.focusMessage(event.detail.message)) this.#composer?.focus();
    });
    // Out of the messages, back to where one writes.
    root.addEventListener("keydown", (/** @type {any} */ event) => {
      if (event.key === "Escape" && !event.defaultPrevented && event.target === this.#messages) this.#composer?.focus();
    });
  }

  /** Show a channel, as a choice from the list does. @param {string} channel */
  open(channel) {
    if (this.client && this.isConnected) this.#select(channel, true);
    else this.setAttribute("channel", channel);
  }

  begin() {
    this.#list = document.createElement("tidings-channel-list");
    this.#pass(this.#list);
    this.#banner = h("div", { class: "banner", role: "status", hidden: true });
    this.#talk = h("section", { class: "talk" });
    this.#aside = h("div", { class: "aside-pane", hidden: true });
    this.#frame = h("div", { class: "frame" }, h("div", { class: "chat" }, h("div", { class: "side" }, this.#banner, this.#list), this.#talk, this.#aside));
    this.#frame.style.height = "100%";
    this.root.replaceChildren(this.#frame);
    const sized = new ResizeObserver(([{ contentRect }]) => {
      this.#frame.classList.toggle("narrow", contentRect.width < NARROW);
      this.#frame.classList.toggle("middle", contentRect.width < MIDDLE);
    });
    sized.observe(this);
    this.atEnd(() => sized.disconnect());
    this.atEnd(() => this.#hide());
    this.watch(this.client.status, (/** @type {any} */ { state, error }) => {
      const said = { connecting: "connecting", catching_up: "catching_up", offline: "offline", refused: "refused" }[/** @type {string} */ (state)];
      this.#banner.hidden = !said;
      this.#banner.classList.toggle("bad", state === "refused");
      if (said) this.#banner.textContent = this.say(said, { reason: error?.detail ?? "" });
    });
    const themes = new MutationObserver(() => this.root.querySelectorAll("tidings-channel-list, tidings-message-list, tidings-composer, tidings-thread").forEach((one) => this.#pass(/** @type {any} */ (one))));
    themes.observe(this, { attributes: true, attributeFilter: ["theme"] });
    this.atEnd(() => themes.disconnect());
    this.#id = null;
    this.#select(this.getAttribute("channel"), false);
  }

  /** @param {any} element */
  #pass(element) {
    if (this.hasAttribute("theme")) element.setAttribute("theme", this.theme);
    else element.removeAttribute("theme");
    element.setAttribute("lang", this.words.lang);
    if (element.strings !== this.strings) element.strings = this.strings;
    if (element.client !== this.client) element.client = this.client;
  }

  #hide() {
    for (const end of this.#shown.splice(0)) end();
  }

  /** @param {string | null} id @param {boolean} focus */
  #select(id, focus) {
    this.#frame.classList.toggle("open", !!id);
    if (id) this.#list.setAttribute("channel", id);
    else this.#list.removeAttribute("channel");
    if (id === this.#id && this.#talk.childElementCount) return focus && this.#composer?.focus();
    this.#id = id;
    this.#hide();
    this.#closeThread();
    if (!id) return this.#talk.replaceChildren(h("p", { class: "choose" }, this.say("choose")));
    const channel = this.client.channel(id);
    const title = h("h2");
    const about = h("p", { "aria-live": "polite" });
    const face = h("span", { class: "dot" });
    const typing = h("div", { class: "typing-line", "aria-live": "polite" });
    this.#messages = document.createElement("tidings-message-list");
    this.#composer = document.createElement("tidings-composer");
    for (const element of [this.#messages, this.#composer]) {
      element.setAttribute("channel", id);
      this.#pass(element);
    }
    const back = h("button", { type: "button", class: "round back", "aria-label": this.say("back"), onclick: () => this.#back() }, icon("back"));
    this.#talk.replaceChildren(h("header", { class: "head", part: "head" }, back, face, h("div", { class: "words" }, title, about)), this.#messages, typing, this.#composer);
    const narrow = () => (back.hidden = !this.#frame.classList.contains("narrow"));
    narrow();
    const changed = new MutationObserver(narrow);
    changed.observe(this.#frame, { attributes: true });
    this.#shown.push(() => changed.disconnect());

    /** @type {(() => void) | undefined} */ let watched;
    /** @type {string | undefined} */ let other;
    const head = () => {
      const summary = channel.summary.get();
      const name = this.titleOf(summary);
      title.textContent = name;
      const now = this.otherOf(summary);
      if (now !== other) {
        watched?.();
        other = now;
        watched = now ? this.client.presence(now).subscribe(() => queueMicrotask(head)) : undefined;
      }
      const presence = now && this.client.presence(now).get();
      face.replaceChildren(avatar(now ?? id, name, summary.avatar_url));
      face.classList.toggle("on", presence?.status === "online");
      about.textContent =
        presence?.status === "online"
          ? this.say("online")
          : presence?.last_seen_at
            ? this.say("last_seen", { when: this.words.sayShort(new Date(presence.last_seen_at)) })
            : this.say("members", { count: summary.member_count ?? 0 });
      for (const { user } of summary.members ?? []) {
        const profile = this.client.userOf(user);
        if (!profile.get().name && !waiting.has(user)) {
          waiting.add(user);
          this.#shown.push(profile.subscribe((/** @type {any} */ found) => found.name && queueMicrotask(head)));
        }
      }
    };
    const waiting = new Set();
    this.#shown.push(channel.summary.subscribe(head), () => watched?.());
    this.#shown.push(
      channel.typingCount.subscribe((/** @type {number} */ count) => {
        const names = channel.typing.get().map((/** @type {string} */ user) => this.nameOf(user));
        const said =
          names.length === 1
            ? this.say("typing_one", { name: names[0] })
            : names.length === 2
              ? this.say("typing_two", { name: names[0], other: names[1] })
              : count
                ? this.say("typing_many", { count })
                : "";
        typing.replaceChildren(...(said ? [h("span", { class: "bouncing", "aria-hidden": "true" }, h("i"), h("i"), h("i")), said] : []));
      }),
    );
    if (focus && !matchMedia("(pointer: coarse)").matches) this.#composer.focus();
    else if (focus) back.focus();
    this.#list.setAttribute("channel", id);
  }

  /** @param {{channel: string, message: string}} of */
  #openThread({ channel, message }) {
    const thread = document.createElement("tidings-thread");
    thread.setAttribute("channel", channel);
    thread.setAttribute("message", message);
    this.#aside.replaceChildren(thread);
    this.#aside.hidden = false;
    this.#frame.classList.add("threaded");
    this.#pass(thread);
    thread.focus();
  }

  #closeThread() {
    this.#frame.classList.remove("threaded");
    this.#aside.hidden = true;
    this.#aside.replaceChildren();
  }

  #back() {
    const id = this.#id;
    this.#select(null, false);
    this.#list.root.querySelector(`[data-channel="${CSS.escape(id ?? "")}"]`)?.focus();
  }
}
