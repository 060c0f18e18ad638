"""The guarded client for what is sent by the thousand: webhooks and Web Push.

`tidings.server.outbound.GuardedClient` is the measure: the same requests, the same refusals, the same errors. This one
costs less than a tenth of its processor time, speaks HTTP/1.1 only, and holds more connections. The address is judged
where the socket is made (aiohttp's `socket_factory`), which every new connection passes, to names and to literal
addresses alike; aiohttp's resolver, which literal addresses bypass, judges all answers of a name before the first is
dialled.
"""

import asyncio
import contextvars
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import aiohttp
import aiohttp.abc
import httpx
from multidict import CIMultiDict
from yarl import URL

from tidings.server.domain.netguard import OutboundPolicy, canonical_host, refusal
from tidings.server.outbound import (
    CONNECT_ATTEMPTS_MAX,
    CONNECT_SECONDS,
    KEEPALIVE_SECONDS,
    TOTAL_SECONDS,
    OutboundRefused,
    Reply,
    Resolver,
    check_url,
    judged_addresses,
    resolve_with_system,
)

# Two thousand deliveries a second to receivers that take a tenth of a second need two hundred connections.
CONNECTIONS_MAX: Final = 512
# All Web Push of a browser goes to one host; a receiver that hangs still leaves most of the sockets to the others.
CONNECTIONS_PER_HOST_MAX: Final = 128
# URLs are asked for again and again; reading one costs as much as half the request.
URLS_KEPT: Final = 4096


class _Target:
    """Where the request of this task goes, for who is called back when its socket is made."""

    __slots__ = ("host", "port", "refused", "url")

    def __init__(self, url: URL, host: str, port: int) -> None:
        self.url = url
        self.host = host
        self.port = port
        self.refused: str | None = None


_target: contextvars.ContextVar[_Target] = contextvars.ContextVar("outbound_target")


class _Refused(OSError):
    """A refusal in the only shape that aiohappyeyeballs carries to its end."""


class AddressGuard(aiohttp.abc.AbstractResolver):
    """What aiohttp asks for addresses and for sockets."""

    def __init__(self, policy: OutboundPolicy, resolve: Resolver) -> None:
        self._policy = policy
        self._resolve = resolve

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        """The addresses of a name, all of them judged. Raises OutboundRefused, or OSError for no usable answer."""
        async with asyncio.timeout(CONNECT_SECONDS):
            addresses = await judged_addresses(host, port, policy=self._policy, resolve=self._resolve)
        return [
            aiohttp.abc.ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses[:CONNECT_ATTEMPTS_MAX]
        ]

    async def close(self) -> None:
        """Nothing is held."""

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """The socket for one attempt, or OSError with the refusal noted. The last word before a packet leaves."""
        family, kind, protocol, _, (address, port, *_) = info
        target = _target.get()
        try:
            # A name here would be resolved by the loop, unjudged.
            reason = refusal(ipaddress.ip_address(address), host=target.host, port=port, policy=self._policy)
        except ValueError:
            reason = "not an address"
        if reason is None and port != target.port:
            reason = "not the port that was asked for"
        if reason is not None:
            target.refused = f"the host is not a public address ({reason})"
            raise _Refused(target.refused)
        return socket.socket(family=family, type=kind, proto=protocol)


class PooledClient:
    """Requests to chosen addresses with every bound in place: address, scheme, size, time, no redirects, no proxies.

    Raises OutboundRefused for what must not be tried again and httpx.TransportError for what may be.
    """

    def __init__(
        self,
        policy: OutboundPolicy,
        *,
        resolve: Resolver = resolve_with_system,
        ssl_context: ssl.SSLContext | None = None,
        user_agent: str = "tidings",
        connections_max: int = CONNECTIONS_MAX,
        connections_per_host_max: int = CONNECTIONS_PER_HOST_MAX,
    ) -> None:
        """`ssl_context` is this client's alone: its protocols (ALPN) are set to HTTP/1.1."""
        self.policy = policy
        self._guard = AddressGuard(policy, resolve)
        self._ssl = httpx.create_ssl_context(trust_env=False) if ssl_context is None else ssl_context
        self._ssl.set_alpn_protocols(["http/1.1"])
        self._user_agent = user_agent
        self._limits = (connections_max, connections_per_host_max)
        # aiohttp wants a running loop; this object is made before there is one.
        self._session: aiohttp.ClientSession | None = None
        self._read_url = lru_cache(maxsize=URLS_KEPT)(self._check_url)

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
        address, host, port = self._read_url(url)
        target = _Target(address, host, port)
        sent = CIMultiDict(headers or {})
        sent["accept-encoding"] = "identity"
        session = self._session or self._open_session()
        token = _target.set(target)
        try:
            async with asyncio.timeout(total_seconds):
                response = await session.request(method, address, headers=sent, data=content, allow_redirects=False)
                try:
                    return await _read(response, body_bytes_max)
                finally:
                    # Gives the connection back when the answer was read to its end, and closes it otherwise.
                    response.release()
        except OutboundRefused:
            raise
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise httpx.ConnectTimeout("the host could not be reached in time") from error
            raise httpx.ReadTimeout("the answer took too long") from error
        except aiohttp.InvalidURL as error:
            raise OutboundRefused("this is not a URL") from error
        except (aiohttp.ClientError, OSError) as error:
            if target.refused is not None:
                raise OutboundRefused(target.refused) from error
            raise _as_httpx(error) from error
        except ValueError as error:
            # A line break in a header, a method that is none.
            raise OutboundRefused("this cannot be written as an HTTP request") from error
        finally:
            _target.reset(token)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        total, per_host = self._limits
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=self._ssl,
                resolver=self._guard,
                socket_factory=self._guard.open_socket,
                # A cached answer would be dialled without having been judged for this request's host and port.
                use_dns_cache=False,
                limit=total,
                limit_per_host=per_host,
                keepalive_timeout=KEEPALIVE_SECONDS,
            ),
            # Whoever sets a cookie would speak to all apps that use the same host.
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            headers={"user-agent": self._user_agent, "accept": "*/*"},
        )
        return self._session

    def _check_url(self, url: str) -> tuple[URL, str, int]:
        """`url` for aiohttp, with its host and port. Written anew from the parts that were judged, so that there is no
        second opinion about where the host ends."""
        parsed = check_url(url, self.policy)
        host, _ = canonical_host(parsed.raw_host.decode("ascii"))
        port = (443 if parsed.scheme == "https" else 80) if parsed.port is None else parsed.port
        path, _, query = parsed.raw_path.decode("ascii").partition("?")
        return (
            URL.build(scheme=parsed.scheme, host=host, port=parsed.port, path=path, query_string=query, encoded=True),
            host,
            port,
        )


async def _read(response: aiohttp.ClientResponse, body_bytes_max: int) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    if headers.get("content-encoding", "identity").lower() != "identity":
        response.close()
        raise OutboundRefused("the answer is compressed, which was not asked for")
    body = bytearray()
    while chunk := await response.content.readany():
        body += chunk
        if len(body) > body_bytes_max:
            response.close()
            raise OutboundRefused(f"the answer is longer than {body_bytes_max} bytes")
    return Reply(response.status, headers, bytes(body))


def _as_httpx(error: Exception) -> httpx.TransportError:
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientConnectorCertificateError):
        return httpx.ConnectError("the host could not be reached")
    if isinstance(error, aiohttp.ClientResponseError):
        return httpx.RemoteProtocolError("the answer is not HTTP")
    return httpx.ReadError("the connection broke before the answer was read")
