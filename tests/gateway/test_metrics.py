"""What a node counts about itself, seen as monitoring sees it."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tidings.server
from tidings.server.clock import SystemClock
from tidings.server.errors import StoreUnavailable
from tidings.server.jobs import health
from tidings.server.store.base import Store
from tidings.server.telemetry import Metrics

from .world import Node


def scraped(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and labels, as `name{label}`."""
    return {
        sample.name + "".join(f"{{{value}}}" for name, value in sample.labels.items() if name != "le"): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if "le" not in sample.labels
    }


async def test_a_slow_reader_shows_as_a_number_until_it_has_caught_up(node: Node) -> None:
    await node.channel("c1", "alice", "bob")
    bob = await node.connect("bob")
    await node.connect("alice")
    now = scraped(node.core.metrics)
    assert (now["tidings_users"], now["tidings_behind"], now["tidings_paused"]) == (2, 0, 0)
    assert now["tidings_streams"] == 4
    bob.pause()
    for _ in range(5):
        await node.send("c1")
    now = scraped(node.core.metrics)
    assert (now["tidings_behind"], now["tidings_behind_events"], now["tidings_paused"]) == (1, 5, 1)
    bob.resume()
    await bob.got("c1", await node.head("c1"))
    await bob.until(lambda: not bob.behind)
    now = scraped(node.core.metrics)
    assert (now["tidings_behind"], now["tidings_behind_events"], now["tidings_paused"]) == (0, 0, 0)


async def test_a_send_is_timed_from_its_frame_to_its_answer(node: Node) -> None:
    await node.channel("c1", "alice")
    alice = await node.connect("alice")
    # The first one loads what has to be known; from then on it is decided from memory.
    await alice.ask("message.send", channel="c1", key="k1", text="one")
    timed = scraped(node.core.metrics)["tidings_send_seconds_count"]
    await alice.ask("message.send", channel="c1", key="k2", text="two")
    now = scraped(node.core.metrics)
    assert now["tidings_send_seconds_count"] == timed + 1
    assert now["tidings_sends_total{stored}"] == 2
    assert now["tidings_commands_total{message.send}"] == 1


async def test_what_is_refused_is_counted_by_its_reason(node: Node) -> None:
    stranger = node.peer()
    stranger.say("connect", token="no.such.token", device={"id": "d"})
    await stranger.until(lambda: stranger.closed_with is not None)
    assert any(
        name.startswith("tidings_auth_refused_total{token_") and value == 1
        for name, value in scraped(node.core.metrics).items()
    )
    alice = await node.connect("alice")
    for number in range(300):
        alice.say("ping", ref=number)
    assert scraped(node.core.metrics)["tidings_rate_limited_total{socket}"] > 0


async def test_the_process_is_among_them(node: Node) -> None:
    now = scraped(node.core.metrics)
    assert now["process_open_fds"] > 0
    assert now["process_max_fds"] > 0


class Sick:
    """A store that can be made to fail and to hang."""

    def __init__(self) -> None:
        self.failing = False
        self.hanging = False

    async def read(self, unit: object) -> None:
        if self.hanging:
            await asyncio.Event().wait()
        if self.failing:
            raise StoreUnavailable("it is away")


@pytest.mark.parametrize("how", ["failing", "hanging"])
async def test_a_store_that_does_not_answer_is_down_and_comes_back(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.001)
    monkeypatch.setattr(health, "PROBE_SECONDS_MAX", 0.02)
    store, metrics = Sick(), Metrics()
    probing = asyncio.ensure_future(health.probe_store(as_store(store), metrics, SystemClock()))
    try:
        for sick in (False, True, False):
            setattr(store, how, sick)
            async with asyncio.timeout(10):
                while metrics.store_up.value == sick:
                    await asyncio.sleep(0)
    finally:
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)
    assert sum(metrics.store_probe_seconds.counts) >= 3


def as_store(store: Sick) -> Store:
    return store  # type: ignore[return-value]


def test_every_metric_that_is_declared_is_counted_somewhere() -> None:
    declared = set(re.findall(r"self\.(\w+) = self\._\w+\(", inspect.getsource(Metrics.__init__)))
    root = Path(next(iter(tidings.server.__path__)))
    source = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "telemetry.py")
    source += inspect.getsource(inspect.getmodule(Metrics)).partition("async def watch_event_loop")[2]  # type: ignore[arg-type]
    never = {name for name in declared if not re.search(rf"metrics\.{name}\b", source)}
    assert len(declared) > 20
    assert not never, f"declared and never counted: {never}"
