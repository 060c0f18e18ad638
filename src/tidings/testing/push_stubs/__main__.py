"""The stubs as a process, for tests of whole servers: `python -m tidings.testing.push_stubs FOLDER [KIND …]`.

Writes `stubs.json` into the folder when all listen: the URL of each, and what a configuration needs. Every push is a
line in `fcm.jsonl`, `apns.jsonl`, `webpush.jsonl` or `http.jsonl`. Answers are read from `KIND-answers.json`, anew at
each push: `{"*": {"status": 503, "headers": {"retry-after": "1"}}}`. Subscriptions to Web Push are in
`subscriptions.json`. Ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from . import ApnsStub, FcmStub, HookStub, PushStub, WebPushStub
from .apns import KEY_ID, TEAM, TOPIC

SUBSCRIPTIONS = 100


async def main(folder: Path, kinds: list[str]) -> None:
    """Serve until standard input ends."""
    told: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as stack:
        for kind in kinds:
            options: dict[str, Any] = {
                "record": folder / f"{kind}.jsonl",
                "script": folder / f"{kind}-answers.json",
            }
            stub: PushStub
            match kind:
                case "fcm":
                    stub = await stack.enter_async_context(fcm := FcmStub(**options))
                    told[kind] = {"service_account": fcm.service_account(), "endpoint": fcm.url}
                case "apns":
                    stub = await stack.enter_async_context(apns := ApnsStub(folder, **options))
                    config = {"team_id": TEAM, "key_id": KEY_ID, "topic": TOPIC, "private_key": apns.private_key()}
                    told[kind] = {**config, "endpoint": apns.url}
                case "webpush":
                    stub = await stack.enter_async_context(webpush := WebPushStub(**options))
                    given = [json.loads(webpush.subscribe(name=f"browser-{n}")) for n in range(SUBSCRIPTIONS)]
                    (folder / "subscriptions.json").write_text(json.dumps(given), encoding="utf-8")
                    told[kind] = {"url": webpush.url}
                case _:
                    stub = await stack.enter_async_context(hook := HookStub(**options))
                    told[kind] = {"url": f"{hook.url}/push", "secrets": [hook.secret]}
            assert stub.port
        # In one piece, for who waits for it to appear.
        unfinished = folder / "stubs.json.part"
        unfinished.write_text(json.dumps(told), encoding="utf-8")
        unfinished.rename(folder / "stubs.json")
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="*", default=["fcm", "apns", "webpush", "http"])
    arguments = parser.parse_args()
    asyncio.run(main(arguments.folder, arguments.kinds))
