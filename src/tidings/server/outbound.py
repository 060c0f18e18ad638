"""HTTP to addresses that somebody else chose: webhooks, key sets, push endpoints, link previews.

The guard sits where the connection is made, not where the URL is read: the name is resolved once, every answer is
judged by `tidings.server.domain.netguard`, and the socket is opened to a judged address, by number. A name that
answers differently the second time (DNS rebinding) is never asked a second time. TLS still names and verifies the host
of the URL, and so does the Host header, because httpcore takes both from the request and not from the socket.

Proxies of the environment are ignored: behind one, the address that is checked is not the one that is reached.
"""

import asyncio
import http.cookiejar
import ipaddress
import socket
import ssl
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

import httpcore
import httpx
import msgspec

from tidings.server.domain.netguard import OutboundPolicy, canonical_host, refusal

# Name, port → addresses as text. Injected so that tests can play a resolver that changes its mind.
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
SocketOption: TypeAlias = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]

# A dual-stack host has a few addresses; beyond four the host is down rather than unlucky.
CONNECT_ATTEMPTS_MAX: Final = 4
# A resolver's answer is judged in full, so it must not be able to keep us busy.
ADDRESSES_MAX: Final = 64
URL_CHARS_MAX: Final = 2048

# Long enough for a far-away host on a bad day, short enough that a hanging one does not collect our tasks.
CONNECT_SECONDS: Final = 5.0
TOTAL_SECONDS: Final = 10.0
# One misbehaving receiver must not open sockets without end.
CONNECTIONS_MAX: Final = 100
KEEPALIVE_CONNECTIONS_MAX: Final = 20
KEEPALIVE_SECONDS: Final = 15.0


class OutboundRefused(Exception):
    """The request must not be made (or its answer not be read). Trying again does not help. Never shows the URL."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Reply(msgspec.Struct, frozen=True):
    """An answer that fits the bound it was asked with. `headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def check_url(url: str, policy: OutboundPolicy) -> httpx.URL:
    """The URL as it will be requested, or OutboundRefused with what is wrong.

    Use it when a URL is configured, for an early and kind refusal. It is not the guard: a name is judged when it is
    resolved, at each connection. The parser is httpx's own, so there is no second opinion about where the host ends.
    """
    if len(url) > URL_CHARS_MAX:
        raise OutboundRefused(f"the URL is longer than {URL_CHARS_MAX} characters")
    # httpx strips and percent-encodes what it finds odd; other parsers end the host there. Neither guess is ours.
    if any(character <= " " or character == "\\" or character == "\x7f" for character in url):
        raise OutboundRefused("the URL contains blanks, control characters or backslashes")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise OutboundRefused("this is not a URL") from None
    if parsed.scheme not in ("https", "http"):
        raise OutboundRefused("the URL must begin with https://")
    if parsed.userinfo or "@" in url.split("://", 1)[-1].split("/", 1)[0]:
        raise OutboundRefused("the URL must not contain a user name or password")
    try:
        host, literal = canonical_host(parsed.raw_host.decode("ascii"))
    except ValueError:
        raise OutboundRefused("the host is neither a DNS name nor a plain IP address") from None
    # httpx takes any digits for a port and leaves the default one out.
    port = (443 if parsed.scheme == "https" else 80) if parsed.port is None else parsed.port
    if not 1 <= port <= 65535:
        raise OutboundRefused("the port is not between 1 and 65535")
    if literal is not None:
        reason = refusal(literal, host=host, port=port, policy=policy)
        if reason is not None:
            raise OutboundRefused(f"the host is not a public address ({reason})")
    if parsed.scheme == "http" and not policy.names(host, port):
        listed = literal is not None and any(literal in network for network in policy.parsed_networks())
        if not listed:
            raise OutboundRefused("the URL must begin with https://")
    return parsed


async def resolve_with_system(host: str, port: int) -> Sequence[str]:
    """The system's resolver (in a thread of the loop's executor). Raises OSError when there is no answer."""
    answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


async def judged_addresses(host: str, port: int, *, policy: OutboundPolicy, resolve: Resolver) -> list[str]:
    """The addresses of `host` as text, resolved once and every one of them allowed.

    Raises OutboundRefused when one is not, and OSError when the name does not resolve to a usable number of them.
    """
    try:
        name, literal = canonical_host(host)
    except ValueError:
        raise OutboundRefused("the host is neither a DNS name nor a plain IP address") from None
    if literal is not None:
        answers: Sequence[str] = [str(literal)]
    else:
        try:
            answers = await resolve(name, port)
        except (OSError, UnicodeError) as error:
            raise OSError("the host name does not resolve") from error
    if not answers or len(answers) > ADDRESSES_MAX:
        raise OSError("the host name does not resolve to a usable number of addresses")
    judged = []
    for answer in answers:
        address = ipaddress.ip_address(answer)
        reason = refusal(address, host=name, port=port, policy=policy)
        if reason is not None:
            raise OutboundRefused(f"the host is not a public address ({reason})")
        judged.append(str(address))
    return judged


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to judged addresses only. Raises OutboundRefused for the others.

    All addresses of a name are judged before the first is dialled, and one internal address condemns the name: a name
    that is public and internal at once has no honest use here.
    """

    def __init__(
        self,
        policy: OutboundPolicy,
        *,
        resolve: Resolver = resolve_with_system,
        dial: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._policy = policy
        self._resolve = resolve
        self._dial = httpcore.AnyIOBackend() if dial is None else dial

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        seconds = CONNECT_SECONDS if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                addresses = await self._judged_addresses(host, port)
                return await self._dial_first(addresses, port, seconds, local_address, socket_options)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[SocketOption] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise OutboundRefused("Unix sockets are not for outbound requests")

    async def sleep(self, seconds: float) -> None:
        await self._dial.sleep(seconds)

    async def _judged_addresses(self, host: str, port: int) -> list[str]:
        try:
            return await judged_addresses(host, port, policy=self._policy, resolve=self._resolve)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error

    async def _dial_first(
        self,
        addresses: Sequence[str],
        port: int,
        seconds: float,
        local_address: str | None,
        socket_options: Iterable[SocketOption] | None,
    ) -> httpcore.AsyncNetworkStream:
        attempts = addresses[:CONNECT_ATTEMPTS_MAX]
        failure: Exception = httpcore.ConnectError("no address to connect to")
        for address in attempts:
            try:
                return await self._dial.connect_tcp(
                    address, port, seconds / len(attempts), local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class GuardedTransport(httpx.AsyncBaseTransport):
    """An httpx transport over a guarded connection pool, for libraries that take an `httpx.AsyncClient`.

    Written against httpcore's public interface and not by replacing a private attribute of httpx's own transport:
    should that attribute be renamed one day, the guard would be gone and nothing would say so.
    """

    def __init__(
        self, backend: httpcore.AsyncNetworkBackend, *, ssl_context: ssl.SSLContext | None = None, http2: bool = True
    ) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False) if ssl_context is None else ssl_context,
            max_connections=CONNECTIONS_MAX,
            max_keepalive_connections=KEEPALIVE_CONNECTIONS_MAX,
            keepalive_expiry=KEEPALIVE_SECONDS,
            http1=True,
            http2=http2,
            network_backend=backend,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        # `sni_hostname` would let a caller verify the certificate of another host than the one in the URL.
        extensions = {key: value for key, value in request.extensions.items() if key != "sni_hostname"}
        try:
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=request.url.raw_scheme,
                        host=request.url.raw_host,
                        port=request.url.port,
                        target=request.url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=extensions,
                )
            )
        except _HTTPCORE_ERRORS as error:
            raise _as_httpx(error) from error
        assert isinstance(response.stream, typing.AsyncIterable)
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_ResponseStream(response.stream),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class GuardedClient:
    """Requests to chosen addresses with every bound in place: address, scheme, size, time, no redirects, no proxies.

    Raises OutboundRefused for what must not be tried again and httpx.TransportError for what may be.
    """

    def __init__(
        self,
        policy: OutboundPolicy,
        *,
        resolve: Resolver = resolve_with_system,
        backend: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
        user_agent: str = "tidings",
    ) -> None:
        self.policy = policy
        self._client = httpx.AsyncClient(
            transport=GuardedTransport(
                GuardedBackend(policy, resolve=resolve) if backend is None else backend, ssl_context=ssl_context
            ),
            trust_env=False,
            follow_redirects=False,
            # Whoever sets a cookie would speak to all apps that use the same host.
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx.Timeout(TOTAL_SECONDS, connect=CONNECT_SECONDS),
            headers={"user-agent": user_agent},
        )

    async def request(
        self,
        method: str,
        url: str,
        *,
        body_bytes_max: int,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        total_seconds: float = TOTAL_SECONDS,
    ) -> Reply:
        """The answer, whatever its status (a redirect is returned, not followed).

        Raises OutboundRefused when the URL or its address is not allowed, when the body is longer than
        `body_bytes_max`, or when it is compressed (a few bytes could become gigabytes); httpx.TransportError when the
        network fails or `total_seconds` pass, however slowly the answer drips.
        """
        target = check_url(url, self.policy)
        sent = {**(headers or {}), "accept-encoding": "identity"}
        try:
            async with (
                asyncio.timeout(total_seconds),
                self._client.stream(method, target, headers=sent, content=content) as response,
            ):
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise OutboundRefused("the answer is compressed, which was not asked for")
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > body_bytes_max:
                        raise OutboundRefused(f"the answer is longer than {body_bytes_max} bytes")
                return Reply(response.status_code, dict(response.headers), bytes(body))
        except TimeoutError as error:
            raise httpx.ReadTimeout("the answer took too long") from error

    async def aclose(self) -> None:
        await self._client.aclose()


class _ResponseStream(httpx.AsyncByteStream):
    def __init__(self, stream: typing.AsyncIterable[bytes]) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                yield part
        except _HTTPCORE_ERRORS as error:
            raise _as_httpx(error) from error

    async def aclose(self) -> None:
        if hasattr(self._stream, "aclose"):
            await self._stream.aclose()


_HTTPCORE_ERRORS: Final = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
)


def _as_httpx(error: Exception) -> httpx.TransportError:
    """The error of the same name in httpx: the two families mirror each other (httpx/_transports/default.py)."""
    kind = getattr(httpx, type(error).__name__, httpx.TransportError)
    return typing.cast(httpx.TransportError, kind(str(error)))
