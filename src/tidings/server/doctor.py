"""What could go wrong on this machine, found before it does.

Each check looks at one thing and returns findings; none of them changes anything, except that the fsync check writes
and removes one small file in the data directory. `examine` runs them all. Printing is the command line's business.
"""

import asyncio
import datetime
import importlib.util
import os
import resource
import shutil
import socket
import sqlite3
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cryptography import x509

from tidings.server.clock import Clock, SystemClock
from tidings.server.config import Config, ConfigError, load_config
from tidings.server.errors import TidingsError, UnsafeStore

if TYPE_CHECKING:
    from tidings.server.bus.nats_link import NatsLink

__all__ = ["Finding", "examine", "has_wal_reset_bug", "worst"]

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result: `what` was found, in words with numbers, and what to `do` about it (empty when ok)."""

    status: Status
    name: str
    what: str
    do: str = ""


# --- versions --------------------------------------------------------------------------------------------------------

# RETURNING, which the store relies on, arrived in 3.35.
SQLITE_MIN = (3, 35, 0)


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite has the WAL-reset bug: 3.7.0 to 3.51.2, except the fixed branches 3.44.6+ and 3.50.7+.

    Two connections that write or checkpoint at the same moment could, very rarely, corrupt the database.
    Source: https://sqlite.org/wal.html#walresetbug
    """
    if version >= (3, 51, 3) or version < (3, 7, 0):
        return False
    return not any(version[:2] == fixed[:2] and version >= fixed for fixed in ((3, 44, 6), (3, 50, 7)))


def check_python(version: tuple[int, int, int] = sys.version_info[:3]) -> Finding:
    """Python is one that Tidings runs on."""
    text = ".".join(map(str, version))
    if version < (3, 11, 0):
        return Finding("fail", "python", f"Python {text} is older than 3.11", "Install Python 3.11 or newer.")
    return Finding("ok", "python", f"Python {text}")


def check_sqlite(version: tuple[int, int, int] | None = None) -> Finding:
    """SQLite is new enough, and free of the one known bug that could corrupt a database in WAL mode."""
    version = version or sqlite3.sqlite_version_info[:3]
    text = ".".join(map(str, version))
    if version < SQLITE_MIN:
        return Finding("fail", "sqlite", f"SQLite {text} is older than 3.35", "Install a newer libsqlite3.")
    if has_wal_reset_bug(version):
        return Finding(
            "warn",
            "sqlite",
            f"SQLite {text} has the WAL-reset bug: two connections that write or checkpoint at the same moment "
            "could, very rarely, corrupt the database. Tidings itself writes and checkpoints from one connection",
            "Open the database with no other program while the server runs; use `tidings backup` for copies. "
            "SQLite 3.51.3, 3.50.7 and 3.44.6 are free of the bug.",
        )
    return Finding("ok", "sqlite", f"SQLite {text}")


# --- files -----------------------------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_data_dir(data_dir: Path) -> Finding:
    """The data directory can be used by this user, and by nobody else."""
    name = "data directory"
    if not data_dir.exists():
        above = _existing(data_dir)
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            return Finding(
                "fail", name, f"{data_dir} does not exist and cannot be made in {above}", f"mkdir {data_dir}; chown it."
            )
        return Finding("ok", name, f"{data_dir} will be made at the first start")
    if not data_dir.is_dir():
        return Finding("fail", name, f"{data_dir} is not a directory", "Set data_dir to a directory.")
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        return Finding("fail", name, f"{data_dir} cannot be written by this user", f"chown the directory {data_dir}.")
    status = data_dir.stat()
    if status.st_uid != os.geteuid():
        return Finding(
            "warn",
            name,
            f"{data_dir} belongs to user {status.st_uid}, and this is user {os.geteuid()}",
            "Run the doctor as the user that runs the server, or chown the directory.",
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        return Finding("warn", name, f"{data_dir} is open to others (mode {mode:04o})", f"chmod 700 {data_dir}")
    return Finding("ok", name, f"{data_dir}, mode {mode:04o}")


def check_key_file(key_file: Path) -> Finding:
    """The root key is readable by its owner only."""
    name = "root key"
    try:
        status = key_file.stat()
    except FileNotFoundError:
        return Finding("ok", name, f"{key_file} will be made at the first start")
    except OSError as error:
        return Finding("fail", name, f"{key_file} cannot be looked at: {error.strerror}", "Check the directory's mode.")
    if not stat.S_ISREG(status.st_mode):
        return Finding("fail", name, f"{key_file} is not a file", "Set key_file to a file.")
    if not os.access(key_file, os.R_OK):
        return Finding("fail", name, f"{key_file} cannot be read by this user", f"chown the file {key_file}.")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        return Finding(
            "fail",
            name,
            f"{key_file} is open to others (mode {mode:04o})",
            f"chmod 600 {key_file}; if others could read it, rotate it with `tidings keys rotate-root`.",
        )
    return Finding("ok", name, f"{key_file}, mode {mode:04o}")


# Under one gigabyte a busy day, or one checkpoint held up by a backup, may fill the disk; under 100 MB it soon does.
_FREE_WARN_BYTES, _FREE_FAIL_BYTES = 1 << 30, 100 << 20
_FREE_WARN_SHARE = 0.10


def check_disk_space(data_dir: Path, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage) -> Finding:
    """There is room to grow. `usage` gives total, used and free bytes."""
    total, _, free = usage(_existing(data_dir))
    share = free / total if total else 0.0
    what = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} ({share:.0%})"
    if free < _FREE_FAIL_BYTES:
        return Finding("fail", "disk space", what, "Free some space: with a full disk, sends are refused.")
    if free < _FREE_WARN_BYTES or share < _FREE_WARN_SHARE:
        return Finding("warn", "disk space", what, "Make room, or move data_dir to a larger disk.")
    return Finding("ok", "disk space", what)


_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "afs", "lustre", "virtiofs"})
_VOLATILE = frozenset({"tmpfs", "ramfs"})


def filesystem_of(path: Path, mounts: str | None = None) -> str:
    """The type of the filesystem that holds `path`, from /proc/self/mounts; `unknown` where there is none."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "unknown"
    target = _existing(path).resolve()
    best, kind = Path(), "unknown"
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        # The kernel writes spaces in paths as \040. The last mount over a directory is the one that is seen.
        point = Path(fields[1].replace("\\040", " "))
        if target.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, fields[2]
    return kind


def check_filesystem(data_dir: Path, kind: str | None = None) -> Finding:
    """The data directory is on a disk of this machine, and one that outlives it."""
    kind = kind or filesystem_of(data_dir)
    name = "filesystem"
    if kind in _NETWORK or kind.startswith("fuse"):
        return Finding(
            "warn",
            name,
            f"{data_dir} is on {kind}: SQLite's locks and shared memory are not reliable there",
            "Move data_dir to a local disk.",
        )
    if kind in _VOLATILE:
        return Finding("warn", name, f"{data_dir} is on {kind}: gone after a reboot", "Move data_dir to a disk.")
    if kind == "overlay":
        return Finding(
            "warn", name, f"{data_dir} is inside a container: gone with it", "Mount a volume and put data_dir there."
        )
    return Finding("ok", name, f"{data_dir} is on {kind}")


# A disk of 2010 rotates in 8 ms; two orders below that, nothing can have reached a disk.
_FSYNC_SLOW_SECONDS, _FSYNC_SUSPICIOUS_SECONDS = 0.020, 0.000_02
_FSYNC_ROUNDS = 20


def measure_fsync(directory: Path, rounds: int = _FSYNC_ROUNDS) -> float:
    """Median seconds of writing 4 KiB and fsync, in a file that is removed again. Raises OSError."""
    taken = []
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as file:
        for _ in range(rounds):
            begun = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def check_fsync(data_dir: Path, measure: Callable[[Path], float] = measure_fsync) -> Finding:
    """fsync works and takes a plausible time: every acknowledgement waits for one."""
    name = "fsync"
    directory = _existing(data_dir)
    try:
        seconds = measure(directory)
    except OSError as error:
        return Finding("fail", name, f"does not work in {directory}: {error.strerror}", "Choose another data_dir.")
    what = f"{seconds * 1000:.2f} ms (median of {_FSYNC_ROUNDS})"
    if seconds > _FSYNC_SLOW_SECONDS:
        return Finding("warn", name, what + ": each send waits for this", "Use a faster disk, best an SSD.")
    if seconds < _FSYNC_SUSPICIOUS_SECONDS:
        return Finding(
            "warn",
            name,
            what + ": too fast to have reached a disk",
            "Make sure that nothing (tmpfs, eatmydata, a virtual disk with unsafe caching) swallows fsync.",
        )
    return Finding("ok", name, what)


# --- PostgreSQL ------------------------------------------------------------------------------------------------------

# Commits that take longer are felt in every acknowledgement.
_COMMIT_SLOW_SECONDS = 0.020
_COMMIT_ROUNDS = 10
# Nodes that are replaced one after the other are there twice for a moment.
_NODES_AT_UPGRADE = 2


def check_postgres(config: Config) -> Iterator[Finding]:
    """The database can be reached, is safe, has a schema that this version can use, and answers in good time."""
    from tidings.server.errors import StoreUnavailable

    async def look() -> list[Finding]:
        from tidings.server.store.postgres import connect

        connection = await connect(config.store)
        try:
            return [
                await _postgres_safety(connection, config),
                await _postgres_schema(connection),
                await _postgres_room(connection, config),
                await _postgres_speed(connection),
            ]
        finally:
            await connection.close()

    try:
        yield from asyncio.run(look())
    except StoreUnavailable as error:
        yield Finding(
            "fail", "postgresql", error.detail, "Set store to the database's URL; see docs/operate/postgresql.md."
        )


async def _postgres_safety(connection: Any, config: Config) -> Finding:
    from tidings.server.store.postgres import check_safety

    version = await connection.fetchval("SELECT current_setting('server_version')")
    if await connection.fetchval("SELECT current_setting('server_encoding')") != "UTF8":
        return Finding("fail", "postgresql", "the database's encoding is not UTF8", "Make it with ENCODING 'UTF8'.")
    try:
        await check_safety(connection, allow=False)
    except UnsafeStore as error:
        return Finding("warn" if config.allow_unsafe_store else "fail", "postgresql", str(error), "Set it, and reload.")
    return Finding("ok", "postgresql", f"PostgreSQL {version}; what it acknowledges is on its disk")


async def _postgres_schema(connection: Any) -> Finding:
    from tidings.server.store.migrations.postgres import plan
    from tidings.server.store.transferring import check_target

    try:
        planned = await plan(connection)
    except TidingsError as error:
        return Finding("fail", "schema", str(error), "Use the version of Tidings that the database needs.")
    if planned.current is not None:
        try:
            await check_target(connection)
        except TidingsError as error:
            return Finding("fail", "transfer", str(error), "Finish it; see docs/operate/transfer.md.")
    if planned.steps:
        return Finding("ok", "schema", f"the next start will run {', '.join(planned.steps)}")
    return Finding("ok", "schema", f"at revision {planned.current}")


async def _postgres_room(connection: Any, config: Config) -> Finding:
    allowed = int(await connection.fetchval("SELECT current_setting('max_connections')"))
    used = int(await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE backend_type='client backend'"))
    need = config.store_connections + config.store_append_connections
    what = f"{allowed} allowed, {used} in use, one node needs up to {need}"
    if allowed < need * _NODES_AT_UPGRADE:
        return Finding(
            "warn", "connections", what, "Raise max_connections, or lower store_connections: nodes overlap at upgrades."
        )
    return Finding("ok", "connections", what)


async def _postgres_speed(connection: Any) -> Finding:
    taken = []
    for _ in range(_COMMIT_ROUNDS):
        begun = time.perf_counter()
        # Writes a commit to the log, and nothing else.
        await connection.execute("SELECT pg_current_xact_id()")
        taken.append(time.perf_counter() - begun)
    seconds = statistics.median(taken)
    what = f"{seconds * 1000:.2f} ms (median of {_COMMIT_ROUNDS})"
    if seconds > _COMMIT_SLOW_SECONDS:
        return Finding("warn", "commit", what + ": each send waits for this", "Look at its disk and the way to it.")
    return Finding("ok", "commit", what)


# --- the bus ---------------------------------------------------------------------------------------------------------

# A node tries for longer at its start; whoever asks the doctor waits for the answer.
_BUS_SECONDS = 3.0
# Between machines of one room it is under a millisecond. Presence and typing wait for it, messages do not.
_BUS_SLOW_SECONDS = 0.050
_BUS_ROUNDS = 10


def check_bus(config: Config) -> Iterator[Finding]:
    """Each NATS server can be reached with our credentials, delivers, says when nobody listens, and answers in time."""

    async def look() -> list[Finding]:
        return list(await asyncio.gather(*(_bus_server(config, url) for url in config.bus_servers)))

    findings = asyncio.run(look())
    yield from findings
    reached = sum(finding.status != "fail" for finding in findings)
    if len(findings) == 1 and reached:
        yield Finding(
            "warn", "bus", "one server: without it nodes do not hear each other", "Name three, each on its own machine."
        )


async def _bus_server(config: Config, url: str) -> Finding:
    import ssl

    from tidings.server.bus.nats_link import NatsLink, NatsRefused, read_address, read_credentials
    from tidings.server.config import is_loopback
    from tidings.server.errors import BusUnavailable

    address = read_address(url)
    path = config.bus_credentials
    plain = not address.tls and not is_loopback(address.host)
    try:
        tls = ssl.create_default_context(cafile=None if config.bus_ca is None else str(config.bus_ca))
        # As two nodes: a server does not send us what we have published ourselves.
        links = [
            NatsLink(
                [address],
                name="tidings doctor",
                credentials=lambda: None if path is None else read_credentials(path),
                tls=tls,
            )
            for _ in range(2)
        ]
        try:
            for link in links:
                await link.open(_BUS_SECONDS)
            mouth, ear = links
            return await _bus_answers(mouth, ear, config, str(address), plain=plain)
        finally:
            for link in links:
                await link.close()
    except NatsRefused as error:
        return Finding("fail", "bus", str(error), "Look at bus_credentials and the server's accounts.")
    except (BusUnavailable, OSError, ValueError) as error:
        return Finding("fail", "bus", f"{address}: {error}", "Look at the setting bus, the server and the way to it.")


async def _bus_answers(mouth: "NatsLink", ear: "NatsLink", config: Config, address: str, *, plain: bool) -> Finding:
    """What comes of publishing from one to the other, and of asking where nobody listens."""
    subject = f"{config.cluster}.doctor.{os.urandom(6).hex()}".encode()
    heard: asyncio.Queue[bool] = asyncio.Queue()
    for link, where in ((ear, subject), (mouth, subject + b".reply")):
        link.subscribe(where, lambda subject, reply, data, nobody: heard.put_nowait(nobody))
        await link.settled(_BUS_SECONDS)
    taken = []
    try:
        async with asyncio.timeout(_BUS_SECONDS):
            for _ in range(_BUS_ROUNDS):
                begun = time.perf_counter()
                mouth.publish(subject, b"hello")
                await heard.get()
                taken.append(time.perf_counter() - begun)
    except TimeoutError:
        return Finding(
            "fail",
            "bus",
            f"{address}: what is published on {config.cluster}.> does not arrive",
            "Allow our account to publish and subscribe there.",
        )
    try:
        async with asyncio.timeout(_BUS_SECONDS):
            mouth.publish(subject + b".nobody", b"", reply=subject + b".reply")
            nobody = await heard.get()
    except TimeoutError:
        nobody = False
    seconds = statistics.median(taken)
    what = f"{address}: {seconds * 1000:.2f} ms there and back (median of {_BUS_ROUNDS})"
    if not nobody:
        return Finding(
            "fail",
            "bus",
            f"{address}: does not say that nobody listens",
            "Presence needs it: run nats-server 2.2 or later.",
        )
    if plain:
        return Finding(
            "warn", "bus", what + ", not encrypted", "tls:// in the setting bus, unless the network is private."
        )
    if seconds > _BUS_SLOW_SECONDS:
        return Finding("warn", "bus", what + ": presence and typing wait for this", "Put it nearer to the nodes.")
    return Finding("ok", "bus", what)


# --- the machine -----------------------------------------------------------------------------------------------------

# Tokens and certificates of any use are newer than this program.
_YEAR_MIN, _YEAR_MAX = 2025, 2100
_CLOCK_SAMPLE_SECONDS, _CLOCK_DRIFT_MAX_SECONDS = 0.05, 0.02


def check_clock(clock: Clock | None = None, wait: Callable[[float], None] = time.sleep) -> Finding:
    """The wall clock shows a plausible year and runs as fast as the monotonic one."""
    clock = clock or SystemClock()
    name = "clock"
    wall, monotonic = clock.now_ms(), clock.monotonic()
    wait(_CLOCK_SAMPLE_SECONDS)
    drift = abs((clock.now_ms() - wall) / 1000 - (clock.monotonic() - monotonic))
    now = datetime.datetime.fromtimestamp(wall / 1000, datetime.UTC)
    what = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if not _YEAR_MIN <= now.year <= _YEAR_MAX:
        return Finding("fail", name, what + ": tokens will be refused", "Set the clock and run an NTP service.")
    if drift > _CLOCK_DRIFT_MAX_SECONDS:
        return Finding("warn", name, f"{what}; it just jumped by {drift:.2f} s", "Look at the NTP service.")
    return Finding("ok", name, what)


def check_time_sync(
    command: tuple[str, ...] = ("timedatectl", "show", "--property=NTPSynchronized", "--value"),
) -> Finding:
    """The clock is kept by NTP, where systemd can say so."""
    name = "time service"
    try:
        # Two seconds: it answers at once or hangs on a bus that is not there.
        answer = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Finding("ok", name, "cannot be asked here (no timedatectl)")
    match answer.stdout.strip() if answer.returncode == 0 else "":
        case "yes":
            return Finding("ok", name, "the clock is synchronised")
        case "no":
            return Finding("warn", name, "the clock is not synchronised", "Run an NTP service (chrony, timesyncd).")
        case _:
            return Finding("ok", name, "cannot be asked here (no systemd)")


# Database, log, listening sockets, pipes, outbound requests.
_FILES_RESERVE = 256


def check_open_files(connections_max: int, limits: tuple[int, int] | None = None) -> Finding:
    """The process may open a file for every connection. `limits` are the soft and the hard one."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    need = connections_max + _FILES_RESERVE
    what = f"{hard} allowed, {need} needed for connections_max = {connections_max}"
    if hard != resource.RLIM_INFINITY and hard < need:
        return Finding(
            "warn", "open files", what, f"Raise the limit (LimitNOFILE={need} in systemd), or lower connections_max."
        )
    if soft != resource.RLIM_INFINITY and soft < need:
        return Finding(
            "warn", "open files", f"{soft} allowed, {need} needed", f"ulimit -n {need} (the hard limit allows it)."
        )
    return Finding("ok", "open files", what if hard != resource.RLIM_INFINITY else "no limit")


def check_port(host: str, port: int) -> Finding:
    """Nobody listens there yet, and this user may."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            candidate.bind(address)
            candidate.listen(1)
    except OSError as error:
        do = "Stop what listens there (`ss -ltnp` names it), or set another port. Fine if it is this server."
        if isinstance(error, PermissionError):
            do = "Choose a port from 1024 up, or allow it (AmbientCapabilities=CAP_NET_BIND_SERVICE in systemd)."
        elif isinstance(error, socket.gaierror):
            do = "Set host to an address of this machine."
        return Finding("warn", "port", f"{where}: {error.strerror}", do)
    return Finding("ok", "port", f"{where} is free")


# Time to notice, ask for a new one and install it.
_CERTIFICATE_WARN_DAYS = 21


def check_certificate(path: Path, now: datetime.datetime) -> Finding:
    """The certificate can be read and is valid for a while yet. `now` is aware."""
    name = "certificate"
    try:
        certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no PEM certificate in it"
        return Finding("fail", name, f"{path}: {reason}", "Set tls_cert to a PEM file, the server's certificate first.")
    until = certificate.not_valid_after_utc
    days = (until - now).days
    what = f"valid until {until:%Y-%m-%d} ({days} days)"
    if now < certificate.not_valid_before_utc:
        return Finding(
            "fail", name, f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d}", "Check the clock."
        )
    if now >= until:
        return Finding("fail", name, f"expired on {until:%Y-%m-%d}", "Renew it.")
    if days < _CERTIFICATE_WARN_DAYS:
        return Finding("warn", name, what, "Renew it soon.")
    return Finding("ok", name, what)


def check_tracing() -> Finding:
    """What the setting `tracing` needs is installed."""
    name = "tracing"
    for package in ("opentelemetry.sdk", "opentelemetry.exporter"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return Finding("fail", name, f"{package} is not installed", "pip install 'tidings[otel]'")
    return Finding("ok", name, "its libraries are installed")


# --- all together ----------------------------------------------------------------------------------------------------


def examine(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Iterator[Finding]:
    """Every check, in order, as each finishes. The arguments are those of `load_config`.

    With a configuration that is not valid, its problems come first and the rest is examined with the defaults.
    """
    try:
        config = load_config(file=file, environ=environ, overrides=overrides)
        yield Finding("ok", "configuration", "valid")
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("fail", "configuration", str(problem), "docs/reference/configuration.md lists every setting.")
        config = Config()
    if config.store_synchronous != "full":
        yield Finding("warn", "store", "may lose acknowledged messages", "Set store_synchronous = full.")
    yield check_python()
    if config.embedded:
        yield check_sqlite()
    else:
        yield from check_postgres(config)
    if config.bus_servers:
        yield from check_bus(config)
    yield check_data_dir(config.data_dir)
    yield check_key_file(config.key_file)
    yield check_disk_space(config.data_dir)
    if config.embedded:
        yield check_filesystem(config.data_dir)
        yield check_fsync(config.data_dir)
    yield check_clock()
    yield check_time_sync()
    yield check_open_files(config.connections_max)
    if config.port:
        yield check_port(config.host, config.port)
    if config.tls_cert is not None:
        yield check_certificate(config.tls_cert, datetime.datetime.now(datetime.UTC))
    if config.tracing:
        yield check_tracing()


def worst(findings: Iterable[Finding]) -> Status:
    """The gravest status among them: fail, else warn, else ok."""
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"
