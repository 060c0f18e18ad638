"""Every setting of the server, declared once: type, default, bound, reason, help.

Values come from four places, each overriding the one before: the defaults below, a TOML file, environment variables
(`TIDINGS_` and the setting's name in capitals), and the command line. Everything is checked before anything starts, and
all that is wrong is reported at once, each with the setting, where its value came from and what would be accepted.

No setting holds a secret, so that a configuration may be printed and compared: keys live in files and in the store. The
exception is a password in `store`, which is therefore left out of every print and message.

`python -m tidings.server.config` writes `docs/reference/configuration.md` from this list.
"""

import dataclasses
import difflib
import ipaddress
import os
import re
import sys
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

__all__ = ["SETTINGS", "Config", "ConfigError", "Problem", "Setting", "is_loopback", "load_config", "reference"]

ENV_PREFIX = "TIDINGS_"
DEFAULT_FILE = "tidings.toml"
# The bus of a process that is the only node; any other is a list of servers.
LOCAL = "local"
# The store that is a file in data_dir; any other is a URL.
SQLITE = "sqlite"

PORT_MAX = 65_535
# A node's name stands in the subjects of the bus and in ids: short enough for both.
NODE_NAME_MAX = 32
# Of it, what tells workers apart: w and two digits.
WORKER_DIGITS = 3

# Names with our prefix that belong to others: the path of the file itself, and what clients and tools of ours read.
FOREIGN_ENV = frozenset({"CONFIG", "URL", "API_KEY", "APP", "USER", "TOKEN"})
# Kubernetes puts these into every container when a service is called "tidings" (TIDINGS_PORT=tcp://10.0.0.1:8080).
_KUBERNETES = re.compile(r"SERVICE_(HOST|PORT)(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One declared setting. `low` and `high` are inclusive, in `unit`; `why` is the reason for default and bound."""

    name: str
    kind: Any
    default: Any
    help: str
    why: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    default_text: str = ""

    @property
    def env(self) -> str:
        """The environment variable that sets it."""
        return ENV_PREFIX + self.name.upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """The accepted words, where it is a choice; else empty."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def accepts(self) -> str:
        """What a value must look like, for people: `an integer from 1 to 65535`."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        word = {bool: "true or false", int: "an integer", float: "a number", Path: "a path", str: "text"}.get(
            self.kind, "a list of texts"
        )
        if self.kind is str and self.low:
            return "text, not empty"
        if self.low is not None and self.high is not None and self.kind in (int, float):
            word += f" from {_plain(self.low)} to {_plain(self.high)}"
        if self.unit == "bytes":
            word += " bytes (also 64KiB, 1MiB)"
        elif self.unit:
            word += f" {self.unit}"
        return word


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the setting, where the value came from, and what would be right."""

    setting: str
    origin: str
    what: str

    def __str__(self) -> str:
        return f"{self.setting} ({self.origin}): {self.what}"


class ConfigError(Exception):
    """The configuration is not usable. `problems` holds everything that is wrong, not only the first."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def _setting(
    default: Any,
    help: str,
    *,
    why: str,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    default_text: str = "",
    secret: bool = False,
) -> Any:
    metadata = {"help": help, "why": why, "unit": unit, "low": low, "high": high, "default_text": default_text}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one server process. Construct it with `load_config`, or directly in tests.

    Direct construction checks nothing; `load_config` does.
    """

    # Where it listens
    host: str = _setting(
        "127.0.0.1",
        "Address to listen on.",
        low=1,
        why="Loopback until somebody decides otherwise: beyond it, TLS or a proxy that terminates TLS is required.",
    )
    port: int = _setting(
        8080,
        "Port for HTTP and WebSocket. 0 takes a free one.",
        low=0,
        high=65535,
        why="A port that needs no privilege.",
    )
    public_url: str = _setting(
        "",
        "The address that clients use, such as https://chat.example.com. Empty: derived from host and port.",
        why="Behind a proxy the server cannot know it; it appears in the OpenAPI document and in links.",
    )
    tls_cert: Path | None = _setting(
        None, "PEM file with the certificate and its chain.", why="TLS is on wherever others could listen."
    )
    tls_key: Path | None = _setting(None, "PEM file with the certificate's private key.", why="Belongs to tls_cert.")
    behind_proxy: bool = _setting(
        False,
        "A proxy in front terminates TLS, so listening beyond loopback without a certificate is intended.",
        why="Said by name, because the hop between proxy and server is then in the clear.",
    )
    workers: int = _setting(
        1,
        "Processes that share the port. More than one needs a store and a bus that processes can share: PostgreSQL and "
        "NATS.",
        unit="processes",
        low=1,
        high=64,
        why="A process uses one core. As many as the machine has cores, less those of what else runs there. Each is a "
        "node of its own: bounds such as connections_max and store_connections are each worker's.",
    )
    worker_port: int = _setting(
        0,
        "Port on which the first worker answers by itself, the next one on the next port, and so on. 0: none does.",
        low=0,
        high=65535,
        why="On the shared port nobody can choose who answers; /metrics and /readyz are asked of one worker at a time.",
    )
    trusted_proxies: tuple[str, ...] = _setting(
        (),
        "Addresses or networks whose X-Forwarded-For is believed. Empty: only loopback. Needs behind_proxy.",
        why="Anyone else could write any address there and escape the limits per address.",
    )

    # What it keeps
    data_dir: Path = _setting(
        Path("data"), "Directory for the database, files and keys.", why="One place to back up and to protect."
    )
    key_file: Path = _setting(
        Path(),
        "File with the root key. Made on first start with mode 0600.",
        default_text="root.key in data_dir",
        why="Without it nothing that was stored can be read: keep it apart from backups of the data.",
    )
    store: str = _setting(
        "sqlite",
        "sqlite, or the URL of a PostgreSQL database, such as postgres://tidings@db.internal/tidings.",
        low=1,
        secret=True,
        why="One file in data_dir needs no server; several nodes need one database. Where a password is in the URL, "
        "set it in the environment, or leave it out and put it into ~/.pgpass or PGPASSWORD.",
    )
    store_connections: int = _setting(
        10,
        "Connections of one node to PostgreSQL for reads and changes.",
        unit="connections",
        low=1,
        high=500,
        why="A read takes about a millisecond: ten do some thousands a second, more than one node's core asks for. "
        "All nodes' together, and store_append_connections, must stay below the database's max_connections.",
    )
    store_append_connections: int = _setting(
        4,
        "Connections of one node to PostgreSQL on which messages are stored, a batch at a time on each.",
        unit="connections",
        low=1,
        high=64,
        why="Two keep one core's messages moving; the others are for batches that wait for somebody's lock.",
    )
    store_statement_seconds: float = _setting(
        5.0,
        "Time that PostgreSQL may take for one statement, waiting for locks included, before it is given up.",
        unit="seconds",
        low=0.1,
        high=9,
        why="Statements take milliseconds; one that takes longer waits for somebody who has stopped. Marks of clients "
        "lie ten seconds back, so what is stored must be visible sooner than that.",
    )
    store_synchronous: Literal["full", "normal", "off"] = _setting(
        "full",
        "How the store reaches the disk. Only full keeps what was acknowledged; the others need allow_unsafe_store. "
        "With PostgreSQL, full is synchronous_commit = on, which it sets itself, and the others are off.",
        why="With normal, a power cut was measured to lose acknowledged messages.",
    )
    allow_unsafe_store: bool = _setting(
        False,
        "Accept a store that may lose acknowledged messages. For throw-away data only.",
        why="Losing messages must be asked for by name.",
    )
    store_readers: int = _setting(
        4,
        "Threads that read from the embedded store beside the one that writes.",
        unit="threads",
        low=1,
        high=64,
        why="Reads mostly hit the page cache; beyond a few threads they wait for the interpreter, not for the disk.",
    )

    # Other nodes
    bus: str = _setting(
        "local",
        "local: this process is the only node. Else the NATS servers through which nodes hear each other, separated by "
        "commas: nats://nats-1:4222,nats://nats-2:4222, or tls:// where the connection must be encrypted.",
        low=1,
        why="One process needs no bus. Several servers, because nodes move to another one when theirs dies.",
    )
    bus_credentials: Path | None = _setting(
        None,
        "File with what NATS asks for: user:password, a token, or the .creds file that nsc writes. Read at every start "
        "of a connection.",
        why="A secret lives in a file, not in a setting.",
    )
    bus_ca: Path | None = _setting(
        None,
        "PEM file with the certificates that NATS servers are trusted by. None: those of this system.",
        why="Servers inside a cluster mostly have certificates of one's own.",
    )
    cluster: str = _setting(
        "tidings",
        "First word of every subject on the bus: letters, digits, - and _.",
        low=1,
        why="Two clusters may share their NATS servers; in one database belongs one cluster.",
    )
    node: str = _setting(
        "",
        "This node's name among the others: up to 32 letters and digits. Empty: drawn at each start.",
        why="It stands in the ids of HTTP sessions, so that any node finds whose they are. No two nodes may share it.",
    )

    # What it says about itself
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "The least severe event that is logged.", why="Info holds starts, stops and changes; no message does."
    )
    log_format: Literal["auto", "json", "console"] = _setting(
        "auto", "json, or console for people; auto: console on a terminal.", why="Machines read most logs."
    )
    tracing: bool = _setting(
        False,
        "Emit OpenTelemetry spans. Needs tidings[otel]; where to, OTEL_EXPORTER_OTLP_ENDPOINT says.",
        why="A span costs more than many of the operations that it would measure: see docs/operate/observe.md.",
    )
    development: bool = _setting(
        False,
        "Comforts for developers: user tokens on request, error messages in logs. Refused beyond loopback.",
        why="Each of them would be a hole in production.",
    )

    demo: Literal["auto", "on", "off"] = _setting(
        "auto",
        "The demonstration at /demo: a page where anybody can be one of a few example people, in an app of its own. "
        "auto: with development.",
        why="Whoever can reach the page can use it, which is right on one's own machine.",
    )

    # Jobs
    jobs: bool = _setting(
        True,
        "Whether the server itself does what happens behind the scenes: webhooks, push, housekeeping. Off: processes "
        "started with `tidings worker` do.",
        why="One process is easiest to run; many deliveries deserve cores of their own.",
    )

    delivery_log_days: int = _setting(
        7,
        "How long it is kept what was sent to webhooks and pushed to devices, and what became of it.",
        unit="days",
        low=1,
        high=365,
        why="A week is enough to look into a complaint; each attempt is about 1 KB.",
    )
    outbound_allow_hosts: tuple[str, ...] = _setting(
        (),
        "Hosts (`name` or `name:port`) that webhooks, push and the like may reach though their addresses are internal, "
        "and by plain http.",
        why="Whoever may set an address up could otherwise ask machines that only this one reaches.",
    )

    # Connections
    connections_max: int = _setting(
        20_000,
        "Sockets of all users together; further ones are refused with a time to come back.",
        unit="connections",
        low=1,
        high=1_000_000,
        why="At 20 KB each, twenty thousand idle connections take 400 MB. Needs as many open files.",
    )
    connections_per_address: int = _setting(
        1_000,
        "Sockets from one network address, and as many HTTP connections. A trusted proxy's own is not counted.",
        unit="connections",
        low=1,
        high=1_000_000,
        why="A hospital or office behind one address has hundreds of people with two devices; a flood has more.",
    )
    auth_timeout_seconds: float = _setting(
        5.0,
        "Time an unauthenticated socket has to present a token, and a connection to present a request.",
        unit="seconds",
        low=0.1,
        high=60,
        why="A phone on a bad link needs two round trips, under two seconds; idle strangers cost memory.",
    )
    heartbeat_seconds: float = _setting(
        25.0,
        "Time between heartbeats. A peer that misses two is gone.",
        unit="seconds",
        low=0.1,
        high=300,
        why="Common proxies and mobile networks drop connections that were silent for 30 to 60 seconds.",
    )
    presence_grace_seconds: float = _setting(
        15.0,
        "Time a user without connections is still shown as online.",
        unit="seconds",
        low=0,
        high=600,
        why="Changing from one network to another takes a few seconds and should not flicker.",
    )
    drain_seconds: float = _setting(
        10.0,
        "Time for work under way to finish at shutdown.",
        unit="seconds",
        low=0,
        high=300,
        why="Shorter than the thirty seconds after which Kubernetes kills; the longest request takes about five.",
    )
    reconnect_spread_seconds: float = _setting(
        20.0,
        "Clients told to reconnect spread themselves over this time.",
        unit="seconds",
        low=0,
        high=600,
        why="At 1,000 connections a second, 20,000 clients come back in twenty seconds without a queue.",
    )

    # Bounds on what clients send and what is kept for them
    frame_bytes_max: int = _setting(
        128 * 1024,
        "Largest frame, or REST body, a client may send.",
        unit="bytes",
        low=1024,
        high=16 * 1024 * 1024,
        why="The largest message, 20,000 characters of four bytes, fits with its custom data; files travel elsewhere.",
    )
    outbox_bytes_max: int = _setting(
        1024 * 1024,
        "Unsent bytes kept for one socket before its reader is served from the log instead.",
        unit="bytes",
        low=64 * 1024,
        high=64 * 1024 * 1024,
        why="A phone on a bad link drains about 50 kB/s: twenty seconds of patience.",
    )
    session_queue_max: int = _setting(
        256,
        "Commands of one socket that may wait while earlier ones are worked on.",
        unit="commands",
        low=1,
        high=65_536,
        why="More than a client's burst after reconnecting; beyond it the socket is not read until some are done.",
    )
    session_rate_per_second: float = _setting(
        50.0,
        "Commands per second that one socket may send over time.",
        unit="commands per second",
        low=0.1,
        high=1_000_000,
        why="A person types, reads and reacts a few times a second; a device's outbox may be busier.",
    )
    session_burst: int = _setting(
        200,
        "Commands that one socket may send at once.",
        unit="commands",
        low=1,
        high=1_000_000,
        why="What an outbox holds after an hour without a connection.",
    )
    rest_rate_per_second: float = _setting(
        200.0,
        "Requests per second of one credential over time.",
        unit="requests per second",
        low=0.1,
        high=1_000_000,
        why="A tenth of what one core does: one backend in a loop leaves room for the others.",
    )
    rest_burst: int = _setting(
        400,
        "Requests of one credential at once.",
        unit="requests",
        low=1,
        high=1_000_000,
        why="Two seconds of the sustained rate: a page that loads many things at once.",
    )
    history_page_max: int = _setting(
        200,
        "Largest page of messages or other items that one request returns.",
        unit="items",
        low=1,
        high=1_000,
        why="Several screens, and some 100 KB of JSON: more takes longer than it helps.",
    )

    # Who may call
    cors_origins: tuple[str, ...] = _setting(
        ("*",),
        "Origins of web pages that may call the API from a browser, such as https://app.example.com. * is any.",
        why="No credential here is sent by browsers on their own, so a foreign page gains nothing by calling.",
    )
    metrics_public: bool = _setting(
        False,
        "Serve /metrics to everybody, not only to callers on this machine or a private network.",
        why="Numbers of users and errors are nobody else's business.",
    )

    # Outbound
    jwks_allow_hosts: tuple[str, ...] = _setting(
        (),
        "Hosts (host or host:port) that key-set URLs of apps may name although they are internal.",
        why="Otherwise an app's administrator could make the server call addresses inside the network.",
    )

    def __post_init__(self) -> None:
        if self.key_file == Path():
            object.__setattr__(self, "key_file", self.data_dir / "root.key")

    @property
    def bus_servers(self) -> tuple[str, ...]:
        """The addresses of the NATS servers; none for the only node."""
        if self.bus == LOCAL:
            return ()
        return tuple(url.strip() for url in self.bus.split(",") if url.strip())

    def of_worker(self, number: int, port: int) -> "Config":
        """What worker `number`, counted from 1, goes by, on the port that they share: a node of its own."""
        return dataclasses.replace(
            self,
            port=port,
            node=f"{self.node}w{number}" if self.node else "",
            worker_port=self.worker_port + number - 1 if self.worker_port else 0,
        )

    @property
    def demo_on(self) -> bool:
        """Whether /demo is there."""
        return self.demo == "on" or (self.demo == "auto" and self.development)

    @property
    def embedded(self) -> bool:
        """Whether the store is the file in data_dir."""
        return self.store == SQLITE

    @property
    def tls(self) -> bool:
        """Whether this process itself speaks TLS."""
        return self.tls_cert is not None and self.tls_key is not None

    def trusts(self, address: str) -> bool:
        """Whether X-Forwarded-For from this address is believed: a listed proxy, or loopback when none is listed."""
        if not self.behind_proxy:
            return False
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        if not self.trusted_proxies:
            return ip.is_loopback
        return any(ip in ipaddress.ip_network(proxy, strict=False) for proxy in self.trusted_proxies)

    @property
    def url(self) -> str:
        """The base address for clients, without a trailing slash."""
        if self.public_url:
            return self.public_url.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


SETTINGS: tuple[Setting, ...] = tuple(
    Setting(name=field.name, kind=field.type, default=field.default, **field.metadata)
    for field in dataclasses.fields(Config)
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server listening on `host`. An unknown name counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def load_config(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """The settings from defaults, file, environment and overrides, in rising order of precedence, all checked.

    `file` names the TOML file; else `TIDINGS_CONFIG` does; else `tidings.toml` in the working directory is read if it
    is there. Relative paths in the file are relative to the file, elsewhere to the working directory. `overrides` are
    the command line's: texts or typed values, `None` meaning "not given". Raises ConfigError with every problem found.
    """
    environ = os.environ if environ is None else environ
    problems: list[Problem] = []
    values: dict[str, object] = {}
    origins: dict[str, str] = {}

    def take(name: str, raw: object, origin: str, base: Path) -> None:
        setting = _BY_NAME.get(name)
        if setting is None:
            problems.append(Problem(name, origin, "there is no such setting" + _did_you_mean(name, _BY_NAME)))
            return
        origins[name] = origin
        try:
            values[name] = _convert(setting, raw, base)
        except ValueError as error:
            problems.append(Problem(name, origin, str(error)))

    path = file or (Path(environ["TIDINGS_CONFIG"]) if environ.get("TIDINGS_CONFIG") else None)
    if path is None and Path(DEFAULT_FILE).is_file():
        path = Path(DEFAULT_FILE)
    if path is not None:
        table, lines, trouble = _read_file(path)
        problems.extend(trouble)
        for name, raw in table.items():
            line = lines.get(name)
            take(name, raw, f"{path}, line {line}" if line else str(path), path.parent)

    for variable in sorted(environ):
        name = variable.removeprefix(ENV_PREFIX)
        if name == variable or name in FOREIGN_ENV or _KUBERNETES.fullmatch(name):
            continue
        raw_text = environ[variable]
        if name == "PORT" and raw_text.startswith(("tcp://", "udp://", "sctp://")):
            continue
        if name.lower() not in _BY_NAME:
            known = {setting.env: setting for setting in SETTINGS}
            what = "there is no such setting" + _did_you_mean(variable, known)
            problems.append(Problem(variable, "environment", what))
            continue
        take(name.lower(), raw_text, f"environment, {variable}", Path())

    for name, raw in (overrides or {}).items():
        if raw is not None:
            take(name, raw, f"command line, --{name.replace('_', '-')}", Path())

    config = Config(**cast("dict[str, Any]", values))
    # A setting that did not parse has been reported; its default must not set off further complaints.
    wrong = {problem.setting for problem in problems}
    problems.extend(
        Problem(name, origins.get(name, "default"), what)
        for name, what in _contradictions(config)
        if name not in wrong and not (wrong & set(_BY_NAME))
    )
    if problems:
        raise ConfigError(tuple(problems))
    return config


def _read_file(path: Path) -> tuple[dict[str, object], dict[str, int], list[Problem]]:
    """The file's top-level table and the line of each key; or what kept it from being read."""
    try:
        text = path.read_text(encoding="utf-8")
        table: dict[str, object] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return {}, {}, [Problem("config", str(path), f"not valid TOML: {error}")]
    except UnicodeDecodeError:
        return {}, {}, [Problem("config", str(path), "not UTF-8 text")]
    except OSError as error:
        return {}, {}, [Problem("config", str(path), f"cannot be read: {error.strerror}")]
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.match(r"\s*\[?\s*[\"']?([A-Za-z0-9_-]+)[\"']?\s*[=\].]", line):
            lines.setdefault(found[1], number)
    return table, lines, []


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or difflib.get_close_matches(
        name.lower().replace("-", "_"), known, n=1, cutoff=0.6
    )
    return f"; did you mean {close[0]}?" if close else ""


_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})
_SIZES = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _convert(setting: Setting, raw: object, base: Path) -> object:
    """`raw` (text, or TOML's types) as the setting's type, within its bound; ValueError says what is accepted."""
    wrong = ValueError(f"must be {setting.accepts}")
    kind = setting.kind
    if setting.choices:
        if raw not in setting.choices:
            close = difflib.get_close_matches(str(raw).lower(), setting.choices, n=1) if isinstance(raw, str) else []
            raise ValueError(f"{wrong}" + (f"; did you mean {close[0]}?" if close else ""))
        return raw
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        word = raw.strip().lower() if isinstance(raw, str) else ""
        if word not in _TRUE | _FALSE:
            raise wrong
        return word in _TRUE
    if kind in (int, float):
        return _convert_number(setting, raw, wrong)
    if kind is str:
        if not isinstance(raw, str) or (setting.low and not raw.strip()):
            raise wrong
        return raw.strip()
    if kind in (Path, Path | None):
        if not isinstance(raw, str | Path) or not str(raw).strip() or "\0" in str(raw):
            raise ValueError("must be a path")
        return base / Path(raw).expanduser()
    # What remains is a list of texts.
    items = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise wrong
    return tuple(item.strip() for item in items if item.strip())


def _convert_number(setting: Setting, raw: object, wrong: ValueError) -> int | float:
    number: int | float
    if isinstance(raw, str):
        text = raw.strip().replace("_", "")
        size = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text) if setting.unit == "bytes" else None
        try:
            if size and size[2].lower() in _SIZES:
                number = int(size[1]) * _SIZES[size[2].lower()]
            else:
                number = int(text) if setting.kind is int else float(text)
        except ValueError:
            raise wrong from None
    elif isinstance(raw, bool) or not isinstance(raw, int | float):
        raise wrong
    else:
        number = raw
    if setting.kind is int and not isinstance(number, int):
        raise wrong
    # Written so that NaN, which compares false with everything, is refused too.
    if not ((setting.low is None or number >= setting.low) and (setting.high is None or number <= setting.high)):
        raise wrong
    return number if setting.kind is int else float(number)


def _contradictions(config: Config) -> list[tuple[str, str]]:
    """(setting, what is wrong) for values that are each fine and together are not."""
    found: list[tuple[str, str]] = []

    def refuse(name: str, what: str) -> None:
        found.append((name, what))

    if config.store_synchronous != "full" and not config.allow_unsafe_store:
        refuse(
            "store_synchronous",
            f"{config.store_synchronous} may lose acknowledged messages at a power cut; "
            "use full, or say allow_unsafe_store = true if the data may be lost",
        )
    for url in config.bus_servers or ((config.bus,) if config.bus != LOCAL else ()):
        if not _is_bus_url(url):
            # The value is not repeated: people write passwords into addresses.
            refuse("bus", "must be local, or addresses like nats://nats-1:4222; credentials go into bus_credentials")
            break
    for name, path in (("bus_credentials", config.bus_credentials), ("bus_ca", config.bus_ca)):
        if path is not None and config.bus == LOCAL:
            refuse(name, "has no effect without bus = nats://…")
        elif path is not None and not (path.is_file() and os.access(path, os.R_OK)):
            refuse(name, f"{path} is not a file that this user can read")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", config.cluster):
        refuse("cluster", f"{config.cluster!r} is not up to 64 letters, digits, - and _")
    if config.node and not re.fullmatch(rf"[A-Za-z0-9]{{1,{NODE_NAME_MAX}}}", config.node):
        refuse("node", f"{config.node!r} is not up to {NODE_NAME_MAX} letters and digits")
    if not config.embedded and not _is_store_url(config.store):
        # The value is not repeated: it may carry a password.
        refuse("store", "must be sqlite, or a URL like postgres://user@host:5432/database")
    if (config.tls_cert is None) != (config.tls_key is None):
        missing, given = ("tls_key", "tls_cert") if config.tls_key is None else ("tls_cert", "tls_key")
        refuse(missing, f"is needed when {given} is set")
    for name, path in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)):
        if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
            refuse(name, f"{path} is not a file that this user can read")
    if not is_loopback(config.host):
        if not config.tls and not config.behind_proxy:
            refuse(
                "host",
                f"{config.host} can be reached from other machines, and there is no certificate; set tls_cert and "
                "tls_key, or behind_proxy = true if a proxy in front terminates TLS, or listen on 127.0.0.1",
            )
        if config.development:
            refuse("development", f"is only for loopback, and host is {config.host}")
    if config.workers > 1 and (config.embedded or config.bus == LOCAL):
        refuse(
            "workers",
            f"{config.workers} workers need a store and a bus that processes can share: set store = postgres://… and "
            "bus = nats://…; over SQLite there is one",
        )
    if config.worker_port:
        last = config.worker_port + config.workers - 1
        if last > PORT_MAX:
            refuse("worker_port", f"leaves no port up to {PORT_MAX} for the last of {config.workers} workers")
        elif config.worker_port <= config.port <= last:
            refuse("worker_port", f"{config.worker_port} to {last} would be the workers', and port is {config.port}")
    if config.workers > 1 and len(config.node) > NODE_NAME_MAX - WORKER_DIGITS:
        refuse("node", f"with several workers at most {NODE_NAME_MAX - WORKER_DIGITS} characters: w1, w2 … are added")
    if config.trusted_proxies and not config.behind_proxy:
        refuse("trusted_proxies", "has no effect without behind_proxy = true")
    for proxy in config.trusted_proxies:
        if not _is(ipaddress.ip_network, proxy):
            refuse("trusted_proxies", f"{proxy!r} is not an address or a network such as 10.0.0.0/8")
    if config.public_url and not _is_base_url(config.public_url):
        # The value is not repeated: an address may carry a password.
        refuse("public_url", "must be like https://chat.example.com: no user, path, query or fragment")
    for setting in ("jwks_allow_hosts", "outbound_allow_hosts"):
        for host in getattr(config, setting):
            if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?", host):
                refuse(setting, f"{host!r} is not a host or host:port")
    if config.connections_per_address > config.connections_max:
        refuse("connections_per_address", f"is more than connections_max ({config.connections_max})")
    if config.outbox_bytes_max < config.frame_bytes_max:
        refuse("outbox_bytes_max", f"must hold at least one frame (frame_bytes_max is {config.frame_bytes_max} bytes)")
    if config.data_dir.exists() and not config.data_dir.is_dir():
        refuse("data_dir", f"{config.data_dir} is not a directory")
    if config.key_file.is_dir():
        refuse("key_file", f"{config.key_file} is a directory")
    return found


def _is(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _is_bus_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        valid_port = url.port is None or url.port > 0
    except ValueError:
        return False
    clean = not (url.path.strip("/") or url.query or url.fragment or "@" in url.netloc)
    return url.scheme in ("nats", "tls") and bool(url.hostname) and clean and valid_port


def _is_store_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        valid_port = url.port is None or url.port > 0
    except ValueError:
        # Several hosts, as libpq takes them: host1:5432,host2:5432.
        valid_port = "," in text
    return url.scheme in ("postgres", "postgresql") and len(url.path) > 1 and valid_port


def _is_base_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        valid_port = url.port is None or url.port > 0
    except ValueError:
        return False
    clean = not (url.path.strip("/") or url.query or url.fragment or "@" in url.netloc)
    return url.scheme in ("http", "https") and bool(url.hostname) and clean and valid_port


def _plain(number: float) -> str:
    return f"{number:,g}" if number != int(number) else f"{int(number)}"


def _default_text(setting: Setting) -> str:
    if setting.default_text:
        return setting.default_text
    match setting.default:
        case None | "" | ():
            return "none"
        case bool(value):
            return f"`{str(value).lower()}`"
        case int(value) | float(value):
            return f"`{_plain(value)}`"
        case value:
            return f"`{value}`"


def reference() -> str:
    """docs/reference/configuration.md: every setting as Markdown."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by `make docs` from src/tidings/server/config.py. -->",
        "",
        "Values come from the defaults, then a TOML file (`--config`, else `TIDINGS_CONFIG`, else `tidings.toml` in",
        "the working directory), then environment variables, then the command line; later ones win. The file is",
        "flat: `port = 9000`. Lists are separated by commas in the environment. Everything is checked before the",
        "server starts, and a name that is not in this list is an error.",
        "",
    ]
    for setting in SETTINGS:
        lines += [
            f"## `{setting.name}`",
            "",
            setting.help,
            "",
            f"- Accepts: {setting.accepts}",
            f"- Default: {_default_text(setting)}",
            f"- Environment: `{setting.env}`",
            f"- Why: {setting.why}",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(reference())
