"""Notifications in a real browser, from "Notify me" to the click.

Everything is real but two things that Chromium does not do without its maker's servers and a person: the subscription
is one of the Web Push stub, which decrypts what our server sends, and a click is told to the worker rather than made.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, CDPSession, Page, Worker

from tests.browser.conftest import ELSEWHERE, Stage, until
from tests.browser.test_demo import write
from tests.checks.house import wait_until
from tidings.server.push.base import Notification, encode_notification
from tidings.testing.push_stubs import WebPushStub

# A push manager with the stub behind it. What it has subscribed is on the browser's disk, as the real one's is.
PUSH_MANAGER = """() => {
  const decoded = (text) => atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = (text) => Uint8Array.from(decoded(text), (one) => one.charCodeAt(0));
  Object.defineProperty(globalThis.ServiceWorkerRegistration?.prototype ?? {}, "pushManager", {
    get() {
      const place = `subscription ${this.scope}`;
      const getSubscription = async () => {
        const kept = JSON.parse(localStorage.getItem(place));
        return kept && {
          options: { applicationServerKey: bytes(kept.key).buffer },
          toJSON: () => JSON.parse(kept.subscription),
          unsubscribe: async () => localStorage.removeItem(place),
        };
      };
      const subscribe = async ({ userVisibleOnly, applicationServerKey }) => {
        if (!userVisibleOnly || !this.active) throw new DOMException("not like this", "NotAllowedError");
        const key = btoa(String.fromCharCode(...applicationServerKey));
        const plain = key.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
        localStorage.setItem(place, JSON.stringify({ key: plain, subscription: await subscribeAtStub(plain) }));
        return getSubscription();
      };
      return { getSubscription, subscribe };
    },
  });
}"""
# As the browser does when somebody clicks, and what comes of it: which page is brought forward, or what is opened anew.
CLICK = """async (tag) => {
  const done = { focused: [], opened: [] };
  WindowClient.prototype.focus = async function () { done.focused.push(this.url); return this; };
  clients.openWindow = async (url) => { done.opened.push(url); };
  const [notification] = await registration.getNotifications({ tag });
  const click = new NotificationEvent("notificationclick", { notification });
  let work;
  click.waitUntil = (promise) => { work = promise; };
  dispatchEvent(click);
  await work;
  return done;
}"""
# What the worker has done with pushes to the end. Whoever asks Chromium for the notifications while one is being shown
# makes it forget that one: it tidies up what is written down and does not stand yet.
COUNT = """() => {
  if (globalThis.done !== undefined) return;
  globalThis.done = 0;
  const { waitUntil } = ExtendableEvent.prototype;
  ExtendableEvent.prototype.waitUntil = function (work) {
    if (this.type === "push") work.finally(() => { globalThis.done += 1; });
    return waitUntil.call(this, work);
  };
}"""
SHOWN = """async () => (await registration.getNotifications())
  .map(({ tag, title, body, data }) => ({ tag, title, body, data }))"""
TOAST = "#toast.shown >> text="
TITLE = "() => document.querySelector('tidings-chat').root.querySelector('h2')?.textContent"
SECRET = "The biopsy has found nothing."


@dataclass
class Phone:
    """A browser with somebody's page, which may be closed, and with a worker, which stays."""

    stage: Stage
    context: BrowserContext
    stub: WebPushStub
    cdp: CDPSession
    registrations: dict[str, str] = field(default_factory=dict)

    async def open(self, who: str = "amira", channel: str | None = None) -> Page:
        page = await self.stage.enter(who, self.context, channel)
        await page.wait_for_selector("#bell")
        return page

    async def worker(self, who: str = "amira") -> Worker:
        scope = self.scope(who)
        await wait_until(lambda: scope in self.registrations, "the worker is registered")
        found: list[Worker] = []

        async def look() -> bool:
            for one in self.context.service_workers:
                if await one.evaluate("() => registration.scope") == scope:
                    found.append(one)
            return bool(found)

        await wait_until(look, "the worker runs")
        return found[0]

    async def deliver(self, payload: Any, who: str = "amira") -> None:
        """What a push service hands to the browser, decrypted by it; until the worker is done with it."""
        worker = await self.worker(who)
        await worker.evaluate(COUNT)
        before = await worker.evaluate("() => done")
        at = {"origin": self.stage.server.url, "registrationId": self.registrations[self.scope(who)]}
        await self.cdp.send("ServiceWorker.deliverPushMessage", {**at, "data": json.dumps(payload)})

        async def over() -> bool:
            return bool(await worker.evaluate("() => done") > before)

        await wait_until(over, "the worker is done with the push")

    async def shown(self, count: int) -> list[dict[str, Any]]:
        """The notifications that stand, once there are so many."""
        worker = await self.worker()
        found: list[dict[str, Any]] = []

        async def look() -> bool:
            found[:] = await worker.evaluate(SHOWN)
            return len(found) == count

        await wait_until(look, f"{count} notifications are shown, not {found}")
        return sorted(found, key=lambda one: str(one["tag"]))

    def scope(self, who: str) -> str:
        return f"{self.stage.server.url}/demo?as={who}"

    async def tokens(self, who: str = "amira") -> list[str]:
        """The devices by which the server would wake somebody."""
        async with httpx.AsyncClient(base_url=self.stage.server.url, trust_env=False) as http:
            made = (await http.post("/demo/session", json={"user": who})).json()
            bearer = {"authorization": f"Bearer {made['token']}"}
            answer = await http.get(f"/v1/users/{who}/push-tokens", headers=bearer)
            return [one["device"] for one in answer.json()["items"]]

    async def forget(self, who: str, device: str) -> None:
        """The server has heard that the subscription has ended."""
        async with httpx.AsyncClient(base_url=self.stage.server.url, trust_env=False) as http:
            made = (await http.post("/demo/session", json={"user": who})).json()
            bearer = {"authorization": f"Bearer {made['token']}"}
            (await http.delete(f"/v1/users/{who}/devices/{device}/push", headers=bearer)).raise_for_status()


@pytest_asyncio.fixture
async def stub() -> AsyncIterator[WebPushStub]:
    async with WebPushStub() as stub:
        yield stub


@pytest_asyncio.fixture
async def phone(stage: Stage, stub: WebPushStub) -> Phone:
    """Amira has said yes to the browser before: only the switch is to be pressed."""
    context = await stage.context(permissions=["notifications"])
    await context.expose_function("subscribeAtStub", stub.subscribe)
    await context.add_init_script(f"({PUSH_MANAGER})()")
    # A page of this address that is nobody's: it stays when the others are closed.
    other = await stage.page(context)
    await other.goto(f"{stage.server.url}/demo")
    cdp = await context.new_cdp_session(other)
    phone = Phone(stage, context, stub, cdp)

    def heard(told: dict[str, Any]) -> None:
        phone.registrations.update({one["scopeURL"]: one["registrationId"] for one in told["registrations"]})

    cdp.on("ServiceWorker.workerRegistrationUpdated", heard)
    await cdp.send("ServiceWorker.enable")
    return phone


async def test_a_closed_page_is_notified_without_what_was_said_and_a_click_opens_the_channel(
    stage: Stage, phone: Phone, stub: WebPushStub
) -> None:
    amira = await phone.open()
    await amira.check("#notify")
    await amira.wait_for_selector(f"{TOAST}You will be notified")
    device = await amira.evaluate("() => chat.device")
    assert await phone.tokens() == [device]
    await amira.close()
    lena = await stage.enter("lena")
    await write(lena, SECRET)
    await wait_until(lambda: stub.received, "our server has pushed")
    (pushed,) = stub.received
    assert stub.faults == []
    assert SECRET not in json.dumps(pushed.payload)
    await phone.deliver(pushed.payload)
    (shown,) = await phone.shown(1)
    assert (shown["title"], shown["body"], shown["tag"]) == ("Demo", "You have a new message.", "demo-knee")
    assert SECRET not in json.dumps(shown)
    done = await (await phone.worker()).evaluate(CLICK, "demo-knee")
    # The page that is open is nobody's: it is left alone.
    assert done == {"focused": [], "opened": [f"{phone.scope('amira')}&tidings-channel=demo-knee"]}
    await phone.shown(0)
    opened = await stage.page(phone.context)
    await opened.goto(done["opened"][0])
    await opened.wait_for_selector(f".bubble >> text={SECRET}")
    assert await opened.evaluate(TITLE) == "Knee follow-up"


async def test_a_click_brings_the_page_of_this_person_forward_at_the_channel(
    stage: Stage, phone: Phone, stub: WebPushStub
) -> None:
    amira = await phone.open(channel="demo-bill")
    await amira.check("#notify")
    await amira.wait_for_selector(f"{TOAST}You will be notified")
    await amira.check("#offline")
    # The last to have the focus, in the same browser: not hers.
    lena = await phone.open("lena", "demo-ward")
    await write(await stage.enter("jonas"), SECRET)
    await wait_until(lambda: stub.received, "our server has pushed")
    await phone.deliver(stub.received[0].payload)
    await phone.shown(1)
    done = await (await phone.worker()).evaluate(CLICK, "demo-knee")
    assert done == {"focused": [phone.scope("amira")], "opened": []}
    await until(amira, f"() => ({TITLE})() === 'Knee follow-up'")
    assert await lena.evaluate(TITLE) == "Ward team"
    await amira.uncheck("#offline")
    await amira.wait_for_selector(f".bubble >> text={SECRET}")
    # And once more, after something else was chosen by hand.
    await amira.click("[data-channel=demo-physio]")
    await phone.deliver(payload("demo-bill"))
    await phone.shown(1)
    await (await phone.worker()).evaluate(CLICK, "demo-bill")
    await until(amira, f"() => ({TITLE})() === 'Invoice 2041'")


async def test_a_silent_push_takes_away_what_was_read_elsewhere_and_nothing_else(phone: Phone) -> None:
    amira = await phone.open()
    await amira.check("#notify")
    await amira.wait_for_selector(f"{TOAST}You will be notified")
    for channel in ("demo-bill", "demo-physio"):
        await phone.deliver(payload(channel))
    assert [one["tag"] for one in await phone.shown(2)] == ["demo-bill", "demo-physio"]
    await phone.deliver(payload("demo-bill", silent=True))
    assert [one["tag"] for one in await phone.shown(1)] == ["demo-physio"]


async def test_the_switch_is_as_it_was_after_a_reload_and_the_server_hears_of_it_again(phone: Phone) -> None:
    amira = await phone.open()
    await amira.check("#notify")
    await amira.wait_for_selector(f"{TOAST}You will be notified")
    (device,) = await phone.tokens()
    await phone.forget("amira", device)
    await amira.reload()
    await amira.wait_for_selector("#bell:has(#notify:checked)")
    assert await phone.tokens() == [device]
    assert len(phone.stub.browsers) == 1
    # Another person of this page is asked for herself.
    lena = await phone.open("lena")
    assert not await lena.is_checked("#notify")
    await amira.uncheck("#notify")
    await amira.wait_for_selector(f"{TOAST}No more notifications")
    assert await phone.tokens() == []
    await amira.reload()
    await amira.wait_for_selector("#bell:has(#notify:not(:checked))")


async def test_whoever_has_blocked_notifications_is_told_where_to_allow_them(stage: Stage, phone: Phone) -> None:
    amira = await phone.open()
    target = (await phone.cdp.send("Target.getTargetInfo"))["targetInfo"]
    blocked = {"permission": {"name": "notifications"}, "setting": "denied"}
    browser = await stage.browser.new_browser_cdp_session()
    await browser.send("Browser.setPermission", {**blocked, "browserContextId": target["browserContextId"]})
    await amira.click("#bell")
    await amira.wait_for_selector(
        f"{TOAST}Notifications are blocked for this page. Allow them in the browser's settings"
    )
    assert not await amira.is_checked("#notify")
    assert await phone.tokens() == []


async def test_a_push_service_that_is_not_reached_is_said_in_words(phone: Phone) -> None:
    await phone.context.add_init_script(
        "globalThis.subscribeAtStub = async () => { throw new DOMException('no', 'AbortError'); }"
    )
    amira = await phone.open()
    await amira.click("#bell")
    await amira.wait_for_selector(f"{TOAST}The browser did not reach its push service")
    assert not await amira.is_checked("#notify")
    assert await amira.is_enabled("#notify")
    assert await phone.tokens() == []


async def test_without_https_the_switch_tells_why_it_cannot(stage: Stage) -> None:
    page = await stage.page(await stage.context())
    # A name that is not this computer: what a colleague types who wants to have a look, too.
    await page.goto(f"{stage.server.url.replace('127.0.0.1', ELSEWHERE)}/demo?as=amira")
    assert not await page.evaluate("() => isSecureContext")
    await page.click("#bell")
    await page.wait_for_selector(f"{TOAST}Notifications need https")
    assert not await page.is_checked("#notify")


@pytest.mark.parametrize("why", ["browser", "provider"])
async def test_where_there_is_nothing_to_offer_there_is_no_switch(stage: Stage, why: str) -> None:
    context = await stage.context(permissions=["notifications"])
    if why == "browser":
        await context.add_init_script("delete globalThis.PushManager")
    else:
        stage.expected = ("404",)
        problem = {"code": "not_found", "detail": "The app has no Web Push provider."}
        await context.route("**/v1/push/webpush-key", lambda route: route.fulfill(status=404, json=problem))
    page = await stage.enter("amira", context)
    await page.evaluate("() => globalThis.offered")
    assert not await page.is_visible("#bell")


def payload(channel: str, *, silent: bool = False) -> Any:
    """What our server has encrypted for a browser, or what an app hands on when something was read elsewhere."""
    title, body = ("", "") if silent else ("Demo", "You have a new message.")
    data = {"channel": channel, "event": "read" if silent else "message"}
    made = Notification(id=channel, title=title, body=body, data=data, collapse_key=channel, silent=silent)
    return json.loads(encode_notification(made))
