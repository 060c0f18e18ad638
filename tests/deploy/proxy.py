"""A real proxy, on the file that is delivered, in front of a real server."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.asyncio.client import ClientConnection, connect

from tests.deploy.files import text
from tidings.client import Rest
from tidings.server.app import open_core
from tidings.server.config import Config
from tidings.testing.chaos import LOOPBACK, reserve_port
from tidings.testing.process import ServerProcess

# Loopback addresses of clients that are not the proxy's own: all of 127.0.0.0/8 is this machine.
SOMEBODY, ANOTHER = "127.0.0.2", "127.0.0.3"
# Proxies start in a fraction of a second; a busy machine may take several times as long.
START_SECONDS = 20


def exchanged(content: str, *pairs: tuple[str, str]) -> str:
    """The file with a few lines made fit for a test; each of them must be in it."""
    for old, new in pairs:
        assert old in content, f"{old!r} is not in the file any more"
        content = content.replace(old, new)
    return content


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, private = folder / "fullchain.pem", folder / "privkey.pem"
    chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, private


@dataclass
class Front:
    """A proxy's address and process, the server behind it, and Alice and Bob in `c1`."""

    port: int
    secure: bool
    process: subprocess.Popen[bytes]
    server: ServerProcess
    api_key: str
    tokens: Mapping[str, str]
    chain: Path | None
    log: Path

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://localhost:{self.port}"

    def trust(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=str(self.chain)) if self.chain is not None else None

    def http(self, source: str = SOMEBODY, **options: Any) -> httpx.AsyncClient:
        """A client whose connections come from this address."""
        trust = self.trust()
        transport = httpx.AsyncHTTPTransport(local_address=source, verify=trust if trust is not None else False)
        return httpx.AsyncClient(base_url=self.url, transport=transport, timeout=30, trust_env=False, **options)

    @asynccontextmanager
    async def socket(
        self, user: str, device: str = "phone", *, source: str = SOMEBODY, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[ClientConnection]:
        """A connected session over a WebSocket through the proxy."""
        async with connect(
            f"{self.url.replace('http', 'ws', 1)}/v1/ws",
            ssl=self.trust(),
            local_addr=(source, 0),
            host=LOOPBACK,
            additional_headers=dict(headers or {}),
            proxy=None,
        ) as ws:
            await ws.send(json.dumps({"type": "connect", "token": self.tokens[user], "device": {"id": device}}))
            await frame(ws, "connected")
            yield ws

    async def say(self, content: str) -> None:
        """Alice writes into `c1`, past the proxy."""
        async with Rest(self.server.url, api_key=self.api_key, user="alice") as rest:
            await rest.request(
                "POST", "/v1/channels/c1/messages", body={"text": content, "key": content.replace(" ", "-")}
            )

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)


async def frame(ws: ClientConnection, type: str) -> dict[str, Any]:
    """The next frame of this type."""
    async with asyncio.timeout(30):
        while True:
            found: dict[str, Any] = json.loads(await ws.recv())
            if found["type"] == type:
                return found


Command = Callable[[Path, int, int, int, tuple[Path, Path]], list[str]]


@asynccontextmanager
async def front(
    folder: Path, command: Command, *, secure: bool, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Front]:
    """The proxy that `command` starts (given a folder, its ports for HTTP and HTTPS, the server's, a certificate)."""
    data = folder / "data"
    async with open_core(Config(data_dir=data)) as core:
        new = await core.services.admin.create_app("Clinic", "app_clinic")
    environment = {
        "TIDINGS_BEHIND_PROXY": "true",
        # The proxy alone, so that other addresses of this machine are clients.
        "TIDINGS_TRUSTED_PROXIES": f"{LOOPBACK}/32",
        "TIDINGS_REST_RATE_PER_SECOND": "100000",
        "TIDINGS_REST_BURST": "100000",
        **(settings or {}),
    }
    server = ServerProcess(data, environment=environment, logs=folder / "logs")
    plain, tls = reserve_port(), reserve_port()
    log = folder / "proxy.log"
    process: subprocess.Popen[bytes] | None = None
    try:
        await server.start()
        tokens = {}
        async with Rest(server.url, api_key=new.api_key) as rest:
            for user in ("alice", "bob"):
                await rest.users.create(user)
                tokens[user] = (await rest.users.token(user)).token
            await rest.channels.create("c1", members=["alice", "bob"])
        files = certificate(folder)
        ports = plain.getsockname()[1], tls.getsockname()[1]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command(folder, *ports, server.port, files),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
                | {"TIDINGS_DOMAIN": f"http://localhost:{ports[0]}", "TIDINGS_NODES": f"{LOOPBACK}:{server.port}"},
            )
        made = Front(
            ports[1] if secure else ports[0], secure, process, server, new.api_key, tokens,
            files[0] if secure else None, log,
        )  # fmt: skip
        await answers(made)
        yield made
    finally:
        # The server first: a proxy waits for what is open.
        server.kill9()
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 10)
            if process.poll() is None:
                process.kill()
                process.wait()
        await server.close()
        plain.close()
        tls.close()


async def answers(made: Front) -> None:
    deadline = time.monotonic() + START_SECONDS
    async with made.http() as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/healthz")).status_code == 200:
                    return
            assert made.process.poll() is None, made.log.read_text()
            assert time.monotonic() < deadline, made.log.read_text()
            await asyncio.sleep(0.02)  # why: until the proxy answers


def nginx(folder: Path, plain: int, tls: int, server: int, files: tuple[Path, Path]) -> list[str]:
    """nginx on deploy/nginx.conf."""
    paths = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    made = exchanged(
        text("nginx.conf"),
        ("user www-data;", user),
        ("worker_processes auto;", "worker_processes 1;"),
        ("worker_rlimit_nofile 65536;", ""),
        ("worker_connections 32768;", "worker_connections 512;"),
        ("pid /run/nginx.pid;", f"pid {folder}/nginx.pid;"),
        ("http {\n", f"http {{\n{paths}"),
        ("/var/log/nginx/tidings.log", f"{folder}/access.log"),
        ("/var/log/nginx/error.log", "stderr"),
        ("server 127.0.0.1:8080 ", f"server 127.0.0.1:{server} "),
        ("listen 80;", f"listen {LOOPBACK}:{plain};"),
        ("listen 443 ssl http2;", f"listen {LOOPBACK}:{tls} ssl http2;"),
        ("server_name chat.example.com;", "server_name localhost;"),
        ("/etc/ssl/tidings/fullchain.pem", str(files[0])),
        ("/etc/ssl/tidings/privkey.pem", str(files[1])),
    )
    path = folder / "nginx.conf"
    path.write_text(made)
    return ["nginx", "-p", str(folder), "-c", str(path), "-g", "daemon off;"]


def caddy(folder: Path, plain: int, tls: int, server: int, files: tuple[Path, Path]) -> list[str]:
    """Caddy on deploy/Caddyfile, without TLS: its own authority would ask for the machine's trust store."""
    path = folder / "Caddyfile"
    path.write_text(exchanged(text("Caddyfile"), ("{\n\tservers {", "{\n\tadmin off\n\tauto_https off\n\tservers {")))
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(path)]
