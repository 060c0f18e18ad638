import { avatar, h, icon, linked, onlyEmoji, safeUrl } from "./dom.js";
import { TidingsElement } from "./element.js";
import { Heights } from "./heights.js";
import { withMentions } from "./mentions.js";

const EMOJI = ["👍", "❤️", "😂", "🎉", "🙏"];
/** Messages of one person in this time stand together. */
const GROUP_MS = 5 * 60_000;
/** What a row is taken for until it has been measured, and how far beyond the edges rows are made. */
const HEIGHT = 56;
const BEYOND = 600;
/** As near to the end counts as being there. */
const NEAR = 60;

/**
 * The messages of one channel. Only those in view are in the page, however many there are. Tells `tidings-reply`,
 * `tidings-edit`.
 */
export class MessageList extends TidingsElement {
  /** @type {any} */ #channel;
  /** @type {any} */ #scroll;
  /** @type {any} */ #above;
  /** @type {any} */ #below;
  /** @type {any} */ #rows;
  /** @type {any} */ #latest;
  /** @type {any} */ #live;
  /** @type {any} */ #note;
  /** @type {any[]} */ #items = [];
  /** What has been measured, by key: it holds when rows above come and go. @type {Map<string, number>} */ #measured = new Map();
  #heights = new Heights(HEIGHT);
  /** The messages as they were taken last, and for each the place where its rows begin. @type {any[]} */ #taken = [];
  /** @type {number[]} */ #begins = [];
  /** @type {number | null} */ #marker = null;
  /** Messages that were answered and are not loaded; null while they are asked for. @type {Map<string, any>} */ #quoted = new Map();
  /** Where the line above what is new stands, or -1. */ #fresh = -1;
  /** @type {Map<string, {item: any, element: any}>} */ #made = new Map();
  #atEnd = true;
  #newBelow = 0;
  #lastSeq = 0;
  #first = true;
  #frame = 0;
  /** @type {string | null} */ #focused = null;
  /** @type {number | null} */ #goTo = null;

  begin() {
    const id = this.getAttribute("channel");
    this.#items = [];
    this.#measured.clear();
    this.#heights = new Heights(HEIGHT);
    this.#taken = [];
    this.#begins = [];
    this.#marker = null;
    this.#fresh = -1;
    this.#made.clear();
    this.#first = true;
    this.#atEnd = true;
    this.#newBelow = 0;
    this.#lastSeq = 0;
    this.#focused = null;
    if (!id && !this.source) return this.root.replaceChildren();
    this.#channel = this.source ?? this.client.channel(id);
    this.#above = h("div", { "aria-hidden": "true" });
    this.#below = h("div", { "aria-hidden": "true" });
    this.#rows = h("div", { role: "feed", "aria-label": this.say("messages"), onfocusin: (/** @type {any} */ { target }) => this.#focusedIn(target), onkeydown: (/** @type {KeyboardEvent} */ event) => this.#key(event) });
    this.#note = h("p", { class: "empty" });
    this.#scroll = h("div", { class: "scroll", part: "messages", tabindex: "-1", onscroll: () => this.#scrolled() }, this.#above, this.#rows, this.#below, this.#note);
    this.#latest = h("button", { type: "button", class: "latest", part: "latest", hidden: true, onclick: () => void this.toLatest() });
    this.#live = h("div", { class: "hidden", role: "status" });
    this.root.replaceChildren(h("div", { class: "messages" }, this.#scroll, this.#latest, this.#live));
    this.#channel.open();
    this.atEnd(() => this.#channel.close());
    this.watch(this.#channel.messages, (messages) => this.#take(messages));
    this.watch(this.#channel.state, () => this.#sayState());
    this.watch(this.#channel.receipts, () => {});
    this.watch(this.client.status, () => {});
    const resized = new ResizeObserver(() => this.#later());
    resized.observe(this.#scroll);
    this.atEnd(() => resized.disconnect());
    const seen = () => this.#read();
    document.addEventListener("visibilitychange", seen);
    addEventListener("focus", seen);
    this.atEnd(() => {
      document.removeEventListener("visibilitychange", seen);
      removeEventListener("focus", seen);
      cancelAnimationFrame(this.#frame);
      this.#frame = 0;
    });
  }

  // ---------------------------------------------------------------- from messages to rows

  /** @param {any[]} messages */
  #take(messages) {
    const { from, to, known } = this.#change(messages);
    const newest = messages.at(-1);
    const fresh = messages.slice(from, to).filter(({ seq, mine }) => seq !== null && seq > this.#lastSeq && !mine);
    const ownNew = newest?.mine && newest.seq === null && !known.has(`k ${newest.key}`);
    if (this.#lastSeq && fresh.length && !this.#first) {
      if (!this.#atEnd) this.#newBelow += fresh.length;
      const said = fresh.at(-1);
      this.#live.textContent = fresh.length === 1 ? `${this.nameOf(said.user)}: ${said.text ?? ""}` : this.say("more_new", { count: fresh.length });
    }
    this.#lastSeq = Math.max(this.#lastSeq, ...messages.slice(-50).map(({ seq }) => seq ?? 0), 0);
    if (ownNew) this.#atEnd = true;
    if (this.#first && messages.length) {
      this.#first = false;
      if (this.#fresh > 0) {
        this.#atEnd = false;
        this.#goTo = this.#fresh;
      }
    }
    this.#later();
  }

  /**
   * Bring the rows up to date. Most of the time something has come at the end or above, or one message is another: what stands
   * before and behind that is left as it is, for it may be 100,000 rows.
   * @param {any[]} messages
   */
  #change(messages) {
    const taken = this.#taken;
    const marker = this.#channel.firstUnread.get();
    const least = Math.min(messages.length, taken.length);
    let from = 0;
    let rest = 0;
    if (marker === this.#marker) {
      while (from < least && messages[from] === taken[from]) from += 1;
      while (rest < least - from && messages.at(-1 - rest) === taken.at(-1 - rest)) rest += 1;
      // A neighbour may stand in another group now.
      from = Math.max(0, from - 1);
      rest = Math.max(0, rest - 1);
      const marked = rest > 0 && this.#items[this.#fresh] && this.#fresh >= this.#begins[taken.length - rest];
      if (marked && messages.slice(from, messages.length - rest).some((message) => unread(message, marker))) from = rest = 0;
    }
    const to = messages.length - rest;
    const start = this.#begins[from] ?? this.#items.length;
    const end = rest ? this.#begins[taken.length - rest] : this.#items.length;
    const known = new Map(this.#items.slice(start, end).map((item) => [item.key, item]));
    /** @type {any[]} */ const items = [];
    /** @type {number[]} */ const begins = [];
    if (this.#fresh >= start && this.#fresh < end) this.#fresh = -1;
    const behind = this.#fresh >= end;
    let marked = marker === null || this.#fresh >= 0;
    let last = messages[from - 1];
    let [dawn, dusk] = last ? day(Date.parse(last.created_at)) : [0, 0];
    for (let place = from; place < to; place += 1) {
      const message = messages[place];
      const at = Date.parse(message.created_at);
      begins.push(start + items.length);
      if (at < dawn || at >= dusk) {
        [dawn, dusk] = day(at);
        items.push(known.get(`day ${dawn}`) ?? { key: `day ${dawn}`, day: new Date(at) });
        last = undefined;
      }
      if (!marked && unread(message, marker)) {
        this.#fresh = start + items.length;
        items.push(known.get("new") ?? { key: "new", fresh: true });
        marked = true;
        last = undefined;
      }
      const first = !last || last.user !== message.user || at - Date.parse(last.created_at) > GROUP_MS;
      if (items.length && !first) items[items.length - 1].last = false;
      items.push({ key: message.key && message.mine ? `k ${message.key}` : `s ${message.seq}`, message, first, last: true });
      last = message;
    }
    if (items.length && this.#items[end]?.first === false) items[items.length - 1].last = false;
    // Objects stay the same where nothing has changed, so that rows need not be made anew.
    for (let place = 0; place < items.length; place += 1) {
      const old = known.get(items[place].key);
      if (old && old.message === items[place].message && old.first === items[place].first && old.last === items[place].last) items[place] = old;
    }
    const more = items.length - (end - start);
    if (behind) this.#fresh += more;
    this.#items = [...this.#items.slice(0, start), ...items, ...this.#items.slice(end)];
    this.#begins = [...this.#begins.slice(0, from), ...begins, ...this.#begins.slice(taken.length - rest).map((place) => place + more)];
    this.#heights.replace(start, end - start, items.map(({ key }) => this.#measured.get(key)));
    this.#taken = messages;
    this.#marker = marker;
    return { from, to, known };
  }

  /** Make a row anew although its message is the same. @param {number} place */
  #again(place) {
    if (place < 0) return;
    this.#items[place] = { ...this.#items[place] };
    this.#later();
  }

  #later() {
    if (this.#frame) return;
    const draw = () => {
      this.#frame = 0;
      this.#draw();
    };
    // A page that is not looked at has no frames.
    this.#frame = document.hidden ? /** @type {any} */ (setTimeout(draw, 50)) : requestAnimationFrame(draw);
  }

  // ---------------------------------------------------------------- only what is in view

  #draw() {
    const { scrollTop, clientHeight } = this.#scroll;
    if (!clientHeight || !this.isConnected) return;
    const anchor = this.#atEnd ? null : this.#anchor();
    const wanted = this.#goTo;
    this.#goTo = null;
    let top = wanted !== null ? Math.max(0, this.#heights.top(wanted) - clientHeight / 3) : this.#atEnd ? Infinity : scrollTop;
    const anchored = anchor ? this.#items.findIndex((item) => item.key === anchor.key) : -1;
    for (let turn = 0; turn < 3; turn += 1) {
      // What one looks at may stand elsewhere now: older messages have come above it, or rows turned out to be higher.
      if (anchor && anchored >= 0 && wanted === null) top = this.#heights.top(anchored) - anchor.offset;
      const total = this.#heights.top();
      if (!this.#fill(Math.max(0, Math.min(top, total - clientHeight)), clientHeight)) break;
    }
    if (this.#atEnd) this.#scroll.scrollTop = this.#scroll.scrollHeight;
    else {
      const found = wanted === null && anchor ? this.#made.get(anchor.key)?.element : undefined;
      if (found && anchor) this.#scroll.scrollTop = found.offsetTop - anchor.offset;
      else if (top !== Infinity) this.#scroll.scrollTop = top;
    }
    this.#settle();
  }

  /** The first row in view, and where it stands. */
  #anchor() {
    const { scrollTop } = this.#scroll;
    for (const element of this.#rows.children) {
      if (element.classList.contains("aside")) continue;
      if (element.offsetTop + element.offsetHeight > scrollTop) return { key: element.dataset.key, offset: element.offsetTop - scrollTop };
    }
    return null;
  }

  /** Make the rows around a place; whether one of them turned out to have another height. @param {number} top @param {number} height */
  #fill(top, height) {
    const items = this.#items;
    const heights = this.#heights;
    const start = heights.find(top - BEYOND);
    const end = Math.min(items.length, heights.find(top + height + BEYOND) + 1);
    const above = heights.top(start);
    const below = heights.top() - heights.top(end);
    // What has the focus stays, wherever it is scrolled to.
    const active = /** @type {any} */ (this.root.activeElement)?.closest?.("[data-key]")?.dataset.key;
    const wanted = new Set(items.slice(start, end).map(({ key }) => key));
    for (const [key, { element }] of this.#made) {
      element.classList.toggle("aside", !wanted.has(key));
      if (wanted.has(key) || key === active) continue;
      element.remove();
      this.#made.delete(key);
    }
    // A row that stands where it belongs is not touched: what is taken out, if only to be put in again, loses the focus.
    /** @type {any} */ let at = this.#rows.firstElementChild;
    for (let place = start; place < end; place += 1) {
      const item = items[place];
      let made = this.#made.get(item.key);
      const focused = /** @type {any} */ (made?.element.contains(this.root.activeElement) ? this.root.activeElement : null);
      if (!made || made.item !== item) {
        const element = this.#make(item);
        made?.element.replaceWith(element);
        if (made && made.element === at) at = element;
        made = { item, element };
        this.#made.set(item.key, made);
      }
      while (at?.classList.contains("aside")) at = at.nextElementSibling;
      if (made.element === at) at = at.nextElementSibling;
      else this.#rows.insertBefore(made.element, at);
      if (focused && this.root.activeElement !== focused) {
        const again = focused.isConnected ? focused : made.element.querySelector("article");
        again?.focus({ preventScroll: true });
      }
    }
    this.#above.style.height = `${above}px`;
    this.#below.style.height = `${below}px`;
    let changed = false;
    for (let place = start; place < end; place += 1) {
      const { key } = items[place];
      const now = this.#made.get(key)?.element.getBoundingClientRect().height ?? 0;
      if (now && Math.abs(now - heights.at(place)) > 0.5) {
        heights.set(place, now);
        this.#measured.set(key, now);
        changed = true;
      }
    }
    return changed;
  }

  #scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.#scroll;
    this.#atEnd = scrollHeight - scrollTop - clientHeight < NEAR && !this.#channel.state.get().has_after;
    this.#later();
  }

  #settle() {
    const { scrollTop, clientHeight, scrollHeight } = this.#scroll;
    const { has_before, has_after, loading } = this.#channel.state.get();
    if (!loading) {
      if (has_before && scrollTop < 800) void this.#channel.loadBefore(50);
      else if (has_after && scrollHeight - scrollTop - clientHeight < 800) void this.#channel.loadAfter(50);
    }
    this.#rove();
    if (this.#atEnd) {
      this.#newBelow = 0;
      this.#channel.trim?.();
    }
    const away = !this.#atEnd && this.#items.length > 0;
    this.#latest.hidden = !away;
    if (away) this.#latest.replaceChildren(icon("down"), this.#newBelow ? this.say("more_new", { count: this.#newBelow }) : this.say("latest"));
    this.#read();
    this.#sayState();
  }

  #read() {
    if (!this.#atEnd || document.visibilityState !== "visible" || !document.hasFocus() || !this.isConnected) return;
    if (this.#channel?.isOpen && this.#channel.state.get().ready) this.#channel.read();
  }

  #sayState() {
    const { ready, loading, error, left } = this.#channel.state.get();
    const nothing = !this.#items.length;
    this.#note.hidden = !nothing;
    if (!nothing) return;
    this.#note.textContent = left ? this.say("left") : error ? this.say("error") : loading || !ready ? this.say("loading") : this.say("empty");
  }

  /** Scroll to the newest message, loading it if need be. */
  async toLatest() {
    await this.#channel.jumpToLatest();
    this.#atEnd = true;
    this.#later();
  }

  /** Show one message, wherever it is. @param {number} seq */
  async show(seq) {
    await this.#channel.jumpTo(seq);
    // What has just been loaded is told with the next frame: it is needed now.
    this.#take(this.#channel.messages.get());
    const at = this.#items.findIndex((item) => item.message?.seq === seq);
    if (at < 0) return;
    this.#atEnd = false;
    this.#goTo = at;
    this.#focused = this.#items[at].key;
    this.#draw();
    const found = this.#made.get(this.#focused ?? "")?.element;
    found?.querySelector("article")?.focus({ preventScroll: true });
    found?.classList.add("found");
    found?.addEventListener("animationend", () => found.classList.remove("found"), { once: true });
  }

  // ---------------------------------------------------------------- one row

  /** @param {any} item */
  #make(item) {
    if (item.day) return h("div", { class: "row day", "data-key": item.key }, h("span", {}, this.words.sayDay(item.day)));
    if (item.fresh) return h("div", { class: "row fresh", "data-key": item.key, role: "separator" }, this.say("new"));
    const { message, first, last } = item;
    const { mine, state } = message;
    const name = mine ? this.say("you") : this.nameOf(message.user);
    const profile = mine ? undefined : this.client.userOf(message.user ?? "");
    if (profile && !profile.get().name && message.user) this.#await(profile, item.key);
    const gone = !!message.deleted_at;
    const emoji = !gone && !message.attachments?.length && !message.reply_to && onlyEmoji(message.text ?? "");
    const at = new Date(message.created_at);
    const time = this.words.time.format(at);
    const classes = ["row", mine && "mine", first && "first", last && "last", gone && "gone", emoji && "emoji", state === "failed" && "failed", message.id && message.id === this.#channel.rootId && "root"];
    const acts = !gone && message.seq !== null && !this.#channel.state.get().left;
    // What can be done with a message is made when somebody comes near: in a busy channel that is hardly any of them.
    const near = (/** @type {any} */ { currentTarget }) => acts && !currentTarget.querySelector(".actions") && currentTarget.append(this.#actions(message, name));
    return h(
      "div",
      { class: classes.filter(Boolean).join(" "), "data-key": item.key },
      h(
        "article",
        { onpointerenter: near, onfocusin: near, class: "message", part: "message", tabindex: "-1", "aria-label": `${name}, ${time}`, "aria-describedby": idOf(item.key), "aria-setsize": "-1", "aria-posinset": message.seq ?? undefined },
        h("div", { class: "face" }, last && !mine && avatar(message.user ?? "", name, profile?.get().avatar_url)),
        h(
          "div",
          { class: "body" },
          first && !mine && h("div", { class: "author" }, name),
          h("div", { class: "bubble", id: idOf(item.key), part: mine ? "bubble bubble-mine" : "bubble" }, ...(gone ? [this.say("deleted")] : this.#content(message))),
          !gone && message.reactions?.length > 0 && this.#reactions(message),
          this.#answers(message),
          (last || state === "failed" || message.edited_at) && this.#meta(message, at, time),
        ),
      ),
    );
  }

  /** Make a row anew when its author's name has come. @param {any} profile @param {string} key */
  #await(profile, key) {
    const end = profile.subscribe((/** @type {any} */ user) => {
      if (!user.name) return;
      queueMicrotask(() => end());
      this.#again(this.#items.findIndex((item) => item.key === key));
    });
    this.atEnd(end);
  }

  /** @param {any} message */
  #content(message) {
    const parts = [];
    if (message.reply_to && message.reply_to !== this.#channel.rootId) {
      const quoted = this.#quote(message.reply_to, message);
      parts.push(
        h(
          "button",
          { type: "button", class: "quote", onclick: () => quoted && void this.show(quoted.seq) },
          h("b", {}, quoted ? (quoted.user === this.client.user ? this.say("you") : this.nameOf(quoted.user)) : this.say("reply")),
          // In its own direction: neither the name nor the quote says how the answer is read.
          h("span", { dir: "auto" }, quoted ? (quoted.deleted_at ? this.say("deleted") : quoted.text || this.say("attachment")) : "…"),
        ),
      );
    }
    if (message.attachments?.length) parts.push(h("div", { class: "attachments" }, ...message.attachments.map((/** @type {any} */ one) => this.#attachment(one))));
    if (message.text) parts.push(h("div", { class: "text", dir: "auto" }, ...withMentions(linked(message.text), this.#mentioned(message))));
    return parts;
  }

  /** Who is mentioned, by the name and by the id that may stand in the text. @param {any} message */
  #mentioned({ mentions = [], mention_all, id }) {
    /** @type {{name: string, me: boolean}[]} */ const people = mention_all ? [{ name: "all", me: true }] : [];
    for (const user of mentions) {
      const profile = this.client.userOf(user);
      if (!profile.get().name) this.#await(profile, this.#items.find(({ message }) => message?.id === id)?.key ?? "");
      const me = user === this.client.user;
      people.push({ name: user, me }, { name: profile.get().name ?? "", me });
    }
    return people;
  }

  /** The message that was answered, asked for if it is not loaded. @param {string} id @param {any} by */
  #quote(id, by) {
    const loaded = this.#items.find((item) => item.message?.id === id)?.message;
    if (loaded || this.#quoted.has(id)) return loaded ?? this.#quoted.get(id);
    this.#quoted.set(id, null);
    const channel = encodeURIComponent(this.#channel.id);
    this.client.request?.("GET", `/v1/channels/${channel}/messages/${encodeURIComponent(id)}`).then(
      (/** @type {any} */ message) => {
        this.#quoted.set(id, message);
        this.#again(this.#items.findIndex((item) => item.message?.id === by.id));
      },
      // Asked for again when the row is made again.
      () => this.#quoted.delete(id),
    );
    return null;
  }

  /** The way to a message's thread, where somebody has answered. @param {any} message */
  #answers(message) {
    const count = this.#channel.rootId ? 0 : (message.reply_count ?? 0);
    if (!count) return null;
    return h("button", { type: "button", class: "answers", part: "answers", onclick: () => this.#thread(message.id) }, icon("thread"), this.say("replies", { count }));
  }

  /** @param {string} id */
  #thread(id) {
    this.tell("thread", { channel: this.#channel.id, message: id });
  }

  /** @param {any} attachment */
  #attachment({ type, url, title, mime_type, size, width, height }) {
    const href = safeUrl(url);
    const name = title || this.say("attachment");
    if (type === "image" && href) {
      return h("a", { href, target: "_blank", rel: "noopener noreferrer" }, h("img", { src: href, alt: title ?? "", width, height, loading: "lazy" }));
    }
    const about = [mime_type, size !== undefined && `${this.words.number.format(Math.ceil(size / 1024))} KB`].filter(Boolean).join(" · ");
    return h(href ? "a" : "span", { class: "file", href, target: href && "_blank", rel: href && "noopener noreferrer" }, icon("file"), h("span", {}, name, about && h("br"), about && h("small", {}, about)));
  }

  /** @param {any} message */
  #reactions(message) {
    const me = this.client.user;
    return h(
      "div",
      { class: "reactions" },
      ...message.reactions.map((/** @type {any} */ { emoji, count, users }) => {
        const mine = users?.includes(me);
        const act = () => this.#do(mine ? this.#channel.unreact(message.id, emoji) : this.#channel.react(message.id, emoji));
        return h("button", { type: "button", class: "reaction", "aria-pressed": mine ? "true" : "false", "aria-label": this.say("reactions", { emoji, count }), onclick: act }, `${emoji} ${this.words.number.format(count)}`);
      }),
    );
  }

  /** @param {any} message @param {Date} at @param {string} time */
  #meta(message, at, time) {
    const { state, mine, edited_at, error, key } = message;
    const drawn = { queued: "clock", sending: "clock", sent: "tick", delivered: "ticks", read: "ticks", failed: "alert" };
    const meta = h("div", { class: "meta" }, edited_at && `${this.say("edited")} · `, h("time", { datetime: at.toISOString(), title: at.toLocaleString(this.words.lang) }, time));
    if (!mine) return meta;
    const said = this.say(state, { reason: error?.detail ?? "" });
    const sign = icon(/** @type {any} */ (drawn)[state] ?? "tick");
    if (state === "read") sign.classList.add("is-read");
    meta.append(sign, h("span", { class: state === "failed" ? "" : "hidden" }, said));
    if (state === "failed") {
      meta.append(
        h("button", { type: "button", onclick: () => this.#channel.retry(key) }, this.say("retry")),
        h("button", { type: "button", onclick: () => this.#channel.discard(key) }, this.say("discard")),
      );
    }
    return meta;
  }

  /** @param {any} message @param {string} name */
  #actions(message, name) {
    const button = (/** @type {any} */ sign, /** @type {string} */ label, /** @type {() => void} */ act) =>
      h("button", { type: "button", tabindex: "-1", "aria-label": label, title: label, onclick: act }, sign);
    const ask = (/** @type {string} */ type) => () => this.tell(type, { channel: this.#channel.id, message });
    return h(
      "div",
      { class: "actions", role: "toolbar", "aria-label": this.say("actions", { name }) },
      ...EMOJI.map((emoji) => button(emoji, this.say("react", { emoji }), () => this.#do(this.#channel.react(message.id, emoji)))),
      !this.#channel.rootId && button(icon("reply"), this.say("reply"), ask("reply")),
      !this.#channel.rootId && button(icon("thread"), this.say("open_thread"), () => this.#thread(message.reply_to ?? message.id)),
      message.mine && message.text && button(icon("edit"), this.say("edit"), ask("edit")),
      message.mine && button(icon("trash"), this.say("delete"), () => this.#do(this.#channel.delete(message.id))),
    );
  }

  /** @param {Promise<any>} work */
  #do(work) {
    work.catch((error) => this.tell("error", { error }));
  }

  // ---------------------------------------------------------------- by keyboard

  /** One message takes part in the order of the Tab key: the one that had the focus last, else the newest in view. */
  #rove() {
    const focused = this.#made.get(this.#focused ?? "")?.element.querySelector("article");
    const { bottom } = this.#scroll.getBoundingClientRect();
    /** @type {any[]} */ const articles = [...this.#rows.querySelectorAll("article")];
    const one = focused ?? articles.filter((article) => article.getBoundingClientRect().top < bottom).at(-1);
    for (const article of articles) if (article.tabIndex !== (article === one ? 0 : -1)) article.tabIndex = article === one ? 0 : -1;
  }

  /** @param {HTMLElement} target */
  #focusedIn(target) {
    this.#focused = /** @type {any} */ (target.closest("[data-key]"))?.dataset.key ?? null;
    this.#rove();
  }

  /** Where a message is among the rows, from a place on in one direction; -1 if there is none. @param {number} place @param {number} step */
  #next(place, step) {
    for (; place >= 0 && place < this.#items.length; place += step) if (this.#items[place].message) return place;
    return -1;
  }

  /** @param {number} place */
  #focus(place) {
    const { key } = this.#items[place];
    const made = this.#made.get(key)?.element;
    if (!made || made.classList.contains("aside")) {
      this.#atEnd = false;
      this.#goTo = place;
      this.#draw();
    }
    const article = this.#made.get(key)?.element.querySelector("article");
    this.#focused = key;
    article?.focus({ preventScroll: true });
    article?.scrollIntoView({ block: "nearest" });
    this.#rove();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const active = /** @type {any} */ (this.root.activeElement);
    const article = active?.closest("article");
    if (!article || event.altKey || event.ctrlKey || event.metaKey) return;
    const buttons = [...article.querySelectorAll(".actions button")];
    if (active.closest(".actions")) {
      const step = (event.key === "ArrowRight") === (getComputedStyle(this).direction !== "rtl") ? 1 : -1;
      const to = { Escape: article, ArrowRight: buttons.at((buttons.indexOf(active) + step) % buttons.length) }[event.key.replace("Left", "Right")];
      if (!to) return;
      event.preventDefault();
      return to.focus({ preventScroll: true });
    }
    if (active !== article) {
      if (event.key !== "Escape") return;
      event.preventDefault();
      return article.focus({ preventScroll: true });
    }
    if (event.key === "Enter") {
      event.preventDefault();
      return buttons[0]?.focus({ preventScroll: true });
    }
    const { key } = article.closest("[data-key]").dataset;
    const at = this.#items.findIndex((item) => item.key === key);
    const { length } = this.#items;
    const [from, step] = { ArrowUp: [at - 1, -1], ArrowDown: [at + 1, 1], Home: [0, 1], End: [length - 1, -1] }[event.key] ?? [];
    if (from === undefined || step === undefined) return;
    event.preventDefault();
    const to = this.#next(from, step);
    if (to >= 0) this.#focus(to);
  }

  /** A message gets the focus, if it is loaded; whether it is. @param {string} id */
  focusMessage(id) {
    const place = this.#items.findIndex((item) => item.message?.id === id);
    if (place >= 0) this.#focus(place);
    return place >= 0;
  }

  /** The newest message gets the focus: where the arrows begin. */
  focusNewest() {
    const newest = this.#next(this.#items.length - 1, -1);
    if (newest >= 0) this.#focus(newest);
  }
}

/** The day of a moment where the reader is: when it begins and when the next one does, ms. @param {number} at @returns {[number, number]} */
function day(at) {
  const from = new Date(at).setHours(0, 0, 0, 0);
  const next = new Date(from);
  return [from, next.setDate(next.getDate() + 1)];
}

/** @param {any} message @param {number | null} marker the first unread one's seq */
const unread = ({ seq, mine }, marker) => marker !== null && seq !== null && seq >= marker && !mine;

/** The id of a bubble within the list, of letters that an id may have. @param {string} key */
const idOf = (key) => `b-${key.replace(/\s+/g, "-")}`;
