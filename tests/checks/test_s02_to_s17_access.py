"""Who may see what, at the moment when it changes; and how often anybody may ask."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.auth.attack_corpus import AttackKeys, vectors
from tests.checks.house import House, Wire, open_house
from tidings.server.services.signing import AppKeys
from tidings.testing.rawsocket import HandshakeRefused

pytestmark = pytest.mark.asyncio(loop_scope="module")

# DESIGN 6: revocation reaches live sockets within seconds; CHECKS S6 names five.
REVOKED_WITHIN_S = 5.0


async def test_s2_a_removed_member_gets_nothing_after_the_removal_was_acknowledged(house: House) -> None:
    await house.users("rex", "sue", "tom")
    channel = await house.channel("rex", "sue", "tom")
    stop = asyncio.Event()

    async def flood() -> None:
        wire = await house.wire("sue")
        number = 0
        while not stop.is_set():
            await asyncio.gather(*(wire.send(channel, "x", key=f"{number + n}") for n in range(8)))
            number += 8

    flooding = asyncio.create_task(flood())
    tom = await house.wire("tom", device="watch")
    try:
        for round in range(12):
            sockets = [await house.wire("rex", device=f"d{number}") for number in range(2)]
            # One of them is reading the log at the moment of the removal, the other one is live.
            await sockets[1].post("sync", positions={channel: {"seq": 0}})
            await sockets[0].until(lambda wire=sockets[0]: len(wire.seqs(channel)) > 20, "the flood came")
            await house.rest.members.remove(channel, "rex")
            acknowledged = (await house.rest.streams.events(channel, 0, limit=1)).head
            for wire in sockets:
                # What comes before the answer to a ping was sent before it.
                await wire.ask("ping")
            removal = house.sql(
                "SELECT max(seq) FROM events WHERE sid=? AND type='member.removed'", house.sid(channel)
            )[0][0]
            assert removal <= acknowledged
            for wire in sockets:
                assert max(wire.seqs(channel)) < removal, f"round {round}: was shown something behind the removal"
                count = len(wire.seqs(channel))
                reply = await wire.ask("history", channel=channel)
                assert reply.get("code") == "not_found"
                reply = await wire.ask("sync", positions={channel: {"seq": 0}})
                assert reply["refused"][channel]["code"] == "not_found"
                reply = await wire.send(channel, "let me in", key=f"r{round}")
                assert reply.get("code") == "not_found"
                assert len(wire.seqs(channel)) == count
            assert not any(
                frame["type"] in ("typing", "receipts") and frame.get("channel") == channel
                for wire in sockets
                for frame in wire.frames[_place(wire, removal) :]
            )
            rest = house.rest.as_user("rex")
            for path in ("", "/messages", "/events?after=0", "/members", "/receipts"):
                with pytest.raises(Exception, match="not_found"):
                    await rest.request("GET", f"/v1/channels/{channel}{path}")
            await house.rest.members.add(channel, ["rex"])
            for wire in sockets:
                await wire.close()
    finally:
        stop.set()
        await flooding
    await tom.until(lambda: any(e["type"] == "member.removed" for e in tom.events), "the others were told")


def _place(wire: Wire, removal: int) -> int:
    """Where in its frames a device learned that it is out."""
    for number, frame in enumerate(wire.frames):
        if frame["type"] == "channel.left":
            return number
    return len(wire.frames)


async def test_s4_the_attack_corpus_is_refused_by_rest_and_by_the_socket(house: House) -> None:
    await house.users("alice")
    await house.channel("alice")
    (kid,) = [key.kid async for key in house.rest.app.signing_keys()]
    keys = AttackKeys(hs_kid=kid, hs_secret=house.secret.encode())
    corpus = vectors(AppKeys(house.app, ()), keys, int(time.time() * 1000))
    assert len(corpus) >= 30
    async with httpx.AsyncClient(base_url=house.server.url) as http:
        good = await http.get("/v1/me", headers=_bearer(house.token("alice")))
        assert good.status_code == 200, good.text
        for vector in corpus:
            if _fits_a_header(vector.token):
                answer = await http.get("/v1/me", headers=_bearer(vector.token) | {"Tidings-App": house.app})
                assert answer.status_code in (400, 401, 431), f"REST let in: {vector.name}"
                if answer.status_code == 401:
                    assert answer.json()["code"] in vector.codes | {"unauthenticated"}, vector.name
            wire = await Wire.open(house.server.port)
            frame = {"token": vector.token, "app": house.app, "device": {"id": "d1"}}
            try:
                reply = await wire.ask("connect", **frame)
            except ConnectionError:
                reply = {"type": "closed"}
            assert reply["type"] != "connected", f"the socket let in: {vector.name}"
            if reply["type"] == "error":
                assert reply["code"] in vector.codes | {"invalid", "invalid_field", "unauthenticated", "too_large"}, (
                    vector.name
                )
            closed = await wire.until_closed()
            assert closed.code in (None, 1009) or closed.code >= 4400, vector.name
            await wire.close()
            if _fits_a_header(vector.token):
                headed = None
                try:
                    headed = await Wire.open(house.server.port, headers=_bearer(vector.token))
                    reply = await headed.ask("connect", device={"id": "d1"}, app=house.app)
                    assert reply["type"] == "error", f"the socket's header let in: {vector.name}"
                except (HandshakeRefused, ConnectionError):
                    pass
                finally:
                    if headed is not None:
                        await headed.close()


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _fits_a_header(token: str) -> bool:
    # What an HTTP library will not even send says nothing about the server.
    return bool(token) and token.isascii() and token.isprintable() and token == token.strip() and len(token) < 60_000


async def test_s6_revoking_disabling_and_expiry_end_live_sockets_within_seconds(house: House) -> None:
    await house.users("uma", "vic", "wes", "xia", "yan")
    channel = await house.channel("uma", "vic", "wes", "xia", "yan")
    yan = await house.wire("yan")
    one = await house.wire("uma", device="d1", token=house.token("uma", jti="first"))
    other = await house.wire("uma", device="d2", token=house.token("uma", jti="second"))
    vic = await house.wire("vic")
    wes = await house.wire("wes")
    xia = await house.wire("xia", token=house.token("xia", seconds=4))

    await house.rest.users.revoke_tokens("uma", jti="first")
    assert (await one.until_closed(REVOKED_WITHIN_S)).code == 4401
    assert (await other.ask("ping"))["type"] == "pong", "another token of hers lives on"
    refused = await (await Wire.open(house.server.port)).ask(
        "connect", token=house.token("uma", jti="first"), device={"id": "d1"}
    )
    assert refused["code"] == "token_revoked"

    await house.rest.users.revoke_tokens("vic")
    assert (await vic.until_closed(REVOKED_WITHIN_S)).code == 4401
    await house.rest.users.deactivate("wes")
    assert (await wes.until_closed(REVOKED_WITHIN_S)).code == 4503
    closed = await xia.until_closed(4 + REVOKED_WITHIN_S)
    assert closed.code == 4401
    counts = [len(wire.seqs(channel)) for wire in (one, vic, wes, xia)]
    await yan.send(channel, "they are gone", key="k")
    assert [len(wire.seqs(channel)) for wire in (one, vic, wes, xia)] == counts


async def test_s6_a_fresh_token_in_time_keeps_the_socket_and_a_strangers_does_not_change_whose_it_is(
    house: House,
) -> None:
    await house.users("zoe", "abe")
    wire = await house.wire("zoe", token=house.token("zoe", seconds=4))
    reply = await wire.ask("authenticate", token=house.token("abe"))
    assert reply["type"] == "error"
    reply = await wire.ask("authenticate", token=house.token("zoe", seconds=600))
    assert reply["type"] == "authenticated"
    assert (await wire.ask("ping"))["type"] == "pong"
    assert wire.frames[0]["user"] == "zoe"


async def test_s17_rest_and_socket_take_from_one_bucket(tmp_path: Path) -> None:
    burst = 60
    settings = {
        "TIDINGS_REST_RATE_PER_SECOND": "0.5",
        "TIDINGS_REST_BURST": str(burst),
        "TIDINGS_SESSION_RATE_PER_SECOND": "1000",
        "TIDINGS_SESSION_BURST": "1000",
    }
    async with open_house(tmp_path, **settings) as house:
        await house.users("ann")
        channel = await house.channel("ann")
        wire = await house.wire("ann")
        token = house.token("ann")
        async with httpx.AsyncClient(base_url=house.server.url, headers=_bearer(token)) as http:
            taken = refused = 0
            for number in range(burst):
                reply, answer = await asyncio.gather(
                    wire.send(channel, "x", key=f"k{number}"), http.get(f"/v1/channels/{channel}")
                )
                for ok, code in (
                    (reply["type"] == "message.sent", reply.get("code")),
                    (answer.status_code == 200, answer.json().get("code")),
                ):
                    taken += ok
                    refused += not ok
                    assert ok or code == "rate_limited"
            # Both doors together had no more than one burst, and what came back meanwhile.
            assert burst - 2 <= taken <= burst + 15, taken
            assert refused >= burst - 15
            answer = await http.get("/v1/me")
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
            assert re.fullmatch(r'"\w+";q=\d+;w=\d+', answer.headers["ratelimit-policy"])
            assert re.fullmatch(r'"\w+";r=\d+;t=\d+', answer.headers["ratelimit"])


async def test_s5_a_flood_of_unknown_kids_on_the_socket_fetches_keys_once(house: House, tmp_path: Path) -> None:
    fetched = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal fetched
        await reader.readuntil(b"\r\n\r\n")
        fetched += 1
        body = b'{"keys":[]}'
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()
        writer.close()

    stub = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = stub.sockets[0].getsockname()[1]
    async with stub, open_house(tmp_path, TIDINGS_JWKS_ALLOW_HOSTS="127.0.0.1") as own:
        await own.users("ann")
        await own.rest.app.create_identity_provider(f"http://127.0.0.1:{port}/jwks.json", algorithms=["RS256"])
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        now = int(time.time())
        claims = {"sub": "ann", "app": own.app, "iat": now, "exp": now + 60}

        async def knock(number: int) -> None:
            token = jwt.encode(claims, key, "RS256", headers={"kid": f"unknown{number}"})
            wire = await Wire.open(own.server.port)
            reply = await wire.ask("connect", token=token, device={"id": "d"})
            assert reply["code"] == "token_key_unknown"
            await wire.close()

        for start in range(0, 60, 20):
            await asyncio.gather(*(knock(start + number) for number in range(20)))
        assert fetched <= 1, f"{fetched} fetches"
