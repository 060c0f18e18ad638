"""What a page has seen and sent, noted in the page so that it survives reloads, and told to the history checker."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from playwright.async_api import BrowserContext, Page

from tests.browser.conftest import Stage, until
from tests.checks.house import log_event
from tidings.testing.checker import check
from tidings.testing.history import LogEvent, Send, body_digest
from tidings.testing.recorder import Operation, Recorder

# The journal is written in the same turn of the page in which the SDK tells: nothing is told and not noted. What a page
# says it has of a stream when it comes back (`sync`) is where the checker lets it go on.
JOURNAL = """() => {
  const note = (line) => {
    const at = Number(localStorage.getItem("noted") ?? 0);
    localStorage.setItem(`note ${at}`, JSON.stringify(line));
    localStorage.setItem("noted", at + 1);
  };
  note({ kind: "page" });
  const { send } = WebSocket.prototype;
  WebSocket.prototype.send = function (data) {
    const { type, positions = {} } = JSON.parse(data);
    const told = type === "sync" ? Object.entries(positions) : [];
    for (const [stream, { seq }] of told) note({ kind: "position", stream, seq });
    return send.call(this, data);
  };
  let chat;
  Object.defineProperty(globalThis, "chat", {
    get: () => chat,
    set(made) {
      chat = made;
      chat.on("*", ({ stream, seq, type, data = {} }) => note({ kind: "event", stream, seq, type, data }));
      chat.on("message.sent", (sent) => note({ kind: "sent", ...sent }));
      chat.on("message.failed", ({ key, error }) => note({ kind: "failed", key, code: error.code }));
    },
  });
}"""
READ = """() => Array.from({ length: Number(localStorage.getItem("noted") ?? 0) }, (_, n) =>
  JSON.parse(localStorage.getItem(`note ${n}`)))"""
BUBBLES = """() => [...document.querySelector('tidings-chat').root.querySelector('tidings-message-list').root
  .querySelectorAll('.bubble')].map((one) => one.textContent)"""


@dataclass
class Witness:
    """One device of a user in a conversation. `page` may be reloaded as often as one likes."""

    name: str
    user: str
    channel: str
    context: BrowserContext
    page: Page
    recorder: Recorder
    asked: dict[str, Operation] = field(default_factory=dict)
    _read: int = 0

    async def send(self, *texts: str) -> None:
        """What the composer does for each text; its key is made of it."""
        for text in texts:
            call = Send(self.channel, self.user, key_of(text), body_digest(text))
            self.asked[key_of(text)] = self.recorder.invoke(self.name, call)
        await self.page.evaluate(
            "([channel, all]) => { for (const [text, key] of all) chat.channel(channel).send({ text, key }); }",
            [self.channel, [(text, key_of(text)) for text in texts]],
        )

    async def online(self) -> None:
        await until(self.page, "() => globalThis.chat?.status.get().state === 'online'")

    async def sent(self) -> None:
        """Until nothing waits to be sent; what was acknowledged is noted as such."""
        await self.online()
        await until(self.page, "() => chat.status.get().state === 'online' && chat.outbox.get().length === 0")
        await self.acknowledge()

    async def acknowledge(self) -> None:
        """Tell the recorder of the acknowledgements that came since."""
        lines: list[dict[str, Any]] = await self.page.evaluate(READ)
        for line in lines[self._read :]:
            operation = self.asked.get(line.get("key", "")) if line["kind"] in ("sent", "failed") else None
            if operation is None or operation.settled:
                continue
            if line["kind"] == "sent":
                operation.ok(message_id=line["id"], seq=line["seq"])
            else:
                operation.fail(line["code"])
        self._read = len(lines)

    async def reload(self) -> None:
        await self.page.reload()
        await self.online()
        await self.page.click(f"[data-channel={self.channel}]")

    async def tell(self, epoch: str) -> None:
        """Everything that this device saw, to the recorder."""
        device, user, channel = self.name, self.user, self.channel
        last = 0
        fresh = True
        for line in await self.page.evaluate(READ):
            if line["kind"] == "page":
                fresh = True
            if line.get("stream") != self.channel:
                continue
            seq = line["seq"]
            if fresh:
                position = seq if line["kind"] == "position" else seq - 1
                # The disk never says more than what was told.
                assert last == 0 or position <= last, f"{self.name} skips from {last} to {position}"
                self.recorder.device_start(device=device, user=user, channel=channel, position=position)
                last, fresh = position, False
            if line["kind"] == "event":
                data = line["data"]
                created = line["type"] == "message.created"
                self.recorder.observe(
                    device=device,
                    user=user,
                    channel=channel,
                    epoch=epoch,
                    seq=seq,
                    event_type=line["type"],
                    message_id=data.get("id", "") if created else "",
                    key=data.get("key") or "" if created else "",
                    sender=data.get("user", "") if created else "",
                    digest=body_digest(data.get("text", "")) if created else "",
                )
                last = seq
        self.recorder.device_final(device=device, user=user, channel=channel, position=last)


@dataclass
class Room:
    """A conversation under witness."""

    stage: Stage
    http: httpx.AsyncClient
    channel: str
    recorder: Recorder = field(default_factory=Recorder)
    witnesses: list[Witness] = field(default_factory=list)

    @classmethod
    async def open(cls, stage: Stage, *members: str) -> Room:
        """A new channel of these people of the demonstration."""
        http = await acting(stage, members[0])
        made = await http.post("/v1/channels", json={"id": "witnessed", "type": "group", "members": list(members)})
        assert made.is_success, made.text
        return cls(stage, http, "witnessed")

    async def log(self) -> tuple[str, list[LogEvent]]:
        """Epoch and events of the channel, all of them."""
        events: list[LogEvent] = []
        while True:
            after = events[-1].seq if events else 0
            page = (await self.http.get(f"/v1/channels/{self.channel}/events", params={"after": after})).json()
            events += [log_event(event) for event in page["events"]]
            if not page["events"]:
                return page["epoch"], events

    async def enter(self, name: str, user: str) -> Witness:
        """A device of its own, high enough to show everything at once."""
        context = await self.stage.context(viewport={"width": 900, "height": 6000})
        await context.add_init_script(f"({JOURNAL})()")
        page = await self.stage.enter(user, context, channel=None)
        await page.click(f"[data-channel={self.channel}]")
        witness = Witness(name, user, self.channel, context, page, self.recorder)
        self.witnesses.append(witness)
        return witness

    async def judge(self, *, acknowledged: int) -> list[str]:
        """When all is sent: everybody shows what the server has, once, in order, and the checker finds nothing.

        Returns the texts in the log.
        """
        for witness in self.witnesses:
            await witness.sent()
        epoch, log = await self.log()
        messages = [event for event in log if event.type == "message.created"]
        texts = [event.key.replace("-", " ") for event in messages]
        for witness in self.witnesses:
            # A list that ends with the log's last message, and stands in the page as it is in the store.
            shown = f"(all) => JSON.stringify(({BUBBLES})()) === all"
            try:
                await until(witness.page, shown, json.dumps(texts, separators=(",", ":"), ensure_ascii=False))
            except Exception as error:
                raise AssertionError(f"{witness.name}: {await witness.page.evaluate(BUBBLES)} != {texts}") from error
            await until(witness.page, f"() => ({READ})().some(({{ seq }}) => seq >= {log[-1].seq})")
            await witness.tell(epoch)
        self.recorder.final_log(self.channel, log, epoch=epoch)
        verdict = check(self.recorder.entries)
        assert verdict.ok, verdict.render()
        assert verdict.seen["acknowledged"] >= acknowledged, verdict.render()
        return texts

    async def close(self) -> None:
        await self.http.aclose()


def key_of(text: str) -> str:
    return text.replace(" ", "-")


async def acting(stage: Stage, who: str) -> httpx.AsyncClient:
    """The REST API as one of the people of the demonstration."""
    http = httpx.AsyncClient(base_url=stage.server.url, trust_env=False)
    token = (await http.post("/demo/session", json={"user": who})).json()["token"]
    http.headers["authorization"] = f"Bearer {token}"
    return http
