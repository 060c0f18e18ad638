"""The lines of docs/start/web.md, as they stand, on a page of another address than the server's."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx

from tests.browser.conftest import Stage

PAGE = Path(__file__).parents[2] / "docs/start/web.md"


async def test_ten_lines_are_a_chat(stage: Stage) -> None:
    found = re.search(r"```html\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    html = found[1].replace("http://127.0.0.1:8080", stage.server.url)
    assert html.count("\n") <= 12

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The team's own backend: the page, and a token for whoever is signed in."""
        path = (await reader.readline()).split()[1]
        body, kind = html, "text/html"
        if path == b"/chat-token":
            async with httpx.AsyncClient(base_url=stage.server.url, trust_env=False) as http:
                body, kind = (await http.post("/demo/session", json={"user": "amira"})).json()["token"], "text/plain"
        elif path != b"/":
            body = ""
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write((head + body).encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as backend:
        port = backend.sockets[0].getsockname()[1]
        page = await stage.page(await stage.context())
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.click("[data-channel=demo-knee]")
        await page.wait_for_selector("article")
        await page.fill("textarea", "Ten lines")
        await page.press("textarea", "Enter")
        await page.wait_for_selector("article:has-text('Ten lines') .icon-tick")
