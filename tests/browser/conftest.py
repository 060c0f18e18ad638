"""A real server with the demonstration, and Debian's Chromium on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

from tests.checks.house import ROOMY
from tidings.testing.process import ServerProcess

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# The test's server under a name that browsers do not take for this computer's own.
ELSEWHERE = "clinic.example"
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-sync",
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
]
# What a condition may take on a busy two-core machine before it is called unmet, ms.
PATIENCE_MS = 20_000


@dataclass
class Stage:
    """A server, a browser, and what pages have complained of."""

    server: ServerProcess
    browser: Browser
    complaints: list[str] = field(default_factory=list)
    # What a page says when its server is killed or its network is cut: the browser's own words, not the page's.
    expected: tuple[str, ...] = ()

    async def context(self, **options: Any) -> BrowserContext:
        made = await self.browser.new_context(**options)
        made.set_default_timeout(PATIENCE_MS)
        return made

    async def page(self, context: BrowserContext) -> Page:
        page = await context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("console", lambda message: self._said(message.type, message.text))
        return page

    async def enter(self, who: str, context: BrowserContext | None = None, channel: str | None = "demo-knee") -> Page:
        """Somebody of the demonstration, with a conversation open."""
        page = await self.page(context or await self.context())
        await page.goto(f"{self.server.url}/demo?as={who}")
        await page.wait_for_function("() => globalThis.chat?.status.get().state === 'online'")
        if channel is not None:
            await page.click(f"[data-channel={channel}]")
            await page.wait_for_selector("article")
        return page

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(words in text for words in self.expected):
            self.complaints.append(f"{kind}: {text}")


@pytest_asyncio.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    program = next((found for name in _PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("Chromium is not installed: `make setup` says how")
    environment = {**ROOMY, "TIDINGS_DEMO": "on", "TIDINGS_OUTBOUND_ALLOW_HOSTS": "127.0.0.1"}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            ServerProcess(tmp_path / "data", logs=tmp_path / "logs", environment=environment)
        )
        playwright = await stack.enter_async_context(async_playwright())
        # The browser writes beside the test, not into somebody's home.
        home = {**os.environ, "HOME": str(tmp_path)}
        browser = await playwright.chromium.launch(executable_path=program, args=_ARGUMENTS, env=home)
        stack.push_async_callback(browser.close)
        made = Stage(server, browser)
        yield made
        assert made.complaints == []


Until = Callable[[Page, str], Awaitable[None]]


async def until(page: Page, condition: str, argument: Any = None) -> None:
    """Wait until a JavaScript function returns something true."""
    await page.wait_for_function(condition, arg=argument, timeout=PATIENCE_MS)
