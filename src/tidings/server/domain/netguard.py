"""Which network addresses the server may open connections to on behalf of an app.

Webhook URLs, key-set URLs, push endpoints and link previews are chosen by people the operator of this server need
not trust. A connection from here reaches what they cannot: the loopback interface, the private network, a cloud
machine's metadata service. So an address must be *public* unless the operator listed it.

This module is pure: it judges addresses and host names. `tidings.server.outbound` resolves, asks, and connects to the
very address that was judged.
"""

import ipaddress
import re
from typing import Final, TypeAlias

import msgspec

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Everything of the IANA IPv4 special-purpose registry that is not globally reachable, written out: the standard
# library's `is_global` has changed its mind between patch releases of Python 3.11, and a security boundary should not.
_SPECIAL_V4: Final = tuple(
    (ipaddress.IPv4Network(text), why)
    for text, why in (
        ("0.0.0.0/8", "this host"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared (carrier-grade NAT)"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "protocol assignments"),
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "AS112"),
        ("192.52.193.0/24", "AMT"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "AS112"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)

# IPv6 is the other way round: only 2000::/3 is global unicast at all, so whatever lies outside is refused unseen
# (loopback, mapped and compatible IPv4, NAT64, unique local, link-local, site-local, multicast, what comes next).
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6: Final = tuple(
    (ipaddress.IPv6Network(text), why)
    for text, why in (
        ("2001::/23", "protocol assignments (Teredo, ORCHID, benchmarking)"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4, which carries an IPv4 address"),
        ("2620:4f:8000::/48", "AS112"),
        ("3fff::/20", "documentation"),
    )
)
_NAMED_V6: Final = tuple(
    (ipaddress.IPv6Network(text), why)
    for text, why in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("::/96", "IPv4-compatible"),
        ("64:ff9b::/96", "NAT64"),
        ("64:ff9b:1::/48", "NAT64"),
        ("fc00::/7", "unique local"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)

# ISATAP puts an IPv4 address into the interface identifier (RFC 5214): …:0:5efe:a.b.c.d or …:200:5efe:a.b.c.d.
_ISATAP: Final = (0x00005EFE, 0x02005EFE)

# What a host name on the operator's list may resolve to beyond public addresses: the inside of a network, and no more.
# Not link-local (a metadata service answers there with the machine's own credentials; 169.254.169.254, and
# fd00:ec2::254 within unique local), and nothing that carries another address. Who means those lists the network.
_BY_NAME: Final = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")
)
_METADATA_V6: Final = ipaddress.IPv6Network("fd00:ec2::/32")

# RFC 1035: 253 characters for a name, 63 for a label. Underscores occur in the wild and harm nobody.
HOST_CHARS_MAX: Final = 253
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)\Z")
# The last label of anything that some resolver would read as an IPv4 address (WHATWG URL, "ends in a number").
_NUMBER: Final = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")


class OutboundPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows beyond public addresses over https. The default allows nothing more.

    `networks`: CIDR blocks whose addresses may be connected to (`10.1.2.0/24`, `127.0.0.1/32`).
    `hosts`: names, optionally with a port (`idp.internal`, `localhost:9000`), that may resolve to internal addresses
    and may be spoken to over plain http. Link-local and metadata addresses need an entry in `networks`.
    """

    networks: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError when an entry of `networks` is not a CIDR block."""
        self.parsed_networks()

    def parsed_networks(self) -> tuple[Network, ...]:
        return tuple(ipaddress.ip_network(text) for text in self.networks)

    def names(self, host: str, port: int) -> bool:
        """Whether the operator listed this host, or this host with this port."""
        listed = {entry.lower() for entry in self.hosts}
        return host in listed or f"{host}:{port}" in listed


def canonical_host(host: str) -> tuple[str, Address | None]:
    """The host as it will be connected to, with the address when it is a literal one.

    Refuses (ValueError) what different parsers read differently: octal, hexadecimal, decimal and short IPv4 forms,
    zone identifiers, escapes, empty labels. One trailing dot (a fully qualified name) is dropped.
    """
    text = host.lower()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
        if ":" not in text:
            raise ValueError("brackets are for IPv6 addresses")
    if ":" in text:
        if "%" in text:
            raise ValueError("an IPv6 zone has no meaning in a URL")
        address = ipaddress.IPv6Address(text)
        return str(address), address
    text = text.removesuffix(".")
    if not text or len(text) > HOST_CHARS_MAX:
        raise ValueError("the host is empty or too long")
    labels = text.split(".")
    if not all(_LABEL.match(label) for label in labels):
        raise ValueError("the host is not a DNS name")
    if _NUMBER.match(labels[-1]):
        return text, ipaddress.IPv4Address(text)
    return text, None


def internal_reason(address: Address) -> str | None:
    """Why this address is not a public one, or None when it is."""
    if isinstance(address, ipaddress.IPv4Address):
        for network4, why in _SPECIAL_V4:
            if address in network4:
                return why
        return None
    if getattr(address, "scope_id", None) is not None:
        return "scoped"
    if address not in _GLOBAL_V6:
        return next((why for network6, why in _NAMED_V6 if address in network6), "not global unicast")
    for network6, why in _SPECIAL_V6:
        if address in network6:
            return why
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return "ISATAP, which carries an IPv4 address"
    return None


def refusal(address: Address, *, host: str, port: int, policy: OutboundPolicy) -> str | None:
    """Why the server must not connect to `address`, to which `host` resolved, or None when it may.

    `host` is canonical (see `canonical_host`).
    """
    reason = internal_reason(address)
    if reason is None:
        return None
    if any(address in network for network in policy.parsed_networks()):
        return None
    if policy.names(host, port) and address not in _METADATA_V6 and any(address in network for network in _BY_NAME):
        return None
    return reason
