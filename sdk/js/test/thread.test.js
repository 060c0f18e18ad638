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
  const asked = [];
  const rest = ({ pathname, searchParams }) => {
    const { events, epoch } = server.streams.get("c1");
    if (pathname.endsWith("/messages/m1")) return events[0].data;
    if (!pathname.endsWith("/messages/m1/replies")) return { items: [], next: null };
    const [after, limit] = [Number(searchParams.get("after")), Number(searchParams.get("limit"))];
    asked.push(after);
    const all = events.filter(({ type, data, seq }) => type === "message.created" && data.reply_to === "m1" && seq > after).map(({ data }) => data);
    return { messages: all.slice(0, limit), epoch, head: events.length, has_before: after > 1, has_after: all.length > limit };
  };
  const client = new Client({
    url: "http://chat.test",
    token: "t",
    WebSocket: socketClass(server),
    fetch: async (url) => ({ ok: true, status: 200, text: async () => JSON.stringify(rest(new URL(url))) }),
    storage: "memory",
    shareTabs: false,
    random: () => 0,
  }).start();
  await client.connected({ timeout_ms: 2000 });
  return { server, client, say, asked, thread: client.channel("c1").thread("m1") };
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

test("of very many replies the first thousand are read, and more when somebody asks", async (run) => {
  const { client, thread, asked } = await begin(11_000);
  run.after(() => client.stop());
  thread.open();
  await until(() => thread.state.get().ready);
  assert.equal(thread.state.get().has_after, true);
  assert.equal(texts(thread).includes("message 10000"), true);
  assert.equal(texts(thread).includes("message 10900"), false);
  await thread.loadAfter();
  assert.equal(thread.state.get().has_after, false);
  assert.equal(texts(thread).length, 1_100);
  assert.equal(asked.length, 11);
  thread.close();
  assert.equal(client.channel("c1").isOpen, false);
});

test("how many replies a message has follows the events, and counts none twice that its page has counted", async (run) => {
  const { server, client, say, thread } = await begin(12);
  run.after(() => client.stop());
  const channel = client.channel("c1");
  // The page says what stood at its head; an event of before comes late.
  const { history } = server.instead;
  server.instead.history = (frame, answer) =>
    history(frame, (page) => answer({ ...page, head: 13, messages: page.messages.map((message) => (message.id === "m1" ? { ...message, reply_count: 2 } : message)) }));
  channel.open();
  await until(() => channel.state.get().ready);
  const count = () => channel.messages.get()[0].reply_count;
  assert.equal(count(), 2);
  server.say(say(13, { reply_to: "m1" }));
  server.say(say(14, { reply_to: "m1" }));
  await until(() => count() === 3);
  server.say(server.append("c1", "message.deleted", { id: "m14", message_seq: 14, reply_to: "m1" }));
  await until(() => count() === 2);
  assert.equal(channel.messages.get().length, 14);
  void thread;
});
