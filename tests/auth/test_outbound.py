"""Where the server lets itself be sent, and where not."""

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.auth.conftest import private_pem
from tests.auth.stub_http import response, stub_server
from tidings.server.domain.netguard import OutboundPolicy, canonical_host, internal_reason, refusal
from tidings.server.outbound import GuardedBackend, GuardedClient, GuardedTransport, OutboundRefused, check_url

OPEN = OutboundPolicy()

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


async def test_a_redirect_is_returned_and_not_followed() -> None:
    async with stub_server() as outside, stub_server() as inside:
        outside.answer = lambda: response(b"", status="307 Temporary Redirect", headers=f"location: {inside.url}\r\n")
        client = GuardedClient(OutboundPolicy(networks=("127.0.0.1/32",)))
        reply = await client.request("POST", outside.url, body_bytes_max=100, content=b"{}")
        await client.aclose()
        assert (reply.status, reply.headers["location"]) == (307, inside.url)
        assert inside.requests == []


async def test_an_answer_is_read_up_to_its_bound_and_its_time() -> None:
    async with stub_server() as server:
        client = GuardedClient(OutboundPolicy(networks=("127.0.0.1/32",)))
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


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stub_server() as server, stub_server() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        client = GuardedClient(OutboundPolicy(networks=("127.0.0.1/32",)))
        assert (await client.request("GET", server.url, body_bytes_max=100)).status == 200
        await client.aclose()
        assert proxy.requests == []


async def test_tls_verifies_the_name_of_the_url_and_not_the_address(tmp_path: Path) -> None:
    names: list[str | None] = []
    certificate, key = _self_signed("hooks.example", tmp_path)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    server_side.sni_callback = lambda _socket, name, _context: names.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response(b"ok"))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.2", 0, ssl=server_side)
    port = server.sockets[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=str(certificate))
    client = GuardedClient(STAND_IN, resolve=_Rebinding(["127.0.0.2"], ["127.0.0.2"]), ssl_context=trusting)
    assert (await client.request("GET", f"https://hooks.example:{port}/", body_bytes_max=10)).body == b"ok"
    assert names == ["hooks.example"]
    with pytest.raises(httpx.ConnectError):
        await client.request("GET", f"https://other.example:{port}/", body_bytes_max=10)
    await client.aclose()
    server.close()
    await server.wait_closed()


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
