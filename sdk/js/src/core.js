import { Connection } from "./connection.js";
import { TidingsError } from "./errors.js";
import { CACHED, indexedStorage, isFull, memoryStorage, noChanges, removals, together } from "./storage.js";

const ME = "@me";
/** Streams in one `sync`. */
const SYNC_MAX = 1_000;
/** What has changed is stored together after this time, what is sent at once. */
const SAVE_MS = 250;
/** A full disk is tried again after this time, and with each message that is sent. */
const FULL_AGAIN_MS = 5_000;
const ACK_MS = 1_000;
const AGAIN_MS = 1_000;
const HISTORY = 50;
/** Messages that wait to be sent; more is a program gone wrong. */
export const OUTBOX_MAX = 1_000;

/**
 * The one who talks to the server for a user on this device: positions, what is missing, what waits to be sent, and what
 * of it is on disk. The rules are those of docs/protocol/catching-up.md. Tabs hear of everything through `emit`.
 */
export class Core {
  /** @type {Map<string, {seq: number, epoch?: string}>} */ positions = new Map();
  /** @type {Map<string, any>} by key, oldest first */ outbox = new Map();
  /** @type {Map<string, any>} */ channels = new Map();
  /** @type {Map<string, string>} */ drafts = new Map();
  /** @type {any} */ status = { state: "idle", since: 0, leader: true, storage: "memory" };
  /** @type {string | undefined} */ user;
  /** @type {string | undefined} */ device;

  #options;
  #env;
  #emit;
  /** @type {import("./storage.js").Storage} */ #storage = memoryStorage();
  #changes = noChanges();
  #dirty = false;
  /** The disk is full: what has changed since waits in `#changes`. */
  #full = false;
  /** @type {any} */ #saving;
  /** @type {Promise<void>} */ #saved = Promise.resolve();
  /** @type {string | undefined} */ #mark;
  #connection;
  /** Told where we stand, and live. */
  #ready = false;
  /** Streams that a `sync` is under way for, or that are being started over. @type {Set<string>} */ #gaps = new Set();
  /** Streams that wait until `@me` has caught up. @type {string[]} */ #later = [];
  /** @type {Map<string, number>} */ #acked = new Map();
  /** Channels with a message on its way. @type {Set<string>} */ #busy = new Set();
  #order = 0;
  /** @type {any} */ #ackTimer;

  /**
   * @param {any} options
   * @param {any} env
   * @param {(kind: string, data: any) => void} emit
   */
  constructor(options, env, emit) {
    this.#options = options;
    this.#env = env;
    this.#emit = emit;
    this.#connection = new Connection(
      options,
      {
        begin: () => ({
          device: { ...options.device, id: this.device },
          since: this.#mark,
          ...(options.presence ? { presence: options.presence } : {}),
        }),
        connected: (frame) => this.#connected(frame),
        frame: (frame) => this.#frame(frame),
        down: () => this.#down(),
        status: (status) => this.#tell(status),
      },
      env,
    );
  }

  // ---------------------------------------------------------------- life

  async open() {
    const { storage, database } = this.#options;
    try {
      if (typeof storage === "object") this.#storage = storage;
      else if (storage !== "memory" && this.#env.indexedDB) {
        this.#storage = await indexedStorage(this.#env.indexedDB, database);
      } else if (storage !== "memory") this.#diagnose("storage_missing", "There is no IndexedDB here: nothing outlives this page.");
      await this.#load();
    } catch (error) {
      this.#lost(error);
      await this.#load();
    }
  }

  async #load() {
    const stored = await this.#storage.load();
    this.positions = stored.positions;
    this.outbox = stored.outbox;
    this.channels = stored.channels;
    this.drafts = stored.drafts;
    this.#mark = stored.meta.mark;
    this.user = stored.meta.user;
    this.device = this.#options.device.id ?? stored.meta.device ?? this.#env.newId();
    if (stored.meta.device !== this.device) {
      // Positions belong to the device that has them.
      if (stored.meta.device !== undefined) this.#forget();
      this.#change("meta", "device", this.device);
    }
    for (const entry of this.outbox.values()) {
      if (entry.state === "sending") entry.state = "queued";
      this.#order = Math.max(this.#order, entry.order);
    }
    this.status = { ...this.status, storage: this.#storage.kind };
  }

  #forget() {
    this.positions.clear();
    this.#mark = undefined;
  }

  start() {
    this.#connection.start();
  }

  /** @param {boolean} cut */
  cut(cut) {
    this.#connection.cut(cut);
  }

  nudge() {
    this.#connection.nudge();
  }

  async stop() {
    this.#acknowledge();
    this.#connection.stop();
    await this.flush();
    this.#storage.close();
    this.#tell({ state: "stopped" });
  }

  /** Sign out: nothing of it stays on this device. */
  async clear() {
    this.#connection.stop();
    this.#tell({ state: "stopped" });
    await this.#saved.catch(() => {});
    this.#changes = noChanges();
    await this.#storage.clear();
    this.#storage = memoryStorage();
    this.#full = false;
  }

  /** @param {any} status */
  #tell(status) {
    this.status = {
      leader: true,
      ...status,
      storage: this.#kept,
      since: status.state === this.status.state ? this.status.since : this.#env.clock.now(),
    };
    this.#emit("status", this.status);
  }

  /** @param {string} code @param {string} detail */
  #diagnose(code, detail) {
    this.#emit("diagnostic", { code, detail });
  }

  // ---------------------------------------------------------------- storing

  /** @param {"meta"|"positions"|"outbox"|"channels"|"drafts"} store @param {string} key @param {any} value */
  #change(store, key, value) {
    this.#changes[store].set(key, value);
    this.#soon();
  }

  #soon() {
    this.#dirty = true;
    this.#saving ??= this.#env.clock.setTimeout(() => void this.flush(), this.#full ? FULL_AGAIN_MS : SAVE_MS);
  }

  /** Store what has changed; done when it is on disk. @returns {Promise<void>} never rejected */
  flush() {
    this.#env.clock.clearTimeout(this.#saving);
    this.#saving = undefined;
    if (this.#dirty) {
      const changes = this.#changes;
      this.#changes = noChanges();
      this.#dirty = false;
      // One after the other: what comes later is about what came before.
      this.#saved = this.#saved.then(() => this.#save(changes)).catch((error) => this.#lost(error));
    }
    return this.#saved;
  }

  /** @param {import("./storage.js").Changes} changes */
  async #save(changes) {
    try {
      await this.#storage.save(changes);
    } catch (error) {
      if (!isFull(error)) throw error;
      try {
        // The server has all that is cached: it makes room for what is nowhere else.
        await this.#storage.save(removals(changes));
        await this.#storage.save({ ...changes, messages: [] });
      } catch (again) {
        if (!isFull(again)) throw again;
        return this.#keepBack(changes);
      }
    }
    if (!this.#full) return;
    this.#full = false;
    this.#tell(this.status);
  }

  /** There is no room: it is kept here, and tried again. @param {import("./storage.js").Changes} changes */
  #keepBack(changes) {
    this.#changes = together(changes, this.#changes);
    if (!this.#full) {
      this.#full = true;
      this.#diagnose("storage_full", "The disk is full: until there is room, what happens does not outlive this page.");
      this.#tell(this.status);
    }
    this.#soon();
  }

  /** What what happens now is kept in. */
  get #kept() {
    return this.#full ? "full" : this.#storage.kind;
  }

  /** @param {unknown} error */
  #lost(error) {
    if (this.#storage.kind === "memory" && this.status.storage === "memory" && this.#dirty) return;
    const why = error instanceof Error ? error.message || error.name : String(error);
    this.#diagnose("storage_failed", `What happens from here on does not outlive this page: ${why}`);
    try {
      this.#storage.close();
    } catch {
      // It is gone already.
    }
    this.#storage = memoryStorage();
    this.#full = false;
    this.#tell(this.status);
  }

  /** What the channel list shows of a channel, kept for the next start. @param {string} id @param {any} summary */
  keepChannel(id, summary) {
    if (summary === undefined) this.channels.delete(id);
    else this.channels.set(id, summary);
    this.#change("channels", id, summary);
  }

  /** @param {string} channel @param {string} text */
  keepDraft(channel, text) {
    if (text) this.drafts.set(channel, text);
    else this.drafts.delete(channel);
    this.#change("drafts", channel, text || undefined);
  }

  /** The newest messages that are kept, ascending; none that a gap lies before. @param {string} channel */
  async cached(channel) {
    try {
      await this.flush();
      return await this.#storage.messages(channel, CACHED);
    } catch {
      return [];
    }
  }

  // ---------------------------------------------------------------- commands

  /** @param {any} frame @param {number} [timeout_ms] @returns {Promise<any>} */
  command(frame, timeout_ms) {
    return this.#connection.command(frame, timeout_ms);
  }

  /** @param {any} frame */
  post(frame) {
    this.#connection.post(frame);
  }

  // ---------------------------------------------------------------- finding out what is missing

  /** @param {any} frame */
  #connected(frame) {
    if (this.user !== undefined && this.user !== frame.user) {
      // What is here is somebody else's: they never see it, and it is never sent in another's name.
      this.#diagnose("user_changed", "Another user has signed in: what was kept of the other one is dropped here.");
      for (const key of this.outbox.keys()) this.#change("outbox", key, undefined);
      for (const id of this.channels.keys()) this.#change("channels", id, undefined);
      for (const channel of this.positions.keys()) this.#change("positions", channel, undefined);
      this.outbox.clear();
      this.channels.clear();
      this.#forget();
      this.#tellOutbox();
    }
    this.user = frame.user;
    this.#change("meta", "user", frame.user);
    this.#emit("user", { user: frame.user, limits: frame.limits });
    this.#gaps.clear();
    this.#later = [];
    this.#acked.clear();
    // The first connection broke before everything was known: it begins anew.
    if (this.#mark === undefined) this.positions.clear();
    void this.#learn(frame);
    this.#ackTimer = this.#env.clock.setTimeout(() => this.#ackLoop(), ACK_MS);
  }

  #down() {
    this.#ready = false;
    this.#env.clock.clearTimeout(this.#ackTimer);
    this.#busy.clear();
    for (const entry of this.outbox.values()) if (entry.state === "sending") entry.state = "queued";
    this.#tellOutbox();
  }

  /** @param {any} connected */
  async #learn(connected) {
    try {
      const fresh = this.#mark === undefined;
      /** @type {any[]} */ const moved = connected.moved ?? [];
      let cursor = connected.more;
      while (cursor) {
        const page = await this.command({ type: "heads", since: this.#mark, cursor });
        moved.push(...page.moved);
        cursor = page.more;
      }
      if (fresh) await this.#heads(moved);
      for (const { stream, head, epoch } of moved) if (!this.positions.has(stream)) this.#place(stream, head, epoch);
      this.#emit("heads", { heads: moved, fresh });
      const streams = moved.map(({ stream }) => stream);
      this.#later = streams.filter((stream) => stream !== ME);
      // The own stream first: it tells which channels were left and joined meanwhile.
      if (fresh || streams.includes(ME)) {
        if (!this.positions.has(ME)) this.#place(ME, 0, undefined);
        this.#sync([ME]);
      } else this.#syncLater();
      this.#mark = connected.mark;
      this.#change("meta", "mark", this.#mark);
      this.#ready = true;
      this.#caughtUp();
      this.#transmitAll();
    } catch (error) {
      // The line broke: the next connection begins again. Anything else is worth another try after a pause.
      if (this.#connection.open) {
        this.#env.clock.setTimeout(() => this.#connection.open && !this.#ready && void this.#learn(connected), AGAIN_MS);
      }
    }
  }

  /** All streams of the user. @param {any[]} into */
  async #heads(into) {
    let cursor;
    do {
      const page = await this.command({ type: "heads", cursor });
      into.push(...page.moved);
      cursor = page.more;
    } while (cursor);
  }

  #syncLater() {
    const some = this.#later.splice(0).filter((stream) => this.positions.has(stream));
    this.#sync(some);
  }

  /** @param {string[]} streams */
  #sync(streams) {
    for (const stream of streams) this.#gaps.add(stream);
    for (let at = 0; at < streams.length; at += SYNC_MAX) {
      const some = streams.slice(at, at + SYNC_MAX);
      this.post({ type: "sync", positions: Object.fromEntries(some.map((stream) => [stream, this.positions.get(stream)])) });
    }
  }

  #caughtUp() {
    if (this.#ready && !this.#gaps.size && !this.#later.length && this.status.state === "catching_up") {
      this.#tell({ state: "online", transport: this.status.transport });
    }
  }

  /** @param {string} stream @param {number} seq @param {string | undefined} epoch */
  #place(stream, seq, epoch) {
    const position = epoch === undefined ? { seq } : { seq, epoch };
    this.positions.set(stream, position);
    this.#change("positions", stream, { ...position });
  }

  /** @param {any} frame */
  #frame(frame) {
    if (frame.stream !== undefined && frame.seq !== undefined && frame.type !== "synced") return this.#event(frame);
    switch (frame.type) {
      case "pong":
        if (this.#mark !== undefined && this.#ready && frame.mark) {
          this.#mark = frame.mark;
          this.#change("meta", "mark", frame.mark);
        }
        return;
      case "syncing":
        for (const [stream, why] of Object.entries(frame.refused ?? {})) this.#refused(stream, why);
        return this.#caughtUp();
      case "synced": {
        const position = this.positions.get(frame.stream);
        if (position && position.epoch !== frame.epoch) this.#place(frame.stream, position.seq, frame.epoch);
        this.#gaps.delete(frame.stream);
        if (frame.stream === ME) this.#syncLater();
        return this.#caughtUp();
      }
      case "typing":
      case "presence":
      case "receipts":
      case "unread":
        return this.#emit("signal", frame);
      case "error":
        return this.#diagnose(frame.code, frame.detail);
    }
  }

  /** @param {any} frame */
  #event(frame) {
    const { stream, seq, type, data } = frame;
    // It is not known yet where we are: it comes again.
    if (this.#mark === undefined) return;
    const position = this.positions.get(stream);
    if (!position && this.#gaps.has(stream)) return;
    const at = position?.seq ?? seq - 1;
    if (seq <= at) return;
    if (seq > at + 1) {
      if (!this.#gaps.has(stream)) this.#sync([stream]);
      return;
    }
    this.#place(stream, seq, position?.epoch);
    if (stream === ME) {
      if (type === "channel.joined") {
        const known = this.positions.get(data.channel);
        // A position that is further came from the channel itself.
        if (!known || known.seq < data.head) this.#place(data.channel, data.head, data.epoch);
        this.#sync([data.channel]);
      } else if (type === "channel.left") this.#drop(data.channel);
    } else this.#remember(stream, frame);
    if (type === "message.created" && data.user === this.user && data.key) this.#arrived(data);
    this.#emit("event", frame);
  }

  /** Keep an event's effect on the newest messages. @param {string} channel @param {any} frame */
  #remember(channel, { type, seq, data }) {
    const messages = this.#changes.messages;
    if (type === "message.created") {
      messages.push({ channel, seq, message: data });
      // Now and then: what is older than what is kept.
      if (seq % 64 === 0) messages.push({ channel, seq: seq - 4 * CACHED, drop: true });
    } else {
      const place = type === "message.updated" ? data.seq : data.message_seq;
      if (place !== undefined) messages.push({ channel, seq: place, merge: (old) => applied(old, { type, data }) });
    }
    this.#soon();
  }

  /** The newest page of a channel, as the server told it. @param {string} channel @param {any[]} page */
  keepPage(channel, page) {
    for (const message of page) this.#changes.messages.push({ channel, seq: message.seq, message });
    if (page.length) this.#soon();
  }

  /** @param {string} stream */
  #drop(stream) {
    this.positions.delete(stream);
    this.#gaps.delete(stream);
    this.#change("positions", stream, undefined);
    this.#changes.messages.push({ channel: stream, seq: Number.MAX_SAFE_INTEGER, drop: true });
    this.keepChannel(stream, undefined);
  }

  /** @param {string} stream @param {any} why */
  #refused(stream, { code }) {
    const { clock } = this.#env;
    if (code === "unavailable" || code === "internal") {
      clock.setTimeout(() => this.#connection.open && this.positions.has(stream) && this.#sync([stream]), AGAIN_MS);
    } else if (code === "not_found") {
      this.#drop(stream);
      this.#emit("event", { type: "channel.left", stream: ME, data: { channel: stream, reason: "removed" }, local: true });
    } else void this.#startOver(stream, code);
  }

  /** What is here of a stream is not its history. @param {string} stream @param {string} why */
  async #startOver(stream, why) {
    this.positions.delete(stream);
    this.#gaps.add(stream);
    try {
      if (stream === ME) {
        /** @type {any[]} */ const moved = [];
        await this.#heads(moved);
        const own = moved.find((head) => head.stream === ME);
        this.#place(ME, own?.head ?? 0, own?.epoch);
        for (const { stream: id, head, epoch } of moved) if (!this.positions.has(id)) this.#place(id, head, epoch);
        this.#emit("heads", { heads: moved, fresh: true });
      } else {
        const page = await this.command({ type: "history", channel: stream, limit: HISTORY });
        this.#changes.messages.push({ channel: stream, seq: Number.MAX_SAFE_INTEGER, drop: true });
        this.#place(stream, page.head, page.epoch);
        this.keepPage(stream, page.messages);
        this.#emit("reset", { channel: stream, page, why });
      }
      this.#sync([stream]);
    } catch (error) {
      if (error instanceof TidingsError && error.code === "not_found") return this.#refused(stream, error);
      this.#env.clock.setTimeout(() => this.#connection.open && void this.#startOver(stream, why), AGAIN_MS);
    }
  }

  // ---------------------------------------------------------------- delivered

  #ackLoop() {
    this.#acknowledge();
    this.#ackTimer = this.#env.clock.setTimeout(() => this.#ackLoop(), ACK_MS);
  }

  #acknowledge() {
    if (!this.#ready) return;
    /** @type {Record<string, number>} */ const moved = {};
    let count = 0;
    for (const [stream, { seq }] of this.positions) {
      if (this.#acked.get(stream) === seq || this.#gaps.has(stream) || !seq) continue;
      moved[stream] = seq;
      this.#acked.set(stream, seq);
      if (++count === SYNC_MAX) break;
    }
    if (count) this.post({ type: "ack", positions: moved });
  }

  // ---------------------------------------------------------------- sending

  /**
   * Take a message: stored, then sent as soon as there is a connection, in order, once.
   * @param {string} channel
   * @param {string} key
   * @param {any} content
   */
  enqueue(channel, key, content) {
    if (this.outbox.size >= OUTBOX_MAX) {
      throw new TidingsError("outbox_full", `More than ${OUTBOX_MAX} messages wait to be sent.`, { bound: OUTBOX_MAX });
    }
    if (this.outbox.has(key)) return;
    const entry = { channel, key, content, state: "queued", created_at: this.#env.clock.now(), order: ++this.#order };
    this.#put(entry);
    // Not sent before it is on disk: a page that is closed in between would not know of it, and might send it again.
    this.flush().then(() => this.#transmitAll());
    this.#tellOutbox();
  }

  /** @param {any} entry */
  #put(entry) {
    this.outbox.set(entry.key, entry);
    this.#change("outbox", entry.key, { ...entry });
  }

  #tellOutbox() {
    this.#emit("outbox", [...this.outbox.values()]);
  }

  /** Try a failed message again, as the last of its channel. @param {string} key */
  retry(key) {
    const entry = this.outbox.get(key);
    if (entry?.state !== "failed") return;
    this.outbox.delete(key);
    this.#put({ ...entry, state: "queued", error: undefined, order: ++this.#order });
    this.flush().then(() => this.#transmitAll());
    this.#tellOutbox();
  }

  /** Give a message up that is not on its way. @param {string} key */
  discard(key) {
    if (this.outbox.get(key)?.state === "sending") return;
    this.#take(key);
  }

  /** @param {string} key */
  #take(key) {
    if (!this.outbox.delete(key)) return;
    this.#change("outbox", key, undefined);
    this.#tellOutbox();
  }

  #transmitAll() {
    if (!this.#ready) return;
    for (const entry of this.outbox.values()) {
      if (entry.state === "queued" && !this.#busy.has(entry.channel)) void this.#transmit(entry);
    }
  }

  /** @param {any} entry */
  async #transmit(entry) {
    // One at a time in each channel, so that one that has to wait is not overtaken.
    this.#busy.add(entry.channel);
    entry.state = "sending";
    this.#tellOutbox();
    try {
      const sent = await this.command({ type: "message.send", channel: entry.channel, key: entry.key, ...entry.content });
      this.#emit("sent", { channel: entry.channel, key: entry.key, id: sent.id, seq: sent.seq, at: sent.at, duplicate: !!sent.duplicate });
      this.#take(entry.key);
    } catch (error) {
      const refused = /** @type {TidingsError} */ (error);
      if (refused.code === "not_connected" || refused.code === "timeout" || refused.retry === "later") {
        entry.state = "queued";
        if (this.#ready) {
          // The channel waits with it.
          await new Promise((resolve) => this.#env.clock.setTimeout(resolve, refused.retry_after_ms ?? AGAIN_MS));
        }
      } else {
        const { code, detail, field, bound, retry } = refused;
        this.#put({ ...entry, state: "failed", error: { code, detail, field, bound, retry } });
        this.#emit("failed", { channel: entry.channel, key: entry.key, error: { code, detail, field, bound, retry } });
      }
      this.#tellOutbox();
    }
    this.#busy.delete(entry.channel);
    this.#transmitAll();
  }

  /** One of our own messages came back as an event: it is stored, whatever became of the reply. @param {any} message */
  #arrived({ key, channel, id, seq, created_at }) {
    const entry = this.outbox.get(key);
    if (!entry || entry.channel !== channel) return;
    this.#emit("sent", { channel, key, id, seq, at: created_at, duplicate: false });
    this.#take(key);
  }
}

/**
 * A message after an event about it. Reactions survive an edit, which comes without them.
 * @param {any} old
 * @param {{type: string, data: any}} event
 */
export function applied(old, { type, data }) {
  switch (type) {
    case "message.updated":
      if (data.content_omitted) return old;
      return { ...data, reactions: data.deleted_at ? undefined : old.reactions, reply_count: old.reply_count, last_reply_at: old.last_reply_at };
    case "message.deleted": {
      const { id, channel, seq, user, created_at, reply_to, reply_count, last_reply_at } = old;
      return { id, channel, seq, user, created_at, reply_to, reply_count, last_reply_at, deleted_at: data.at ?? new Date().toISOString() };
    }
    case "reaction.added":
    case "reaction.removed": {
      /** @type {any[]} */ const before = old.reactions ?? [];
      const found = before.find((one) => one.emoji === data.emoji);
      const others = (found?.users ?? []).filter((/** @type {string} */ user) => user !== data.user);
      const count = data.count ?? 0;
      const users = type === "reaction.added" ? [...others, data.user] : others;
      const now = { emoji: data.emoji, count, users };
      if (!count) return { ...old, reactions: before.filter((one) => one !== found) };
      return { ...old, reactions: found ? before.map((one) => (one === found ? now : one)) : [...before, now] };
    }
    default:
      return old;
  }
}
