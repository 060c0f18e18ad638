"""The same scenarios for every SDK: see README.md."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.player import Player, playing

HERE = Path(__file__).parent
# `make mutants` names another one.
SDK = Path(os.environ.get("MUTANTS_SDK", HERE.parents[1] / "sdk"))
SCENARIOS: list[dict[str, Any]] = json.loads((HERE / "scenarios.json").read_text())
DRIVERS = {
    "python": [sys.executable, str(HERE / "drivers/python_driver.py")],
    "javascript": ["node", str(SDK / "js/test/conformance_driver.js")],
}
PATIENCE_S = 20.0


class Driver:
    """An SDK in a process of its own, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.said: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.said.append(json.loads(line))
            self._changed.set()

    def tell(self, step: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(step).encode() + b"\n")

    def all(self, name: str) -> list[Any]:
        return [said[name] for said in self.said if name in said]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Until what it has said, or what the player has heard, fits."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    self._changed.clear()
                    try:
                        async with asyncio.timeout(0.02):
                            await self._changed.wait()
                    except TimeoutError:
                        continue
        except TimeoutError:
            raise AssertionError(f"{what} did not come about. Said: {self.said}") from None

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), PATIENCE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading


@asynccontextmanager
async def driving(command: list[str], port: int) -> AsyncIterator[Driver]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, f"http://127.0.0.1:{port}", stdin=pipe, stdout=pipe)
    driver = Driver(process)
    try:
        yield driver
    finally:
        await driver.end()


async def expect(step: dict[str, Any], driver: Driver, player: Player) -> None:
    match step["expect"]:
        case "state":
            await driver.until(lambda: driver.all("state")[-1:] == [step["is"]], f"the state {step['is']}")
        case "texts":
            wanted = step["are"]
            await driver.until(lambda: len(driver.all("text")) >= len(wanted), f"{wanted}")
            assert driver.all("text") == wanted
        case "count":
            await driver.until(lambda: len(driver.all("text")) >= step["texts"], f"{step['texts']} messages")
            assert len(driver.all("text")) == len(set(driver.all("text"))) == step["texts"]
        case "sent":
            await driver.until(lambda: step["key"] in driver.all("sent"), f"that {step['key']} is sent")
            found = next(said for said in driver.said if said.get("sent") == step["key"])
            assert found["seq"] == step.get("seq", found["seq"])
        case "failed":
            wanted_failure = {"failed": step["key"], "code": step["code"]}
            await driver.until(lambda: wanted_failure in driver.said, f"{wanted_failure}")
        case "stored":
            assert player.texts() == step["texts"]
        case "stored once":
            assert len(player.texts()) == len(set(player.texts()))
        case "tokens":
            tokens = [frame["token"] for frame in player.of("connect")]
            assert len(set(tokens)) == len(tokens) >= 2
        case "connects":
            await driver.until(lambda: len(player.of("connect")) >= step["count"], f"{step['count']} connections")
        case "quiet":
            before = len(player.of("connect"))
            await asyncio.sleep(step["ms"] / 1000)  # why: nothing must happen in this time
            assert len(player.of("connect")) == before
        case "reset":
            await driver.until(lambda: driver.all("reset") == ["c1"], "a reset")
        case "left":
            await driver.until(lambda: driver.all("left") == ["c1"], "that the channel is left")
        case "not asked for":
            last = player.heard.index(player.of("connect")[-1])
            asked = [frame for frame in player.heard[last:] if frame["type"] == "sync"]
            assert all(step["stream"] not in frame["positions"] for frame in asked)
        case other:
            raise ValueError(f"no such step: {other}")


@pytest.mark.parametrize("sdk", list(DRIVERS))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=[one["name"] for one in SCENARIOS])
async def test_it_does_as_the_scenario_says(scenario: dict[str, Any], sdk: str) -> None:
    if sdk == "javascript" and (shutil.which("node") is None or not (SDK / "node_modules").is_dir()):
        pytest.skip("Node is not installed: `make setup` says what is missing")
    async with playing() as player, driving(DRIVERS[sdk], player.port) as driver:
        for step in scenario["steps"]:
            if "client" in step:
                driver.tell(step)
            elif "server" in step:
                await player.do(step)
            else:
                await expect(step, driver, player)
        # Nothing was told twice, nor out of order, but for a history that was replaced.
        if not driver.all("reset"):
            seqs = [said["seq"] for said in driver.said if "text" in said]
            assert seqs == sorted(set(seqs))
