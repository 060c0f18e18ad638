"""Nothing readable where it does not belong: at rest, in logs, errors, metrics; nor believed when it was moved."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests import postgres
from tests.checks.house import SOCKET_PATH, House, Wire, open_house
from tidings.testing.rawsocket import TEXT

# Found nowhere by accident, in any of the forms in which a writer may have put it down.
CANARY = "Zq7canaryXw"


def forms(text: str) -> Iterator[bytes]:
    yield text.encode()
    yield text.encode("utf-16-le")
    yield text.encode("utf-16-be")
    yield text.encode().hex().encode()
    yield text[::-1].encode()
    for shift in range(3):
        # The middle of a Base64 text does not depend on what stands around it, but on where it begins.
        encoded = base64.b64encode(b"\0" * shift + text.encode())
        yield encoded[4 if shift else 0 : len(encoded) - 4]


def found_in(folder: Path, text: str) -> list[str]:
    """Files below the folder that hold the text in some form."""
    needles = list(forms(text))
    hits = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            hits += [f"{path.name}: {needle!r}" for needle in needles if needle in data]
    return hits


async def tell_secrets(house: House) -> tuple[str, str]:
    """Put a canary into every field that holds content; the channel and a message in it."""
    rest = house.rest
    await rest.users.create(
        "ann", name=f"Ann {CANARY}", avatar_url=f"https://example.org/{CANARY}.png", custom={"note": CANARY}
    )
    await house.users("bob")
    made = await rest.channels.create(
        type="group", name=f"About {CANARY}", description=CANARY, members=["ann", "bob"], custom={"case": CANARY}
    )
    ann = await house.wire("ann")
    sent = await ann.send(
        made.id,
        f"a message with {CANARY}",
        key="k1",
        custom={"inside": CANARY},
        attachments=[{"type": "file", "title": f"{CANARY}.pdf", "url": f"https://example.org/{CANARY}"}],
    )
    assert sent["type"] == "message.sent", sent
    await ann.ask("message.edit", channel=made.id, id=sent["id"], text=f"edited {CANARY}")
    gone = await ann.send(made.id, f"soon deleted {CANARY}", key="k2")
    await ann.ask("message.delete", channel=made.id, id=gone["id"])
    await rest.channels.update(made.id, name=f"Now about {CANARY}")
    await rest.as_user("ann").me.update(name=f"Ann again {CANARY}")
    await ann.ask("history", channel=made.id)
    return made.id, sent["id"]


async def test_h1_no_plaintext_at_rest(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        channel, _ = await tell_secrets(house)
        history = await house.rest.request("GET", f"/v1/channels/{channel}/messages")
        assert CANARY.encode() in history, "the canary is not where it belongs: this would show nothing"
        # While the log of the database is in use, after a kill, and after an orderly stop.
        assert found_in(tmp_path, CANARY) == []
        if house.store_url:
            # Its tables are written at a checkpoint, its log before.
            postgres.query(house.store_url, "CHECKPOINT")
            assert found_in(postgres.server().folder, CANARY) == []
        else:
            assert (house.server.data / "tidings.db-wal").stat().st_size > 0
        await house.server.restart()
        assert found_in(tmp_path, CANARY) == []
        await house.rest.request("GET", f"/v1/channels/{channel}/messages")
        await house.server.terminate()
        assert found_in(tmp_path, CANARY) == []
        # What this search would have found.
        (tmp_path / "data" / "probe").write_bytes(b"x" + CANARY.encode("utf-16-le"))
        assert len(found_in(tmp_path, CANARY)) == 1


async def test_s8_no_token_and_no_content_in_logs_errors_metrics_and_addresses(tmp_path: Path) -> None:
    async with open_house(tmp_path, TIDINGS_LOG_LEVEL="debug") as house:
        channel, message = await tell_secrets(house)
        token = house.token("ann", jti="canary-token")
        signature = token.rpartition(".")[2]
        said: list[str] = []
        async with httpx.AsyncClient(base_url=house.server.url) as http:
            for headers in (
                {"Authorization": f"Bearer {token}"},
                {"Authorization": f"Bearer {token}x"},
                {"Authorization": f"Bearer {house.api_key}x"},
            ):
                for method, path, body in (
                    ("POST", f"/v1/channels/{channel}/messages", {"key": "e", "text": CANARY, "wrong": CANARY}),
                    ("POST", f"/v1/channels/{channel}/messages", {"key": "e", "text": [CANARY]}),
                    ("POST", f"/v1/channels/{channel}/messages", {"key": "k1", "text": CANARY}),
                    ("PATCH", f"/v1/channels/{channel}/messages/{message}", {"text": CANARY * 5000}),
                    ("POST", "/v1/channels", {"type": CANARY, "name": CANARY}),
                    ("GET", "/v1/me", None),
                ):
                    answer = await http.request(method, path, json=body, headers=headers)
                    if answer.status_code >= 400:
                        said.append(answer.text)
            # A token in an address is nobody's credential, on either door.
            answer = await http.get(f"/v1/me?token={token}&access_token={token}")
            assert answer.status_code == 401
            said.append(answer.text)
            said.append((await http.get("/metrics", headers={"Authorization": f"Bearer {house.api_key}"})).text)
        wire = await Wire.open(house.server.port)
        await wire.raw.send_frame(TEXT, b'{"type":"connect","token":"%s' % token.encode())
        await wire.until_closed()
        said += [str(frame) for frame in wire.frames]
        wire.raw.abort()
        raw = await Wire.open(house.server.port)
        reply = await raw.ask("connect", token=token + "x", device={"id": "d"})
        said.append(str(reply))
        ann = await house.wire("ann", token=token)
        said.append(str(await ann.ask("message.send", channel=channel, key="k1", text=CANARY)))
        said.append(str(await ann.ask("message.send", channel=channel, key="k9", text=[CANARY])))
        for path in (f"{SOCKET_PATH}?token={token}",):
            async with httpx.AsyncClient(base_url=house.server.url) as http:
                said.append((await http.get(path)).text)
        await house.server.terminate()
        logs = house.server.stdout_path.read_text() + house.server.stderr_path.read_text()
        # The secrets of the first app are shown once, on purpose.
        logs = logs.replace(house.api_key, "").replace(house.secret, "")
        for name, text in (("an answer", "\n".join(said)), ("the logs", logs)):
            for secret in (signature, token, house.api_key.split("_", 2)[2], house.secret):
                assert secret not in text, f"a credential is in {name}"
        assert CANARY not in logs
        assert len(said) >= 15
        for text in said:
            assert CANARY not in text, f"an error repeats content: {text[:300]}"


def _alter(house: House, statement: str, *values: object) -> None:
    if house.store_url:
        assert len(postgres.query(house.store_url, statement + " RETURNING 1", *values)) == 1
        return
    with closing(sqlite3.connect(house.database)) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


@pytest.mark.parametrize("damage", ["flip", "swap", "swap-channel", "truncated"])
async def test_h2_moved_or_edited_ciphertext_is_refused(tmp_path: Path, damage: str) -> None:
    async with open_house(tmp_path) as house:
        await house.users("ann")
        here, there = await house.channel("ann"), await house.channel("ann")
        ann = await house.wire("ann")
        for channel in (here, there):
            for number in range(2):
                await ann.send(channel, f"{channel} {number}", key=f"k{number}")
        sids = [house.sid(channel) for channel in (here, there)]
        sealed = dict(house.sql("SELECT seq, sealed FROM messages WHERE sid=?", sids[0]))
        first, second = sorted(sealed)
        other = house.sql("SELECT sealed FROM messages WHERE sid=? AND seq=?", sids[1], first)[0][0]
        await house.server.terminate()
        bad = {
            "flip": bytes([*sealed[first][:-20], sealed[first][-20] ^ 1, *sealed[first][-19:]]),
            "swap": sealed[second],
            "swap-channel": other,
            "truncated": sealed[first][:-1],
        }[damage]
        _alter(house, "UPDATE messages SET sealed=? WHERE sid=? AND seq=?", bad, sids[0], first)
        await house.server.start()
        async with httpx.AsyncClient(base_url=house.server.url) as http:
            headers = {"Authorization": f"Bearer {house.token('ann')}"}
            for path in (f"/v1/channels/{here}/messages", f"/v1/channels/{here}/events?after={first - 1}"):
                answer = await http.get(path, headers=headers)
                assert answer.status_code >= 500, f"{path} believed it: {answer.text[:300]}"
                assert f"{here} 1" not in answer.text
                assert there not in answer.text
            # What was not touched is read as before.
            answer = await http.get(f"/v1/channels/{there}/messages", headers=headers)
            assert answer.status_code == 200
            assert f"{there} 1" in answer.text
