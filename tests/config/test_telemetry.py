"""What leaves through logs and metrics, and what does not."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from tidings.server.clock import SystemClock
from tidings.server.telemetry import (
    OTHER,
    SERIES_MAX,
    WITHHELD,
    Metrics,
    get_logger,
    setup_logging,
    watch_event_loop,
)

CANARY = "canary-7f3a"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def stream() -> io.StringIO:
    output = io.StringIO()
    setup_logging(format="json", stream=output)
    return output


def test_an_event_is_one_line_with_its_fields(stream: io.StringIO) -> None:
    get_logger("tidings.x").info("channel.created", channel="c1", members=3)
    (event,) = logged(stream)
    assert event.pop("at").endswith("Z")
    assert event == {"level": "info", "event": "channel.created", "module": "tidings.x", "channel": "c1", "members": 3}


@pytest.mark.parametrize(
    "field",
    ["text", "body", "token", "secret", "Authorization", "password", "custom", "name", "access_token", "Set-Cookie"],
)
def test_a_field_that_holds_content_is_withheld_at_any_depth(field: str, stream: io.StringIO) -> None:
    get_logger("x").info("e", **{field: CANARY, "outer": {"inner": [{field: CANARY}]}}, deep=[[[[[CANARY]]]]])
    assert CANARY not in stream.getvalue()
    assert logged(stream)[0][field] == WITHHELD


def test_a_text_that_looks_like_a_token_is_withheld_under_any_name(stream: io.StringIO) -> None:
    jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
    get_logger("x").info("e", url=f"/connect?t={jwt}&y=1", note="tk_abc_0123456789abcdef", header="Bearer zzz")
    for secret in ("eyJ", "0123456789abcdef", "zzz"):
        assert secret not in stream.getvalue()
    assert "y=1" in logged(stream)[0]["url"]


def test_an_object_is_named_and_not_shown(stream: io.StringIO) -> None:
    class Draft:
        def __repr__(self) -> str:
            return CANARY

    get_logger("x").info("e", what=Draft())
    assert logged(stream)[0]["what"] == "<Draft>"


def fail(stream: io.StringIO) -> None:
    try:
        try:
            int(CANARY)
        except ValueError as error:
            raise KeyError(CANARY) from error
    except KeyError:
        get_logger("x").exception("send.failed")


def test_an_exception_is_told_by_type_and_place_without_its_message(stream: io.StringIO) -> None:
    fail(stream)
    assert CANARY not in stream.getvalue()
    outer, inner = logged(stream)[0]["exception"]
    assert (outer["type"], inner["type"]) == ("KeyError", "ValueError")
    assert "test_telemetry.py" in outer["at"][-1]


def test_in_development_an_exception_says_what_it_says() -> None:
    output = io.StringIO()
    setup_logging(format="console", development=True, stream=output)
    fail(output)
    assert CANARY in output.getvalue()


def test_libraries_are_heard_without_what_they_quote(stream: io.StringIO) -> None:
    library = logging.getLogger("somebody.else")
    library.warning("request %s failed", CANARY)
    library.error(f"task died\n{CANARY}")
    library.info("not heard")
    assert CANARY not in stream.getvalue()
    assert [event["template"] for event in logged(stream)] == ["request %s failed", "task died"]


def test_less_severe_events_than_asked_for_are_silent() -> None:
    output = io.StringIO()
    setup_logging(level="warning", format="console", stream=output)
    get_logger("x").info("quiet")
    get_logger("x").warning("loud", channel="c1")
    assert "quiet" not in output.getvalue()
    assert "loud" in output.getvalue()
    assert "channel=c1" in output.getvalue()


def test_metrics_are_exposed_as_prometheus_reads_them() -> None:
    metrics = Metrics()
    metrics.connections.inc(3)
    metrics.connections.dec()
    metrics.rest_requests.labels("/v1/channels", "200").inc(2)
    for value in (1, 2, 3, 10_000):
        metrics.batch_size.observe(value)
    families = {f.name: f for f in text_string_to_metric_families(metrics.exposition().decode())}
    assert families["tidings_connections"].samples[0].value == 2
    (requests,) = [s for s in families["tidings_rest_requests"].samples if s.name.endswith("_total")]
    assert (requests.labels, requests.value) == ({"route": "/v1/channels", "status": "200"}, 2)
    batch = {(s.name, s.labels.get("le")): s.value for s in families["tidings_append_batch_size"].samples}
    assert batch["tidings_append_batch_size_bucket", "1.0"] == 1
    assert batch["tidings_append_batch_size_bucket", "2.0"] == 2
    assert batch["tidings_append_batch_size_bucket", "4.0"] == 3
    assert batch["tidings_append_batch_size_bucket", "+Inf"] == 4
    assert batch["tidings_append_batch_size_count", None] == 4
    assert batch["tidings_append_batch_size_sum", None] == 10_006


def test_every_metric_is_declared_with_a_name_a_unit_and_help() -> None:
    declared = Metrics().declared
    assert len({metric.name for metric in declared}) == len(declared)
    for metric in declared:
        assert metric.help.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_label_values_without_end_become_other() -> None:
    metrics = Metrics()
    for number in range(SERIES_MAX + 50):
        metrics.internal_errors.labels(str(number)).inc()
    series = dict(metrics.internal_errors.series())
    assert len(series) == SERIES_MAX + 1
    assert series[(OTHER,)].value == 50
    with pytest.raises(ValueError, match="route, status"):
        metrics.rest_requests.labels("only one")


async def test_a_blocked_event_loop_is_measured() -> None:
    metrics, clock = Metrics(), SystemClock()
    async with asyncio.timeout(10):
        watch = asyncio.ensure_future(watch_event_loop(metrics, clock))
        while not metrics.event_loop_lag_seconds.total > 0.1:
            until = clock.monotonic() + 0.4
            while clock.monotonic() < until:  # block the loop on purpose
                pass
            await asyncio.sleep(0)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
