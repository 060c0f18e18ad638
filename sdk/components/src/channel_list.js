import { avatar, h } from "./dom.js";
import { TidingsElement } from "./element.js";

/** The user's channels, the newest activity first. Tells `tidings-channel-selected`. */
export class ChannelList extends TidingsElement {
  #filter = "";
  /** @type {any[]} */ #channels = [];
  /** @type {any} */ #list;
  /** @type {Map<string, {row: any, seen: any, ends: (() => void)[]}>} */ #rows = new Map();

  begin() {
    const search = h("input", {
      type: "search",
      "aria-label": this.say("search"),
      placeholder: this.say("search"),
      oninput: (/** @type {any} */ { target }) => {
        this.#filter = target.value.trim().toLocaleLowerCase();
        this.#render();
      },
      onkeydown: (/** @type {KeyboardEvent} */ event) => event.key === "ArrowDown" && this.#focus(0, event),
    });
    this.#list = h("ul", { onscroll: () => this.#scrolled(), onkeydown: (/** @type {KeyboardEvent} */ event) => this.#key(event) });
    this.#dropRows();
    this.root.replaceChildren(
      h("nav", { class: "channels", part: "channels", "aria-label": this.say("conversations") }, h("div", { class: "filter" }, search), this.#list),
    );
    this.watch(this.client.channels, (/** @type {any[]} */ channels) => {
      this.#channels = channels.filter(({ hidden, archived }) => !hidden && !archived);
      this.#render();
    });
    this.atEnd(() => this.#dropRows());
  }

  #dropRows() {
    for (const { ends } of this.#rows.values()) for (const end of ends) end();
    this.#rows.clear();
  }

  #render() {
    const selected = this.getAttribute("channel");
    const shown = this.#channels.filter((summary) => !this.#filter || this.titleOf(summary).toLocaleLowerCase().includes(this.#filter));
    const focused = /** @type {any} */ (this.root.activeElement)?.dataset?.channel;
    const rows = shown.map((summary) => this.#row(summary, summary.id === selected));
    const kept = new Set(shown.map(({ id }) => id));
    for (const [id, { ends }] of this.#rows) {
      if (kept.has(id)) continue;
      for (const end of ends) end();
      this.#rows.delete(id);
    }
    if (!rows.length) rows.push(h("li", { class: "empty" }, this.say(this.#filter ? "no_matches" : "no_conversations")));
    this.#list.replaceChildren(...rows);
    if (focused) this.#list.querySelector(`[data-channel="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  /** @param {any} summary @param {boolean} selected */
  #row(summary, selected) {
    const known = this.#rows.get(summary.id);
    if (known && known.seen.summary === summary && known.seen.selected === selected) return known.row;
    const ends = known?.ends ?? this.#follow(summary);
    const title = this.titleOf(summary);
    const other = this.otherOf(summary);
    const { unread = 0 } = summary;
    const typing = this.client.channel(summary.id).typing.get();
    const at = summary.last_message_at && new Date(summary.last_message_at);
    const there = other && this.client.presence(other).get().status === "online";
    const row = h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: `channel${unread ? " unread" : ""}`,
          part: "channel",
          "data-channel": summary.id,
          "aria-current": selected ? "true" : undefined,
          onclick: () => this.tell("channel-selected", { channel: summary.id }),
        },
        h("span", { class: `dot${there ? " on" : ""}` }, avatar(other ?? summary.id, title, summary.avatar_url), there && h("span", { class: "hidden" }, `${this.say("online")}. `)),
        h(
          "span",
          { class: "words" },
          h("span", { class: "top" }, h("span", { class: "name" }, title), at && h("time", { datetime: at.toISOString() }, this.words.sayShort(at))),
          h(
            "span",
            { class: "below" },
            h("span", { class: `last${typing.length ? " typing" : ""}` }, typing.length ? this.#typing(typing) : this.#preview(summary)),
            unread > 0 && h("span", { class: "badge", part: "badge" }, h("span", { "aria-hidden": "true" }, unread > 99 ? "99+" : unread), h("span", { class: "hidden" }, this.say("unread", { count: unread }))),
          ),
        ),
      ),
    );
    this.#rows.set(summary.id, { row, seen: { summary, selected }, ends });
    return row;
  }

  /** What a row shows beyond its summary: names, who types, who is there. @param {any} summary */
  #follow(summary) {
    const again = () => {
      const known = this.#rows.get(summary.id);
      if (!known) return;
      known.seen = {};
      this.#render();
    };
    const values = [this.client.channel(summary.id).typing];
    const other = this.otherOf(summary);
    if (other) values.push(this.client.presence(other));
    const people = new Set([...(summary.members ?? []).map((/** @type {any} */ { user }) => user), summary.last_message?.user]);
    for (const user of people) if (user) values.push(this.client.userOf(user));
    let quiet = true;
    const ends = values.map((value) => value.subscribe(() => quiet || queueMicrotask(again)));
    quiet = false;
    return ends;
  }

  /** @param {string[]} users */
  #typing(users) {
    return users.length === 1 ? this.say("typing_one", { name: this.nameOf(users[0]) }) : this.say("typing_many", { count: users.length });
  }

  /** @param {any} summary */
  #preview({ last_message: message, member_count }) {
    if (!message) return this.say("members", { count: member_count ?? 0 });
    if (message.deleted_at) return this.say("deleted");
    const text = message.text || `📎 ${message.attachments?.[0]?.title ?? this.say("attachment")}`;
    const who = message.user === this.client.user ? this.say("you") : this.nameOf(message.user).replace(/^(Dr\.?) /, "").split(" ")[0];
    return `${who}: ${text.replace(/\s+/g, " ").slice(0, 120)}`;
  }

  #scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.#list;
    if (scrollHeight - scrollTop - clientHeight < 400) void this.client.loadChannels({ more: true });
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const buttons = [...this.#list.querySelectorAll("button")];
    const at = buttons.indexOf(/** @type {any} */ (this.root.activeElement));
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to !== undefined) this.#focus(to, event);
  }

  /** @param {number} place @param {KeyboardEvent} event */
  #focus(place, event) {
    const button = this.#list.querySelectorAll("button")[place];
    if (!button) return;
    event.preventDefault();
    button.focus();
  }
}
