// The server's side of the protocol for tests, in one process and without a network: frames in, frames out.

/** A class like `WebSocket` whose other end is `server`. @param {FakeServer} server */
export function socketClass(server) {
  return class {
    readyState = 0;
    constructor(url) {
      this.url = url;
      queueMicrotask(() => {
        if (!server.up) return this.end(1006);
        this.readyState = 1;
        server.socket = this;
        server.dials += 1;
        this.onopen?.();
      });
    }
    send(text) {
      queueMicrotask(() => this.readyState === 1 && server.hear(JSON.parse(text), this));
    }
    close() {
      this.end(1000);
    }
    end(code) {
      if (this.readyState === 3) return;
      this.readyState = 3;
      queueMicrotask(() => this.onclose?.({ code }));
    }
    tell(frame) {
      if (this.readyState === 1) this.onmessage?.({ data: JSON.stringify(frame) });
    }
  };
}

/** Streams with events, one user, messages stored by key. */
export class FakeServer {
  up = true;
  dials = 0;
  mark = 1;
  heard = [];
  streams = new Map([["@me", { epoch: "m", events: [] }], ["c1", { epoch: "e", events: [] }]]);
  keys = new Map();
  /** What to do instead of answering, by type of command. */
  instead = {};
  socket = null;

  append(stream, type, data) {
    const { events } = this.streams.get(stream);
    const seq = events.length + 1;
    const event = { type, stream, seq, at: new Date().toISOString(), by: data.user, data: type === "message.created" ? { seq, ...data } : data };
    events.push(event);
    return event;
  }

  message(text, { user = "bob", key = `${user}-${this.streams.get("c1").events.length}` } = {}) {
    return this.append("c1", "message.created", { id: `m${this.streams.get("c1").events.length + 1}`, channel: "c1", user, key, created_at: new Date().toISOString(), text });
  }

  say(frame) {
    this.socket?.tell(frame);
  }

  cut(code = 1006) {
    this.socket?.end(code);
    this.socket = null;
  }

  of(type) {
    return this.heard.filter((frame) => frame.type === type);
  }

  heads() {
    return [...this.streams].map(([stream, { epoch, events }]) => ({ stream, epoch, head: events.length }));
  }

  hear(frame, socket) {
    this.heard.push(frame);
    const answer = (reply) => socket.tell({ ref: frame.ref, ...reply });
    if (this.instead[frame.type]) return this.instead[frame.type](frame, answer, socket);
    switch (frame.type) {
      case "connect":
        return answer({ type: "connected", session: "s", user: "alice", mark: String(this.mark), heartbeat_seconds: 25, limits: { text_length: 20000 }, ...(frame.since ? { moved: this.heads() } : {}) });
      case "heads":
        return answer({ type: "heads", mark: String(this.mark), moved: this.heads() });
      case "sync": {
        const refused = {};
        for (const [stream, { seq, epoch }] of Object.entries(frame.positions)) {
          const found = this.streams.get(stream);
          if (!found) refused[stream] = { code: "not_found" };
          else if (epoch && epoch !== found.epoch) refused[stream] = { code: "epoch_changed" };
          else {
            for (const event of found.events.slice(seq)) socket.tell(event);
            socket.tell({ type: "synced", stream, epoch: found.epoch, seq: found.events.length });
          }
        }
        if (Object.keys(refused).length) socket.tell({ type: "syncing", refused });
        return;
      }
      case "history": {
        const { events, epoch } = this.streams.get(frame.channel);
        const messages = events.filter(({ type }) => type === "message.created").map(({ data }) => data);
        return answer({ type: "history", channel: frame.channel, messages: messages.slice(-frame.limit), epoch, head: events.length, has_before: messages.length > frame.limit, has_after: false });
      }
      case "message.send": {
        const known = this.keys.get(frame.key);
        const event = known ?? this.message(frame.text, { user: "alice", key: frame.key });
        this.keys.set(frame.key, event);
        answer({ type: "message.sent", channel: frame.channel, id: event.data.id, seq: event.seq, at: event.at, ...(known ? { duplicate: true } : {}) });
        if (!known) socket.tell(event);
        return;
      }
      case "ping":
        return socket.tell({ type: "pong", mark: String(++this.mark) });
      case "read":
        return answer({ type: "read", channel: frame.channel, read: frame.seq, unread: 0, mentions: 0 });
      default:
        if (frame.ref) answer({ type: "done" });
    }
  }
}

/** Until `condition()` is true. */
export async function until(condition, what = "it") {
  const end = Date.now() + 5000;
  while (!condition()) {
    if (Date.now() > end) throw new Error(`${what} has not come about`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}
