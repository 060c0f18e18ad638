// The JavaScript SDK as a program that does what it is told, one JSON document a line: see tests/conformance/README.md.
import { createInterface } from "node:readline";
import WebSocket from "ws";
import { Client } from "@tidings/client";

const tell = (what) => process.stdout.write(`${JSON.stringify(what)}\n`);
let tokens = 0;
const client = new Client({
  url: process.argv[2],
  token: async () => `t${++tokens}`,
  device: "d1",
  transport: "websocket",
  storage: "memory",
  shareTabs: false,
  WebSocket,
  // Pauses are a twentieth of what they are for people.
  random: () => Math.random() / 20,
  fetch: async () => ({ ok: true, status: 200, text: async () => '{"items":[],"next":null}' }),
});

let state = "";
client.status.subscribe(({ state: now }) => {
  if (now !== state && (now === "online" || now === "refused")) tell({ state: now });
  state = now;
});
client.on("message.created", ({ data, seq }) => tell({ text: data.text, seq }));
client.on("history.reset", ({ channel }) => tell({ reset: channel }));
client.on("channel.left", ({ data }) => tell({ left: data.channel }));

createInterface({ input: process.stdin })
  .on("line", (line) => {
    const step = JSON.parse(line);
    if (step.client === "start") client.start();
    else {
      const { sent } = client.channel("c1").send({ key: step.key, text: step.text });
      sent.then(
        ({ seq }) => tell({ sent: step.key, seq }),
        ({ code }) => tell({ failed: step.key, code }),
      );
    }
  })
  .on("close", async () => {
    await client.stop();
    process.exit(0);
  });
