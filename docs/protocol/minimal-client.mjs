// A complete client that uses nothing but what the protocol pages say. Node 22 (or 20 with --experimental-websocket).
//
//   node minimal-client.mjs ws://127.0.0.1:8080/v1/ws TOKEN CHANNEL state.json
//
// Every line on stdin is sent to the channel; every message of the channel is printed once, in order, as a JSON line,
// whatever happens to the server or the network, and over restarts of this program. Its state is one file, written
// after printing: killed in between, it prints a message again. Where what you show is on disk too, save both at once.
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";

const [url, token, channel, stateFile] = process.argv.slice(2);

// ------------------------------------------------------------------ what is kept: positions, mark, unanswered messages
let state = { device: crypto.randomUUID(), mark: undefined, pos: {}, outbox: [] };
try {
  state = JSON.parse(readFileSync(stateFile, "utf8"));
} catch {} // The first start.
const save = () => {
  writeFileSync(`${stateFile}.new`, JSON.stringify(state));
  renameSync(`${stateFile}.new`, stateFile);
};

// ------------------------------------------------------------------ one connection
let socket, open, moved, later, waiting, gaps, heard, tries = 0, refs = 0;
const timers = [];

const send = (frame) => {
  if (socket.readyState === 1) socket.send(JSON.stringify({ ref: ++refs, ...frame }));
  return refs;
};

function connect() {
  open = false;
  moved = [];
  later = [];
  // The first connection broke before everything was known: it begins anew.
  if (state.mark === undefined) state.pos = {};
  waiting = new Map(); // ref -> what to do with the reply
  gaps = new Set(); // streams that a sync is under way for
  heard = Date.now();
  const mine = (socket = new WebSocket(url));
  socket.onopen = () => send({ type: "connect", token, device: { id: state.device }, since: state.mark });
  socket.onmessage = ({ data }) => {
    heard = Date.now();
    handle(JSON.parse(data));
  };
  // Some versions of Node tell of a failed attempt by `error` alone, others by both.
  socket.onerror = socket.onclose = ({ code }) => {
    if (socket === mine) ended(code);
  };
}

function ended(code) {
  socket = { readyState: 3 };
  open = false;
  timers.splice(0).forEach(clearInterval);
  if (code >= 4500 && code <= 4999) {
    console.error(`the server said ${code}: giving up`);
    process.exit(1);
  }
  const most = Math.min(30_000, 500 * 2 ** tries++);
  setTimeout(connect, Math.random() * most); // full jitter
}

// ------------------------------------------------------------------ frames
function handle(frame) {
  if (frame.ref !== undefined && waiting.has(frame.ref)) {
    const answer = waiting.get(frame.ref);
    waiting.delete(frame.ref);
    return answer(frame);
  }
  switch (frame.type) {
    case "connected":
      timers.push(setInterval(beat, frame.heartbeat_seconds * 900, frame.heartbeat_seconds));
      timers.push(setInterval(acknowledge, 1000));
      return learn(frame, frame.mark);
    case "pong":
      if (state.mark !== undefined) state.mark = frame.mark;
      return save();
    case "syncing":
      for (const [stream, refusal] of Object.entries(frame.refused ?? {})) refused(stream, refusal);
      return;
    case "synced":
      gaps.delete(frame.stream);
      if (state.pos[frame.stream]) state.pos[frame.stream].epoch = frame.epoch;
      if (frame.stream === "@me") syncAll(later.splice(0));
      return save();
    case "error":
      return console.error(`${frame.code}: ${frame.detail}`);
  }
  if (frame.stream !== undefined && frame.seq !== undefined) event(frame);
}

// Streams that moved since the mark, page by page, are held until they are named in `sync`; then we are live.
function learn(page, mark) {
  moved.push(...(page.moved ?? []));
  if (page.more) {
    waiting.set(send({ type: "heads", since: state.mark, cursor: page.more }), (next) => learn(next, mark));
    return;
  }
  if (state.mark === undefined) return list(mark);
  begin(moved);
  const streams = moved.map((head) => head.stream);
  later = streams.filter((stream) => stream !== "@me");
  // The own stream first: it tells which channels were left and joined meanwhile.
  if (streams.includes("@me")) sync(["@me"]);
  else syncAll(later.splice(0));
  ready(mark);
}

// A fresh device: all there is, and from there on what changes.
function list(mark, cursor, all = []) {
  waiting.set(send({ type: "heads", cursor }), (page) => {
    if (page.type === "error") return socket.close();
    all.push(...page.moved);
    if (page.more) return list(mark, page.more, all);
    // From the places in the list on, so that nothing falls between; of the channel that is shown, all there is.
    begin(all.filter(({ stream }) => stream !== channel));
    later = all.map(({ stream }) => stream).filter((stream) => stream !== "@me" && stream !== channel);
    sync(["@me"]);
    startOver(channel);
    ready(mark);
  });
}

function ready(mark) {
  state.mark = mark;
  open = true;
  tries = 0;
  save();
  state.outbox.forEach(transmit);
}

function begin(heads) {
  for (const { stream, head, epoch } of heads) state.pos[stream] ??= { seq: head, epoch };
}

function syncAll(streams) {
  for (let start = 0; start < streams.length; start += 1000)
    sync(streams.slice(start, start + 1000).filter((stream) => state.pos[stream]));
}

function sync(streams) {
  streams.forEach((stream) => gaps.add(stream));
  send({ type: "sync", positions: Object.fromEntries(streams.map((stream) => [stream, state.pos[stream]])) });
}

function event(frame) {
  // It is not known yet where we are: it comes again.
  if (state.mark === undefined || (!state.pos[frame.stream] && gaps.has(frame.stream))) return;
  const pos = (state.pos[frame.stream] ??= { seq: frame.seq - 1 });
  if (frame.seq <= pos.seq) return; // We have it.
  if (frame.seq > pos.seq + 1) return gaps.has(frame.stream) || sync([frame.stream]);
  pos.seq = frame.seq;
  if (frame.type === "channel.joined") {
    const { channel: joined, head, epoch } = frame.data;
    // A position that is further came from the channel itself.
    if (!(state.pos[joined]?.seq >= head)) state.pos[joined] = { seq: head, epoch };
    sync([joined]);
  }
  if (frame.type === "channel.left") delete state.pos[frame.data.channel];
  if (frame.type === "message.created" && frame.stream === channel) show(frame.data);
  save();
}

function refused(stream, { code }) {
  if (code === "unavailable" || code === "internal") return void setTimeout(() => open && sync([stream]), 1000);
  delete state.pos[stream];
  if (code !== "not_found") startOver(stream);
}

function startOver(stream) {
  if (stream === "@me") return void heads();
  gaps.add(stream);
  waiting.set(send({ type: "history", channel: stream, limit: 200 }), (page) => {
    if (page.type === "error") return console.error(`${page.code}: ${page.detail}`);
    if (stream === channel) page.messages.filter(({ seq }) => seq > (state.pos[stream]?.seq ?? 0)).forEach(show);
    if (page.head >= (state.pos[stream]?.seq ?? 0)) state.pos[stream] = { seq: page.head, epoch: page.epoch };
    save();
    sync([stream]);
  });
}

function heads(cursor) {
  waiting.set(send({ type: "heads", cursor }), (page) => {
    for (const { stream, head, epoch } of page.moved ?? []) state.pos[stream] ??= { seq: head, epoch };
    if (page.more) return heads(page.more);
    sync(["@me"]);
  });
}

function show(message) {
  const { seq, user, text } = message;
  process.stdout.write(`${JSON.stringify({ seq, user, text })}\n`);
}

// ------------------------------------------------------------------ sending
function transmit(message) {
  const ref = send({ type: "message.send", ...message });
  waiting.set(ref, (reply) => {
    if (reply.type === "error" && reply.retry === "later") {
      setTimeout(() => open && transmit(message), reply.retry_after_ms ?? 1000);
      return;
    }
    if (reply.type === "error") console.error(`not sent: ${reply.code}: ${reply.detail}`);
    state.outbox = state.outbox.filter(({ key }) => key !== message.key);
    save();
  });
}

createInterface({ input: process.stdin }).on("line", (text) => {
  const message = { channel, key: crypto.randomUUID(), text };
  state.outbox.push(message);
  save();
  if (open) transmit(message);
});

// ------------------------------------------------------------------ time
let acknowledged = {};
function beat(heartbeat) {
  if (Date.now() - heard > 2000 * heartbeat) return socket.close(), ended();
  send({ type: "ping" });
}
function acknowledge() {
  const entries = Object.entries(state.pos).filter(([stream, { seq }]) => !gaps.has(stream) && acknowledged[stream] !== seq);
  if (!entries.length) return;
  const positions = Object.fromEntries(entries.slice(0, 1000).map(([stream, { seq }]) => [stream, seq]));
  acknowledged = { ...acknowledged, ...positions };
  if (socket.readyState === 1) socket.send(JSON.stringify({ type: "ack", positions }));
}

connect();
