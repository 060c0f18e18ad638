"""One user on two devices: what is read on one is read on the other, what is sent from one is on both, once."""

from __future__ import annotations

from playwright.async_api import Page

from tests.browser.conftest import Stage, until
from tests.browser.test_demo import LIST, write

BADGE = "[data-channel=demo-knee] .badge"
UNREAD = "(count) => chat.channel('demo-knee').summary.get().unread === count"
TIMES = f"(text) => [...{LIST}.querySelectorAll('.bubble')].filter((one) => one.textContent === text).length"


async def other(page: Page, channel: str = "demo-bill") -> None:
    await page.click(f"[data-channel={channel}]")
    await page.wait_for_selector("article")


async def test_what_one_device_reads_and_sends_is_so_on_the_other(stage: Stage) -> None:
    phone, laptop = await stage.enter("amira"), await stage.enter("amira")
    lena = await stage.enter("lena")
    await other(phone)
    await other(laptop)
    for page in (phone, laptop):
        await until(page, UNREAD, 0)
    for number in range(3):
        await write(lena, f"Are you there? {number}")
    for page in (phone, laptop):
        await page.wait_for_selector(f"{BADGE} >> text=3")
        await until(page, "() => document.title.startsWith('(')")
    # Read on one: nothing is left unread on the other, which has not looked.
    await phone.bring_to_front()
    await other(phone, "demo-knee")
    for page in (phone, laptop):
        await page.wait_for_selector(BADGE, state="detached")
        await until(page, UNREAD, 0)
    await other(laptop, "demo-knee")
    await until(laptop, TIMES + " === 1", "Are you there? 2")
    assert await laptop.evaluate("() => chat.channel('demo-knee').firstUnread.get()") is None
    # One's own message: on both, once, unread on neither.
    await other(laptop)
    await write(phone, "Here I am.")
    await until(laptop, "() => chat.channel('demo-knee').summary.get().last_message?.text === 'Here I am.'")
    assert await laptop.evaluate(UNREAD, 0)
    assert await laptop.locator(BADGE).count() == 0
    await other(laptop, "demo-knee")
    for page in (phone, laptop):
        await until(page, TIMES + " === 1", "Here I am.")
    await until(phone, "() => chat.outbox.get().length === 0")
    assert await phone.evaluate(TIMES, "Here I am.") == 1


async def test_what_is_half_written_stays_on_its_device_over_a_reload(stage: Stage) -> None:
    phone, laptop = await stage.enter("amira"), await stage.enter("amira")
    await phone.fill("textarea", "Half a")
    await laptop.fill("textarea", "Another")
    for page, text in ((phone, "Half a"), (laptop, "Another")):
        await page.evaluate("() => chat.link.cached('demo-knee')")  # what has changed is stored before it is read
        await page.reload()
        await until(page, "() => globalThis.chat?.status.get().state === 'online'")
        await page.click("[data-channel=demo-knee]")
        await until(
            page, f"(text) => {LIST.replace('message-list', 'composer')}.querySelector('textarea').value === text", text
        )
