import assert from "node:assert/strict";
import { test } from "node:test";
import { createElement as h } from "react";
import { act, create } from "react-test-renderer";
import { Client } from "@tidings/client";
import { TidingsProvider, useChannel, useDraft, useMessages, useStatus, useUnread } from "../src/index.js";
import { FakeServer, socketClass, until } from "../../js/test/server.js";

globalThis.IS_REACT_ACT_ENVIRONMENT = true;
const nothing = { ok: true, status: 200, text: async () => JSON.stringify({ items: [], next: null }) };

function Talk() {
  const { messages } = useMessages("c1");
  const { channel } = useChannel("c1");
  const [draft, setDraft] = useDraft("c1");
  const { state } = useStatus();
  const { total } = useUnread();
  return h("div", { state, total, draft, write: setDraft, send: (text) => channel.send({ text }) }, ...messages.map(({ text }) => h("p", { key: text }, text)));
}

test("a component shows what there is, and closes what it has opened", async () => {
  const server = new FakeServer();
  const client = new Client({ url: "http://chat.test", token: "t", WebSocket: socketClass(server), fetch: async () => nothing, storage: "memory", shareTabs: false });
  let tree;
  await act(async () => {
    tree = create(h(TidingsProvider, { client }, h(Talk)));
  });
  const root = () => tree.root.findByType("div");
  const shown = () => tree.root.findAllByType("p").map(({ children }) => children[0]);
  const settle = (condition) => act(() => until(condition));
  await settle(() => root().props.state === "online");
  server.say(server.message("hello"));
  await settle(() => shown().length === 1);
  await act(async () => root().props.write("half"));
  await settle(() => root().props.draft === "half");
  await act(() => root().props.send("answer").sent);
  await settle(() => shown().length === 2);
  assert.deepEqual(shown(), ["hello", "answer"]);
  assert.ok(client.channel("c1").isOpen);
  await act(async () => tree.unmount());
  assert.equal(client.channel("c1").isOpen, false);
  await client.stop();
});

test("without a provider it says what is missing", async () => {
  const error = console.error;
  console.error = () => {};
  assert.throws(() => act(() => void create(h(Talk))), /TidingsProvider/);
  console.error = error;
});
