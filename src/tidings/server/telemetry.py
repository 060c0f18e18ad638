"""Logs and metrics. They carry identifiers, never content and never secrets.

Logs are events, not sentences: `log.info("channel.created", channel=channel.id)`. Fields whose name says that they hold
content or secrets are withheld, whoever logs them; so are texts that look like tokens, and messages of exceptions and
of libraries, because those quote what they failed on.

Metrics are declared in one list, `Metrics`. They are plain numbers that one thread changes, an order of magnitude
cheaper than prometheus_client's locked ones (0.07 against 0.6 µs), which matters at a hundred thousand deliveries a
second; prometheus_client renders them. A metric that several threads change would lose counts: give each its own.
"""

import asyncio
import logging
import re
import sys
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Generic, Literal, TextIO, TypeVar, cast

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tidings.server.clock import Clock


@contextmanager
def _unseen(package: str) -> Iterator[None]:
    """For imports inside it is as if the package were not installed, unless it is loaded already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


# It would load all of rich, a tenth of the server's start, to draw tracebacks; ours are drawn by `_Explain`.
with _unseen("rich"):
    import structlog

__all__ = [
    "EXPOSITION_TYPE",
    "WITHHELD",
    "Counter",
    "Family",
    "Gauge",
    "Histogram",
    "Metrics",
    "get_logger",
    "setup_logging",
    "watch_event_loop",
]

# --- logs ------------------------------------------------------------------------------------------------------------

WITHHELD: Final = "[withheld]"

# Names of fields that hold content, personal data or secrets. A new kind of content gets its name here.
_WITHHELD_NAMES: Final = frozenset(
    {
        *("text", "body", "content", "html", "plaintext", "ciphertext", "message", "draft", "data", "frame", "payload"),
        *("custom", "preview", "snippet", "query", "q", "name", "display_name", "title", "topic", "description"),
        *("subject", "profile", "avatar", "email", "phone", "labels", "headers", "cookie", "set_cookie"),
        *("token", "jwt", "secret", "password", "passwd", "authorization", "credential", "credentials", "claims"),
        *("api_key", "private_key", "root_key", "app_key", "stream_key", "key_bytes", "signature"),
    }
)
_WITHHELD_ENDINGS: Final = ("_text", "_body", "_token", "_secret", "_password", "_jwt", "_payload")

# Three parts of base64url of which the first begins with {" are a JWT; tk_<id>_<secret> is our API key.
_TOKEN: Final = re.compile(r"eyJ[\w-]{8,}\.[\w-]+\.[\w-]*|tk_[^\s_]+_[\w-]{8,}|[Bb]earer\s+\S+")

# Deeper nesting than any event needs; below it whole values are withheld.
_DEPTH_MAX: Final = 4
# A field is an identifier or a number. Longer texts are something else, and would fill the disk.
_FIELD_CHARACTERS_MAX: Final = 512

Logger = structlog.typing.FilteringBoundLogger
_Event = MutableMapping[str, Any]


def get_logger(name: str) -> Logger:
    """The logger of a module: `log = get_logger(__name__)`."""
    return cast("Logger", structlog.get_logger(module=name))


def _clean(value: object, depth: int = 0) -> object:
    """`value` without what looks like a token, and without objects whose text nobody has vouched for."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            text = value if len(value) <= _FIELD_CHARACTERS_MAX else value[:_FIELD_CHARACTERS_MAX] + "…"
            return _TOKEN.sub(WITHHELD, text)
        case _ if depth == _DEPTH_MAX:
            return WITHHELD
        case Mapping():
            return {str(key): _clean_field(str(key), item, depth + 1) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_clean(item, depth + 1) for item in value]
        case _:
            return f"<{type(value).__name__}>"


def _clean_field(name: str, value: object, depth: int = 0) -> object:
    lowered = name.lower().replace("-", "_")
    if lowered in _WITHHELD_NAMES or lowered.endswith(_WITHHELD_ENDINGS):
        return WITHHELD
    return _clean(value, depth)


def _withhold(_logger: object, _method: str, event: _Event) -> _Event:
    """Last processor before rendering: no field leaves with content in it."""
    for name, value in event.items():
        if name != "exception":  # made by _explain, which has its own rule
            event[name] = _clean_field(name, value)
    return event


class _Explain:
    """Turns `exc_info` into types and places, without the messages (which quote content) unless `messages`."""

    def __init__(self, messages: bool) -> None:
        self._messages = messages

    def __call__(self, _logger: object, _method: str, event: _Event) -> _Event:
        info = event.pop("exc_info", None)
        event.pop("stack_info", None)
        error: BaseException | None
        match info:
            case BaseException():
                error = info
            case (_, BaseException() as raised, _):
                error = raised
            case None | False:
                error = None
            case _:
                error = sys.exc_info()[1]
        if error is not None:
            event["exception"] = list(self._chain(error))
        return event

    def _chain(self, error: BaseException | None) -> Iterator[dict[str, object]]:
        # Bounded: a chain may be long, and may be a ring.
        for _ in range(8):
            if error is None:
                return
            entry: dict[str, object] = {"type": type(error).__qualname__, "at": list(_places(error.__traceback__))}
            if self._messages:
                entry["says"] = str(error)
            if isinstance(error, BaseExceptionGroup):
                entry["of"] = [type(inner).__qualname__ for inner in error.exceptions[:8]]
            yield entry
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _places(tb: TracebackType | None) -> Iterator[str]:
    # Sixteen frames from the inside: the outer ones are the framework's and always the same.
    for frame in traceback.extract_tb(tb)[-16:]:
        name = frame.filename.replace("\\", "/").rpartition("/site-packages/")[2].rpartition("/src/")[2]
        yield f"{name}:{frame.lineno} {frame.name}"


class _Foreign(logging.Handler):
    """Brings what libraries log through `logging` into our format.

    Only the template's first line is kept: arguments and further lines quote requests, tasks and values.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            template = (str(record.msg).splitlines() or [""])[0][:200]
            log = cast("Logger", structlog.get_logger(module=record.name))
            fields: dict[str, Any] = {"template": template}
            if record.exc_info:
                fields["exc_info"] = record.exc_info
            log.log(record.levelno, "library", **fields)
        except Exception:
            self.handleError(record)


class _JsonLines:
    """One JSON object a line, with the event first."""

    def __call__(self, _logger: object, _method: str, event: _Event) -> str:
        ordered = {name: event.pop(name) for name in ("at", "level", "event", "module") if name in event}
        return msgspec.json.encode({**ordered, **event}).decode()


def _console(_logger: object, _method: str, event: _Event) -> str:
    at, level, name = event.pop("at", ""), event.pop("level", ""), event.pop("event", "")
    event.pop("module", None)
    exception = event.pop("exception", None)
    fields = " ".join(f"{key}={value}" for key, value in event.items())
    line = f"{str(at)[11:19]} {level:<7} {name:<28} {fields}".rstrip()
    for entry in exception or ():
        line += f"\n    {entry['type']} {entry.get('says', '')}".rstrip()
        line += "".join(f"\n      {place}" for place in entry["at"])
    return line


def setup_logging(
    *,
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["auto", "json", "console"] = "auto",
    development: bool = False,
    stream: TextIO | None = None,
    fields: Mapping[str, object] | None = None,
) -> None:
    """Set up logging for the process: to `stream` (standard error), at `level` and above. May be called again.

    `development` keeps the messages of exceptions. `fields` are in every line. Libraries are heard from `warning` on.
    """
    everywhere = dict(fields or {})

    def add_fields(logger: object, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**everywhere, **event}

    output = sys.stderr if stream is None else stream
    console = format == "console" or (format == "auto" and output.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            *([add_fields] if everywhere else []),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            _Explain(messages=development),
            _withhold,
            _console if console else _JsonLines(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(output),
        # Tests, and a second call, may set it up anew; a cached logger would keep the first stream.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(max(threshold, logging.WARNING))


# --- metrics ---------------------------------------------------------------------------------------------------------


class Counter:
    """Only rises. `counter.value += n` is the fast way to say `inc(n)`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Add `amount`, which is not negative."""
        self.value += amount


class Gauge:
    """A level: goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        """The level now."""
        self.value = value

    def inc(self, amount: float = 1) -> None:
        """Raise the level."""
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        """Lower the level."""
        self.value -= amount


class Histogram:
    """Counts values by size. `bounds` are upper bounds, inclusive and rising; what is larger is counted too."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total: float = 0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


# Every label value is a series that monitoring keeps for months. Ours are routes, codes and transports: some dozens.
SERIES_MAX: Final = 500
# What further label values are counted under.
OTHER: Final = "other"


_S = TypeVar("_S", Counter, Gauge, Histogram)


class Family(Generic[_S]):
    """A metric with labels. Bind the series once (`self._ok = metrics.sends.labels("ok")`) and count on that."""

    __slots__ = ("_make", "_names", "_series")

    def __init__(self, make: Callable[[], _S], names: tuple[str, ...]) -> None:
        self._make: Callable[[], _S] = make
        self._names = names
        self._series: dict[tuple[str, ...], _S] = {}

    def labels(self, *values: str) -> _S:
        """The series with these label values, made on first use. Beyond SERIES_MAX all values become `other`."""
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self._names):
                raise ValueError(f"this metric has the labels {', '.join(self._names)}")
            if len(self._series) >= SERIES_MAX:
                values = (OTHER,) * len(values)
                if (other := self._series.get(values)) is not None:
                    return other
            series = self._series[values] = self._make()
        return series

    def series(self) -> Iterable[tuple[tuple[str, ...], _S]]:
        """Label values and series, as of now."""
        return list(self._series.items())


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric's entry in the list: `name` with its unit, `help`, names of `labels`."""

    name: str
    help: str
    labels: tuple[str, ...]
    kind: Literal["counter", "gauge", "histogram"]
    series: Callable[[], Iterable[tuple[tuple[str, ...], Counter | Gauge | Histogram]]]


# From a cached read to a stalled disk, in seconds.
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

EXPOSITION_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """Every metric of one server: the one list. Names follow Prometheus: base units, `_total` for counters."""

    def __init__(self) -> None:
        self.declared: list[Declared] = []

        # The gateway
        self.connections = self._gauge("connections", "Open sockets, authenticated or not.")
        self.sessions = self._gauges("sessions", "Authenticated sessions.", "transport")
        self.auth_refused = self._counters("auth_refused_total", "Refused tokens and API keys.", "code")
        self.closes = self._counters("closes_total", "Connections that the server closed.", "code")
        self.rate_limited = self._counters("rate_limited_total", "Commands and requests over a limit.", "limit")
        self.commands = self._counters("commands_total", "Commands that had to be waited for.", "type")
        self.catch_up_events = self._counter("catch_up_events_total", "Events read from the log for a device.")
        self.slow_readers = self._counter("slow_readers_total", "Sockets taken off live delivery to the log.")
        self.behind = self._gauge("behind", "Sessions that read a stream from the log at the moment.")
        self.behind_events = self._gauge("behind_events", "What the furthest behind of them has still to read.")
        self.paused = self._gauge("paused", "Connections whose peer takes less than it is sent.")
        self.users = self._gauge("users", "Users with a session on this node.")
        self.streams = self._gauge("streams", "Streams that this node listens to.")
        self.draining = self._gauge("draining", "1 from being asked to stop until the end.")

        # Delivery
        self.deliveries = self._counter("deliveries_total", "Events written to sockets.")
        self.flush_frames = self._histogram("flush_frames", "Frames written to one socket at once.", _COUNTS)

        # The store
        self.sends = self._counters(
            "sends_total", "Sends over sockets, by outcome: stored, repeated, refused.", "outcome"
        )
        self.send_seconds = self._histogram(
            "send_seconds", "From the frame of a send to its answer, if it was decided from memory.", _SECONDS
        )
        self.commit_seconds = self._histogram("commit_seconds", "One commit with its fsync.", _SECONDS)
        self.batch_size = self._histogram("append_batch_size", "Appends that shared one commit.", _COUNTS)

        self.store_up = self._gauge("store_up", "Whether the store answered when it was last asked.")
        self.store_probe_seconds = self._histogram(
            "store_probe_seconds", "Reading one row, tried every few seconds.", _SECONDS
        )

        # The bus between nodes
        self.bus_connected = self._gauge("bus_connected", "1 while other nodes can be heard and told.")
        self.bus_interests = self._gauge("bus_interests", "Subjects that this node listens to.")
        self.bus_published = self._counter("bus_published_total", "Notices given to the bus.")
        self.bus_received = self._counter("bus_received_total", "Notices of other nodes.")
        self.bus_dropped = self._counter("bus_dropped_total", "Notices that the bus could not take.")
        self.bus_reconnects = self._counter("bus_reconnects_total", "Times the bus was lost and found again.")
        self.bus_round_trip = self._gauge("bus_round_trip_seconds", "From this node to the bus and back, last time.")
        self.bus_healed = self._counter("bus_healed_total", "Streams whose growth was found in the store, not heard.")

        # Jobs
        self.jobs_ended = self._counters(
            "jobs_ended_total", "Jobs by how they ended: done, again, failed, dead.", "kind", "outcome"
        )
        self.job_seconds = self._histograms("job_seconds", "From a claim to its end.", _SECONDS, "kind")
        self.jobs_waiting = self._gauges("jobs_waiting", "Jobs in the queue that nobody is doing.", "kind")
        self.jobs_dead = self._gauges("jobs_dead", "Jobs that were given up.", "kind")
        self.jobs_overdue = self._gauges(
            "jobs_overdue_seconds", "How long the oldest due job has been waiting.", "kind"
        )
        self.jobs_share = self._gauge("jobs_share", "How much of their room jobs get: less while the loop is busy.")
        self.presend = self._counters(
            "presend_total", "Messages that the app was asked about, by what came of it.", "outcome"
        )
        self.presend_seconds = self._histogram("presend_seconds", "From asking the app to its answer.", _SECONDS)
        self.webhook_deliveries = self._counters("webhook_deliveries_total", "Attempts to tell webhooks.", "outcome")
        self.webhooks_disabled = self._counters(
            "webhooks_disabled_total", "Webhooks that the server has switched off: gone, failing.", "reason"
        )
        self.pushes = self._counters("pushes_total", "Decisions and attempts of pushes.", "outcome", "reason")
        self.push_misconfigured = self._counters(
            "push_misconfigured_total", "Times that a push provider said that its set-up is wrong.", "provider"
        )
        self.outbox_rows = self._counter("outbox_rows_total", "Events that were handed from the outbox to jobs.")

        # REST
        self.rest_requests = self._counters("rest_requests_total", "Requests answered.", "route", "status")
        self.rest_seconds = self._histograms("rest_request_seconds", "Time to answer.", _SECONDS, "route")

        # The process
        self.event_loop_lag = self._gauge("event_loop_lag_seconds", "How late a timer last fired.")
        self.event_loop_lag_seconds = self._histogram("event_loop_stall_seconds", "How late timers fired.", _SECONDS)
        self.internal_errors = self._counters("internal_errors_total", "Errors that are our fault.", "where")
        self.certificate_expires = self._gauge(
            "certificate_expires_seconds", "When the node's own certificate expires, Unix time; 0 without one."
        )
        self.info = self._gauges("info", "1, with what this node is in its labels.", "version")
        self._measured: list[Callable[[], None]] = []

    def measure(self, read: Callable[[], None]) -> None:
        """Call `read` before each scrape: it sets gauges that would cost more to keep current."""
        self._measured.append(read)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at each scrape."""
        for metric in self.declared:
            yield _render(metric)

    def exposition(self) -> bytes:
        """All metrics as Prometheus' text format, for `GET /metrics`; its type is EXPOSITION_TYPE.

        With those of the process, by the names that all programs use: `process_cpu_seconds_total`,
        `process_resident_memory_bytes`, `process_open_fds`, `process_max_fds`.
        """
        for read in self._measured:
            read()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        return generate_latest(registry)

    def _declare(
        self,
        kind: Literal["counter", "gauge", "histogram"],
        name: str,
        help: str,
        labels: tuple[str, ...],
        series: Callable[[], Iterable[tuple[tuple[str, ...], Counter | Gauge | Histogram]]],
    ) -> None:
        self.declared.append(Declared(f"tidings_{name}", help, labels, kind, series))

    def _counter(self, name: str, help: str) -> Counter:
        made = Counter()
        self._declare("counter", name, help, (), lambda: [((), made)])
        return made

    def _gauge(self, name: str, help: str) -> Gauge:
        made = Gauge()
        self._declare("gauge", name, help, (), lambda: [((), made)])
        return made

    def _histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:
        made = Histogram(bounds)
        self._declare("histogram", name, help, (), lambda: [((), made)])
        return made

    def _counters(self, name: str, help: str, *labels: str) -> Family[Counter]:
        made = Family(Counter, labels)
        self._declare("counter", name, help, labels, made.series)
        return made

    def _gauges(self, name: str, help: str, *labels: str) -> Family[Gauge]:
        made = Family(Gauge, labels)
        self._declare("gauge", name, help, labels, made.series)
        return made

    def _histograms(self, name: str, help: str, bounds: Sequence[float], *labels: str) -> Family[Histogram]:
        made = Family(lambda: Histogram(bounds), labels)
        self._declare("histogram", name, help, labels, made.series)
        return made


def _render(metric: Declared) -> Metric:
    if metric.kind == "histogram":
        histograms = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for values, one in metric.series():
            assert isinstance(one, Histogram)
            running, buckets = 0, []
            for bound, count in zip((*map(str, map(float, one.bounds)), "+Inf"), tuple(one.counts), strict=True):
                running += count
                buckets.append((bound, float(running)))
            histograms.add_metric(values, buckets, one.total)
        return histograms
    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
        metric.name, metric.help, labels=metric.labels
    )
    for values, series in metric.series():
        assert not isinstance(series, Histogram)
        family.add_metric(values, series.value)
    return family


# Short enough to see a stall of a tenth of a second, long enough to cost nothing.
_LAG_INTERVAL_SECONDS: Final = 0.25


async def watch_event_loop(metrics: Metrics, clock: Clock) -> None:
    """Measure for ever how late the event loop's timers fire. Its owner cancels it."""
    while True:
        due = clock.monotonic() + _LAG_INTERVAL_SECONDS
        await asyncio.sleep(_LAG_INTERVAL_SECONDS)
        lag = max(0.0, clock.monotonic() - due)
        metrics.event_loop_lag.value = lag
        metrics.event_loop_lag_seconds.observe(lag)
