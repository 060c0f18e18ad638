import assert from "node:assert/strict";
import { test } from "node:test";

import { Client } from "../src/index.js";
import { FakeServer, socketClass, until } from "./server.js";

/** A server with `count` messages, every tenth of them a reply to the first one, and a client on it. */
async function begin(count) {
  const server = new FakeServer();
  const at = new Date().toISOString();
  const say = (place, more) => server.append("c1", "message.created", { id: `m${place}`, channel: "c1", user: "bob", key: `k${place}`, created_at: at, text: `message ${place}`, ...more });
  for (let place = 1; place <= count; place += 1) say(place, place % 10 === 0 ? { reply_to: "m1" } : {});
  server.instead.history = ({ after, limit }, answer) => {
    const { events, epoch } = server.streams.get("c1");
    const all = events.filter(({ type }) => type === "message.created").map(({ data }) => data);
    const messages = after === undefined ? all.slice(-limit) : all.filter(({ seq }) => seq > after).slice(0, limit);
    answer({ type: "history", channel: "c1", messages, epoch, head: events.length, has_before: false, has_after: after !== undefined && messages.at(-1)?.seq < all.at(-1).seq });
  };
  const client = new Client({
    url: "http://chat.test",
    token: "t",
    WebSocket: socketClass(server),
    fetch: async (url) => ({ ok: true, status: 200, text: async () => JSON.stringify(String(url).endsWith("/messages/m1") ? server.streams.get("c1").events[0].data : { items: [], next: null }) }),
    storage: "memory",
    shareTabs: false,
    random: () => 0,
  }).start();
  await client.connected({ timeout_ms: 2000 });
  return { server, client, say, thread: client.channel("c1").thread("m1") };
}

const texts = (thread) => thread.messages.get().map(({ text }) => text);

test("a thread is a message and the replies to it, those that are there and those that come", async (run) => {
  const { server, client, say, thread } = await begin(250);
  run.after(() => client.stop());
  thread.open();
  await until(() => thread.state.get().ready);
  assert.equal(thread.root.get().text, "message 1");
  const there = Array.from({ length: 25 }, (_, place) => `message ${place * 10 + 10}`);
  assert.deepEqual(texts(thread), there);
  server.say(say(251));
  server.say(say(252, { reply_to: "m1" }));
  server.say(server.append("c1", "reaction.added", { id: "m20", message_seq: 20, user: "bob", emoji: "👍", count: 1 }));
  server.say(server.append("c1", "message.deleted", { id: "m30", message_seq: 30, user: "bob" }));
  await until(() => thread.messages.get()[2].deleted_at);
  assert.equal(texts(thread).at(-1), "message 252");
  assert.equal(thread.messages.get()[1].reactions[0].emoji, "👍");
  assert.equal(thread.messages.get()[2].text, undefined);
});

test("one's own reply stands there at once, and once", async (run) => {
  const { server, client, thread } = await begin(12);
  run.after(() => client.stop());
  thread.open();
  await until(() => thread.state.get().ready);
  server.instead["message.send"] = () => {};
  thread.send({ text: "mine" });
  await until(() => texts(thread).at(-1) === "mine");
  assert.equal(thread.messages.get().at(-1).seq, null);
  const [{ key, reply_to }] = await until(() => server.of("message.send").length).then(() => server.of("message.send"));
  assert.equal(reply_to, "m1");
  server.say(server.append("c1", "message.created", { id: "m13", channel: "c1", user: "alice", key, created_at: new Date().toISOString(), text: "mine", reply_to: "m1" }));
  await until(() => thread.messages.get().at(-1).seq === 13);
  assert.deepEqual(texts(thread), ["message 10", "mine"]);
});

test("behind very many messages a thread asks before it looks further", async (run) => {
  const { server, client, thread } = await begin(1_300);
  run.after(() => client.stop());
  thread.open();
  await until(() => thread.state.get().ready);
  assert.equal(thread.state.get().has_after, true);
  // The newest page of the channel is known anyway.
  assert.equal(texts(thread).includes("message 1200"), false);
  await thread.loadAfter();
  assert.equal(thread.state.get().has_after, false);
  assert.equal(texts(thread).length, 130);
  assert.equal(server.of("history").filter(({ after }) => after !== undefined).length, 13);
  thread.close();
  assert.equal(client.channel("c1").isOpen, false);
});
