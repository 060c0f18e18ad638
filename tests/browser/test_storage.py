"""A disk that is full: the page goes on, says so, sends once, and keeps again when there is room."""

from __future__ import annotations

from tests.browser.conftest import Stage, until
from tests.browser.test_demo import LIST, stored, write

KEPT = "(kind) => chat.status.get().storage === kind && chat.status.get().state === 'online'"
SENT = "() => chat.outbox.get().length === 0"
# What waits to be sent, as the disk has it.
ON_DISK = """async (text) => {
  const { name } = (await indexedDB.databases()).find(({ name }) => name.startsWith("tidings:"));
  const db = await new Promise((done) => { indexedDB.open(name).onsuccess = ({ target }) => done(target.result); });
  const all = await new Promise((done) => {
    db.transaction("outbox").objectStore("outbox").getAll().onsuccess = ({ target }) => done(target.result);
  });
  db.close();
  return all.some(({ content }) => content.text === text);
}"""

# The browser remembers for half a minute how much room there was, and looks again when something larger comes.
LOOK_AGAIN = """async () => {
  const opening = indexedDB.open("large");
  opening.onupgradeneeded = () => opening.result.createObjectStore("all");
  const db = await new Promise((done) => { opening.onsuccess = () => done(opening.result); });
  const tx = db.transaction("all", "readwrite");
  tx.objectStore("all").put(crypto.getRandomValues(new Uint8Array(60_000)).join().repeat(20), 1);
  const outcome = await new Promise((done) => {
    tx.oncomplete = () => done("stored");
    tx.onabort = () => done(tx.error.name);
  });
  db.close();
  return outcome;
}"""


async def test_a_full_disk_stops_nothing_and_is_used_again_when_there_is_room(stage: Stage) -> None:
    here = await stage.context()
    tools = await here.new_cdp_session(await stage.page(here))
    await tools.send("Storage.overrideQuotaForOrigin", {"origin": stage.server.url, "quotaSize": 2_000_000})
    amira = await stage.enter("amira", here)
    await write(amira, "there is room")
    await until(amira, SENT)
    await tools.send("Storage.overrideQuotaForOrigin", {"origin": stage.server.url, "quotaSize": 1})
    assert await amira.evaluate(LOOK_AGAIN) == "QuotaExceededError"
    for number in range(3):
        await write(amira, f"full {number}")
    await until(amira, KEPT, "full")
    await amira.wait_for_selector("#toast >> text=The disk is full")
    await until(amira, SENT)
    # What the disk has is older than what was sent: a page made anew finds out, and sends nothing twice.
    await amira.reload()
    await until(amira, "() => globalThis.chat?.status.get().state === 'online'")
    await amira.click("[data-channel=demo-knee]")
    await write(amira, "full after a reload")
    await until(amira, SENT)
    await until(amira, KEPT, "full")
    await until(amira, f"() => {LIST}.textContent.includes('full after a reload')")
    await tools.send("Storage.overrideQuotaForOrigin", {"origin": stage.server.url})
    await write(amira, "room again")
    await until(amira, KEPT, "indexeddb")
    await until(amira, SENT)
    await amira.evaluate("() => chat.goOffline()")
    await write(amira, "kept on the disk")
    await until(amira, ON_DISK, "kept on the disk")
    await amira.reload()
    await until(amira, "() => globalThis.chat?.status.get().state === 'online' && chat.outbox.get().length === 0")
    texts = [message["text"] for message in await stored(stage.server)]
    full = ["full 0", "full 1", "full 2", "full after a reload"]
    assert texts[-7:] == ["there is room", *full, "room again", "kept on the disk"]
