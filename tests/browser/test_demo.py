"""The demonstration in a real browser: two people talk, and nothing is lost or doubled, whatever happens to the page,
the network or the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Page

from tests.browser.conftest import Stage, until
from tidings.testing.process import ServerProcess

AXE = Path(__file__).parents[2] / "sdk" / "node_modules" / "axe-core" / "axe.min.js"

CUT = (
    "ERR_INTERNET_DISCONNECTED",
    "ERR_CONNECTION_REFUSED",
    "ERR_CONNECTION_RESET",
    "ERR_NETWORK",
    "ERR_EMPTY_RESPONSE",
    "WebSocket",
)

LIST = "document.querySelector('tidings-chat').root.querySelector('tidings-message-list').root"
SHOWN = f"() => [...{LIST}.querySelectorAll('.bubble')].map((one) => one.textContent)"
# Each rule that was broken, and where.
COMPLAINTS = """async () => (await axe.run()).violations.map(({ id, nodes }) =>
    `${id}: ${nodes.map((one) => one.html).join(" ").slice(0, 400)}`)"""


async def write(page: Page, text: str) -> None:
    await page.fill("textarea", text)
    await page.press("textarea", "Enter")


async def stored(server: ServerProcess, channel: str = "demo-knee", who: str = "lena") -> list[dict[str, Any]]:
    """What the server has, oldest first."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
        token = (await http.post("/demo/session", json={"user": who})).json()["token"]
        found: list[dict[str, Any]] = []
        after = 0
        while True:
            page = (
                await http.get(
                    f"/v1/channels/{channel}/messages",
                    params={"after": after, "limit": 100},
                    headers={"authorization": f"Bearer {token}"},
                )
            ).json()
            found += page["messages"]
            if not page["has_after"]:
                return found
            after = page["messages"][-1]["seq"]


async def test_two_people_talk_and_see_each_other_typing_and_reading(stage: Stage) -> None:
    amira, lena = await stage.enter("amira"), await stage.enter("lena")
    await lena.type("textarea", "On the")
    await amira.wait_for_selector(".typing-line >> text=Dr. Lena Weiss is typing")
    await write(lena, "On the side is fine, with a pillow between the knees. https://example.com/<b>")
    await amira.wait_for_selector(".bubble >> text=On the side is fine")
    # Links are links, and what looks like markup is text.
    assert await amira.locator(".bubble a", has_text="https://example.com/").count() == 1
    assert await amira.locator(".bubble b", has_text="").count() == 0
    await amira.bring_to_front()
    await write(amira, "I will try that tonight!")
    await lena.wait_for_selector(".bubble >> text=I will try that tonight!")
    await lena.bring_to_front()
    await write(lena, "You are welcome.")
    await amira.wait_for_selector(".bubble >> text=You are welcome.")
    # Read by the other one, jonas has not: in a group a message is read when everybody has.
    reaction = lena.locator("article", has_text="I will try that tonight!")
    await reaction.hover()
    await reaction.locator(".actions button").first.click()
    await amira.wait_for_selector(".reaction >> text=👍")


async def test_a_thread_is_open_beside_the_conversation_and_grows_on_both_sides(stage: Stage) -> None:
    amira, lena = await stage.enter("amira"), await stage.enter("lena")
    await write(amira, "Which exercises are best in the morning?")
    await lena.wait_for_selector(".bubble >> text=Which exercises")
    await lena.locator("article", has_text="Which exercises").hover()
    await lena.locator("article", has_text="Which exercises").get_by_role("button", name="Open thread").click()
    thread = lena.locator("tidings-thread")
    # The place to write has the focus.
    await lena.wait_for_selector("tidings-thread .bubble >> text=Which exercises")
    await lena.keyboard.type("Heel slides, ten of them.")
    await lena.keyboard.press("Enter")
    await thread.locator(".bubble", has_text="Heel slides").wait_for()
    await amira.get_by_role("button", name="1 reply").click()
    await amira.locator("tidings-thread .bubble", has_text="Heel slides").wait_for()
    await amira.keyboard.type("Before breakfast?")
    await amira.keyboard.press("Enter")
    await thread.locator(".bubble", has_text="Before breakfast?").wait_for()
    assert await thread.locator(".bubble").all_inner_texts() == [
        "Which exercises are best in the morning?",
        "Heel slides, ten of them.",
        "Before breakfast?",
    ]
    await lena.get_by_text("2 replies").first.wait_for()
    await lena.keyboard.press("Escape")
    await thread.wait_for(state="detached")
    focused = f"() => {LIST}.activeElement?.innerText.includes('Which exercises')"
    await until(lena, focused)


async def test_people_are_offered_and_mentioned_by_keyboard(stage: Stage) -> None:
    amira, lena = await stage.enter("amira"), await stage.enter("lena")
    await until(amira, "() => chat.userOf('lena').get().name")
    await amira.focus("textarea")
    await amira.keyboard.type("Could you look, @le")
    await amira.wait_for_selector("[role=option][aria-selected=true] >> text=Dr. Lena Weiss")
    assert await amira.get_by_role("option").count() == 1
    await amira.keyboard.press("Enter")
    assert await amira.input_value("textarea") == "Could you look, @Dr. Lena Weiss "
    assert not await amira.get_by_role("listbox").is_visible()
    await amira.keyboard.type("please?")
    await amira.keyboard.press("Enter")
    await lena.wait_for_selector(".mention.me >> text=@Dr. Lena Weiss")
    await amira.wait_for_selector(".mention:not(.me) >> text=@Dr. Lena Weiss")
    assert (await stored(stage.server))[-1]["mentions"] == ["lena"]
    # Given up: Escape closes the list, and Enter sends what is written.
    await amira.keyboard.type("@")
    assert await amira.get_by_role("option").count() == 2
    await amira.keyboard.press("Escape")
    await amira.keyboard.press("Enter")
    await until(amira, "() => chat.outbox.get().length === 0")
    assert "mentions" not in (await stored(stage.server))[-1]


async def test_what_is_written_without_a_network_leaves_once_and_what_was_missed_comes(stage: Stage) -> None:
    stage.expected = CUT
    here = await stage.context()
    amira, lena = await stage.enter("amira", here), await stage.enter("lena")
    await here.set_offline(True)
    await amira.check("#offline")
    for number in range(5):
        await write(amira, f"offline {number}")
        await write(lena, f"meanwhile {number}")
    await amira.wait_for_selector(".icon-clock")
    await here.set_offline(False)
    await amira.uncheck("#offline")
    await amira.wait_for_selector("#toast >> text=Caught up: 5 messages")
    await until(amira, "() => chat.outbox.get().length === 0")
    texts = [message["text"] for message in await stored(stage.server)]
    assert [text for text in texts if text.startswith("offline")] == [f"offline {number}" for number in range(5)]
    assert [text for text in texts if text.startswith("meanwhile")] == [f"meanwhile {number}" for number in range(5)]
    await until(amira, f"(all) => ({SHOWN})().slice(-10).join() === all", ",".join(texts[-10:]))


async def test_a_reload_and_a_killed_server_in_the_middle_of_sending_lose_and_double_nothing(stage: Stage) -> None:
    stage.expected = CUT
    amira = await stage.enter("amira")
    many = "(part) => { for (let n = 0; n < 40; n += 1) chat.channel('demo-knee').send({ text: `${part} ${n}` }); }"
    await amira.evaluate(many, "reload")
    # On the disk, and for the most part not sent yet.
    await until(amira, "() => chat.outbox.get().some(({ state }) => state === 'sending')")
    await amira.reload()
    await until(amira, "() => globalThis.chat?.status.get().state === 'online'")
    await amira.evaluate(many, "killed")
    stage.server.kill9()
    await stage.server.wait_exit()
    await stage.server.start()
    await until(amira, "() => chat.status.get().state === 'online' && chat.outbox.get().length === 0")
    texts = [message["text"] for message in await stored(stage.server)]
    for part in ("reload", "killed"):
        sent = [text for text in texts if text.startswith(part)]
        assert len(sent) == len(set(sent)), "doubled"
        assert sent == sorted(sent, key=lambda text: int(text.split()[1])), "out of order"
    assert [text for text in texts if text.startswith("killed")] == [f"killed {number}" for number in range(40)]
    reloaded = [text for text in texts if text.startswith("reload")]
    # Everything that was on the disk when the page went.
    assert reloaded == [f"reload {number}" for number in range(len(reloaded))]
    assert reloaded


async def test_two_tabs_are_one_device_and_the_second_goes_on_alone(stage: Stage) -> None:
    here = await stage.context()
    first, second = await stage.enter("amira", here), await stage.enter("amira", here)
    assert await second.evaluate("() => chat.status.get().leader") is False
    async with httpx.AsyncClient(base_url=stage.server.url, trust_env=False) as http:
        assert "\ntidings_connections 1.0" in (await http.get("/metrics")).text
    await write(second, "from the second tab")
    await first.wait_for_selector(".bubble >> text=from the second tab")
    await first.close()
    await until(second, "() => chat.status.get().leader && chat.status.get().state === 'online'")
    await write(second, "and alone")
    await until(second, "() => chat.outbox.get().length === 0")
    texts = [message["text"] for message in await stored(stage.server)]
    assert texts[-2:] == ["from the second tab", "and alone"]


async def test_a_page_without_a_disk_works_and_says_so(stage: Stage) -> None:
    here = await stage.context()
    await here.add_init_script(
        "Object.defineProperty(globalThis, 'indexedDB', { get() { throw new Error('denied'); } })"
    )
    amira = await stage.enter("amira", here)
    assert await amira.evaluate("() => chat.status.get().storage") == "memory"
    await write(amira, "all the same")
    await until(amira, "() => chat.outbox.get().length === 0")


async def test_a_long_history_scrolls_without_filling_the_page(stage: Stage) -> None:
    amira = await stage.enter("amira", channel="demo-physio")
    top = f"() => {LIST}.querySelector('.scroll')"
    for _ in range(12):
        await amira.evaluate(f"() => {{ ({top})().scrollTop = 0; }}")
        await amira.wait_for_timeout(80)  # why: a person scrolls, and pages are asked for meanwhile
    await until(amira, "() => !chat.channel('demo-physio').state.get().has_before")
    assert await amira.evaluate("() => chat.channel('demo-physio').messages.get().length") == 400
    rows = await amira.evaluate(f"() => ({top})().querySelectorAll('.row').length")
    assert rows < 80
    await amira.click(".latest")
    await until(amira, f"() => {{ const s = ({top})(); return s.scrollHeight - s.scrollTop - s.clientHeight < 80; }}")


@pytest.mark.parametrize("look", ["light", "dark", "phone", "rtl"])
async def test_there_is_nothing_that_axe_complains_of(stage: Stage, look: str) -> None:
    if not AXE.is_file():
        pytest.skip("Node is not installed: `make setup` says what is missing")
    options: dict[str, Any] = {"bypass_csp": True, "color_scheme": "dark" if look == "dark" else "light"}
    if look == "phone":
        options["viewport"] = {"width": 390, "height": 844}
    here = await stage.context(**options)
    page = await stage.page(here)
    await page.goto(f"{stage.server.url}/demo")
    await page.wait_for_selector("#people a")
    await page.add_script_tag(path=AXE)
    complaints = await page.evaluate(COMPLAINTS)
    page = await stage.enter("amira", here)
    if look == "rtl":
        await page.evaluate("() => { document.documentElement.dir = 'rtl'; document.documentElement.lang = 'ar'; }")
        await page.evaluate("() => { const box = document.querySelector('tidings-chat'); box.client = box.client; }")
        await page.click("[data-channel=demo-knee]")
        await page.wait_for_selector("article")
    await page.wait_for_timeout(300)  # why: colours fade in, and axe looks at what is drawn
    await page.add_script_tag(path=AXE)
    found = await page.evaluate(COMPLAINTS)
    assert complaints + found == []
