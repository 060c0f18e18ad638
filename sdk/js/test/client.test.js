import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import { indexedDB as factory, IDBKeyRange } from "fake-indexeddb";
import { Client, TidingsError } from "../src/index.js";
import { applied } from "../src/core.js";
import { BYTES_MAX, size } from "../size.js";
import { FakeServer, socketClass, until } from "./server.js";

globalThis.IDBKeyRange = IDBKeyRange;
const opened = [];
afterEach(async () => {
  for (const client of opened.splice(0)) await client.stop();
});

const nothing = { ok: true, status: 200, text: async () => JSON.stringify({ items: [], next: null }) };

/** A client of `server` that comes back at once. */
function make(server, options = {}) {
  const client = new Client({
    url: "http://chat.test",
    token: "t",
    WebSocket: socketClass(server),
    fetch: async () => nothing,
    storage: "memory",
    shareTabs: false,
    random: () => 0,
    ...options,
  });
  opened.push(client);
  return client;
}

const texts = (channel) => channel.messages.get().map(({ text }) => text);

test("messages that were missed come once, in order, and then those that follow", async () => {
  const server = new FakeServer();
  const client = make(server).start();
  await client.connected({ timeout_ms: 2000 });
  const seen = [];
  client.on("message.created", ({ data }) => seen.push(data.text));
  const channel = client.channel("c1");
  channel.open();
  await until(() => channel.state.get().ready);
  server.say(server.message("one"));
  await until(() => seen.length === 1);
  server.cut();
  for (const text of ["two", "three"]) server.message(text);
  await until(() => seen.length === 3);
  server.say(server.message("four"));
  await until(() => seen.length === 4);
  assert.deepEqual(seen, ["one", "two", "three", "four"]);
  await until(() => texts(channel).length === 4);
  assert.deepEqual(texts(channel), seen);
});

test("an event that is told twice is applied once, and a gap is asked for once", async () => {
  const server = new FakeServer();
  const client = make(server).start();
  await client.connected({ timeout_ms: 2000 });
  const seen = [];
  client.on("message.created", ({ seq }) => seen.push(seq));
  const [one, , three] = [server.message("1"), server.message("2"), server.message("3")];
  server.say(one);
  server.say(one);
  await until(() => seen.length === 1);
  const before = server.of("sync").length;
  server.say(three);
  server.say(three);
  await until(() => seen.length === 3);
  assert.deepEqual(seen, [1, 2, 3]);
  assert.equal(server.of("sync").length, before + 1);
});

test("a message whose answer was lost is sent again with its key, and stands there once", async () => {
  const server = new FakeServer();
  const client = make(server).start();
  await client.connected({ timeout_ms: 2000 });
  const channel = client.channel("c1");
  channel.open();
  let lost = false;
  server.instead["message.send"] = (frame) => {
    // Stored, and the line breaks before anybody hears of it.
    delete server.instead["message.send"];
    server.keys.set(frame.key, server.message(frame.text, { user: "alice", key: frame.key }));
    lost = true;
    server.cut();
  };
  const first = channel.send({ text: "first" });
  const second = channel.send({ text: "second" });
  assert.deepEqual(channel.messages.get().map(({ state }) => state), ["queued", "queued"]);
  const sent = await first.sent;
  assert.ok(lost);
  assert.equal(sent.seq, 1);
  assert.equal((await second.sent).seq, 2);
  await until(() => texts(channel).length === 2);
  assert.deepEqual(texts(channel), ["first", "second"]);
  assert.equal(client.outbox.get().length, 0);
});

test("one that has to wait is not overtaken, and one that is refused says why and can be tried again", async () => {
  const server = new FakeServer();
  const client = make(server).start();
  await client.connected({ timeout_ms: 2000 });
  const channel = client.channel("c1");
  channel.open();
  let tries = 0;
  server.instead["message.send"] = (frame, answer) => {
    tries += 1;
    if (tries > 2) delete server.instead["message.send"];
    answer({ type: "error", code: "rate_limited", detail: "Too fast.", retry: "later", retry_after_ms: 5 });
  };
  const all = ["a", "b", "c"].map((text) => channel.send({ text }));
  await Promise.all(all.map(({ sent }) => sent));
  assert.deepEqual(texts(channel), ["a", "b", "c"]);
  server.instead["message.send"] = (frame, answer) => answer({ type: "error", code: "forbidden", detail: "You may not.", retry: "never" });
  const refused = channel.send({ text: "d" });
  await assert.rejects(refused.sent, (error) => error instanceof TidingsError && error.code === "forbidden");
  const shown = channel.messages.get().at(-1);
  assert.equal(shown.state, "failed");
  assert.equal(shown.error.detail, "You may not.");
  delete server.instead["message.send"];
  channel.retry(refused.key);
  await until(() => channel.messages.get().at(-1).state === "sent");
  assert.deepEqual(texts(channel), ["a", "b", "c", "d"]);
});

test("what waits outlives the page, and is sent once by the next one", async () => {
  const server = new FakeServer();
  server.up = false;
  const stored = { storage: "auto", indexedDB: factory, name: "reload" };
  const before = make(server, stored).start();
  before.channel("c1").send({ text: "written without a connection", key: "k1" });
  before.channel("c1").setDraft("half a sent");
  await until(() => before.outbox.get().length === 1);
  await before.stop();
  server.up = true;
  const after = make(server, stored);
  const channel = after.channel("c1");
  channel.open();
  after.start();
  await after.connected({ timeout_ms: 2000 });
  await until(() => server.keys.has("k1"));
  await until(() => after.outbox.get().length === 0);
  assert.equal(server.of("message.send").length, 1);
  assert.equal(channel.draft.get(), "half a sent");
  assert.equal(after.status.get().storage, "indexeddb");
  const { id } = server.of("connect")[0].device;
  await after.stop();
  // The same device, from where it stood: its mark and positions were kept.
  const third = make(server, stored).start();
  await third.connected({ timeout_ms: 2000 });
  assert.equal(server.of("connect").at(-1).device.id, id);
  assert.ok(server.of("connect").at(-1).since);
  assert.equal(server.of("sync").at(-1).positions.c1?.seq ?? 1, 1);
});

test("what another user has left on this page is never sent in one's name", async () => {
  const server = new FakeServer();
  const stored = { storage: "auto", indexedDB: factory, name: "shared" };
  const first = make(server, stored).start();
  await first.connected({ timeout_ms: 2000 });
  first.goOffline();
  first.channel("c1").send({ text: "alice's" });
  await until(() => first.outbox.get().length === 1);
  await first.stop();
  server.instead.connect = (frame, answer) => answer({ type: "connected", session: "s", user: "mallory", mark: "1", heartbeat_seconds: 25, moved: [] });
  const second = make(server, stored).start();
  await second.connected({ timeout_ms: 2000 });
  await until(() => second.outbox.get().length === 0);
  assert.equal(server.of("message.send").length, 0);
});

test("a store that breaks costs nothing but what outlives the page", async () => {
  const server = new FakeServer();
  const broken = { open: () => { throw new DOMException("denied", "SecurityError"); } };
  const client = make(server, { storage: "auto", indexedDB: broken });
  const told = [];
  client.on("diagnostic", ({ code }) => told.push(code));
  client.start();
  await client.connected({ timeout_ms: 2000 });
  assert.deepEqual(told, ["storage_failed"]);
  assert.equal(client.status.get().storage, "memory");
  assert.equal((await client.channel("c1").send({ text: "all the same" }).sent).seq, 1);
});

/** A factory whose disk takes nothing in while `full.is`, as browsers say it: the transaction is aborted. */
function fillable(full) {
  return {
    KeyRange: IDBKeyRange,
    deleteDatabase: (name) => factory.deleteDatabase(name),
    open(...how) {
      const opening = factory.open(...how);
      opening.addEventListener("success", () => {
        const db = opening.result;
        const begin = db.transaction.bind(db);
        db.transaction = (...what) => {
          const tx = begin(...what);
          const objectStore = tx.objectStore.bind(tx);
          tx.objectStore = (name) => {
            const store = objectStore(name);
            const put = store.put.bind(store);
            store.put = (...row) => {
              if (!full.is || full.takes?.(name)) return put(...row);
              full.refused = (full.refused ?? 0) + 1;
              const request = put(...row);
              queueMicrotask(() => {
                try {
                  tx.abort();
                } catch {
                  // By an earlier row already.
                }
              });
              Object.defineProperty(tx, "error", { get: () => new DOMException("full", "QuotaExceededError") });
              store.put = put;
              return request;
            };
            return store;
          };
          return tx;
        };
      });
      return opening;
    },
  };
}

test("a full disk stops nothing, and what was held back is stored when there is room", async () => {
  const server = new FakeServer();
  const full = { is: false };
  const stored = { storage: "auto", indexedDB: fillable(full), name: "full" };
  const client = make(server, stored).start();
  const told = [];
  client.on("diagnostic", ({ code }) => told.push(code));
  await client.connected({ timeout_ms: 2000 });
  const channel = client.channel("c1");
  await channel.send({ text: "before" }).sent;
  full.is = true;
  assert.equal((await channel.send({ text: "while it is full" }).sent).seq, 2);
  await until(() => client.status.get().storage === "full");
  assert.deepEqual(told, ["storage_full"]);
  // Not on the disk, and not sent either: it is all there when there is room again.
  client.goOffline();
  await client.link.cached("c1");
  const { refused } = full;
  channel.send({ text: "waits", key: "waits" });
  // It stores what there is first.
  await client.link.cached("c1");
  assert.ok(full.refused > refused);
  full.is = false;
  channel.setDraft("half");
  channel.send({ text: "makes it try again", key: "again" });
  await until(() => client.status.get().storage === "indexeddb");
  await client.stop();
  assert.deepEqual(told, ["storage_full"]);
  const after = make(server, stored).start();
  await after.connected({ timeout_ms: 2000 });
  await until(() => server.keys.has("again") && after.outbox.get().length === 0);
  assert.ok(server.keys.has("waits"));
  assert.equal(after.channel("c1").draft.get(), "half");
  assert.equal(server.of("message.send").length, 4);
});

test("cached messages make room for what waits to be sent", async () => {
  const server = new FakeServer();
  const full = { is: false };
  const stored = { storage: "auto", indexedDB: fillable(full), name: "room" };
  const client = make(server, stored).start();
  await client.connected({ timeout_ms: 2000 });
  await client.channel("c1").send({ text: "cached" }).sent;
  server.say(server.message("and another"));
  await until(() => client.channel("c1").summary.get() !== undefined);
  await client.link.cached("c1");
  full.takes = (name) => name !== "messages";
  full.is = true;
  server.say(server.message("a third"));
  await until(() => full.refused > 0);
  assert.deepEqual(await client.link.cached("c1"), []);
  assert.equal(client.status.get().storage, "indexeddb");
});

test("who asks for older messages while some are on their way waits for them, and gets all by asking again", async () => {
  const server = new FakeServer();
  const all = [1, 2, 3, 4, 5].map((number) => server.message(String(number)).data);
  const client = make(server).start();
  await client.connected({ timeout_ms: 2000 });
  const asked = [];
  server.instead.history = (frame, answer) => {
    asked.push(frame.before);
    const older = all.filter(({ seq }) => seq < (frame.before ?? Infinity));
    const page = { messages: older.slice(-2), has_before: older.length > 2, has_after: false, head: 5 };
    setTimeout(() => answer({ type: "history", channel: "c1", epoch: server.streams.get("c1").epoch, ...page }), 5);
  };
  const channel = client.channel("c1");
  channel.open();
  await until(() => channel.state.get().ready);
  const page = channel.loadBefore();
  while (channel.state.get().has_before) await channel.loadBefore();
  await page;
  assert.deepEqual(texts(channel), ["1", "2", "3", "4", "5"]);
  assert.equal(new Set(asked).size, asked.length);
});

test("a history that was replaced is read anew", async () => {
  const server = new FakeServer();
  const client = make(server).start();
  await client.connected({ timeout_ms: 2000 });
  const channel = client.channel("c1");
  channel.open();
  server.say(server.message("lost in the restore"));
  await until(() => texts(channel).length === 1);
  const resets = [];
  client.on("history.reset", (reset) => resets.push(reset.why));
  server.streams.set("c1", { epoch: "e2", events: [] });
  server.message("what there is");
  server.cut();
  await until(() => resets.length === 1);
  await until(() => texts(channel)[0] === "what there is");
  assert.deepEqual(resets, ["epoch_changed"]);
  server.say(server.message("and what follows"));
  await until(() => texts(channel).length === 2);
});

test("closed for good is final, and says why; anything else comes back with a fresh token", async () => {
  const server = new FakeServer();
  let tokens = 0;
  const client = make(server, { token: async () => `t${++tokens}` }).start();
  await client.connected({ timeout_ms: 2000 });
  server.cut(4401);
  await until(() => server.of("connect").length === 2);
  const [one, two] = server.of("connect").map(({ token }) => token);
  assert.notEqual(one, two);
  await client.connected({ timeout_ms: 2000 });
  server.cut(4505);
  await until(() => client.status.get().state === "refused");
  assert.equal(client.status.get().error.code, "superseded");
  await new Promise((resolve) => setTimeout(resolve, 30));
  assert.equal(server.of("connect").length, 2);
});

test("where sockets do not get through, HTTP is tried, and says the same", async () => {
  const server = new FakeServer();
  class Blocked {
    constructor() {
      queueMicrotask(() => this.onclose?.({ code: 1006 }));
    }
    close() {}
  }
  const frames = [];
  let wake = () => {};
  const socket = { tell: (frame) => (frames.push(frame), wake()) };
  const json = (body, status = 200) => ({ ok: status < 300, status, json: async () => body, text: async () => JSON.stringify(body) });
  const fetch = async (url, { body, signal } = {}) => {
    const { pathname, searchParams } = new URL(url);
    if (pathname === "/v1/realtime") {
      server.hear(JSON.parse(body), socket);
      return json({ session: "s1", frames: frames.splice(0) });
    }
    if (pathname.endsWith("/commands")) {
      for (const frame of JSON.parse(body)) server.hear(frame, socket);
      return json({}, 202);
    }
    if (pathname.endsWith("/poll")) {
      if (!frames.length) await new Promise((resolve, reject) => ((wake = resolve), signal.addEventListener("abort", reject)));
      const after = Number(searchParams.get("after"));
      const some = frames.splice(0);
      return json({ frames: some.map((frame, place) => ({ n: after + place + 1, frame })), next: after + some.length });
    }
    return nothing;
  };
  const client = make(server, { WebSocket: Blocked, fetch }).start();
  await client.connected({ timeout_ms: 4000 });
  assert.equal(client.status.get().transport, "http");
  assert.equal((await client.channel("c1").send({ text: "by HTTP" }).sent).seq, 1);
});

test("two tabs share one connection, and one goes on when the other is closed", async () => {
  const server = new FakeServer();
  const queue = [];
  let held = null;
  // Web Locks as the specification has them, as far as they are used here.
  const locks = {
    request(name, options, work) {
      return new Promise((resolve, reject) => {
        const run = async () => {
          held = run;
          try {
            resolve(await work({ name }));
          } catch (error) {
            reject(error);
          }
          held = null;
          queue.shift()?.();
        };
        if (!held) void run();
        else if (options.ifAvailable) resolve(work(null));
        else {
          queue.push(run);
          options.signal?.addEventListener("abort", () => reject(new Error("aborted")));
        }
      });
    },
  };
  const shared = { shareTabs: true, locks, BroadcastChannel, storage: "auto", indexedDB: factory, name: "tabs" };
  const first = make(server, shared).start();
  await first.connected({ timeout_ms: 2000 });
  const second = make(server, shared).start();
  await second.connected({ timeout_ms: 2000 });
  assert.equal(server.dials, 1);
  assert.deepEqual([first.status.get().leader, second.status.get().leader], [true, false]);
  const seen = [];
  second.on("message.created", ({ data }) => seen.push(data.text));
  await second.channel("c1").send({ text: "from the second tab" }).sent;
  server.say(server.message("to both"));
  await until(() => seen.length === 2);
  await first.stop();
  opened.splice(opened.indexOf(first), 1);
  await until(() => second.status.get().leader && second.status.get().state === "online");
  assert.equal(server.dials, 2);
  await second.channel("c1").send({ text: "alone now" }).sent;
  await until(() => seen.length === 3);
  assert.deepEqual(seen, ["from the second tab", "to both", "alone now"]);
});

test("reactions survive an edit, and a tombstone keeps nothing", () => {
  const message = { id: "m", seq: 1, user: "a", text: "hi", created_at: "x", reactions: [{ emoji: "👍", count: 1, users: ["b"] }] };
  const edited = applied(message, { type: "message.updated", data: { id: "m", seq: 1, user: "a", text: "ho" } });
  assert.deepEqual([edited.text, edited.reactions.length], ["ho", 1]);
  const two = applied(edited, { type: "reaction.added", data: { emoji: "👍", user: "c", count: 2 } });
  assert.deepEqual(two.reactions, [{ emoji: "👍", count: 2, users: ["b", "c"] }]);
  assert.deepEqual(applied(two, { type: "reaction.removed", data: { emoji: "👍", user: "b" } }).reactions, []);
  const gone = applied(two, { type: "message.deleted", data: { at: "y" } });
  assert.deepEqual([gone.text, gone.reactions, gone.deleted_at], [undefined, undefined, "y"]);
});

test("bad options are refused by name", () => {
  assert.throws(() => new Client({ token: "t", url: "chat.example" }), (error) => error.code === "invalid_field" && error.field === "url");
  assert.throws(() => new Client({ url: "http://x" }), (error) => error.field === "token");
});

test("it is small", async () => {
  const { gzipped } = await size();
  assert.ok(gzipped <= BYTES_MAX, `${gzipped} bytes`);
});
