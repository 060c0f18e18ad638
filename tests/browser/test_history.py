"""Ten thousand messages in the demonstration: paged in, in order, once each, and a few rows in the page."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from tests.browser.conftest import Stage, until
from tests.browser.test_demo import LIST
from tests.browser.witness import acting
from tests.checks.house import Wire

MESSAGES = 10_000
AT_ONCE = 200
SCROLL = f"{LIST}.querySelector('.scroll')"
ROWS = f"() => {LIST}.querySelectorAll('.row').length"
ROWS_MAX = 80
CHANNEL = "chat.channel('long')"
AT_END = f"() => {{ const s = {SCROLL}; return s.scrollHeight - s.scrollTop - s.clientHeight < 80; }}"
SEEN = f"(text) => [...{LIST}.querySelectorAll('.bubble')].some((one) => one.textContent === text)"


async def filled(stage: Stage) -> None:
    """A channel with that many messages of Amira's own: none is unread, and the list begins at its end."""
    http = await acting(stage, "amira")
    async with aclosing(http):
        made = await http.post("/v1/channels", json={"id": "long", "type": "group", "members": ["lena"]})
        assert made.is_success, made.text
        token = http.headers["authorization"].removeprefix("Bearer ")
    async with await Wire.open(stage.server.port) as wire:
        assert (await wire.ask("connect", token=token, device={"id": "filler"}))["type"] == "connected"
        for first in range(0, MESSAGES, AT_ONCE):
            numbers = range(first, first + AT_ONCE)
            waiting = [
                await wire.post("message.send", channel="long", key=f"k{number}", text=f"message {number}")
                for number in numbers
            ]
            for reply in await asyncio.gather(*waiting):
                assert reply["type"] != "error", reply


async def test_ten_thousand_messages_are_paged_in_and_stay_a_few_rows(stage: Stage) -> None:
    await filled(stage)
    amira = await stage.enter("amira", channel=None)
    await amira.click("[data-channel=long]")
    await until(amira, SEEN, f"message {MESSAGES - 1}")
    loaded = f"() => {CHANNEL}.messages.get().length"
    assert await amira.evaluate(loaded) <= 100
    # As a person does: up to the top again and again.
    for _ in range(10):
        before = await amira.evaluate(loaded)
        await amira.evaluate(f"() => {{ {SCROLL}.scrollTop = 0; }}")
        await until(amira, f"(before) => {CHANNEL}.messages.get().length > before", before)
        assert await amira.evaluate(ROWS) < ROWS_MAX
    await amira.evaluate(f"async () => {{ while ({CHANNEL}.state.get().has_before) await {CHANNEL}.loadBefore(200); }}")
    texts = await amira.evaluate(f"() => {CHANNEL}.messages.get().map(({{ text }}) => text)")
    assert texts == [f"message {number}" for number in range(MESSAGES)]
    for part, seen in ((0, "message 0"), (1, f"message {MESSAGES - 1}"), (0, "message 0")):
        await amira.evaluate(f"(part) => {{ {SCROLL}.scrollTop = {SCROLL}.scrollHeight * part; }}", part)
        await until(amira, SEEN, seen)
        assert await amira.evaluate(ROWS) < ROWS_MAX
    await amira.click(".latest")
    await until(amira, AT_END)
    await until(amira, SEEN, f"message {MESSAGES - 1}")
    assert await amira.evaluate(ROWS) < ROWS_MAX
    # A page made anew begins at the end, with a page of them.
    await amira.reload()
    await amira.click("[data-channel=long]")
    await until(amira, SEEN, f"message {MESSAGES - 1}")
    await until(amira, f"() => {CHANNEL}.state.get().ready && !{CHANNEL}.state.get().loading")
    assert await amira.evaluate(loaded) <= 300
