"""For people who see little, or are made ill by what moves: narrow windows, zoom, no motion, and axe in all of it."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.async_api import Page

from tests.browser.conftest import Stage, until
from tests.browser.test_demo import AXE, COMPLAINTS, write

# Every element in the page and in the shadow roots, as they are nested.
EVERY = """
  const inside = ({ shadowRoot }) => (shadowRoot ? every(shadowRoot) : []);
  const every = (root) => [...root.querySelectorAll("*")].flatMap((one) => [one, ...inside(one)]);
"""
# What moves by itself, or glides.
MOVING = f"""() => {{ {EVERY}
  return every(document).filter((one) => {{
    const {{ animationName, transitionDuration, scrollBehavior }} = getComputedStyle(one);
    return animationName !== "none" || scrollBehavior === "smooth" || !/^0s(, 0s)*$/.test(transitionDuration);
  }}).map((one) => one.outerHTML.slice(0, 120));
}}"""
# What is seen and reaches over the edge of the window, and whether the page scrolls sideways.
OVER = f"""() => {{ {EVERY}
  const wide = every(document).filter((one) => {{
    const {{ left, right, width, height }} = one.getBoundingClientRect();
    const shown = one.checkVisibility({{ opacityProperty: true, visibilityProperty: true }});
    return shown && width > 1 && height > 1 && (right > innerWidth + 1 || left < -1);
  }});
  const sideways = every(document).filter((one) => one.scrollWidth > one.clientWidth + 1 &&
    /auto|scroll/.test(getComputedStyle(one).overflowX));
  const page = document.documentElement.scrollWidth > innerWidth ? [document.documentElement] : [];
  return [...page, ...wide, ...sideways].map((one) => `${{one.localName}}: ${{one.outerHTML.slice(0, 120)}}`);
}}"""
LONG = "Donaudampfschifffahrtsgesellschaft" * 4 + " https://example.com/" + "path/" * 40


async def axe(page: Page) -> list[str]:
    if not AXE.is_file():
        pytest.skip("Node is not installed: `make setup` says what is missing")
    # Colours that fade in are looked at when they are there.
    await until(page, "() => document.getAnimations().every(({ playState }) => playState !== 'running')")
    await page.add_script_tag(path=AXE)
    found: list[str] = await page.evaluate(COMPLAINTS)
    return found


async def a_thread_and_a_failure(page: Page) -> None:
    """A message that the server refuses for good, and a thread beside the conversation."""
    await page.evaluate("""() => {
      const mentions = Array.from({ length: 500 }, (_, n) => `nobody${n}`);
      chat.channel("demo-knee").send({ text: "refused", mentions });
    }""")
    await until(page, "() => chat.outbox.get().some(({ state }) => state === 'failed')")
    row = page.locator("tidings-message-list article", has_text="refused").last
    await row.wait_for()
    await write(page, "Which exercises?")
    asked = page.locator("tidings-message-list article", has_text="Which exercises?").last
    await until(page, "() => chat.outbox.get().every(({ state }) => state === 'failed')")
    await asked.focus()
    await asked.hover()
    await asked.get_by_role("button", name="Open thread").click()
    await page.wait_for_selector("tidings-thread .bubble >> text=Which exercises?")


@pytest.mark.parametrize("look", ["desktop", "dark", "phone", "reflow"])
async def test_a_thread_and_a_failed_message_are_nothing_for_axe_to_complain_of(stage: Stage, look: str) -> None:
    size = {"phone": (390, 844), "reflow": (320, 640)}.get(look, (1280, 800))
    options: dict[str, Any] = {
        "bypass_csp": True,
        "reduced_motion": "reduce",
        "viewport": {"width": size[0], "height": size[1]},
        "color_scheme": "dark" if look == "dark" else "light",
    }
    page = await stage.enter("amira", await stage.context(**options))
    await a_thread_and_a_failure(page)
    assert await axe(page) == []
    await page.keyboard.press("Escape")
    await page.wait_for_selector("tidings-thread", state="detached")
    assert await axe(page) == []


@pytest.mark.parametrize("look", ["a window of 320 px", "200 % zoom"])
async def test_everything_fits_a_narrow_window(stage: Stage, look: str) -> None:
    # A browser's zoom is fewer and larger CSS pixels: 1280 px wide, each of them two.
    zoom = look == "200 % zoom"
    size = {"width": 640, "height": 400} if zoom else {"width": 320, "height": 640}
    here = await stage.context(viewport=size, device_scale_factor=2 if zoom else 1)
    page = await stage.page(here)
    await page.goto(f"{stage.server.url}/demo")
    await page.wait_for_selector("#people a")
    assert await page.evaluate(OVER) == []
    page = await stage.enter("amira", here, channel=None)
    await page.wait_for_selector("[data-channel=demo-knee]")
    assert await page.evaluate(OVER) == []
    await page.click("[data-channel=demo-knee]")
    await page.wait_for_selector("article")
    await write(page, LONG)
    await page.wait_for_selector(".bubble >> text=Donaudampf")
    await until(page, f"() => ({OVER})().length === 0")
    await a_thread_and_a_failure(page)
    await until(page, f"() => ({OVER})().length === 0")
    # What one writes with is reached, and not covered.
    field = page.locator("tidings-thread textarea")
    await field.fill("It can be written here.")
    await field.press("Enter")
    await page.wait_for_selector("tidings-thread .bubble >> text=It can be written here.")


async def test_nothing_moves_for_who_does_not_want_it(stage: Stage) -> None:
    still = await stage.enter("amira", await stage.context(reduced_motion="reduce"))
    moving, lena = await stage.enter("jonas"), await stage.enter("lena")
    await lena.locator("textarea").press_sequentially("On")
    for page in (still, moving):
        await page.wait_for_selector(".typing-line >> text=Dr. Lena Weiss is typing")
    assert await still.evaluate(MOVING) == []
    # The control: there is something that would move.
    assert await moving.evaluate(MOVING) != []
