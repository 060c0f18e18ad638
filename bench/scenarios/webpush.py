"""Web Push: what it costs to encrypt and send one, to a sink on this machine, with TLS as push services have it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from bench.measure import Findings, at_least
from bench.plan import Plan
from bench.server import scratch
from bench.sink import sink
from tidings.server.clock import SystemClock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.push.base import Notification, Provider
from tidings.server.push.factory import PushProviders
from tidings.server.push.webpush import SUBSCRIPTIONS_KEPT, encoded, encrypt, public_bytes, read_subscription
from tidings.testing.push_stubs.apns import write_certificate
from tidings.wire.push import WebPushConfig

SENDS = 20_000
# Sends that wait for an answer at once, as a worker would have them.
UNDER_WAY = 64
# More than are remembered: each one is read anew, as in a server with many users.
BROWSERS = 2 * SUBSCRIPTIONS_KEPT
NOTIFICATION = Notification(
    id="m_01HV3Y7Q9K8X6W5T4S3R2P1N0M",
    title="Clinic",
    body="You have a new message",
    data={"channel": "ch_7f3k", "message": "m_01HV3Y7Q9K8X6W5T4S3R2P1N0M", "seq": "1042"},
    badge=3,
    collapse_key="ch_7f3k",
)


async def run(plan: Plan, findings: Findings) -> None:
    with scratch() as folder:
        certificate, key = folder / "cert.pem", folder / "key.pem"
        write_certificate(certificate, key)
        for tls in (True, False):
            async with sink(*((certificate, key) if tls else ())) as port:
                scheme = "https" if tls else "http"
                browsers = [subscription(f"{scheme}://127.0.0.1:{port}/push/{n}") for n in range(BROWSERS)]
                providers = PushProviders(
                    OutboundPolicy(networks=("127.0.0.1/32",)), SystemClock(), trusted=str(certificate)
                )
                vapid = encoded(generate_private_key(SECP256R1()).private_numbers().private_value.to_bytes(32))
                config = WebPushConfig(subject="mailto:push@clinic.example", private_key=vapid)
                provider = providers.open(providers.check(config))
                await _send(provider, browsers[:UNDER_WAY], UNDER_WAY * 4)
                for _ in range(plan.runs):
                    await _measure(plan, findings, provider, browsers, tls=tls)
                await providers.aclose()
    await _encryption(plan, findings)
    findings.note(
        f"{UNDER_WAY} sends under way, {BROWSERS:,} browsers in turn, so that each subscription is read anew; CPU is "
        "of the sending process. A key and a salt for every push, one VAPID token for all."
    )


async def _measure(plan: Plan, findings: Findings, provider: Provider, browsers: list[str], *, tls: bool) -> None:
    count = plan.size(SENDS, 2_000)
    began, cpu = time.perf_counter(), time.process_time()
    await _send(provider, browsers, count)
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    how = "over TLS" if tls else "without TLS"
    findings.add(f"encrypted and sent per core-second, {how}", count / spent, "/s", at_least(2_000) if tls else None)
    findings.add(f"CPU per push, {how}", spent / count * 1e6, "µs")
    findings.add(f"by the clock, {how}", count / seconds, "/s")


async def _encryption(plan: Plan, findings: Findings) -> None:
    to = read_subscription(subscription("https://push.example/1"))
    count = plan.size(5_000, 500)
    for _ in range(plan.runs):
        cpu = time.process_time()
        for _ in range(count):
            encrypt(b"x" * 300, to, salt=os.urandom(16), key=generate_private_key(SECP256R1()))
        findings.add("of it for the encryption", (time.process_time() - cpu) / count * 1e6, "µs")


async def _send(provider: Provider, browsers: list[str], count: int) -> None:
    turns = iter(itertools.islice(itertools.cycle(browsers), count))

    async def sender() -> None:
        for token in turns:
            told = await provider.send(token, NOTIFICATION)
            assert told.kind == "accepted", told

    async with asyncio.TaskGroup() as group:
        for _ in range(UNDER_WAY):
            group.create_task(sender())


def subscription(endpoint: str) -> str:
    """What a browser gives, made up."""
    public = encoded(public_bytes(generate_private_key(SECP256R1()).public_key()))
    return json.dumps({"endpoint": endpoint, "keys": {"p256dh": public, "auth": encoded(os.urandom(16))}})
