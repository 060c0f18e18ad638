import { applied } from "./core.js";
import { TidingsError } from "./errors.js";
import { Value } from "./readable.js";
import { Thread } from "./thread.js";

const PAGE = 50;
/** A signal of typing in this time; the server shows it for six seconds. */
const TYPING_MS = 3_000;
const SHOWN_MS = 6_000;
/** Above this many members receipts are not told one by one (docs/protocol/limits.md). */
const RECEIPTS_MEMBERS_MAX = 1_000;

/** One channel as this tab sees it: a window on its messages, and what goes on in it. `client.channel(id)` makes it. */
export class Channel {
  #client;
  /** How many look at it. */ #open = 0;
  /** Ascending by seq: what is loaded. @type {any[]} */ #window = [];
  /** Head of the channel when a message was read, by its seq; without those that came as events. @type {Map<number, number>} */ #asOf = new Map();
  /** Events that came while a page was asked for. @type {any[] | null} */ #meanwhile = null;
  /** Sent, and not yet come back as an event. @type {Map<string, any>} */ #sent = new Map();
  #loading = 0;
  /** The page that is being loaded. @type {Promise<void> | undefined} */
  #underWay;
  #turn = 0;
  #head = 0;
  /** @type {Map<string, any>} */ #typists = new Map();
  #typedAt = 0;
  /** @type {any} */ #readTimer;
  #readTo = 0;
  #fromCache = false;
  /** @type {WeakMap<any, any>} */ #views = new WeakMap();

  /** @param {any} client @param {string} id */
  constructor(client, id) {
    this.#client = client;
    this.id = id;
    /** @type {Value<any>} */
    this.state = new Value({ ready: false, loading: false, has_before: false, has_after: false, head: 0, frozen: false, left: false });
    /** @type {Value<any[]>} */
    this.messages = new Value(/** @type {any[]} */ ([]));
    /** @type {Value<any>} */
    this.summary = new Value({ id, unread: 0, mentions: 0 });
    /** @type {Value<any[]>} */
    this.members = new Value(/** @type {any[]} */ ([]));
    /** @type {Value<string[]>} */
    this.typing = new Value(/** @type {string[]} */ ([]));
    this.typingCount = new Value(0);
    /** @type {Value<Map<string, {delivered: number, read: number}>>} */
    this.receipts = new Value(new Map());
    /** @type {Value<number | null>} */
    this.firstUnread = new Value(/** @type {number | null} */ (null));
    /** Those that somebody looks at. @type {Set<Thread>} */
    this.threads = new Set();
    this.draft = new Value(client.link?.drafts?.get(id) ?? "");
  }

  // ---------------------------------------------------------------- looking at it

  /** Somebody looks at it from now on: the newest messages are loaded and kept up to date, until `close`. */
  open() {
    if (this.#open++) return;
    if (!this.#window.length) void this.#showCached();
    if (this.#client.online) void this.refresh();
  }

  close() {
    if (!this.#open || --this.#open) return;
    // A long history that nobody looks at any more is not kept in memory.
    this.#turn += 1;
    this.#meanwhile = null;
    if (this.#window.length > 2 * PAGE && !this.state.get().has_after) {
      this.#window = this.#window.slice(-PAGE);
      this.#set({ has_before: true });
      this.#show();
    }
  }

  /**
   * Keep only the newest messages loaded, when far more are: for who looks at the end of a busy channel. The others can be
   * loaded again.
   * @param {number} [keep]
   */
  trim(keep = 500) {
    if (this.#window.length < 3 * keep || this.#meanwhile || this.state.get().has_after) return;
    this.#window = this.#window.slice(-keep);
    this.#set({ has_before: true });
    this.#show();
  }

  get isOpen() {
    return this.#open > 0;
  }

  async #showCached() {
    const turn = this.#turn;
    this.#set({ loading: true });
    const messages = await this.#client.link.cached(this.id);
    if (turn !== this.#turn || this.#window.length) return;
    if (messages.length) {
      this.#window = messages;
      this.#fromCache = true;
      this.#head = messages.at(-1).seq;
      this.#markUnread();
      this.#set({ ready: true, has_before: true, has_after: false });
      this.#show();
    }
    if (!this.#client.online) this.#set({ loading: false });
  }

  /** Read the newest page, as after a connection that was lost, and go on from there. */
  async refresh() {
    if (!this.#open) return;
    const { has_after } = this.state.get();
    if (has_after) return;
    await this.#load({}, (page) => {
      const first = page.messages[0]?.seq ?? Infinity;
      // What is loaded before the page stays only where nothing is missing in between.
      const before = this.#window.length && this.#window.at(-1).seq >= first ? this.#window.filter(({ seq }) => seq < first) : [];
      if (!this.#window.length || this.#fromCache) this.#markUnread();
      this.#fromCache = false;
      this.#window = [...before, ...page.messages];
      this.#set({ has_before: before.length ? this.state.get().has_before : page.has_before, has_after: page.has_after });
      void this.#client.link.keepPage(this.id, page.messages);
    });
    void this.#loadReceipts();
  }

  /** @param {any} [page] */
  reset(page) {
    this.#turn += 1;
    this.#meanwhile = null;
    this.#window = page?.messages ?? [];
    this.#asOf = new Map(this.#window.map(({ seq }) => [seq, page.head]));
    this.#head = page?.head ?? 0;
    for (const thread of this.threads) thread.reset();
    this.#set({ ready: true, has_before: page?.has_before ?? false, has_after: page?.has_after ?? false, head: this.#head });
    this.#show();
  }

  /**
   * @param {any} which
   * @param {(page: any) => void} take
   */
  #load(which, take) {
    this.#underWay = this.#run(which, take);
    return this.#underWay;
  }

  /** @param {any} which @param {(page: any) => void} take */
  async #run(which, take) {
    const turn = ++this.#turn;
    this.#loading += 1;
    this.#meanwhile = [];
    this.#set({ loading: true, error: undefined });
    try {
      const page = await this.#client.command({ type: "history", channel: this.id, limit: PAGE, ...which });
      if (turn !== this.#turn) return;
      const meanwhile = this.#meanwhile ?? [];
      this.#meanwhile = null;
      take(page);
      for (const { seq } of page.messages) this.#asOf.set(seq, page.head);
      this.#head = Math.max(this.#head, page.head);
      for (const event of meanwhile) if (event.seq > page.head) this.#apply(event);
      this.#set({ ready: true, head: this.#head });
    } catch (error) {
      if (turn === this.#turn) {
        const meanwhile = this.#meanwhile ?? [];
        this.#meanwhile = null;
        for (const event of meanwhile) this.#apply(event);
        const { code } = /** @type {TidingsError} */ (error);
        // A line that broke is no error of the channel's: it goes on when the line is back.
        this.#set({ error: code === "not_connected" ? undefined : error });
      }
    } finally {
      this.#loading -= 1;
      if (!this.#loading) this.#set({ loading: false });
      this.#show();
    }
  }

  /** Older messages above those that are loaded. @param {number} [limit] */
  async loadBefore(limit = PAGE) {
    // One page at a time: who asks meanwhile waits for the one that is under way.
    if (this.#loading) return this.#underWay;
    const first = this.#window[0];
    if (!first || !this.state.get().has_before) return;
    await this.#load({ before: first.seq, limit }, (page) => {
      this.#window = [...page.messages, ...this.#window];
      this.#set({ has_before: page.has_before });
    });
  }

  /** Newer messages below those that are loaded, where the window does not reach the end. @param {number} [limit] */
  async loadAfter(limit = PAGE) {
    if (this.#loading) return this.#underWay;
    const last = this.#window.at(-1);
    if (!last || !this.state.get().has_after) return;
    await this.#load({ after: last.seq, limit }, (page) => {
      this.#window = [...this.#window, ...page.messages];
      this.#set({ has_after: page.has_after });
    });
  }

  /** Show the messages around one. @param {number} seq */
  async jumpTo(seq) {
    if (this.#window.some((message) => message.seq === seq)) return;
    await this.#load({ around: seq }, (page) => {
      this.#window = page.messages;
      this.#set({ has_before: page.has_before, has_after: page.has_after });
    });
  }

  async jumpToLatest() {
    if (!this.state.get().has_after) return;
    await this.#load({}, (page) => {
      this.#window = page.messages;
      this.#set({ has_before: page.has_before, has_after: page.has_after });
    });
  }

  #markUnread() {
    const { unread, membership } = this.summary.get();
    this.firstUnread.set(unread && membership ? membership.read + 1 : null);
  }

  /** @param {any} changes */
  #set(changes) {
    this.state.set({ ...this.state.get(), ...changes });
  }

  // ---------------------------------------------------------------- what happens

  /** @param {any} event */
  heard(event) {
    this.#head = Math.max(this.#head, event.seq);
    if (event.type === "message.created") this.#ended(event.data.user);
    if (event.type.startsWith("member.")) this.#memberChanged(event);
    if (this.#meanwhile) this.#meanwhile.push(event);
    else this.#apply(event);
    for (const thread of this.threads) thread.heard(event);
  }

  /** @param {any} event */
  #apply({ type, seq, at, data }) {
    if (type === "message.created") {
      this.#sent.delete(data.key);
      if (this.#open && !this.state.get().has_after && !(this.#window.at(-1)?.seq >= seq)) this.#window.push(data);
      if (data.reply_to) this.#replied(data.reply_to, seq, 1, data.created_at);
    } else {
      if (type === "message.deleted" && data.reply_to) this.#replied(data.reply_to, seq, -1);
      const place = type === "message.updated" ? data.seq : data.message_seq;
      const found = place === undefined ? -1 : this.#find(place);
      if (found < 0) return;
      this.#window[found] = applied(this.#window[found], { type, data: { ...data, at } });
    }
    this.#show();
  }

  /** A message has one reply more or less. @param {string} id @param {number} seq the event's @param {number} step @param {string} [at] */
  #replied(id, seq, step, at) {
    const place = this.#window.map((message) => message.id).lastIndexOf(id);
    const root = this.#window[place];
    // The page that it was read with may have counted it.
    if (!root || seq <= (this.#asOf.get(root.seq) ?? 0)) return;
    this.#window[place] = { ...root, reply_count: Math.max(0, (root.reply_count ?? 0) + step), last_reply_at: at ?? root.last_reply_at };
  }

  /** Where a message is in the window, by halves. @param {number} seq */
  #find(seq) {
    let low = 0;
    let high = this.#window.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#window[middle].seq < seq) low = middle + 1;
      else high = middle;
    }
    return this.#window[low]?.seq === seq ? low : -1;
  }

  /** The server has one of our messages. @param {any} sent @param {any} content */
  answered({ key, id, seq, at }, content) {
    if (this.#window.some((message) => message.key === key && message.user === this.#client.user)) return;
    this.#sent.set(key, { ...content, id, key, seq, channel: this.id, user: this.#client.user, created_at: at });
    this.#show();
  }

  /** Something that `messages` is made of has changed. */
  #show() {
    this.messages.lazily(() => this.#render());
  }

  /** The outbox or somebody's position has changed. */
  changed() {
    this.#show();
  }

  /** A message as it is shown here: whose it is, and how far it got. @param {any} message @param {{delivered: number, read: number}} [reached] */
  viewOf(message, { delivered, read } = this.#reached()) {
    const me = this.#client.user;
    const mine = message.user === me && me !== undefined;
    const state = !mine ? "sent" : message.seq <= read ? "read" : message.seq <= delivered ? "delivered" : "sent";
    let view = this.#views.get(message);
    // The same object as long as nothing about it has changed: who shows it need not look closer.
    if (view?.state !== state || view.mine !== mine) this.#views.set(message, (view = { ...message, mine, state }));
    return view;
  }

  #render() {
    const me = this.#client.user;
    const reached = this.#reached();
    const shown = this.#window.map((message) => this.viewOf(message, reached));
    if (this.state.get().has_after) return shown;
    const there = new Set(this.#window.slice(-100).filter(({ user }) => user === me).map(({ key }) => key));
    for (const message of this.#sent.values()) if (!there.has(message.key)) shown.push({ ...message, mine: true, state: "sent" });
    for (const entry of this.#client.outbox.get()) {
      if (entry.channel !== this.id || there.has(entry.key) || this.#sent.has(entry.key)) continue;
      const { key, content, state, error, created_at } = entry;
      const at = new Date(created_at).toISOString();
      shown.push({ ...content, id: null, seq: null, key, channel: this.id, user: me, created_at: at, mine: true, state, error });
    }
    return shown;
  }

  /** How far all the others are. */
  #reached() {
    let delivered = Infinity;
    let read = Infinity;
    for (const receipt of this.receipts.get().values()) {
      delivered = Math.min(delivered, receipt.delivered);
      read = Math.min(read, receipt.read);
    }
    return delivered === Infinity ? { delivered: 0, read: 0 } : { delivered: Math.max(delivered, read), read };
  }

  /** Who of the others has read a message. @param {any} message @returns {string[]} */
  readBy({ seq }) {
    return [...this.receipts.get()].filter(([, { read }]) => seq !== null && read >= seq).map(([user]) => user);
  }

  async #loadReceipts() {
    const { member_count: members = 0 } = this.summary.get();
    if (members > RECEIPTS_MEMBERS_MAX) return;
    try {
      const found = new Map();
      let cursor;
      do {
        /** @type {any} */ const page = await this.#client.request("GET", `/v1/channels/${encodeURIComponent(this.id)}/receipts`, {
          query: { limit: 100, cursor },
        });
        for (const { user, delivered = 0, read = 0 } of page.items) if (user !== this.#client.user) found.set(user, { delivered, read });
        cursor = page.next ?? undefined;
      } while (cursor);
      // What was told meanwhile may be further.
      for (const [user, known] of this.receipts.get()) if (found.has(user)) found.set(user, furthest(found.get(user), known));
      this.receipts.set(found);
      this.#show();
    } catch {
      // Switched off in this type of channel, or the line broke: signals tell what moves from here on.
    }
  }

  /** @param {any} signal */
  signalled(signal) {
    switch (signal.type) {
      case "receipts": {
        const now = new Map(this.receipts.get());
        for (const { user, delivered = 0, read = 0 } of signal.receipts) {
          if (user !== this.#client.user) now.set(user, furthest({ delivered, read }, now.get(user) ?? { delivered: 0, read: 0 }));
        }
        this.receipts.set(now);
        return this.#show();
      }
      case "typing": {
        const { user, count, on = true, expires_in_ms = SHOWN_MS } = signal;
        if (user === undefined) return this.#counted(count ?? 0, expires_in_ms);
        if (user === this.#client.user) return;
        if (!on) return this.#ended(user);
        clearTimeout(this.#typists.get(user));
        this.#typists.set(user, setTimeout(() => this.#ended(user), expires_in_ms));
        return this.#tellTyping();
      }
    }
  }

  /** A large channel says how many type, and not who. @param {number} count @param {number} expires_in_ms */
  #counted(count, expires_in_ms) {
    clearTimeout(this.#typists.get(""));
    this.#typists.delete("");
    if (count) this.#typists.set("", setTimeout(() => this.typingCount.set(0), expires_in_ms));
    this.typingCount.set(count);
  }

  /** @param {string} user */
  #ended(user) {
    if (!this.#typists.has(user)) return;
    clearTimeout(this.#typists.get(user));
    this.#typists.delete(user);
    this.#tellTyping();
  }

  #tellTyping() {
    const users = [...this.#typists.keys()].filter(Boolean);
    this.typing.set(users);
    this.typingCount.set(users.length);
  }

  /** @param {any} event */
  #memberChanged({ type, data }) {
    const members = this.members.get();
    if (members.length) {
      const others = members.filter(({ user }) => user !== data.user);
      this.members.set(type === "member.removed" ? others : [...others, { ...members.find(({ user }) => user === data.user), ...data }]);
    }
    const receipts = new Map(this.receipts.get());
    if (type === "member.removed" && receipts.delete(data.user)) this.receipts.set(receipts);
    if (type === "member.added" && data.user !== this.#client.user && !receipts.has(data.user)) {
      this.receipts.set(receipts.set(data.user, { delivered: 0, read: 0 }));
    }
    this.#show();
  }

  /** @param {string} why */
  gone(why) {
    this.#set({ left: why, loading: false });
  }

  back() {
    if (this.state.get().left) this.#set({ left: false });
    if (this.#open) void this.refresh();
  }

  // ---------------------------------------------------------------- doing something

  /**
   * Send a message: it is shown at once, and leaves when there is a connection, in order, once.
   * @param {{text?: string, attachments?: any[], mentions?: string[], mention_all?: boolean, reply_to?: string, custom?: any, silent?: boolean, key?: string}} message
   * @returns {{key: string, channel: string, sent: Promise<{id: string, seq: number, at: string, duplicate: boolean}>}}
   *   `sent` is rejected with TidingsError when the server refuses for good
   */
  send({ key = this.#client.newId(), ...content }) {
    if (this.#typedAt) this.#typedAt = 0;
    return this.#client.send(this.id, key, content);
  }

  /** The replies to a message. @param {string} id the message's */
  thread(id) {
    return new Thread(this.#client, this, id);
  }

  /** @param {string} key */
  retry(key) {
    this.#client.link.retry(key);
  }

  /** @param {string} key */
  discard(key) {
    this.#client.link.discard(key);
  }

  /** @param {string} id @param {any} content */
  edit(id, content) {
    return this.#client.command({ type: "message.edit", channel: this.id, id, ...content });
  }

  /** @param {string} id @param {{hard?: boolean}} [how] */
  delete(id, { hard = false } = {}) {
    return this.#client.command({ type: "message.delete", channel: this.id, id, ...(hard ? { hard } : {}) });
  }

  /** @param {string} id @param {string} emoji */
  react(id, emoji) {
    return this.#client.command({ type: "reaction.add", channel: this.id, id, emoji });
  }

  /** @param {string} id @param {string} emoji */
  unreact(id, emoji) {
    return this.#client.command({ type: "reaction.remove", channel: this.id, id, emoji });
  }

  /** The user has read up to a message, the newest one if none is named. Never goes back. @param {number} [seq] */
  read(seq = this.#head) {
    const { membership, unread } = this.summary.get();
    if (seq <= this.#readTo || (membership && seq <= membership.read && !unread && !membership.marked_unread_from)) return;
    this.#readTo = seq;
    // Scrolling through reads many in a second: they are told together.
    this.#readTimer ??= setTimeout(() => {
      this.#readTimer = undefined;
      const told = this.#readTo;
      this.#client
        .command({ type: "read", channel: this.id, seq: told })
        .then((/** @type {any} */ reply) => this.#client.counted(reply))
        .catch(() => {
          // Told again when somebody reads on, or by the next look.
          this.#readTo = 0;
        });
    }, 100);
  }

  /** @param {number} seq everything from here on counts as unread */
  async markUnread(seq) {
    this.#readTo = 0;
    this.#client.counted(await this.#client.command({ type: "unread.mark", channel: this.id, seq }));
  }

  /** The user types, or has stopped. Call it with each key: it is told every three seconds at most. @param {boolean} [on] */
  setTyping(on = true) {
    const now = Date.now();
    if (on ? now - this.#typedAt < TYPING_MS : !this.#typedAt) return;
    this.#typedAt = on ? now : 0;
    this.#client.link.post({ type: "typing", channel: this.id, ...(on ? {} : { on }) });
  }

  /** What is written and not sent, kept over reloads. @param {string} text */
  setDraft(text) {
    this.draft.set(text);
    this.#client.link.keepDraft(this.id, text);
  }

  async loadMembers() {
    /** @type {any[]} */ const found = [];
    let cursor;
    do {
      /** @type {any} */ const page = await this.#client.request("GET", `/v1/channels/${encodeURIComponent(this.id)}/members`, { query: { limit: 100, cursor } });
      found.push(...page.items);
      cursor = page.next ?? undefined;
    } while (cursor && found.length < RECEIPTS_MEMBERS_MAX);
    this.members.set(found);
    return found;
  }

  /** @param {any} changes */
  update(changes) {
    return this.#client.request("PATCH", `/v1/channels/${encodeURIComponent(this.id)}`, { body: changes });
  }

  /** @param {string[]} users */
  addMembers(users) {
    return this.#client.request("POST", `/v1/channels/${encodeURIComponent(this.id)}/members`, { body: { users } });
  }

  /** @param {string} user */
  removeMember(user) {
    return this.#client.request("DELETE", `/v1/channels/${encodeURIComponent(this.id)}/members/${encodeURIComponent(user)}`);
  }

  leave() {
    return this.#client.request("POST", `/v1/channels/${encodeURIComponent(this.id)}/leave`);
  }

  /** The user's own side: `muted_until`, `archived`, `hidden`. @param {any} changes */
  settings(changes) {
    return this.#client.request("PATCH", `/v1/channels/${encodeURIComponent(this.id)}/membership`, { body: changes });
  }
}

/** @param {{delivered: number, read: number}} a @param {{delivered: number, read: number}} b */
const furthest = (a, b) => ({ delivered: Math.max(a.delivered, b.delivered), read: Math.max(a.read, b.read) });
