"""The message list on its own, over a client that answers from memory: 100,000 messages, what must not run."""

from __future__ import annotations

from typing import Any

from playwright.async_api import Page

from tests.browser.conftest import Stage, until

# A client as far as the list uses one, and a list that fills the page. `more` gives older messages, `say` a new one.
SET_UP = """async (messages) => {
  const { Value } = await import("/sdk/js/src/index.js");
  const { define } = await import("/sdk/components/src/index.js");
  define();
  const at = (n) => new Date(1790000000000 + n * 60000).toISOString();
  const make = (n, text) => ({
    id: `m${n}`, seq: n, user: n % 3 ? "bob" : "me", created_at: at(n), text, mine: n % 3 === 0, state: "read",
  });
  const all = typeof messages === "number"
    ? Array.from({ length: messages }, (_, n) => make(n + 1, `message ${n + 1} ${"and more words ".repeat(n % 7)}`))
    : messages.map((one, n) => ({ ...make(n + 1, ""), ...one }));
  const state = new Value({ ready: true, loading: false, has_before: false, has_after: false, left: false });
  const list = new Value(all);
  const marker = new Value(null);
  const channel = {
    id: "c", state, messages: list, isOpen: true, receipts: new Value(new Map()), firstUnread: marker,
    open() {}, close() {}, read() {}, async jumpToLatest() {}, async jumpTo() {},
    async loadBefore() { globalThis.asked = (globalThis.asked ?? 0) + 1; },
    react: async (id, emoji) => { globalThis.reacted = [id, emoji]; },
  };
  const client = {
    user: "me", limits: {}, status: new Value({ state: "online" }), channel: () => channel,
    userOf: (id) => new Value({ id, name: id === "bob" ? "Bob <b>Builder</b>" : id }),
  };
  const box = document.createElement("tidings-message-list");
  box.style.cssText = "position: fixed; inset: 0;";
  box.setAttribute("channel", "c");
  box.client = client;
  document.body.replaceChildren(box);
  Object.assign(globalThis, {
    box, state, list, marker,
    scroller: () => box.root.querySelector(".scroll"),
    older: (count) => {
      const first = list.get()[0].seq;
      list.set([...Array.from({ length: count }, (_, n) => make(first - count + n, `older ${n}`)), ...list.get()]);
    },
    say: (text) => list.set([...list.get(), { ...make(list.get().length + 1, text), user: "bob", mine: false }]),
    firstRow: () => {
      const edge = scroller().getBoundingClientRect().top;
      const first = [...box.root.querySelectorAll(".row")].find((row) => row.getBoundingClientRect().bottom > edge);
      return first && [first.dataset.key, Math.round(first.getBoundingClientRect().top - edge)];
    },
  });
}"""

ROWS = "() => box.root.querySelectorAll('.row').length"
AT_END = "() => scroller().scrollHeight - scroller().scrollTop - scroller().clientHeight < 4"
LAST = "(text) => [...box.root.querySelectorAll('.bubble')].at(-1)?.textContent.includes(text)"


async def the_list(stage: Stage, messages: Any) -> Page:
    page = await stage.page(await stage.context(viewport={"width": 800, "height": 700}))
    await page.goto(f"{stage.server.url}/demo")
    await page.wait_for_selector("#people a")
    await page.evaluate(SET_UP, messages)
    await until(page, ROWS.replace("length", "length > 0"))
    return page


async def test_a_hundred_thousand_messages_are_a_few_rows(stage: Stage) -> None:
    page = await the_list(stage, 100_000)
    await until(page, AT_END)
    await until(page, LAST, "message 100000")
    assert await page.evaluate(ROWS) < 80
    for part in (0.5, 0.0, 0.9):
        await page.evaluate("(part) => { scroller().scrollTop = scroller().scrollHeight * part; }", part)
        await until(page, "() => firstRow() !== undefined")
        assert await page.evaluate(ROWS) < 80
    # What comes meanwhile is counted, not jumped to.
    await page.wait_for_timeout(150)  # why: rows are measured in the next frames
    key, offset = await page.evaluate("() => firstRow()")
    await page.evaluate("() => say('hello')")
    await page.wait_for_selector(".latest >> text=1 new message")
    now = await page.evaluate("() => firstRow()")
    assert (now[0], abs(now[1] - offset) <= 2) == (key, True)
    await page.click(".latest")
    await until(page, LAST, "hello")
    await until(page, AT_END)
    await page.evaluate("() => say('and at the end one follows')")
    await until(page, LAST, "and at the end one follows")
    await until(page, AT_END)


async def test_what_one_looks_at_stays_where_it_is_when_older_messages_come(stage: Stage) -> None:
    page = await the_list(stage, 300)
    await page.evaluate("() => { scroller().scrollTop = 900; }")
    await page.wait_for_timeout(150)  # why: rows are measured in the next frames
    before = await page.evaluate("() => firstRow()")
    for _ in range(5):
        await page.evaluate("() => older(50)")
        await page.wait_for_timeout(60)  # why: as above
        key, offset = await page.evaluate("() => firstRow()")
        assert key == before[0]
        assert abs(offset - before[1]) <= 2
    await page.evaluate("() => { state.set({ ...state.get(), has_before: true }); scroller().scrollTop = 0; }")
    await until(page, "() => globalThis.asked > 0")


async def test_nothing_that_somebody_wrote_runs_or_leads_astray(stage: Stage) -> None:
    corpus = [
        "<script>globalThis.owned = 1</script>",
        "<img src=x onerror='globalThis.owned = 1'>",
        "javascript:globalThis.owned=1 http://javascript:1",
        "https://example.com/?q=<svg onload=alert(1)>",
        "data:text/html,<script>globalThis.owned=1</script>",
        "https://good.example\u202egpj.exe",
        "https://user:password@evil.example/",
        "&lt;b&gt; &amp; entities stay as they are",
        "HTTPS://EXAMPLE.COM/a_(b). And (https://example.com/c)!",
    ]
    messages: list[dict[str, Any]] = [{"text": text} for text in corpus]
    messages.append(
        {"text": "x", "attachments": [{"type": "image", "url": "javascript:globalThis.owned=1", "title": "a"}]}
    )
    messages.append({"text": "y", "attachments": [{"type": "file", "url": "data:text/html,x", "title": "<i>name</i>"}]})
    page = await the_list(stage, messages)
    await until(page, "(count) => box.root.querySelectorAll('article').length === count", len(messages))
    assert await page.evaluate("() => globalThis.owned") is None
    shown = await page.evaluate("() => [...box.root.querySelectorAll('.bubble')].map((one) => one.textContent)")
    assert shown[: len(corpus)] == corpus
    made = await page.evaluate("() => [...box.root.querySelectorAll('.bubble *')].map((one) => one.localName)")
    assert set(made) <= {"a", "svg", "path", "div", "span"}
    links = await page.evaluate("() => [...box.root.querySelectorAll('.bubble a')].map((one) => [one.href, one.rel])")
    assert all(href.startswith(("https://", "http://", "mailto:")) for href, _ in links)
    assert all("noopener" in rel for _, rel in links)
    assert [href for href, _ in links][-2:] == ["https://example.com/a_(b)", "https://example.com/c"]
    assert not any("\u202e" in href or "%E2%80%AE" in href for href, _ in links)


async def test_each_text_is_read_in_its_own_direction(stage: Stage) -> None:
    page = await the_list(stage, [{"text": "שלום world"}, {"text": "hello שלום", "reply_to": "m1"}])
    await until(page, "() => box.root.querySelectorAll('.text').length === 2")
    found = await page.evaluate(
        "() => [...box.root.querySelectorAll('.text')].map((one) => getComputedStyle(one).direction)"
    )
    assert found == ["rtl", "ltr"]
    assert await page.evaluate("() => getComputedStyle(box.root.querySelector('.quote span')).direction") == "rtl"


async def test_messages_are_reached_and_acted_on_by_keyboard(stage: Stage) -> None:
    page = await the_list(stage, 40)
    await page.evaluate("() => box.focusNewest()")
    focused = "() => box.root.activeElement.getAttribute('aria-posinset') ?? box.root.activeElement.ariaLabel"
    assert await page.evaluate(focused) == "40"
    for _ in range(3):
        await page.keyboard.press("ArrowUp")
    assert await page.evaluate(focused) == "37"
    await page.keyboard.press("Enter")
    assert await page.evaluate(focused) == "React with 👍"
    await page.keyboard.press("ArrowRight")
    await page.keyboard.press("Enter")
    assert await page.evaluate("() => globalThis.reacted") == ["m37", "❤️"]
    await page.keyboard.press("Escape")
    assert await page.evaluate(focused) == "37"


async def test_rows_after_any_change_are_those_of_a_list_made_anew(stage: Stage) -> None:
    """What stands before and behind a change is left as it is: the outcome is that of reading everything again."""
    page = await the_list(stage, 30)
    outcome = await page.evaluate("""async () => {
      const drawn = async () => {
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        const rows = [...box.root.querySelectorAll(".row")];
        return rows.map((row) => `${row.className}|${row.dataset.key}|${row.innerText}`);
      };
      const wrong = [];
      let seed = 11;
      const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
      box.style.insetBlockEnd = "-9000px";
      const when = (n) => new Date(1790000000000 + n * n * 500000).toISOString();
      const pool = list.get().map((one, n) => ({ ...one, seq: 100 + n, created_at: when(n) }));
      let shown = pool.slice(10, 20);
      for (let turn = 0; turn < 60; turn += 1) {
        const [first, last] = [pool.indexOf(shown[0]), pool.indexOf(shown.at(-1))];
        const place = random(shown.length);
        const other = { ...shown[place], text: `changed ${turn}` };
        const what = random(5);
        if (what === 0 && first > 0) shown = [...pool.slice(Math.max(0, first - 3), first), ...shown];
        else if (what === 1 && last < 29) shown = [...shown, ...pool.slice(last + 1, last + 3)];
        else if (what === 2) shown = shown.filter((_, n) => n !== place || shown.length < 4);
        else if (what === 3) {
          shown = shown.with(place, other);
          pool[pool.findIndex(({ id }) => id === other.id)] = other;
        } else marker.set(random(3) ? 100 + random(30) : null);
        shown = [...shown];
        list.set(shown);
        const now = await drawn();
        list.set([]);
        await drawn();
        list.set(shown);
        const anew = await drawn();
        if (now.join() !== anew.join()) wrong.push({ turn, what, now, anew });
      }
      return wrong;
    }""")
    assert outcome == []


async def test_the_tab_key_reaches_one_message_and_what_has_the_focus_keeps_it_out_of_view(stage: Stage) -> None:
    page = await the_list(stage, 2_000)
    await until(page, LAST, "message 2000")
    stops = "() => [...box.root.querySelectorAll('article[tabindex=\"0\"]')].map((one) => one.ariaPosInSet)"
    await until(page, "() => box.root.querySelector('article[tabindex=\"0\"]') !== null")
    assert await page.evaluate(stops) == ["2000"]
    await page.keyboard.press("Tab")
    focused = "() => box.root.activeElement?.getAttribute('aria-posinset')"
    assert await page.evaluate(focused) == "2000"
    await page.keyboard.press("ArrowUp")
    assert await page.evaluate(stops) == ["1999"]
    # Far away: the message keeps the focus, and stands in nobody's way.
    await page.evaluate("() => { scroller().scrollTop = 0; }")
    await until(page, "() => firstRow()?.[0] === 'k m1' || box.root.querySelector('[aria-posinset=\"1\"]') !== null")
    assert await page.evaluate(focused) == "1999"
    assert await page.evaluate("() => getComputedStyle(box.root.activeElement.parentElement).opacity") == "0"
    await page.keyboard.press("ArrowUp")
    assert await page.evaluate(focused) == "1998"
    seen = """() => {
      const [one, all] = [box.root.activeElement.getBoundingClientRect(), scroller().getBoundingClientRect()];
      return one.top >= all.top - 1 && one.bottom <= all.bottom + 1;
    }"""
    await until(page, seen)
    await page.keyboard.press("Home")
    assert await page.evaluate(focused) == "1"
    await page.keyboard.press("End")
    assert await page.evaluate(focused) == "2000"


async def test_the_focus_is_never_lost_as_rows_come_and_go_and_are_made_anew(stage: Stage) -> None:
    page = await the_list(stage, 400)
    await until(page, LAST, "message 400")
    await page.evaluate("() => box.focusNewest()")
    for _ in range(12):
        await page.keyboard.press("ArrowUp")
    await page.evaluate("() => { globalThis.lost = 0; box.root.addEventListener('focusout', () => { lost += 1; }); }")
    focused = "() => box.root.activeElement?.getAttribute('aria-posinset')"
    frame = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    # Rows go above and come below, those that stay are not moved.
    for _ in range(10):
        await page.evaluate("() => { scroller().scrollTop -= 90; }")
        await page.evaluate(frame)
    for _ in range(10):
        await page.evaluate("() => { scroller().scrollTop += 90; }")
        await page.evaluate(frame)
    assert await page.evaluate(focused) == "388"
    assert await page.evaluate("() => lost") == 0
    # Its own message changes.
    for text in ("changed", "and again"):
        change = "(text) => list.set(list.get().map((one) => (one.seq === 388 ? { ...one, text } : one)))"
        await page.evaluate(change, text)
        await until(page, "(text) => box.root.activeElement?.innerText.includes(text)", text)
        assert await page.evaluate(focused) == "388"
    # Far away and back.
    for part in ("0", "scroller().scrollHeight"):
        await page.evaluate(f"() => {{ scroller().scrollTop = {part}; }}")
        await page.evaluate(frame)
        assert await page.evaluate(focused) == "388"
