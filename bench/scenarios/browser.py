"""The JavaScript SDK and the message list in Chromium: a channel in which 1,000 messages a second arrive, and 10,000
that were missed."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import Any

from playwright.async_api import Page, async_playwright

from bench.fill import Fill, filled_server
from bench.measure import Findings, at_most
from bench.plan import Plan
from bench.server import BenchServer
from bench.sockets import Socket, connect, flood, message
from tidings.testing.process import ServerFailed

READER, WRITER, CHANNEL = "reader", "writer", "busy"
RATE = 1_000
SECONDS = 8
MISSED = 10_000
# Messages that are sent together; a person's screen shows one frame in that time.
STEP_SECONDS = 0.016
TEXT = "Could you look at this when you have a moment? It is about the appointment on Thursday."

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>bench</title>
<tidings-message-list id="list" channel="busy" style="position: fixed; inset: 0"></tidings-message-list></html>"""
# `tasks`: what the browser itself calls long, over 50 ms, from its own timeline.
SET_UP = """async ([url, token, name]) => {
  const { Client } = await import("/sdk/js/src/index.js");
  const { define } = await import("/sdk/components/src/index.js");
  define();
  const chat = new Client({ url, token, name }).start();
  Object.assign(globalThis, { chat, count: 0, tasks: [], frames: [] });
  chat.on("message.created", () => { count += 1; });
  document.getElementById("list").client = chat;
  const long = new PerformanceObserver((list) => tasks.push(...list.getEntries().map((one) => one.duration)));
  long.observe({ type: "longtask" });
  let before = performance.now();
  const frame = (now) => { frames.push(now - before); before = now; requestAnimationFrame(frame); };
  requestAnimationFrame(frame);
  await chat.connected();
}"""
SHOWN = """() => chat.channel("busy").messages.get().at(-1)?.text ===
  [...document.getElementById("list").root.querySelectorAll(".bubble")].at(-1)?.textContent"""


async def run(plan: Plan, findings: Findings) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise ServerFailed("Chromium is not installed. On Debian: sudo apt-get install chromium")

    async def make(fill: Fill) -> None:
        await fill.users([READER, WRITER])
        await fill.groups({CHANNEL: [READER, WRITER]})
        await fill.messages(CHANNEL, WRITER, 200)

    async with filled_server(make) as server, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        writer = await connect(server.port, server.credentials.token(WRITER))
        sent = 0
        for turn in range(plan.runs):
            page = await (await browser.new_context()).new_page()
            await _enter(page, server, f"run{turn}")
            sent = await _live(page, writer, sent, plan.size(SECONDS, 1), findings)
            sent = await _missed(page, writer, sent, plan.size(MISSED, 1_000), findings)
            await page.context.close()
        await browser.close()
    findings.note(
        f"{RATE} messages/s of {len(TEXT)} characters in the open channel for {SECONDS} s, the list at its end."
    )
    findings.note(
        "Long tasks: the browser's own timeline of what kept its thread for over 50 ms. Server on the same cores."
    )


async def _enter(page: Page, server: BenchServer, name: str) -> None:
    await page.route("**/bench", lambda route: route.fulfill(body=PAGE, content_type="text/html"))
    await page.goto(f"{server.url}/bench")
    await page.evaluate(SET_UP, [server.url, server.credentials.token(READER), name])
    # It begins at the first unread message; looked at is the end.
    await page.wait_for_selector(".bubble")
    await page.evaluate("() => document.getElementById('list').toLatest()")
    await page.wait_for_function(SHOWN)


def _frame(number: int) -> bytes:
    return message(number, CHANNEL, f"b{number}", f"{TEXT} {number}")


async def _live(page: Page, writer: Socket, sent: int, seconds: int, findings: Findings) -> int:
    await page.evaluate("() => { count = 0; tasks.length = 0; frames.length = 0; }")
    began = time.perf_counter()
    total = RATE * seconds
    done = 0
    while done < total:
        due = min(total, int((time.perf_counter() - began) * RATE))
        if due > done:
            sent = await flood(writer, sent, due - done, window=64, frame=_frame)
            done = due
        await asyncio.sleep(STEP_SECONDS)
    await page.wait_for_function("(total) => count >= total", arg=total)
    await page.wait_for_function(SHOWN)
    found: dict[str, Any] = await page.evaluate("() => ({ tasks, frames })")
    findings.add("1,000/s: longest task", max(found["tasks"], default=0.0), "ms", at_most(50))
    findings.add("1,000/s: tasks over 50 ms", len(found["tasks"]), "")
    findings.add("1,000/s: time between frames, median", sorted(found["frames"])[len(found["frames"]) // 2], "ms")
    return sent


async def _missed(page: Page, writer: Socket, sent: int, missed: int, findings: Findings) -> int:
    await page.evaluate("() => { chat.goOffline(); count = 0; }")
    sent = await flood(writer, sent, missed, window=64, frame=_frame)
    taken = await page.evaluate(
        """async (missed) => {
          const began = performance.now();
          chat.goOnline();
          await new Promise((resolve) => chat.on("message.created", () => count >= missed && resolve()));
          return performance.now() - began;
        }""",
        missed,
    )
    await page.wait_for_function(SHOWN)
    findings.add("10,000 missed: taken in after", taken / 1000, "s", at_most(2))
    return sent
