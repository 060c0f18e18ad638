"""A message that was written is sent once, in order, whatever breaks in between."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tidings.client import outbox as outbox_module
from tidings.client.client import Observed
from tidings.client.errors import Closed, OutboxFull, Refused, StoreError, StoreInUse, StoreMismatch, Timeout
from tidings.client.events import SendFailed
from tidings.client.store import FileStore, SavedMessage

from .conftest import client, take, until
from .fake import FakeServer


async def test_a_send_answers_with_its_place(server: FakeServer) -> None:
    async with client(server) as chat:
        sent = await chat.channel("c1").send("hello", key="k1")
        assert (sent.channel, sent.seq, sent.key, sent.duplicate) == ("c1", 1, "k1", False)
        again = await chat.channel("c1").send("hello", key="k1")
        assert (again.seq, again.duplicate) == (1, True)
    assert server.texts("c1") == ["hello"]


@pytest.mark.parametrize("closing", [True, False])
async def test_a_lost_reply_is_followed_by_the_same_key_and_one_message(
    server: FakeServer, closing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "REPLY_SECONDS_MAX", 0.1)
    server.lose_replies, server.lose_by_closing = 2, closing
    async with client(server) as chat:
        sent = await chat.channel("c1").send("once", timeout=5)
        assert sent.duplicate
    assert server.texts("c1") == ["once"]
    assert len({c["key"] for c in server.commands if c["type"] == "message.send"}) == 1


async def test_messages_written_offline_leave_in_order_when_there_is_a_connection(server: FakeServer) -> None:
    await server.stop()
    async with client(server) as chat:
        waiting = [await chat.channel(f"c{n % 3}").send(str(n), wait=False) for n in range(30)]
        assert [one.state for one in waiting] == ["queued"] * 30
        assert len(chat.outbox) == 30
        await server.start()
        await chat.flush(5)
        assert [one.state for one in waiting] == ["sent"] * 30
    for channel in range(3):
        assert server.texts(f"c{channel}") == [str(n) for n in range(30) if n % 3 == channel]


async def test_a_message_is_on_disk_before_it_is_sent(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, may_write = [], asyncio.Event()
    add = FileStore.add

    async def slow_disk(store: FileStore, message: SavedMessage) -> None:
        await may_write.wait()
        await add(store, message)
        written.append(message.key)

    monkeypatch.setattr(FileStore, "add", slow_disk)
    async with client(server, store=tmp_path / "a.db") as chat:
        await chat.wait_connected(5)
        sending = asyncio.ensure_future(chat.channel("c1").send("hello", key="k"))
        # A command that was given later is answered: the message would have been there by now.
        await chat.channel("c1").read(0)
        chat.outbox.pump()
        await chat.channel("c1").read(0)
        assert server.texts("c1") == []
        may_write.set()
        await sending
        assert written == ["k"]
    assert server.texts("c1") == ["hello"]


async def test_order_holds_when_the_server_refuses_for_now(server: FakeServer) -> None:
    refusals = iter(range(5))

    def refuse(command: dict[str, Any]) -> tuple[str, str] | None:
        if command["type"] == "message.send" and command["text"] == "2" and next(refusals, None) is not None:
            return "rate_limited", "later"
        return None

    server.refuse = refuse
    async with client(server) as chat:
        await chat.wait_connected(5)
        for n in range(6):
            await chat.channel("c1").send(str(n), wait=False)
        await chat.flush(5)
    assert server.texts("c1") == [str(n) for n in range(6)]


async def test_a_final_refusal_fails_the_message_and_the_next_goes_on(server: FakeServer, tmp_path: Path) -> None:
    server.refuse = lambda c: ("forbidden", "never") if c.get("text") == "bad" else None
    async with client(server, store=tmp_path / "a.db") as chat:
        failures = chat.signals(SendFailed)
        bad = await chat.channel("c1").send("bad", wait=False)
        await chat.channel("c1").send("good", timeout=5)
        assert bad.state == "failed"
        with pytest.raises(Refused) as refused:
            await bad.sent()
        assert refused.value.code == "forbidden"
        (failure,) = await take(failures, 1)
        assert (failure.channel, failure.text, failure.code) == ("c1", "bad", "forbidden")
        assert len(chat.outbox) == 0
    async with client(server, store=tmp_path / "a.db") as chat:
        assert len(chat.outbox) == 0


async def test_what_can_never_be_accepted_does_not_enter_the_outbox(server: FakeServer) -> None:
    async with client(server) as chat:
        with pytest.raises(Refused) as refused:
            await chat.channel("c1").send("x" * 20_001)
        assert (refused.value.code, refused.value.field) == ("invalid_field", "text")
        assert len(chat.outbox) == 0


async def test_the_outbox_is_bounded(server: FakeServer) -> None:
    await server.stop()
    async with client(server, outbox_max=3) as chat:
        for n in range(3):
            await chat.channel("c1").send(str(n), wait=False)
        with pytest.raises(OutboxFull):
            await chat.channel("c1").send("one too many", wait=False)


async def test_a_timeout_leaves_the_message_in_the_outbox(server: FakeServer) -> None:
    await server.stop()
    async with client(server) as chat:
        with pytest.raises(Timeout):
            await chat.channel("c1").send("later", timeout=0.05)
        assert [one.text for one in chat.outbox] == ["later"]
        waiting = asyncio.ensure_future(next(iter(chat.outbox)).sent())
        await asyncio.sleep(0)
    with pytest.raises(Closed):
        await waiting


async def test_observers_hear_of_every_send(server: FakeServer) -> None:
    heard: list[Observed] = []
    server.refuse = lambda c: ("forbidden", "never") if c.get("text") == "bad" else None
    async with client(server, observer=heard.append) as chat:
        await chat.channel("c1").send("good", timeout=5)
        with pytest.raises(Refused):
            await chat.channel("c1").send("bad", timeout=5)
    assert [(seen.kind, seen.text, seen.seq) for seen in heard] == [
        ("invoke", "good", None),
        ("ok", "good", 1),
        ("invoke", "bad", None),
        ("fail", "bad", None),
    ]


WRITER = """
import asyncio, sys
from tidings.client.client import Client

async def main():
    async with Client(sys.argv[1], token="user:alice", device="phone", store=sys.argv[2]) as chat:
        for n in range(5):
            await chat.channel("c1").send(f"written {n}", key=f"k{n}", wait=False)
        print("written", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_messages_survive_the_death_of_the_program_and_are_sent_once(server: FakeServer, tmp_path: Path) -> None:
    store = tmp_path / "chat.db"
    # The dying program gets every message to the server but never learns of it, or never gets a connection.
    for reachable in (False, True):
        if reachable:
            server.lose_replies = 1000
        else:
            await server.stop()
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, server.url, str(store), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert program.stdout is not None
            assert await asyncio.wait_for(program.stdout.readline(), 20) == b"written\n"
            if reachable:
                await until(lambda: server.texts("c1"))
        finally:
            os.kill(program.pid, signal.SIGKILL)
            await program.wait()
        server.lose_replies = 0
        if not reachable:
            await server.start()
        async with client(server, store=store) as chat:
            assert [one.key for one in chat.outbox] == [f"k{n}" for n in range(5)]
            await chat.flush(10)
        assert server.texts("c1") == [f"written {n}" for n in range(5)]
        server.streams.pop("c1")
        server.keys.clear()


async def test_positions_survive_a_restart_and_what_was_not_taken_comes_again(
    server: FakeServer, tmp_path: Path
) -> None:
    async with client(server, store=tmp_path / "a.db") as chat:
        await chat.wait_connected(5)
        events = chat.events()
        for n in range(5):
            server.append("c1", text=str(n))
        await take(events, 3)
    server.append("c1", text="while away")
    server.append("c2", text="quiet until now")
    async with client(server, store=tmp_path / "a.db") as chat:
        assert [event.seq for event in await take(chat.events("c1"), 4)] == [3, 4, 5, 6]
    assert "since" in server.connects[1]


async def test_a_mark_does_not_vouch_for_events_that_were_not_taken(server: FakeServer, tmp_path: Path) -> None:
    server.heartbeat = 1
    async with client(server, store=tmp_path / "a.db") as chat:
        await chat.wait_connected(5)
        events = chat.events()
        server.append("c1", text="1")
        server.append("c1", text="2")
        await take(events, 1)
        # The server's mark is now newer than both events, one of which has not reached the application.
        await until(lambda: chat._following.mark == "2")
    async with client(server, store=tmp_path / "a.db") as chat:
        assert [event.seq for event in await take(chat.events(), 2)] == [1, 2]
    assert server.connects[1]["since"] == "2"


async def test_a_store_is_bound_to_its_user_and_device(server: FakeServer, tmp_path: Path) -> None:
    store = tmp_path / "a.db"
    async with client(server, store=store) as chat:
        await chat.wait_connected(5)
        with pytest.raises(StoreInUse):
            await client(server, store=store).open()
    with pytest.raises(StoreMismatch):
        await client(server, store=store, device="other").open()
    async with client(server, store=store, token="user:mallory") as chat:
        with pytest.raises(StoreMismatch):
            await chat.wait_connected(5)
        assert not any(c["type"] == "message.send" for c in server.commands)


async def test_a_store_that_is_not_one_is_refused(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError):
        await client(server, store=tmp_path / "a.db").open()


async def test_a_key_can_wait_only_once(server: FakeServer, tmp_path: Path) -> None:
    await server.stop()
    async with client(server, store=tmp_path / "a.db") as chat:
        await chat.channel("c1").send("one", key="k", wait=False)
        with pytest.raises(StoreError, match="waits in the outbox already"):
            await chat.channel("c1").send("two", key="k", wait=False)
        assert [one.text for one in chat.outbox] == ["one"]


async def test_concurrent_writes_share_a_commit(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "a.db", on_error=lambda error: None)
    await store.open({"device": "d"})
    await asyncio.gather(*(store.add(SavedMessage(n, "c1", f"k{n}", b"{}", 0)) for n in range(500)))
    await store.close()
    saved = await (reopened := FileStore(tmp_path / "a.db", on_error=lambda error: None)).open({"device": "d"})
    assert [message.n for message in saved.outbox] == list(range(500))
    await reopened.close()
