import { refusal, TidingsError } from "./errors.js";

/**
 * One connection to the server, by WebSocket or by HTTP. Frames are objects.
 * @typedef {{name: "websocket"|"http", send(frames: any[]): void, close(): void}} Transport
 * @typedef {{opened(): void, frame(frame: any): void, closed(code: number, error?: TidingsError): void}} Heard
 */

/** What an SDK-made close counts as: a broken line. */
export const BROKEN = 1006;
const POLL_SECONDS = 25;

/**
 * @param {any} WebSocketClass
 * @param {string} url http(s) origin
 * @param {Heard} heard
 * @returns {Transport}
 */
export function webSocket(WebSocketClass, url, heard) {
  const socket = new WebSocketClass(`${url.replace(/^http/, "ws")}/v1/ws`);
  let ended = false;
  const end = (/** @type {number} */ code) => {
    if (ended) return;
    ended = true;
    heard.closed(code);
  };
  socket.onopen = () => ended || heard.opened();
  socket.onmessage = (/** @type {{data: string}} */ { data }) => ended || heard.frame(JSON.parse(data));
  // Some tell of a failed attempt by `error` alone, others by both.
  socket.onerror = () => socket.readyState === 1 || end(BROKEN);
  socket.onclose = (/** @type {{code: number}} */ { code }) => end(code);
  return {
    name: "websocket",
    send(frames) {
      if (socket.readyState === 1) for (const frame of frames) socket.send(JSON.stringify(frame));
    },
    close() {
      end(BROKEN);
      socket.close();
    },
  };
}

/**
 * Long polling, for networks that let nothing else through (docs/protocol/http.md).
 * @param {typeof fetch} fetch
 * @param {string} url
 * @param {() => string} token of the session, as it is now
 * @param {Heard} heard
 * @returns {Transport}
 */
export function longPoll(fetch, url, token, heard) {
  const abort = new AbortController();
  /** @type {any[]} */ const waiting = [];
  let session = "";
  let sending = false;
  let ended = false;

  const end = (/** @type {number} */ code, /** @type {TidingsError=} */ error) => {
    if (ended) return;
    ended = true;
    abort.abort();
    heard.closed(code, error);
  };
  const ask = async (/** @type {string} */ path, /** @type {any} */ body) => {
    const response = await fetch(`${url}/v1/realtime${path}`, {
      method: body === undefined ? "GET" : "POST",
      headers: { authorization: `Bearer ${token()}`, ...(body === undefined ? {} : { "content-type": "application/json" }) },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: abort.signal,
    });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw refusal(answer, response.status);
    return answer;
  };
  const failed = (/** @type {unknown} */ error) => {
    if (!(error instanceof TidingsError)) return end(BROKEN);
    // The catalogue says by its close codes whether to come back; by HTTP it is the status that does.
    const { status = 500, code } = error;
    const back = code === "session_unknown" || status >= 500 || status === 429 || status === 408 || code.startsWith("token_");
    end(back ? 4000 : 4500, error);
  };
  const listen = async () => {
    let after = 0;
    while (!ended) {
      const { frames, next } = await ask(`/${session}/poll?after=${after}&wait=${POLL_SECONDS}`, undefined);
      for (const { n, frame } of frames) if (n > after && !ended) heard.frame(frame);
      after = next;
    }
  };
  const flush = async () => {
    if (sending || !session) return;
    sending = true;
    try {
      while (waiting.length && !ended) {
        const some = waiting.splice(0, 100);
        await ask(`/${session}/commands`, some);
      }
    } catch (error) {
      failed(error);
    }
    sending = false;
  };
  queueMicrotask(() => ended || heard.opened());
  return {
    name: "http",
    send(frames) {
      for (const frame of frames) {
        if (frame.type === "connect") {
          const { token: _, ...connect } = frame;
          ask("", connect)
            .then((opened) => {
              session = opened.session;
              for (const first of opened.frames) ended || heard.frame(first);
              void flush();
              return listen();
            })
            .catch(failed);
        } else waiting.push(frame);
      }
      void flush();
    },
    close: () => end(BROKEN),
  };
}
