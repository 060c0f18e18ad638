import { refusal, TidingsError } from "./errors.js";
import { BROKEN, longPoll, webSocket } from "./transport.js";

/** The n-th pause is a random part of min(30 s, 0.5 s * 2^n): full jitter. */
const PAUSE_MS = 500;
const PAUSE_MS_MAX = 30_000;
/** How long an answer may take, and a connection to come about. */
const COMMAND_MS = 15_000;
const CONNECT_MS = 15_000;
/** After so many sockets that never opened, HTTP is tried; and a socket again every so often, or when the network changes. */
const SOCKETS_TRIED = 2;
const SOCKET_AGAIN_MS = 300_000;
/** A token is renewed so long before it ends, or after nine tenths of its life if that is shorter. */
const RENEW_MS = 60_000;
/** A page that comes back into view hears from the server within this time, or connects anew. */
const PROBE_MS = 5_000;

/**
 * @typedef {object} Hooks
 * @property {() => any} begin what `connect` says beyond token and app
 * @property {(connected: any) => void} connected
 * @property {(frame: any) => void} frame what answers no command
 * @property {() => void} down
 * @property {(status: {state: string, error?: TidingsError, retry_at?: number, transport?: "websocket"|"http"}) => void} status
 */

/** Keeps one session alive for as long as it is wanted: dials, authenticates, beats, comes back. */
export class Connection {
  #options;
  #hooks;
  #env;
  /** @type {import("./transport.js").Transport | null} */ #transport = null;
  /** @type {Map<number, {resolve: (frame: any) => void, reject: (error: TidingsError) => void, timer: any}>} */
  #waiting = new Map();
  #refs = 0;
  #tries = 0;
  #deadSockets = 0;
  #overHttpSince = 0;
  #wanted = false;
  #cut = false;
  #dialling = 0;
  #heard = 0;
  #heartbeat = 25_000;
  #token = "";
  /** @type {any} */ #retry;
  /** @type {any} */ #beat;
  /** @type {any} */ #renewal;
  /** @type {any} */ #again;
  /** A socket that is opened to see whether it gets through. @type {import("./transport.js").Transport | null} */ #probe = null;
  /** @type {number | undefined} */ #comeBackMs;
  /** @type {TidingsError | undefined} */ #lastError;
  open = false;

  /**
   * @param {any} options of the client
   * @param {Hooks} hooks
   * @param {{clock: {now(): number, setTimeout: any, clearTimeout: any}, random: () => number, WebSocket: any, fetch: typeof fetch}} env
   */
  constructor(options, hooks, env) {
    this.#options = options;
    this.#hooks = hooks;
    this.#env = env;
  }

  start() {
    if (this.#wanted) return;
    this.#wanted = true;
    if (!this.#cut) void this.#dial();
  }

  stop() {
    this.#wanted = false;
    this.#hangUp();
  }

  /** As if the network was gone, or back. @param {boolean} cut */
  cut(cut) {
    if (cut === this.#cut) return;
    this.#cut = cut;
    if (cut) {
      this.#hangUp();
      this.#hooks.status({ state: "offline" });
    } else if (this.#wanted) {
      this.#tries = 0;
      void this.#dial();
    }
  }

  /** The network may be back, or the page is looked at again: no reason to wait any longer. */
  nudge() {
    if (!this.#wanted || this.#cut) return;
    if (this.open) {
      const transport = this.#transport;
      this.#lookForSocket();
      this.#beatNow();
      const asked = this.#env.clock.now();
      this.#env.clock.setTimeout(() => {
        if (this.#transport === transport && this.open && this.#heard < asked) this.#ended(BROKEN);
      }, PROBE_MS);
    } else if (this.#retry !== undefined) {
      this.#tries = 0;
      void this.#dial();
    }
  }

  /**
   * Send a command and wait for its reply.
   * @param {any} command
   * @param {number} [timeout_ms]
   * @returns {Promise<any>} rejected with TidingsError: a refusal, `not_connected` when the line breaks, `timeout`
   */
  command(command, timeout_ms = COMMAND_MS) {
    return new Promise((resolve, reject) => {
      if (!this.open) return reject(notConnected());
      this.#ask(command, resolve, reject, timeout_ms);
    });
  }

  /** Send a command that nobody waits for. @param {any} command */
  post(command) {
    if (this.open) this.#transport?.send([command]);
  }

  /** @param {any} command @param {(frame: any) => void} resolve @param {(error: TidingsError) => void} reject @param {number} ms */
  #ask(command, resolve, reject, ms) {
    const ref = ++this.#refs;
    const timer = this.#env.clock.setTimeout(() => {
      this.#waiting.delete(ref);
      reject(new TidingsError("timeout", "The server has not answered in time.", { retry: "later" }));
    }, ms);
    this.#waiting.set(ref, { resolve, reject, timer });
    this.#transport?.send([{ ...command, ref }]);
  }

  async #dial() {
    const { clock } = this.#env;
    clock.clearTimeout(this.#retry);
    this.#retry = undefined;
    const turn = ++this.#dialling;
    const current = () => turn === this.#dialling && this.#wanted && !this.#cut;
    this.#hooks.status({ state: "connecting", error: this.#lastError });
    const give = clock.setTimeout(() => current() && !this.open && this.#ended(BROKEN), CONNECT_MS);
    try {
      const token = await this.#fetchToken();
      if (!current()) return clock.clearTimeout(give);
      this.#token = token;
    } catch (error) {
      clock.clearTimeout(give);
      if (!current()) return;
      const detail = `The token provider failed: ${error instanceof Error ? error.message : error}`;
      this.#lastError = new TidingsError("token_provider_failed", detail, { retry: "later" });
      return this.#ended(BROKEN);
    }
    const kind = this.#kind();
    let opened = false;
    const heard = {
      opened: () => {
        if (!current()) return;
        opened = true;
        if (kind === "websocket") this.#deadSockets = this.#overHttpSince = 0;
        this.#heard = clock.now();
        this.#ask(
          { type: "connect", token: this.#token, app: this.#options.app, client: "tidings-js/0.1.0", ...this.#hooks.begin() },
          (connected) => {
            clock.clearTimeout(give);
            if (current()) this.#connected(connected, kind);
          },
          (error) => {
            this.#lastError = error;
          },
          CONNECT_MS,
        );
      },
      frame: (/** @type {any} */ frame) => current() && this.#frame(frame),
      closed: (/** @type {number} */ code, /** @type {TidingsError=} */ error) => {
        clock.clearTimeout(give);
        if (!current()) return;
        if (!opened && kind === "websocket") this.#deadSockets += 1;
        if (error) this.#lastError = error;
        this.#ended(code);
      },
    };
    try {
      this.#transport =
        kind === "websocket"
          ? webSocket(this.#env.WebSocket, this.#options.url, heard)
          : longPoll(this.#env.fetch, this.#options.url, () => this.#token, heard);
    } catch (error) {
      this.#lastError = new TidingsError("not_connected", String(error), { retry: "later" });
      this.#ended(BROKEN);
    }
  }

  /** @returns {"websocket" | "http"} */
  #kind() {
    const { transport } = this.#options;
    if (transport === "http" || !this.#env.WebSocket) return "http";
    if (transport === "websocket") return "websocket";
    const now = this.#env.clock.now();
    if (this.#deadSockets >= SOCKETS_TRIED) {
      this.#overHttpSince ||= now;
      if (now - this.#overHttpSince < SOCKET_AGAIN_MS) return "http";
      this.#overHttpSince = now;
      this.#deadSockets = SOCKETS_TRIED - 1;
    }
    return "websocket";
  }

  async #fetchToken() {
    const { token } = this.#options;
    return typeof token === "function" ? await token() : token;
  }

  /** @param {any} connected @param {"websocket" | "http"} kind */
  #connected(connected, kind) {
    this.open = true;
    this.#tries = 0;
    this.#comeBackMs = undefined;
    this.#lastError = undefined;
    this.#heartbeat = connected.heartbeat_seconds * 1000;
    this.#later();
    this.#renewAt(connected.expires_at);
    this.#lookAgain();
    this.#hooks.status({ state: "catching_up", transport: kind });
    this.#hooks.connected(connected);
  }

  #lookAgain() {
    this.#env.clock.clearTimeout(this.#again);
    if (this.#transport?.name === "http") this.#again = this.#env.clock.setTimeout(() => this.#lookForSocket(), SOCKET_AGAIN_MS);
  }

  /** While HTTP is what there is: whether a socket gets through by now. Then it is the connection. */
  #lookForSocket() {
    const { WebSocket } = this.#env;
    if (this.#transport?.name !== "http" || this.#options.transport === "http" || !WebSocket || this.#probe) return;
    const probe = (this.#probe = webSocket(WebSocket, this.#options.url, {
      opened: () => {
        this.#deadSockets = this.#overHttpSince = 0;
        this.#hangUp();
        void this.#dial();
      },
      frame: () => {},
      closed: () => {
        if (this.#probe !== probe) return;
        this.#probe = null;
        this.#lookAgain();
      },
    }));
  }

  #later() {
    const { clock, random } = this.#env;
    clock.clearTimeout(this.#beat);
    this.#beat = clock.setTimeout(() => {
      if (clock.now() - this.#heard > 2 * this.#heartbeat) return this.#ended(BROKEN);
      this.#beatNow();
      this.#later();
    }, this.#heartbeat * (0.8 + 0.2 * random()));
  }

  #beatNow() {
    this.#transport?.send([{ type: "ping" }]);
  }

  /** @param {string | undefined} expires_at */
  #renewAt(expires_at) {
    const { clock } = this.#env;
    clock.clearTimeout(this.#renewal);
    if (!expires_at || typeof this.#options.token !== "function") return;
    const left = Date.parse(expires_at) - clock.now();
    const wait = Math.max(left - RENEW_MS, left * 0.9, 1000);
    // Browsers count to 2^31 ms.
    this.#renewal = clock.setTimeout(() => void this.#renew(), Math.min(wait, 2 ** 31 - 1));
  }

  async #renew() {
    try {
      const token = await this.#fetchToken();
      const { expires_at } = await this.command({ type: "authenticate", token });
      this.#token = token;
      this.#renewAt(expires_at);
    } catch {
      // The old one goes on to count; at its end the server closes, and the next connection asks again.
      this.#renewal = this.#env.clock.setTimeout(() => this.open && void this.#renew(), 10_000);
    }
  }

  /** @param {any} frame */
  #frame(frame) {
    this.#heard = this.#env.clock.now();
    const asked = frame.ref === undefined ? undefined : this.#waiting.get(frame.ref);
    if (asked) {
      this.#waiting.delete(frame.ref);
      this.#env.clock.clearTimeout(asked.timer);
      return frame.type === "error" ? asked.reject(refusal(frame)) : asked.resolve(frame);
    }
    if (frame.type === "going_away") this.#comeBackMs = frame.reconnect_in_ms;
    else if (frame.type === "error") this.#lastError = refusal(frame);
    this.#hooks.frame(frame);
  }

  /** @param {number} code */
  #ended(code) {
    const { clock, random } = this.#env;
    const error = this.#lastError;
    this.#hangUp();
    if (code >= 4500 && code <= 4999) {
      this.#wanted = false;
      const why = error ?? new TidingsError(code === 4505 ? "superseded" : "closed", `The server closed with ${code}.`);
      return this.#hooks.status({ state: "refused", error: why });
    }
    if (!this.#wanted || this.#cut) return;
    const most = Math.min(PAUSE_MS_MAX, PAUSE_MS * 2 ** this.#tries++);
    const asked = error?.retry_after_ms ?? 0;
    const wait = this.#comeBackMs ?? Math.max(asked, random() * most);
    this.#comeBackMs = undefined;
    this.#hooks.status({ state: "offline", retry_at: clock.now() + wait, error });
    this.#retry = clock.setTimeout(() => void this.#dial(), wait);
  }

  #hangUp() {
    const { clock } = this.#env;
    this.#dialling += 1;
    for (const timer of [this.#retry, this.#beat, this.#renewal, this.#again]) clock.clearTimeout(timer);
    this.#retry = undefined;
    const transport = this.#transport;
    const probe = this.#probe;
    const was = this.open;
    this.#transport = null;
    this.#probe = null;
    probe?.close();
    this.open = false;
    transport?.close();
    for (const { reject, timer } of this.#waiting.values()) {
      clock.clearTimeout(timer);
      reject(notConnected());
    }
    this.#waiting.clear();
    if (was) this.#hooks.down();
  }
}

const notConnected = () => new TidingsError("not_connected", "There is no connection.", { retry: "later" });
