"""The stubs as a process of their own, for tests of whole servers."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import msgspec

from tests.push.conftest import APNS_TOKEN, FCM_TOKEN, HELLO, POLICY, VAPID_KEY
from tidings.server.clock import SystemClock
from tidings.server.push.factory import PushProviders
from tidings.wire.push import PushConfig


async def test_the_stubs_run_beside_a_server(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidings.testing.push_stubs", str(tmp_path), stdin=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(30):
            while not (tmp_path / "stubs.json").exists():
                assert process.returncode is None
                await asyncio.sleep(0)
        told = json.loads((tmp_path / "stubs.json").read_text())
        [subscription, *_] = json.loads((tmp_path / "subscriptions.json").read_text())
        told["webpush"] = {"subject": "mailto:a@clinic.example", "private_key": VAPID_KEY}
        tokens = {
            "fcm": FCM_TOKEN,
            "apns": APNS_TOKEN,
            "webpush": json.dumps(subscription),
            "http": "patient@example.org",
        }
        providers = PushProviders(POLICY, SystemClock(), trusted=str(tmp_path / "apns-cert.pem"))
        for kind, token in tokens.items():
            config = msgspec.convert({"kind": kind, **told[kind]}, PushConfig)
            provider = providers.open(providers.check(config))
            assert (await provider.send(token, HELLO)).kind == "accepted"
            script = {"*": {"status": 503, "headers": {"retry-after": "3"}}}
            (tmp_path / f"{kind}-answers.json").write_text(json.dumps(script))
            answer = await provider.send(token, HELLO)
            assert (answer.kind, answer.retry_after) == ("retry", 3)
            lines = (tmp_path / f"{kind}.jsonl").read_text().splitlines()
            assert len(lines) == 2
            assert "You have a new message" in lines[0]
        await providers.aclose()
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert await process.wait() == 0
