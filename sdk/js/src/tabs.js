import { Core } from "./core.js";
import { TidingsError } from "./errors.js";

/** Calls that may be made again to another leader, since they change nothing the second time. */
const REPEATABLE = new Set(["enqueue", "keepDraft", "keepChannel", "keepPage", "discard", "retry"]);

/**
 * All tabs of a user share one connection. The tab that holds a Web Lock has it (the leader); the others speak to it over a
 * BroadcastChannel and hear what it hears. When its tab is closed the lock goes to another one, which finds positions and
 * outbox in IndexedDB and goes on: an event may fall in between, so every tab then reads the newest page of what it shows.
 */
export class Tabs {
  /** @type {Core | null} */ #core = null;
  #env;
  #options;
  #emit;
  /** @type {any} */ #bus = null;
  #id;
  /** @type {string | null} */ #leader = null;
  /** @type {Map<number, {resolve: any, reject: any, message: any}>} */ #calls = new Map();
  #number = 0;
  /** @type {(() => void) | undefined} */ #giveUp;
  #stopped = false;
  #abort = new AbortController();
  /** @type {Map<string, string>} */ drafts = new Map();
  /** @type {Promise<void>} */ #held = Promise.resolve();

  /** @param {any} options @param {any} env @param {(kind: string, data: any) => void} emit */
  constructor(options, env, emit) {
    this.#options = options;
    this.#env = env;
    this.#emit = emit;
    this.#id = env.newId();
  }

  get leader() {
    return this.#core !== null;
  }

  async start() {
    const { locks, BroadcastChannel } = this.#env;
    if (!this.#options.shareTabs || !locks || !BroadcastChannel) return this.#lead();
    const name = this.#options.database;
    const bus = (this.#bus = new BroadcastChannel(name));
    bus.onmessage = (/** @type {any} */ { data }) => this.#message(data);
    await new Promise((/** @type {any} */ resolve) => {
      let first = true;
      this.#held = locks
        .request(name, { ifAvailable: true }, async (/** @type {any} */ lock) => {
          if (lock && !this.#stopped) await this.#holding(resolve);
          else first = false;
        })
        .then(() => {
          if (first || this.#stopped) return;
          bus.postMessage({ type: "who", from: this.#id });
          resolve();
          return locks.request(name, { signal: this.#abort.signal }, () => (this.#stopped ? undefined : this.#holding(() => {})));
        })
        .catch((/** @type {unknown} */ error) => {
          if (!this.#stopped) this.#emit("diagnostic", { code: "tabs_failed", detail: String(error) });
        });
    });
  }

  /** @param {() => void} ready */
  async #holding(ready) {
    await this.#lead();
    ready();
    await new Promise((/** @type {any} */ resolve) => (this.#giveUp = resolve));
  }

  async #lead() {
    const core = new Core(this.#options, this.#env, (kind, data) => {
      this.#emit(kind, data);
      this.#bus?.postMessage({ type: "emit", kind, data });
    });
    await core.open();
    if (this.#stopped) return;
    this.#core = core;
    this.drafts = core.drafts;
    this.#emit("snapshot", this.#snapshot());
    this.#bus?.postMessage({ type: "leader", from: this.#id, snapshot: this.#snapshot() });
    for (const [number, call] of this.#calls) this.#repeat(number, call);
    core.start();
  }

  #snapshot() {
    const core = /** @type {Core} */ (this.#core);
    const { user, device, status, channels, drafts } = core;
    return { user, device, status, outbox: [...core.outbox.values()], channels, drafts };
  }

  /** @param {any} message */
  #message(message) {
    if (this.#stopped) return;
    switch (message.type) {
      case "who":
        if (this.#core) this.#bus.postMessage({ type: "leader", from: this.#id, to: message.from, snapshot: this.#snapshot() });
        return;
      case "leader":
        if (this.#core || (message.to && message.to !== this.#id)) return;
        this.#leader = message.from;
        this.drafts = message.snapshot.drafts;
        this.#emit("snapshot", { ...message.snapshot, status: { ...message.snapshot.status, leader: false } });
        for (const [number, call] of this.#calls) this.#repeat(number, call);
        return;
      case "emit":
        if (!this.#core) this.#emit(message.kind, message.kind === "status" ? { ...message.data, leader: false } : message.data);
        return;
      case "call":
        if (this.#core && (!message.to || message.to === this.#id)) void this.#answer(message);
        return;
      case "result": {
        if (message.to !== this.#id) return;
        const call = this.#calls.get(message.number);
        this.#calls.delete(message.number);
        if (message.error) call?.reject(new TidingsError(message.error.code, message.error.detail, message.error));
        else call?.resolve(message.value);
      }
    }
  }

  /** @param {any} message */
  async #answer({ from, number, method, args }) {
    const core = /** @type {any} */ (this.#core);
    /** @type {any} */ const result = { type: "result", to: from, number };
    try {
      result.value = await core[method](...args);
    } catch (error) {
      const { code = "internal", detail = String(error), field, bound, retry, retry_after_ms } = /** @type {any} */ (error);
      result.error = { code, detail, field, bound, retry, retry_after_ms };
    }
    this.#bus.postMessage(result);
  }

  /** The leader has changed. @param {number} number @param {any} call */
  #repeat(number, call) {
    const { method, args } = call.message;
    const again = REPEATABLE.has(method) || call.fresh;
    if (!again) {
      this.#calls.delete(number);
      return call.reject(new TidingsError("not_connected", "The tab that was connected is gone.", { retry: "later" }));
    }
    if (this.#core) {
      this.#calls.delete(number);
      call.resolve(/** @type {any} */ (this.#core)[method](...args));
    } else {
      call.fresh = false;
      this.#bus.postMessage({ ...call.message, to: this.#leader });
    }
  }

  /** @param {string} method @param {...any} args @returns {Promise<any>} */
  async #call(method, ...args) {
    if (this.#core) return /** @type {any} */ (this.#core)[method](...args);
    if (this.#stopped) throw new TidingsError("closed", "The client was stopped.");
    const number = ++this.#number;
    const message = { type: "call", from: this.#id, to: this.#leader, number, method, args };
    return new Promise((resolve, reject) => {
      // Nobody leads yet: made when somebody does.
      const fresh = this.#leader === null;
      this.#calls.set(number, /** @type {any} */ ({ resolve, reject, message, fresh }));
      if (!fresh) this.#bus.postMessage(message);
    });
  }

  /** @param {any} frame @param {number} [timeout_ms] */
  command(frame, timeout_ms) {
    return this.#call("command", frame, timeout_ms);
  }

  /** @param {any} frame */
  post(frame) {
    this.#quietly("post", frame);
  }

  /** @param {string} channel @param {string} key @param {any} content */
  enqueue(channel, key, content) {
    return this.#call("enqueue", channel, key, content);
  }

  /** @param {string} key */
  retry(key) {
    this.#quietly("retry", key);
  }

  /** @param {string} key */
  discard(key) {
    this.#quietly("discard", key);
  }

  /** @param {string} channel @param {string} text */
  keepDraft(channel, text) {
    this.#quietly("keepDraft", channel, text);
  }

  /** @param {string} id @param {any} summary */
  keepChannel(id, summary) {
    // The leader hears the same events: once is enough.
    if (this.#core) this.#core.keepChannel(id, summary);
  }

  /** @param {string} channel @param {any[]} page */
  keepPage(channel, page) {
    this.#quietly("keepPage", channel, page);
  }

  /** @param {string} channel @returns {Promise<any[]>} */
  async cached(channel) {
    return this.#call("cached", channel).catch(() => []);
  }

  /** @param {boolean} cut */
  cut(cut) {
    this.#quietly("cut", cut);
  }

  nudge() {
    this.#core?.nudge();
  }

  /** @param {string} method @param {...any} args */
  #quietly(method, ...args) {
    this.#call(method, ...args).catch(() => {});
  }

  async stop() {
    this.#stopped = true;
    await this.#core?.stop();
    this.#end();
    await this.#held;
  }

  async clear() {
    if (!this.#core) {
      // What is stored belongs to the leader, and to all tabs: it is asked to go, and they with it.
      await this.#call("clear").catch(() => {});
    } else await this.#core.clear();
    this.#stopped = true;
    this.#end();
    await this.#held;
  }

  #end() {
    this.#core = null;
    this.#abort.abort();
    this.#giveUp?.();
    this.#bus?.close();
    for (const { reject } of this.#calls.values()) reject(new TidingsError("closed", "The client was stopped."));
    this.#calls.clear();
  }
}
