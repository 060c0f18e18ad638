import { applied } from "./core.js";
import { Value } from "./readable.js";

/** So many replies are read at once, and so many times before somebody has to ask for more. */
const PAGE = 100;
const PAGES = 10;

/** The replies to one message. `channel.thread(id)` makes it. */
export class Thread {
  #client;
  #channel;
  #opened = 0;
  /** The message and its replies by seq, each with the head up to which its events are in it. @type {Map<number, {message: any, head: number}>} */ #found = new Map();
  /** Everything up to here has been looked through. */ #through = 0;
  #busy = false;
  /** @type {(() => void)[]} */ #ends = [];

  /** @param {any} client @param {any} channel @param {string} id */
  constructor(client, channel, id) {
    this.#client = client;
    this.#channel = channel;
    this.id = id;
    /** @type {Value<any>} */
    this.root = new Value(/** @type {any} */ (undefined));
    /** @type {Value<any[]>} */
    this.messages = new Value(/** @type {any[]} */ ([]));
    /** @type {Value<any>} */
    this.state = new Value({ ready: false, loading: false, has_before: false, has_after: false, frozen: false, left: false });
  }

  /** Somebody looks at it from now on: replies are looked for, and kept up to date, until `close`. Calls are counted. */
  open() {
    if (this.#opened++) return;
    const channel = this.#channel;
    channel.open();
    channel.threads.add(this);
    this.#ends = [
      channel.messages.subscribe(() => this.#show()),
      channel.state.subscribe((/** @type {any} */ { left, frozen }) => this.#set({ left, frozen })),
      this.#client.status.subscribe((/** @type {any} */ { state }) => state === "online" && void this.#load()),
    ];
  }

  close() {
    if (!this.#opened || --this.#opened) return;
    this.#channel.threads.delete(this);
    this.#channel.close();
    for (const end of this.#ends.splice(0)) end();
    // What happens meanwhile is not heard.
    this.reset();
  }

  /** What was read is not to be relied on any more. */
  reset() {
    this.#found.clear();
    this.#through = 0;
    if (this.#opened) void this.#load();
  }

  /** More replies, where there are very many. */
  loadAfter() {
    return this.#load();
  }

  /** Send a reply; as `channel.send`. @param {any} message */
  send(message) {
    return this.#channel.send({ ...message, reply_to: this.id });
  }

  async #load() {
    if (this.#busy || !this.#client.online || (this.#through && !this.state.get().has_after)) return;
    this.#busy = true;
    this.#set({ loading: true, error: undefined });
    const address = `/v1/channels/${encodeURIComponent(this.#channel.id)}/messages/${encodeURIComponent(this.id)}`;
    try {
      if (!this.#through) {
        const root = await this.#client.request("GET", address);
        this.#keep(root, 0);
        this.#through = root.seq;
      }
      for (let page = 0; page < PAGES && this.#opened; page += 1) {
        const after = this.#through;
        /** @type {any} */ const { messages, head, has_after } = await this.#client.request("GET", `${address}/replies`, { query: { after, limit: PAGE } });
        if (after !== this.#through) return;
        for (const message of messages) this.#keep(message, head);
        this.#through = messages.at(-1)?.seq ?? after;
        this.#set({ has_after: has_after && messages.length > 0 });
        if (!this.state.get().has_after) break;
      }
      this.#set({ ready: true });
    } catch (error) {
      this.#set({ error: /** @type {any} */ (error).code === "not_connected" ? undefined : error });
    } finally {
      this.#busy = false;
      this.#set({ loading: false });
      this.#show();
      // Read anew from the start if that was asked for meanwhile.
      if (!this.#through && this.#opened && !this.state.get().error) void this.#load();
    }
  }

  /** @param {any} message @param {number} head */
  #keep(message, head) {
    if (!this.#found.has(message.seq)) this.#found.set(message.seq, { message, head });
  }

  /** @param {any} event of the channel's stream */
  heard({ type, seq, at, data }) {
    if (type === "message.created") {
      if (data.reply_to !== this.id) return;
      this.#keep(data, seq);
    } else {
      const found = this.#found.get(type === "message.updated" ? data.seq : data.message_seq);
      if (!found || seq <= found.head) return;
      found.message = applied(found.message, { type, data: { ...data, at } });
    }
    this.#show();
  }

  /** @param {any} changes */
  #set(changes) {
    this.state.set({ ...this.state.get(), ...changes });
  }

  #show() {
    /** @type {Map<number, any>} */ const shown = new Map();
    for (const [seq, { message }] of this.#found) shown.set(seq, this.#channel.viewOf(message));
    /** @type {any[]} */ const unsent = [];
    for (const message of this.#channel.messages.get()) {
      if (message.id === this.id || message.reply_to === this.id) {
        if (message.seq === null) unsent.push(message);
        else if (!shown.has(message.seq)) shown.set(message.seq, message);
      }
    }
    const all = [...shown.values()].sort((one, other) => one.seq - other.seq);
    this.root.set(all.find(({ id }) => id === this.id) ?? this.root.get());
    this.messages.set([...all.filter(({ id }) => id !== this.id), ...unsent]);
  }
}
