"""Where the server lets itself be sent, and where not."""

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from yarl import URL

from tests.auth.conftest import private_pem
from tests.auth.stub_http import response, stub_server
from tidings.server.domain.netguard import OutboundPolicy, canonical_host, internal_reason, refusal
from tidings.server.outbound import (
    GuardedBackend,
    GuardedClient,
    GuardedTransport,
    OutboundRefused,
    check_url,
    resolve_with_system,
)
from tidings.server.outbound_pool import AddressGuard, PooledClient

OPEN = OutboundPolicy()

# The lean client keeps every promise of the other one.
Client = GuardedClient | PooledClient
CLIENTS = pytest.mark.parametrize("kind", [GuardedClient, PooledClient])

# Hosts that some resolver, parser or operating system takes to the inside.
INTERNAL_HOSTS = [
    # loopback and its spellings
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0177.0.0.01",
    "0x7f.0.0.1",
    "0x7f000001",
    "0x7F.1",
    "127.0.0.1.",
    "127.0.0.0x1",
    "127。0。0。1",
    "１２７.0.0.1",
    "①②⑦.⓪.⓪.①",
    "%31%32%37.0.0.1",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    # unspecified
    "0",
    "0.0.0.0",
    "00000000",
    "0x0",
    "[::]",
    "[::ffff:0.0.0.0]",
    # link-local and metadata
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "[::ffff:169.254.169.254]",
    "[fe80::1]",
    "[fe80::1%25eth0]",
    "[fd00:ec2::254]",
    # private, shared, special
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "100.100.100.200",
    "192.0.0.192",
    "198.18.0.1",
    "203.0.113.7",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[fc00::1]",
    "[fec0::1]",
    "[ff02::1]",
    # an IPv4 address carried inside
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::10.0.0.1]",
    "[2002:7f00:1::]",
    "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",
    "[2001:db8::1]",
    "[2a00:1450::5efe:7f00:1]",
]
ODD_URLS = [
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "//example.com/",
    "example.com",
    "",
    "https://",
    "https:///path",
    "http://example.com/",
    "https://user@example.com/",
    "https://user:password@example.com/",
    "https://example.com@127.0.0.1/",
    "https://@example.com/",
    "https://127.0.0.1\\@example.com/",
    "https://example.com\\.evil.example/",
    "https://exa mple.com/",
    "https://example.com/\r\nx-injected: 1",
    "https://example.com\t/",
    "\x00https://example.com/",
    "https://example..com/",
    "https://-example.com/",
    "https://example.com:99999/",
    "https://example.com:0/",
    "https://example.com:port/",
    "https://[::1/",
    "https://[example.com]/",
    "https://[v1.fe80]/",
    "https://" + "a" * 64 + ".example/",
    "https://" + "a." * 127 + "example/",
    "https://example.com/" + "a" * 2048,
]
PUBLIC_URLS = [
    "https://example.com/hook?x=1#y",
    "https://EXAMPLE.com./",
    "https://example.com:8443/",
    "https://93.184.215.14/",
    "https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/",
    "https://bücher.example/",
    "https://a_b.example/@mention",
    "https://example.com/?next=http://u:p@127.0.0.1/",
    "https://1.example/",
]


@pytest.mark.parametrize("host", INTERNAL_HOSTS)
async def test_an_internal_address_is_refused_in_every_spelling(host: str) -> None:
    with pytest.raises(OutboundRefused):
        check_url(f"https://{host}/", OPEN)
    # And at the socket, whatever the parser made of it: with the system's own resolver, which knows inet_aton.
    backend = GuardedBackend(OPEN, dial=_NeverDials())
    bare = host.strip("[]").replace("%25", "%")
    with pytest.raises((OutboundRefused, httpcore.ConnectError)):
        await backend.connect_tcp(bare, 443, timeout=5)
    with pytest.raises((OutboundRefused, OSError)):
        await AddressGuard(OPEN, resolve_with_system).resolve(bare, 443)


@CLIENTS
@pytest.mark.parametrize("host", INTERNAL_HOSTS)
async def test_a_client_asks_nothing_of_an_internal_address(host: str, kind: type[Client]) -> None:
    client = kind(OPEN)
    with pytest.raises(OutboundRefused):
        await client.request("GET", f"https://{host}/", body_bytes_max=10)
    await client.aclose()


class _UncheckedUrls(PooledClient):
    """A client that forgot to look at the URL: what is left is the guard at the socket."""

    def _check_url(self, url: str) -> tuple[URL, str, int]:
        parsed = URL(url)
        return parsed, parsed.raw_host or "", parsed.port or 443


@pytest.mark.parametrize("host", INTERNAL_HOSTS)
async def test_the_socket_is_guarded_for_whatever_the_library_takes_for_an_address(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp does not ask its resolver about literal addresses: the socket factory sees them."""

    async def never(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"dialled {address}")

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", never)
    client = _UncheckedUrls(OPEN)
    with pytest.raises((OutboundRefused, httpx.ConnectError)):
        await client.request("GET", f"https://{host}/", body_bytes_max=10, total_seconds=5)
    await client.aclose()


async def test_every_new_connection_passes_the_guard_and_a_kept_one_is_not_dialled_again() -> None:
    dialled = []

    class Watching(AddressGuard):
        def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
            dialled.append(info[4][0])
            return super().open_socket(info)

    async with keeping_server() as (port, connections):
        client = PooledClient(OutboundPolicy(networks=("127.0.0.1/32",)))
        client._guard = Watching(client.policy, resolve_with_system)
        for _ in range(3):
            assert (await client.request("GET", f"http://127.0.0.1:{port}/", body_bytes_max=9)).body == b"ok"
        assert (dialled, len(connections)) == (["127.0.0.1"], 1)
        connections.pop().close()
        # The connection that the server closed is not used again, and the new one is judged.
        while len(dialled) < 2:
            with contextlib.suppress(httpx.TransportError):
                await client.request("GET", f"http://127.0.0.1:{port}/", body_bytes_max=9)
        await client.aclose()


@contextlib.asynccontextmanager
async def keeping_server() -> AsyncIterator[tuple[int, list[asyncio.StreamWriter]]]:
    """A server that keeps its connections; its port, and those who are connected."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], connections


async def test_a_name_for_this_machine_is_refused_when_it_is_resolved() -> None:
    backend = GuardedBackend(OPEN, dial=_NeverDials())
    with pytest.raises(OutboundRefused):
        await backend.connect_tcp("localhost", 443)


@pytest.mark.parametrize("url", ODD_URLS, ids=lambda url: repr(url[:40]))
def test_an_odd_url_is_refused(url: str) -> None:
    with pytest.raises(OutboundRefused) as refused:
        check_url(url, OPEN)
    assert not url or url not in refused.value.detail


@pytest.mark.parametrize("url", PUBLIC_URLS)
def test_a_public_url_is_allowed(url: str) -> None:
    assert check_url(url, OPEN).scheme == "https"


@pytest.mark.parametrize("text", ["93.184.215.14", "1.1.1.1", "172.32.0.1", "100.128.0.1", "192.0.1.1", "2a00:1450::1"])
def test_a_public_address_is_public(text: str) -> None:
    assert internal_reason(ipaddress.ip_address(text)) is None


def test_every_address_the_library_calls_internal_is_refused() -> None:
    """A second opinion on the tables, sampled evenly over IPv4 and over the first 16 bits of IPv6."""
    for number in range(0, 2**32, 65_537 * 31):
        address4 = ipaddress.IPv4Address(number)
        if address4.is_private or address4.is_multicast or address4.is_reserved or address4.is_loopback:
            assert internal_reason(address4), address4
    for prefix in range(2**16):
        address6 = ipaddress.IPv6Address(prefix << 112 | 1)
        if not address6.is_global or address6.is_multicast or address6.is_reserved:
            assert internal_reason(address6), address6


def test_only_what_the_operator_listed_is_let_inside() -> None:
    policy = OutboundPolicy(networks=("10.1.0.0/16", "127.0.0.1/32"), hosts=("idp.internal", "LOCALHOST:9000"))

    def judged(address: str, host: str, port: int = 443) -> str | None:
        return refusal(ipaddress.ip_address(address), host=host, port=port, policy=policy)

    assert judged("10.1.2.3", "anything.example") is None
    assert judged("10.2.0.1", "anything.example") == "private"
    assert judged("127.0.0.2", "anything.example") == "loopback"
    assert judged("10.2.0.1", "idp.internal") is None
    assert judged("fd12::1", "idp.internal") is None
    assert judged("10.2.0.1", "x.idp.internal") == "private"
    assert judged("127.0.0.9", "localhost", 9000) is None
    assert judged("127.0.0.9", "localhost", 9001) == "loopback"
    # a listed name must not become a door to the machine's credentials
    for address in ("169.254.169.254", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "::ffff:169.254.169.254", "0.0.0.0"):
        assert judged(address, "idp.internal") is not None
    assert check_url("http://idp.internal/jwks", policy)
    assert check_url("http://127.0.0.1:1234/jwks", policy)
    for url in ("http://example.com/", "http://localhost:9001/", "http://127.0.0.2/"):
        with pytest.raises(OutboundRefused):
            check_url(url, policy)
    with pytest.raises(ValueError, match="network"):
        OutboundPolicy(networks=("not a network",))


@pytest.mark.parametrize(
    ("host", "name"), [("Example.COM.", "example.com"), ("[2A00::1]", "2a00::1"), ("1.1.1.1", "1.1.1.1")]
)
def test_a_host_has_one_spelling(host: str, name: str) -> None:
    assert canonical_host(host)[0] == name


class _NeverDials(httpcore.AsyncNetworkBackend):
    async def connect_tcp(self, *args: object, **kwargs: object) -> httpcore.AsyncNetworkStream:
        raise AssertionError(f"dialled {args}")


class _Rebinding:
    """A resolver that gives one answer when asked first and another from then on, as an attacker's would."""

    def __init__(self, first: Sequence[str], later: Sequence[str]) -> None:
        self.answers = [first, later]
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self.answers[min(self.asked, 2) - 1]


class _ResolvesAgain(GuardedBackend):
    """The mutant: judge the address, then connect by name."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: object = None,
    ) -> httpcore.AsyncNetworkStream:
        await self._judged_addresses(host, port)
        return await self._dial.connect_tcp((await self._resolve(host, port))[0], port, timeout)


# Every address of 127/8 is this machine: .2 plays the public server that the policy allows, .1 the internal one.
STAND_IN = OutboundPolicy(networks=("127.0.0.2/32",))


async def reached_by_rebinding(kind: type[GuardedBackend]) -> tuple[list[str], list[str], int]:
    """Requests that arrived at the public and at the internal server, and how often the resolver was asked."""
    async with stub_server("127.0.0.2") as public, stub_server("127.0.0.1", public.port) as internal:
        public.answer = internal.answer = lambda: response(b"ok")
        resolver = _Rebinding(["127.0.0.2"], ["127.0.0.1"])
        async with httpx.AsyncClient(
            transport=GuardedTransport(kind(STAND_IN, resolve=resolver)), trust_env=False
        ) as client:
            answer = await client.get(f"http://rebinding.example:{public.port}/")
        assert answer.text == "ok"
        return public.requests, internal.requests, resolver.asked


async def test_a_rebinding_name_is_asked_once_and_reached_where_it_was_judged() -> None:
    public, internal, asked = await reached_by_rebinding(GuardedBackend)
    assert (len(public), len(internal), asked) == (1, 0, 1)
    assert "Host: rebinding.example:" in public[0]


@CLIENTS
async def test_a_name_is_asked_once_for_a_connection_and_reached_where_it_was_judged(
    kind: type[Client], tmp_path: Path
) -> None:
    serving, trusting = _tls("rebinding.example", tmp_path)
    resolver = _Rebinding(["127.0.0.2"], ["127.0.0.1"])
    async with (
        stub_server("127.0.0.2", tls=serving) as public,
        stub_server("127.0.0.1", public.port, tls=serving) as internal,
    ):
        client = kind(STAND_IN, resolve=resolver, ssl_context=trusting)
        public.answer = internal.answer = lambda: response(b"ok")
        url = f"https://rebinding.example:{public.port}/"
        assert (await client.request("GET", url, body_bytes_max=10)).body == b"ok"
        assert (len(public.requests), len(internal.requests), resolver.asked) == (1, 0, 1)
        assert "host: rebinding.example:" in public.requests[0].lower()
        # The stub closes its connections, so that the next request resolves anew.
        with pytest.raises(OutboundRefused):
            await client.request("GET", url, body_bytes_max=10)
        assert internal.requests == []
        await client.aclose()


@CLIENTS
@pytest.mark.parametrize("answers", [["127.0.0.2", "127.0.0.1"], ["127.0.0.2", "::1"], ["169.254.169.254"]])
async def test_a_client_refuses_a_name_with_one_internal_answer(answers: list[str], kind: type[Client]) -> None:
    async with stub_server("127.0.0.2") as public:
        client = kind(STAND_IN, resolve=_Rebinding(answers, answers))
        with pytest.raises(OutboundRefused):
            await client.request("GET", f"https://mixed.example:{public.port}/", body_bytes_max=10)
        assert public.requests == []
        await client.aclose()


@CLIENTS
async def test_a_name_that_does_not_resolve_may_be_tried_again(kind: type[Client]) -> None:
    async def lost(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    for resolver in (lost, _Rebinding([], []), _Rebinding(["127.0.0.2"] * 65, [])):
        client = kind(STAND_IN, resolve=resolver)
        with pytest.raises(httpx.ConnectError):
            await client.request("GET", "https://odd.example/", body_bytes_max=10)
        await client.aclose()


@CLIENTS
async def test_a_client_goes_on_to_the_next_address(kind: type[Client], tmp_path: Path) -> None:
    serving, trusting = _tls("two.example", tmp_path)
    policy = OutboundPolicy(networks=("127.0.0.2/31",))
    async with stub_server("127.0.0.2", tls=serving) as server:
        client = kind(policy, resolve=_Rebinding(["127.0.0.3", "127.0.0.2"], []), ssl_context=trusting)
        assert (await client.request("GET", f"https://two.example:{server.port}/", body_bytes_max=10)).status == 200
        await client.aclose()


@CLIENTS
async def test_an_answer_that_is_none_is_a_passing_trouble(kind: type[Client]) -> None:
    client = kind(OutboundPolicy(networks=("127.0.0.1/32",)))
    for raw in (b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort"):
        async with stub_server() as server:
            server.answer = lambda raw=raw: raw  # type: ignore[misc]
            with pytest.raises(httpx.TransportError):
                await client.request("GET", server.url, body_bytes_max=100)
    with pytest.raises(httpx.ConnectError):
        await client.request("GET", server.url, body_bytes_max=100)
    await client.aclose()


@CLIENTS
async def test_what_is_sent_arrives_as_it_was_given(kind: type[Client]) -> None:
    async with stub_server() as server:
        client = kind(OutboundPolicy(networks=("127.0.0.1/32",)), user_agent="tidings/9")
        await client.request(
            "POST",
            server.url + "?a=%2F&b=c%20d#fragment",
            body_bytes_max=100,
            headers={"webhook-id": "m1", "Accept-Encoding": "gzip"} if kind is PooledClient else {"webhook-id": "m1"},
            content=b"12345",
        )
        await client.aclose()
    request = server.requests[0].lower()
    assert request.startswith("post /jwks.json?a=%2f&b=c%20d http/1.1\r\n")
    for line in ("webhook-id: m1", "content-length: 5", "user-agent: tidings/9", "accept-encoding: identity"):
        assert request.count(f"{line}\r\n") == 1
    assert "gzip" not in request
    assert "cookie" not in request


async def test_the_check_notices_a_guard_that_resolves_again() -> None:
    public, internal, asked = await reached_by_rebinding(_ResolvesAgain)
    assert (len(public), len(internal), asked) == (0, 1, 2)


async def test_a_name_that_rebinds_between_requests_is_refused_the_second_time() -> None:
    async with stub_server("127.0.0.2") as public, stub_server("127.0.0.1", public.port) as internal:
        backend = GuardedBackend(STAND_IN, resolve=_Rebinding(["127.0.0.2"], ["127.0.0.1"]))
        async with httpx.AsyncClient(transport=GuardedTransport(backend), trust_env=False) as client:
            assert (await client.get(f"http://rebinding.example:{public.port}/")).status_code == 200
            with pytest.raises(OutboundRefused):
                await client.get(f"http://rebinding.example:{public.port}/")
        assert internal.requests == []


@pytest.mark.parametrize(
    "answers", [["127.0.0.2", "127.0.0.1"], ["127.0.0.2", "::1"], ["::ffff:127.0.0.2"], ["169.254.169.254"]]
)
async def test_one_internal_answer_condemns_the_name(answers: list[str]) -> None:
    backend = GuardedBackend(STAND_IN, resolve=_Rebinding(answers, answers), dial=_NeverDials())
    with pytest.raises(OutboundRefused):
        await backend.connect_tcp("mixed.example", 443)


async def test_a_name_without_or_with_countless_answers_is_an_ordinary_failure() -> None:
    for answers in ([], ["127.0.0.2"] * 65):
        backend = GuardedBackend(STAND_IN, resolve=_Rebinding(answers, answers), dial=_NeverDials())
        with pytest.raises(httpcore.ConnectError):
            await backend.connect_tcp("odd.example", 443)


async def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    policy = OutboundPolicy(networks=("127.0.0.2/31",))
    async with stub_server("127.0.0.2") as server:
        resolver = _Rebinding(["127.0.0.3", "127.0.0.2"], [])
        client = GuardedClient(policy, resolve=resolver)
        url = f"http://two.example:{server.port}/"
        with pytest.raises(OutboundRefused):  # http to a name that is not listed
            await client.request("GET", url, body_bytes_max=10)
        await client.aclose()
        async with httpx.AsyncClient(transport=GuardedTransport(GuardedBackend(policy, resolve=resolver))) as plain:
            assert (await plain.get(url)).status_code == 200


async def test_a_host_that_hangs_holds_its_share_of_the_connections_and_no_more() -> None:
    async with stub_server() as hanging, stub_server() as other:
        hanging.gate.clear()
        client = PooledClient(OutboundPolicy(networks=("127.0.0.1/32",)), connections_max=6, connections_per_host_max=4)
        async with asyncio.TaskGroup() as group:
            waiting = [
                group.create_task(client.request("GET", hanging.url, body_bytes_max=100, total_seconds=20))
                for _ in range(10)
            ]
            while len(hanging.requests) < 4:
                await asyncio.sleep(0)
            # Who waits for a connection waits within the time that was given.
            with pytest.raises(httpx.TimeoutException):
                await client.request("GET", hanging.url, body_bytes_max=100, total_seconds=0.1)
            assert (await client.request("GET", other.url, body_bytes_max=100)).status == 200
            assert len(hanging.requests) == 4
            hanging.gate.set()
        assert [task.result().status for task in waiting] == [200] * 10
        await client.aclose()


@CLIENTS
async def test_a_redirect_is_returned_and_not_followed(kind: type[Client]) -> None:
    async with stub_server() as outside, stub_server() as inside:
        outside.answer = lambda: response(b"", status="307 Temporary Redirect", headers=f"location: {inside.url}\r\n")
        client = kind(OutboundPolicy(networks=("127.0.0.1/32",)))
        reply = await client.request("POST", outside.url, body_bytes_max=100, content=b"{}")
        await client.aclose()
        assert (reply.status, reply.headers["location"]) == (307, inside.url)
        assert inside.requests == []


@CLIENTS
async def test_an_answer_is_read_up_to_its_bound_and_its_time(kind: type[Client]) -> None:
    async with stub_server() as server:
        client = kind(OutboundPolicy(networks=("127.0.0.1/32",)))
        server.answer = lambda: response(b"x" * 100)
        assert (await client.request("GET", server.url, body_bytes_max=100)).body == b"x" * 100
        with pytest.raises(OutboundRefused, match="longer"):
            await client.request("GET", server.url, body_bytes_max=99)
        server.answer = lambda: response(b"\x1f\x8b", headers="content-encoding: gzip\r\n")
        with pytest.raises(OutboundRefused, match="compressed"):
            await client.request("GET", server.url, body_bytes_max=99)
        server.gate.clear()
        with pytest.raises(httpx.TimeoutException):
            await client.request("GET", server.url, body_bytes_max=99, total_seconds=0.1)
        await client.aclose()


@CLIENTS
async def test_a_cookie_is_not_kept_for_the_next_who_asks_there(kind: type[Client]) -> None:
    async with stub_server() as server:
        server.answer = lambda: response(b"", headers="set-cookie: app=1\r\n")
        client = kind(OutboundPolicy(networks=("127.0.0.1/32",)))
        for _ in range(2):
            await client.request("GET", server.url, body_bytes_max=100)
        await client.aclose()
        assert not any("cookie" in request.lower() for request in server.requests)


@CLIENTS
async def test_the_environments_proxy_is_not_used(kind: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    async with stub_server() as server, stub_server() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        client = kind(OutboundPolicy(networks=("127.0.0.1/32",)))
        assert (await client.request("GET", server.url, body_bytes_max=100)).status == 200
        await client.aclose()
        assert proxy.requests == []


@CLIENTS
async def test_tls_verifies_the_name_of_the_url_and_not_the_address(kind: type[Client], tmp_path: Path) -> None:
    names: list[str | None] = []
    server_side, trusting = _tls("hooks.example", tmp_path)
    server_side.sni_callback = lambda _socket, name, _context: names.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response(b"ok"))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.2", 0, ssl=server_side)
    port = server.sockets[0].getsockname()[1]
    client = kind(STAND_IN, resolve=_Rebinding(["127.0.0.2"], ["127.0.0.2"]), ssl_context=trusting)
    assert (await client.request("GET", f"https://hooks.example:{port}/", body_bytes_max=10)).body == b"ok"
    assert names == ["hooks.example"]
    with pytest.raises(httpx.ConnectError):
        await client.request("GET", f"https://other.example:{port}/", body_bytes_max=10)
    await client.aclose()
    server.close()
    await server.wait_closed()


def _tls(name: str, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's side, and a client's that trusts it and nobody else."""
    certificate, key = _self_signed(name, folder)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    return serving, ssl.create_default_context(cafile=str(certificate))


def _self_signed(name: str, folder: Path) -> tuple[Path, Path]:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate_path, key_path = folder / "certificate.pem", folder / "key.pem"
    certificate_path.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_path.write_bytes(private_pem(private))
    return certificate_path, key_path
