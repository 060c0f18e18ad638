"""The server under measurement: a process of its own on a data folder on a real disk, its limits out of the way."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import resource
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from tidings.client.rest import Rest
from tidings.testing.postgres import PostgresProcess
from tidings.testing.process import ServerProcess

# Not the temporary directory: that is memory on many machines, where fsync costs nothing.
WORK = Path(__file__).parents[1] / ".bench"

# Rates are what is measured here, so none is limited. Heartbeats stay out of the way of idle connections. Everything
# else is as delivered: fsync, encryption, permissions, metrics.
ENVIRONMENT = {
    "TIDINGS_SESSION_RATE_PER_SECOND": "1000000",
    "TIDINGS_SESSION_BURST": "1000000",
    "TIDINGS_REST_RATE_PER_SECOND": "1000000",
    "TIDINGS_REST_BURST": "1000000",
    "TIDINGS_CONNECTIONS_PER_ADDRESS": "100000",
    "TIDINGS_CONNECTIONS_MAX": "100000",
    "TIDINGS_AUTH_TIMEOUT_SECONDS": "60",
    "TIDINGS_HEARTBEAT_SECONDS": "300",
    "TIDINGS_LOG_FORMAT": "json",
}

# As in its panel: `App  app_…`, `API key  tk_…`, `Signing secret  …`.
_SHOWN = [
    re.compile(rf"^\W*{name}\s+(\S+)", re.IGNORECASE | re.MULTILINE) for name in ("app", "api key", "signing secret")
]

# Longer than any scenario.
TOKEN_SECONDS = 6 * 3600


class Credentials(msgspec.Struct, frozen=True):
    """What the server printed on its first start."""

    app: str
    api_key: str
    secret: str

    def token(self, user: str) -> str:
        """A user's token, made as an application's backend makes it (docs/guides/tokens.md)."""
        now = int(time.time())
        claims = {"app": self.app, "sub": user, "iat": now, "exp": now + TOKEN_SECONDS}
        text = ".".join(_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        return f"{text}.{_base64(hmac.digest(self.secret.encode(), text.encode(), hashlib.sha256))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class BenchServer(ServerProcess):
    """A server with its first app's credentials."""

    def __init__(
        self,
        data: Path,
        credentials: Credentials | None = None,
        *,
        store: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        stored = {} if store is None else {"TIDINGS_STORE": store}
        super().__init__(data, environment={**ENVIRONMENT, **stored, **(environment or {})})
        self._credentials = credentials

    @property
    def credentials(self) -> Credentials:
        if self._credentials is None:
            said = self.stdout_path.read_text() + self.stderr_path.read_text()
            found = [match[1] for shown in _SHOWN if (match := shown.search(said))]
            if len(found) != len(_SHOWN):
                raise RuntimeError(f"the server has not shown its first app's credentials\n{self.tail()}")
            self._credentials = Credentials(*found)
        return self._credentials

    async def all_ready(self, workers: int) -> None:
        """Wait until every worker answers, not only the first one."""
        while workers > 1 and '"workers_ready"' not in self.stderr_path.read_text():
            if not self.running:
                raise RuntimeError(f"the workers ended with {self.exit_code}\n{self.tail()}")
            await asyncio.sleep(0.02)

    def loop_seconds(self) -> float:
        """Processor seconds of the thread that runs the event loop: the rest is the store's threads."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def bytes_written(self) -> int:
        """Bytes given to the disk so far (`write_bytes` of proc_pid_io(5))."""
        counters = dict(line.split(": ") for line in Path(f"/proc/{self.pid}/io").read_text().splitlines())
        return int(counters["write_bytes"])

    def rest(self) -> Rest:
        """The app's backend."""
        return Rest(self.url, api_key=self.credentials.api_key)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk under test that goes away afterwards."""
    WORK.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=WORK))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def fresh_server(
    store: str | None = None, *, environment: Mapping[str, str] | None = None
) -> AsyncIterator[BenchServer]:
    """A running server on an empty data folder, which goes with it, or on the database that `store` names."""
    with scratch() as folder:
        async with BenchServer(folder / "server", store=store, environment=environment) as server:
            yield server


@contextmanager
def fresh_postgres() -> Iterator[PostgresProcess]:
    """A running PostgreSQL with an empty database, on the disk under test and with every commit on it."""
    with scratch() as folder:
        # PostgreSQL gives up root, and must pass.
        folder.chmod(0o711)
        with PostgresProcess(folder / "postgres", settings={"shared_buffers": "256MB"}) as postgres:
            yield postgres


def raise_file_limit() -> int:
    """Open files this process and its children may have: the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
