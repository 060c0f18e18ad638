// What must hold between a message and the disk, between the reply and the echo, and between two attempts.
import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import { Client } from "../src/index.js";
import { memoryStorage } from "../src/storage.js";
import { FakeServer, socketClass, until } from "./server.js";

const opened = [];
afterEach(async () => {
  for (const client of opened.splice(0)) await client.stop();
});

function make(server, options = {}) {
  const client = new Client({
    url: "http://chat.test",
    token: "t",
    WebSocket: socketClass(server),
    fetch: async () => ({ ok: true, status: 200, text: async () => JSON.stringify({ items: [], next: null }) }),
    storage: "memory",
    shareTabs: false,
    random: () => 0,
    ...options,
  });
  opened.push(client);
  return client.start();
}

test("a message leaves when it is on the disk, not before", async () => {
  const server = new FakeServer();
  let write;
  const slow = {
    ...memoryStorage(),
    save: ({ outbox }) => (outbox.size ? new Promise((done) => (write = done)) : Promise.resolve()),
  };
  const client = make(server, { storage: slow });
  await client.connected({ timeout_ms: 2000 });
  client.channel("c1").send({ text: "one" });
  await until(() => write);
  // The server hears what is told now, and would have heard the message before it.
  await client.command({ type: "read", channel: "c1", seq: 0 });
  assert.equal(server.of("message.send").length, 0);
  write();
  await until(() => server.of("message.send").length === 1);
  // The next save is of the emptied outbox.
  await until(() => client.outbox.get().length === 0);
  const before = write;
  client.link.cached("c1");
  await until(() => write !== before);
  write();
});

test("a position reaches the disk together with what it stands for, and after it was told", async () => {
  const server = new FakeServer();
  const told = [];
  const saved = [];
  const storage = {
    ...memoryStorage(),
    save: async ({ positions, messages }) => {
      const seq = positions.get("c1")?.seq;
      if (seq) saved.push({ seq, with: messages.map((row) => row.seq), told: [...told] });
    },
  };
  const client = make(server, { storage });
  client.on("message.created", ({ seq }) => told.push(seq));
  await client.connected({ timeout_ms: 2000 });
  server.say(server.message("one"));
  server.say(server.message("two"));
  await until(() => saved.length > 0);
  assert.deepEqual(saved[0], { seq: 2, with: [1, 2], told: [1, 2] });
});

test("a message that is put off is not overtaken by those behind it", async () => {
  const server = new FakeServer();
  const client = make(server);
  await client.connected({ timeout_ms: 2000 });
  server.instead["message.send"] = (frame, answer) => {
    delete server.instead["message.send"];
    answer({ type: "error", code: "rate_limited", detail: "Too fast.", retry: "later", retry_after_ms: 5 });
  };
  const sent = ["a", "b", "c"].map((text) => client.channel("c1").send({ text }).sent);
  assert.deepEqual((await Promise.all(sent)).map(({ seq }) => seq), [1, 2, 3]);
});

test("pauses between attempts are a random part of a growing bound", async () => {
  const server = new FakeServer();
  server.up = false;
  const timers = [];
  const clock = { now: () => 0, setTimeout: (fn, ms) => timers.push({ fn, ms }), clearTimeout: () => {} };
  const client = make(server, { clock, random: () => 0.25, transport: "websocket" });
  const waits = [];
  client.status.subscribe(({ state, retry_at }) => state === "offline" && waits.push(retry_at));
  for (let turn = 1; turn <= 9; turn += 1) {
    await until(() => waits.length === turn);
    timers.findLast(({ ms }) => ms === waits.at(-1)).fn();
  }
  assert.deepEqual(waits, [125, 250, 500, 1000, 2000, 4000, 7500, 7500, 7500]);
});

test("one's own message that comes with the history, not as an event, stands there once", async () => {
  const server = new FakeServer();
  const client = make(server);
  await client.connected({ timeout_ms: 2000 });
  const channel = client.channel("c1");
  channel.open();
  await until(() => channel.state.get().ready);
  server.instead["message.send"] = (frame, answer) => {
    const { data, seq, at } = server.message(frame.text, { user: "alice", key: frame.key });
    answer({ type: "message.sent", channel: "c1", id: data.id, seq, at });
  };
  await channel.send({ text: "once" }).sent;
  await until(() => channel.messages.get().length === 1);
  await channel.refresh();
  assert.deepEqual(channel.messages.get().map(({ text }) => text), ["once"]);
});

test("a message that was there already is told as such, and is not another one", async () => {
  const server = new FakeServer();
  const client = make(server);
  await client.connected({ timeout_ms: 2000 });
  const channel = client.channel("c1");
  channel.open();
  server.keys.set("k", server.message("again", { user: "alice", key: "k" }));
  const told = [];
  server.instead["message.send"] = (frame, answer) => {
    const { data, seq, at } = server.keys.get(frame.key);
    answer({ type: "message.sent", channel: "c1", id: data.id, seq, at, duplicate: true });
  };
  client.on("message.sent", ({ duplicate }) => told.push(duplicate));
  const { duplicate, seq } = await channel.send({ text: "again", key: "k" }).sent;
  assert.deepEqual([duplicate, seq, told], [true, 1, [true]]);
  await channel.refresh();
  assert.deepEqual(channel.messages.get().map(({ text }) => text), ["again"]);
});

test("one's own message is not unread, wherever it was sent, and what was unread before it is read", async () => {
  const server = new FakeServer();
  const summary = { id: "c1", type: "group", head: 0, created_at: "2026-01-01T00:00:00Z", membership: { read: 0, unread: 0 } };
  const page = JSON.stringify({ items: [summary], next: null });
  const client = make(server, { fetch: async () => ({ ok: true, status: 200, text: async () => page }) });
  await client.connected({ timeout_ms: 2000 });
  await until(() => client.channels.get().length === 1);
  server.say(server.message("from bob"));
  await until(() => client.unread.get().total === 1);
  server.say(server.message("from another device of mine", { user: "alice" }));
  await until(() => client.channels.get()[0].last_message?.user === "alice");
  assert.equal(client.unread.get().total, 0);
});

test("a socket that gets through takes the place of HTTP", async () => {
  const server = new FakeServer();
  server.up = false;
  const timers = [];
  const clock = {
    now: () => Date.now(),
    setTimeout: (fn, ms) => (timers.push({ fn, ms }), setTimeout(fn, Math.min(ms, 2 ** 31 - 1))),
    clearTimeout: (id) => clearTimeout(id),
  };
  const connected = { type: "connected", session: "s", user: "alice", mark: "1", heartbeat_seconds: 25, limits: {}, moved: [] };
  let asked = 0;
  const fetch = async (at, { body, signal } = {}) => {
    const answer = (what) => ({ ok: true, status: 200, json: async () => what, text: async () => JSON.stringify(what) });
    if (at.includes("/poll")) return new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("aborted"))));
    if (at.endsWith("/realtime")) return answer({ session: "s", frames: [{ ...connected, ref: JSON.parse(body).ref }] });
    if (at.includes("/commands")) asked += 1;
    return answer({ items: [], next: null });
  };
  const client = make(server, { fetch, clock });
  await until(() => client.status.get().transport === "http");
  const later = () => timers.filter(({ ms }) => ms === 300_000);
  assert.equal(later().length, 1);
  // Still shut: it stays as it is, and is tried again.
  later()[0].fn();
  await until(() => later().length === 2);
  assert.equal(client.status.get().transport, "http");
  server.up = true;
  later()[1].fn();
  await until(() => client.status.get().transport === "websocket" && client.status.get().state === "online");
});
