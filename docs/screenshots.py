"""`make screenshots`: the demonstration as it looks, into docs/images. Needs Chromium."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from playwright.async_api import Browser, async_playwright

from tidings.testing.process import ServerProcess

IMAGES = Path(__file__).parent / "images"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SHOTS = (("desktop-light", DESKTOP, "light"), ("desktop-dark", DESKTOP, "dark"), ("phone-light", PHONE, "light"))
_LENA = "On the side is fine, with a pillow between the knees."


async def main() -> None:
    """Start a server on an empty folder, have two people talk, and take the pictures."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("Chromium is not installed. On Debian: sudo apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        async with ServerProcess(data, environment={"TIDINGS_DEMO": "on"}) as server, async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            await _take(browser, server.url)
            await browser.close()


async def _take(browser: Browser, url: str) -> None:
    lena = await browser.new_page()
    await lena.goto(f"{url}/demo?as=lena")
    await lena.click("[data-channel=demo-knee]")
    await lena.wait_for_selector("article")
    await lena.fill("textarea", _LENA)
    await lena.press("textarea", "Enter")
    await lena.wait_for_selector(f".bubble >> text={_LENA}")
    for name, viewport, scheme in SHOTS:
        context = await browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        page = await context.new_page()
        await page.goto(f"{url}/demo?as=amira")
        await page.click("[data-channel=demo-knee]")
        await page.wait_for_selector(f".bubble >> text={_LENA}")
        await lena.type("textarea", "And")
        await page.wait_for_selector(".typing-line >> text=typing")
        await lena.fill("textarea", "")
        await page.screenshot(path=IMAGES / f"{name}.png")
        await context.close()


if __name__ == "__main__":
    asyncio.run(main())
