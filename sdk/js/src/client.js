import { Channel } from "./channel.js";
import { refusal, TidingsError } from "./errors.js";
import { Value } from "./readable.js";
import { Tabs } from "./tabs.js";

const USERS_AT_ONCE = 100;
const PRESENCE_MAX = 500;
const CHANNELS = 50;

/**
 * @typedef {object} Options
 * @property {string} [url] http(s) address of the server; the page's own by default
 * @property {string | (() => string | Promise<string>)} token a user's token, or better: where to get a fresh one
 * @property {string} [app] the app's id, if the token has no `app` claim
 * @property {string | {id?: string, platform?: string, name?: string}} [device] stable per installation; made and kept by default
 * @property {"auto" | "memory" | import("./storage.js").Storage} [storage]
 * @property {string} [name] tells apart what is kept for several users on one page; give the user's id
 * @property {"auto" | "websocket" | "http"} [transport]
 * @property {boolean} [shareTabs] one connection for all tabs of the user (true)
 * @property {"online" | "invisible"} [presence]
 * @property {any} [WebSocket]
 * @property {typeof fetch} [fetch]
 * @property {any} [indexedDB]
 * @property {any} [locks]
 * @property {any} [BroadcastChannel]
 * @property {{now(): number, setTimeout: any, clearTimeout: any}} [clock]
 * @property {() => number} [random]
 */

/** A user on this device: connected, caught up, and shown as values that tell when they change. */
export class Client {
  /** This device's id, once storage was read. @type {string | undefined} */ device;
  /** @type {Value<any>} */
  status = new Value({ state: "idle", since: 0, leader: true, storage: "memory" });
  /** @type {Value<any[]>} */
  channels = new Value(/** @type {any[]} */ ([]));
  channelsDone = new Value(false);
  unread = new Value({ total: 0, mentions: 0, channels: 0 });
  /** @type {Value<any[]>} */
  outbox = new Value(/** @type {any[]} */ ([]));
  /** The signed-in user's id, once it is known. @type {string | undefined} */
  user;
  /** Bounds of the server, once it is known: `text_length`, … @type {any} */
  limits = {};
  link;

  #options;
  #env;
  /** @type {Map<string, Channel>} */ #open = new Map();
  /** @type {Map<string, any>} summaries */ #summaries = new Map();
  /** @type {Map<string, Set<(event: any) => void>>} */ #listeners = new Map();
  /** @type {Map<string, Value<any>>} */ #users = new Map();
  /** @type {Set<string>} */ #wantedUsers = new Set();
  /** @type {Map<string, Value<any>>} */ #presence = new Map();
  /** @type {Set<string>} */ #watched = new Set();
  /** @type {Map<string, {resolve: any, reject: any, content: any}>} */ #sending = new Map();
  /** @type {Set<string>} */ #unknown = new Set();
  /** @type {string | undefined} */ #cursor;
  #listed = false;
  #started = false;
  #watching = false;
  /** @type {(() => void)[]} */ #undo = [];

  /** @param {Options} options */
  constructor(options) {
    const here = /** @type {any} */ (globalThis);
    const url = (options.url ?? here.location?.origin ?? "").replace(/\/+$/, "");
    if (!/^https?:\/\//.test(url)) throw new TidingsError("invalid_field", "The server's address begins with http:// or https://.", { field: "url" });
    if (!options.token) throw new TidingsError("invalid_field", "A token, or a function that gets one, is needed.", { field: "token" });
    const name = options.name ?? "default";
    const locks = options.locks ?? here.navigator?.locks;
    const BroadcastChannel = options.BroadcastChannel ?? (locks ? here.BroadcastChannel : undefined);
    const shared = (options.shareTabs ?? true) && locks && BroadcastChannel;
    const { device } = options;
    this.#options = {
      transport: "auto",
      // Where tabs cannot find each other, each is a device of its own that keeps nothing: two that share positions are worse.
      storage: shared || options.shareTabs === false ? "auto" : "memory",
      ...options,
      shareTabs: options.shareTabs ?? true,
      url,
      device: typeof device === "string" ? { id: device } : { platform: "web", ...device },
      database: `tidings:${url}:${options.app ?? ""}:${name}`,
    };
    const set = (/** @type {any} */ fn, /** @type {number} */ ms) => setTimeout(fn, ms);
    this.#env = {
      clock: options.clock ?? { now: () => Date.now(), setTimeout: set, clearTimeout: (/** @type {any} */ id) => clearTimeout(id) },
      random: options.random ?? Math.random,
      WebSocket: "WebSocket" in options ? options.WebSocket : here.WebSocket,
      fetch: options.fetch ?? ((/** @type {any} */ at, /** @type {any} */ how) => here.fetch(at, how)),
      indexedDB: "indexedDB" in options ? options.indexedDB : safely(() => here.indexedDB),
      locks,
      BroadcastChannel,
      newId: () => this.newId(),
    };
    this.link = new Tabs(this.#options, this.#env, (kind, data) => this.#heard(kind, data));
  }

  // ---------------------------------------------------------------- life

  /** Connect, and stay connected. Returns at once; `status` tells. */
  start() {
    if (this.#started) return this;
    this.#started = true;
    this.link.start().catch((error) => this.#fire("diagnostic", { code: "start_failed", detail: String(error) }));
    const { addEventListener, removeEventListener, document } = /** @type {any} */ (globalThis);
    if (typeof addEventListener === "function") {
      const nudge = () => document?.visibilityState !== "hidden" && this.link.nudge();
      for (const [at, type] of [[globalThis, "online"], [document, "visibilitychange"]]) {
        at?.addEventListener?.(type, nudge);
        this.#undo.push(() => at?.removeEventListener?.(type, nudge));
      }
    }
    return this;
  }

  /**
   * Until there is a connection and everything that was missed is here.
   * @param {{timeout_ms?: number}} [options]
   * @returns {Promise<void>} rejected with what the server refuses, or `timeout`
   */
  connected({ timeout_ms } = {}) {
    return new Promise((resolve, reject) => {
      /** @type {any} */ let timer;
      const end = this.status.subscribe((status) => {
        const over = status.state === "online" || status.state === "refused" || status.state === "stopped";
        if (!over) return;
        clearTimeout(timer);
        queueMicrotask(() => end());
        if (status.state === "online") resolve();
        else reject(status.error ?? new TidingsError("closed", "The client was stopped."));
      });
      if (timeout_ms !== undefined) {
        timer = setTimeout(() => {
          end();
          reject(new TidingsError("timeout", "There is no connection yet.", { retry: "later" }));
        }, timeout_ms);
      }
    });
  }

  /** Hang up. What is stored stays, and what waits to be sent leaves the next time. */
  async stop() {
    for (const undo of this.#undo.splice(0)) undo();
    await this.link.stop();
    this.status.set({ ...this.status.get(), state: "stopped" });
  }

  /** Sign out: hang up, and leave nothing on this device. */
  async clear() {
    for (const undo of this.#undo.splice(0)) undo();
    await this.link.clear();
    this.status.set({ ...this.status.get(), state: "stopped" });
  }

  /** As if the network was cut. For demonstrations and tests. */
  goOffline() {
    this.link.cut(true);
  }

  goOnline() {
    this.link.cut(false);
  }

  get online() {
    const { state } = this.status.get();
    return state === "online" || state === "catching_up";
  }

  newId() {
    return globalThis.crypto?.randomUUID?.() ?? `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
  }

  // ---------------------------------------------------------------- hearing

  /**
   * Call `fn` with every event of a type (`message.created`, …; `*` for all), with signals (`signal:typing`, …), and with
   * `history.reset`, `message.sent`, `message.failed`, `diagnostic`.
   * @param {string} type
   * @param {(event: any) => void} fn
   * @returns {() => void} ends it
   */
  on(type, fn) {
    const found = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, found.add(fn));
    return () => found.delete(fn);
  }

  /** @param {string} type @param {any} data */
  #fire(type, data) {
    for (const fn of this.#listeners.get(type) ?? []) {
      try {
        fn(data);
      } catch (error) {
        // One listener's fault is not the others'.
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }

  /** @param {string} kind @param {any} data */
  #heard(kind, data) {
    switch (kind) {
      case "snapshot":
        return this.#snapshot(data);
      case "status":
        return this.#status(data);
      case "user":
        this.user = data.user;
        this.limits = data.limits ?? {};
        return;
      case "outbox": {
        const before = this.outbox.get();
        this.outbox.set(data);
        for (const id of new Set([...before, ...data].map(({ channel }) => channel))) this.#open.get(id)?.changed();
        return;
      }
      case "sent": {
        const sending = this.#sending.get(data.key);
        const entry = this.outbox.get().find(({ key }) => key === data.key);
        this.#open.get(data.channel)?.answered(data, sending?.content ?? entry?.content ?? {});
        this.#sending.delete(data.key);
        sending?.resolve({ id: data.id, seq: data.seq, at: data.at, duplicate: data.duplicate });
        return this.#fire("message.sent", data);
      }
      case "failed": {
        const error = new TidingsError(data.error.code, data.error.detail, data.error);
        this.#sending.get(data.key)?.reject(error);
        this.#sending.delete(data.key);
        return this.#fire("message.failed", { ...data, error });
      }
      case "heads":
        return this.#heads(data);
      case "event":
        return this.#event(data);
      case "reset":
        this.#open.get(data.channel)?.reset(data.page);
        this.#unknown.add(data.channel);
        this.#learnUnknown();
        return this.#fire("history.reset", { channel: data.channel, why: data.why });
      case "signal":
        return this.#signal(data);
      case "diagnostic":
        return this.#fire("diagnostic", data);
    }
  }

  /** @param {any} snapshot */
  #snapshot({ user, device, status, outbox, channels, drafts }) {
    this.user = user ?? this.user;
    this.device = device;
    for (const [id, summary] of channels) if (!this.#summaries.has(id)) this.#put(id, summary);
    for (const [id, text] of drafts) if (this.#open.get(id) && !this.#open.get(id)?.draft.get()) this.#open.get(id)?.draft.set(text);
    this.#heard("outbox", outbox);
    // Another tab leads now, or this one: what happened in between may not have been told here.
    const was = this.online;
    this.status.set(status);
    if (this.online) this.#resume(was);
  }

  /** @param {any} status */
  #status(status) {
    const was = this.online;
    this.status.set(status);
    if (this.online && !was) this.#resume(false);
    if (!this.online && was) for (const presence of this.#presence.values()) presence.set({ status: "unknown" });
  }

  /** There is a connection. @param {boolean} again */
  #resume(again) {
    this.#watching = false;
    this.#watch();
    void this.#fetchUsers();
    if (!this.#listed || again) void this.loadChannels({ limit: CHANNELS });
    for (const channel of this.#open.values()) if (channel.isOpen) void channel.refresh();
  }

  // ---------------------------------------------------------------- channels

  /** @param {string} id @returns {Channel} the same object each time */
  channel(id) {
    let channel = this.#open.get(id);
    if (!channel) {
      this.#open.set(id, (channel = new Channel(this, id)));
      const summary = this.#summaries.get(id);
      if (summary) channel.summary.set(summary);
      else if (this.#started) {
        this.#unknown.add(id);
        this.#learnUnknown();
      }
    }
    return channel;
  }

  /**
   * The next page of the user's channels, newest activity first; the first one comes by itself.
   * @param {{limit?: number, more?: boolean}} [options]
   */
  async loadChannels({ limit = CHANNELS, more = false } = {}) {
    if (more && this.channelsDone.get()) return;
    try {
      const page = await this.request("GET", "/v1/channels", {
        query: { limit, cursor: more ? this.#cursor : undefined, include: ["last_message", "members"], joined: true },
      });
      this.#listed = true;
      this.#cursor = page.next ?? undefined;
      this.channelsDone.set(!page.next);
      for (const channel of page.items) this.#learn(channel);
      this.#list();
    } catch (error) {
      this.#fire("diagnostic", { code: "channels_not_loaded", detail: String(error) });
    }
  }

  /** A channel as the server told it. @param {any} channel */
  #learn(channel) {
    const known = this.#summaries.get(channel.id);
    // What was heard since is newer than what was asked for before.
    const stale = known?.counted > channel.head;
    const side = channel.membership;
    this.#put(channel.id, {
      ...channel,
      unread: stale ? known.unread : (side?.unread ?? 0),
      mentions: stale ? known.mentions : (side?.mentions ?? 0),
      last_message: stale ? known.last_message : channel.last_message,
      last_message_at: stale ? known.last_message_at : channel.last_message_at,
      counted: Math.max(known?.counted ?? 0, channel.head),
      archived: side?.archived ?? false,
      hidden: side?.hidden ?? false,
      muted_until: side?.muted_until,
    });
    const open = this.#open.get(channel.id);
    if (open?.state.get().left) open.back();
  }

  /** @param {string} id @param {any} summary */
  #put(id, summary) {
    this.#summaries.set(id, summary);
    this.link.keepChannel(id, summary);
    const channel = this.#open.get(id);
    channel?.summary.set(summary);
    if (channel && channel.state.get().frozen !== !!summary.frozen) channel.state.set({ ...channel.state.get(), frozen: !!summary.frozen });
    this.#list();
  }

  /** @param {string} id @param {any} changes */
  #change(id, changes) {
    const known = this.#summaries.get(id);
    if (known) this.#put(id, { ...known, ...changes });
    else {
      this.#unknown.add(id);
      this.#learnUnknown();
    }
  }

  #list() {
    const all = () => [...this.#summaries.values()].sort((a, b) => activity(b).localeCompare(activity(a)));
    this.channels.lazily(all);
    this.unread.lazily(() => {
      let total = 0;
      let mentions = 0;
      let channels = 0;
      for (const { unread, mentions: named, archived } of this.#summaries.values()) {
        if (archived || !unread) continue;
        total += unread;
        mentions += named;
        channels += 1;
      }
      return { total, mentions, channels };
    });
  }

  #learnUnknown() {
    queueMicrotask(async () => {
      if (!this.#unknown.size || !this.online) return;
      const ids = [...this.#unknown].slice(0, USERS_AT_ONCE);
      for (const id of ids) this.#unknown.delete(id);
      try {
        const page = await this.request("GET", "/v1/channels", { query: { ids, include: ["last_message", "members"], limit: USERS_AT_ONCE } });
        for (const channel of page.items) this.#learn(channel);
        for (const id of ids) if (!page.items.some((/** @type {any} */ found) => found.id === id)) this.#open.get(id)?.gone("removed");
      } catch {
        for (const id of ids) this.#unknown.add(id);
      }
      if (this.#unknown.size && this.online) setTimeout(() => this.#learnUnknown(), 1_000);
    });
  }

  /** @param {any} told */
  #heads({ heads, fresh }) {
    for (const { stream, head, unread = 0, mentions = 0, read } of heads) {
      const known = this.#summaries.get(stream);
      if (!known) continue;
      this.#put(stream, { ...known, unread, mentions, counted: head, membership: { ...known.membership, read: read ?? known.membership?.read ?? 0 } });
    }
    if (fresh && this.#listed) void this.loadChannels();
  }

  /** Exact numbers of one channel: a reply or a signal. @param {any} told */
  counted({ channel, read, unread = 0, mentions = 0, marked_unread_from }) {
    const known = this.#summaries.get(channel);
    if (!known) return;
    this.#put(channel, { ...known, unread, mentions, membership: { ...known.membership, read, marked_unread_from } });
  }

  /** @param {any} event */
  #event(event) {
    const { stream, type, data, seq } = event;
    if (stream === "@me") this.#own(event);
    else {
      const known = this.#summaries.get(stream);
      if (!known) {
        this.#unknown.add(stream);
        this.#learnUnknown();
      } else if (seq > known.counted) this.#count(known, event);
      this.#open.get(stream)?.heard(event);
    }
    if (!event.local) {
      this.#fire(type, event);
      this.#fire("*", event);
    }
  }

  /** @param {any} known @param {any} event */
  #count(known, { stream, seq, type, data, at }) {
    const changes = { counted: seq, head: seq };
    switch (type) {
      case "message.created": {
        const mine = data.user === this.user;
        const counts = !mine && !data.silent && data.kind !== "system";
        const named = counts && (data.mention_all || data.mentions?.includes(this.user));
        Object.assign(changes, { last_message: data, last_message_at: at });
        if (mine) Object.assign(changes, { unread: 0, mentions: 0, membership: { ...known.membership, read: seq, marked_unread_from: undefined } });
        else if (counts) Object.assign(changes, { unread: known.unread + 1, mentions: known.mentions + (named ? 1 : 0) });
        if (known.hidden) Object.assign(changes, { hidden: false });
        break;
      }
      case "message.updated":
        if (known.last_message?.id === data.id) Object.assign(changes, { last_message: { ...known.last_message, ...data } });
        break;
      case "message.deleted":
        if (known.last_message?.id === data.id) {
          const { id, seq: place, user, created_at } = known.last_message;
          Object.assign(changes, { last_message: { id, seq: place, user, created_at, deleted_at: at } });
        }
        // Whether it counted as unread, the server knows.
        if (data.message_seq > (known.membership?.read ?? 0)) this.#unknown.add(stream);
        break;
      case "channel.updated":
        Object.assign(changes, data, { membership: known.membership, last_message: known.last_message, members: known.members });
        break;
      case "channel.deleted":
        this.#open.get(stream)?.gone("deleted");
        break;
      case "member.added":
        Object.assign(changes, { member_count: (known.member_count ?? 0) + 1, members: known.members && [...known.members.filter((/** @type {any} */ one) => one.user !== data.user), data].slice(0, 10) });
        break;
      case "member.removed":
        Object.assign(changes, { member_count: Math.max(0, (known.member_count ?? 1) - 1), members: known.members?.filter((/** @type {any} */ one) => one.user !== data.user) });
        break;
    }
    this.#put(stream, { ...known, ...changes });
    if (this.#unknown.size) this.#learnUnknown();
  }

  /** @param {any} event */
  #own({ type, data }) {
    if (type === "channel.joined") {
      this.#unknown.add(data.channel);
      this.#learnUnknown();
      this.#open.get(data.channel)?.back();
    } else if (type === "channel.left") {
      this.#summaries.delete(data.channel);
      this.link.keepChannel(data.channel, undefined);
      this.#open.get(data.channel)?.gone(data.reason);
      this.#list();
    } else if (type === "channel.settings") {
      const { channel, archived = false, hidden = false, muted_until } = data;
      this.#change(channel, { archived, hidden, muted_until });
    } else if (type === "profile.updated") this.setUser(data);
  }

  /** @param {any} signal */
  #signal(signal) {
    if (signal.type === "presence") this.#presence.get(signal.user)?.set({ status: signal.status, last_seen_at: signal.last_seen_at });
    else if (signal.type === "unread") this.counted(signal);
    else this.#open.get(signal.channel)?.signalled(signal);
    this.#fire(`signal:${signal.type}`, signal);
  }

  // ---------------------------------------------------------------- sending

  /** @param {string} channel @param {string} key @param {any} content */
  send(channel, key, content) {
    const sent = new Promise((resolve, reject) => {
      this.#sending.set(key, { resolve, reject, content });
      this.link.enqueue(channel, key, content).catch((/** @type {any} */ error) => {
        this.#sending.delete(key);
        reject(error);
        this.#fire("message.failed", { channel, key, error });
      });
    });
    // Whoever does not wait for it hears of it by `message.failed` and sees it in the channel.
    sent.catch(() => {});
    return { channel, key, sent };
  }

  /** @param {any} frame @param {number} [timeout_ms] @returns {Promise<any>} */
  command(frame, timeout_ms) {
    return this.link.command(frame, timeout_ms);
  }

  /**
   * Ask the REST API as the user.
   * @param {string} method
   * @param {string} path such as `/v1/channels`
   * @param {{query?: any, body?: any, headers?: any}} [what]
   * @returns {Promise<any>} the answer's JSON; rejected with TidingsError
   */
  async request(method, path, { query = {}, body, headers = {} } = {}) {
    const asked = new URLSearchParams();
    for (const [name, value] of Object.entries(query)) {
      if (value !== undefined) asked.append(name, [value].flat().join(","));
    }
    const { url, token, app } = this.#options;
    const bearer = typeof token === "function" ? await this.#freshToken(token) : token;
    /** @type {Response} */ let response;
    try {
      response = await this.#env.fetch(`${url}${path}${asked.size ? `?${asked}` : ""}`, {
        method,
        headers: {
          authorization: `Bearer ${bearer}`,
          ...(app ? { "tidings-app": app } : {}),
          ...(body === undefined ? {} : { "content-type": "application/json" }),
          ...headers,
        },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      throw new TidingsError("not_connected", String(error), { retry: "later" });
    }
    const text = await response.text();
    const answer = safely(() => (text ? JSON.parse(text) : undefined));
    if (response.ok) return answer;
    if (response.status === 401) this.#token = undefined;
    throw refusal(answer ?? {}, response.status);
  }

  /** @type {{text: string, until: number} | undefined} */ #token;

  /** A token for requests, asked for once in its life. @param {() => any} provider */
  async #freshToken(provider) {
    if (!this.#token || this.#token.until < Date.now() + 30_000) {
      const text = await provider();
      const claims = safely(() => JSON.parse(atob(text.split(".")[1].replace(/-/g, "+").replace(/_/g, "/"))));
      this.#token = { text, until: (claims?.exp ?? Infinity) * 1000 };
    }
    return this.#token.text;
  }

  /** @param {{id?: string, type?: string, name?: string, members?: string[], custom?: any}} channel */
  async createChannel(channel) {
    const made = await this.request("POST", "/v1/channels", { body: channel });
    this.#learn(made);
    return this.channel(made.id);
  }

  // ---------------------------------------------------------------- people

  /** A user's profile, fetched when somebody looks at it. @param {string} id @returns {Value<any>} */
  userOf(id) {
    let found = this.#users.get(id);
    if (!found) {
      this.#users.set(id, (found = new Value(/** @type {any} */ ({ id }))));
      this.#wantedUsers.add(id);
      queueMicrotask(() => void this.#fetchUsers());
    }
    return found;
  }

  /** @param {any} user what is known of a user already */
  setUser(user) {
    const found = this.#users.get(user.id);
    if (found) found.set(user);
    else this.#users.set(user.id, new Value(user));
    this.#wantedUsers.delete(user.id);
  }

  async #fetchUsers() {
    if (!this.#wantedUsers.size || !this.online) return;
    const ids = [...this.#wantedUsers].slice(0, USERS_AT_ONCE);
    for (const id of ids) this.#wantedUsers.delete(id);
    try {
      const page = await this.request("GET", "/v1/users", { query: { ids, limit: USERS_AT_ONCE } });
      for (const user of page.items) this.#users.get(user.id)?.set(user);
      if (this.#wantedUsers.size) void this.#fetchUsers();
    } catch {
      for (const id of ids) this.#wantedUsers.add(id);
    }
  }

  /** Whether a user is there, watched as long as somebody subscribes. @param {string} id @returns {Value<{status: string, last_seen_at?: string}>} */
  presence(id) {
    let found = this.#presence.get(id);
    if (!found) {
      this.#presence.set(id, (found = new Value({ status: "unknown" })));
      found.onUsed = (used) => {
        if (used) this.#watched.add(id);
        else this.#watched.delete(id);
        this.#watch();
      };
    }
    return found;
  }

  #watch() {
    if (this.#watching) return;
    this.#watching = true;
    setTimeout(async () => {
      this.#watching = false;
      if (!this.online || !this.#watched.size) return;
      try {
        const { users } = await this.command({ type: "presence.watch", users: [...this.#watched].slice(0, PRESENCE_MAX) });
        for (const { user, status, last_seen_at } of users) this.#presence.get(user)?.set({ status, last_seen_at });
      } catch {
        // With the next connection.
      }
    }, 50);
  }

  /** @param {"online" | "invisible"} status */
  setPresence(status) {
    this.#options.presence = status;
    return this.command({ type: "presence.set", status });
  }
}

/** @param {any} summary */
const activity = ({ last_message_at, created_at }) => last_message_at ?? created_at ?? "";

/**
 * @template T
 * @param {() => T} what
 * @returns {T | undefined}
 */
function safely(what) {
  try {
    return what();
  } catch {
    return undefined;
  }
}
