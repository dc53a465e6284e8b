"""Which addresses a remote source may live at: public unicast ones, and those of networks that the operator names."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Iterator
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Iterable[str]]
"""From a host name and a port to its addresses as text; raises OSError where there are none."""

_NOT_FOR_US = [
    # Source: https://www.iana.org/assignments/iana-ipv4-special-registry, beyond what ``ipaddress`` of every supported
    # Python calls not global: protocol assignments, AS112, AMT, the retired 6to4 relays.
    IPv4Network("192.0.0.0/24"),
    IPv4Network("192.31.196.0/24"),
    IPv4Network("192.52.193.0/24"),
    IPv4Network("192.88.99.0/24"),
    IPv4Network("192.175.48.0/24"),
    IPv4Network("240.0.0.0/4"),
    # Azure's host agent, seen from every virtual machine there.
    # Source: https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
    IPv4Network("168.63.129.16/32"),
]
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
"""Source: RFC 6052, the well-known prefix; the last 32 bits are the IPv4 address that is reached."""
_V4_COMPATIBLE = IPv6Network("::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)
"""Source: RFC 5214, 6.1: these 32 bits before the last 32 say that those are an IPv4 address."""
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")


def is_public(address: Address) -> bool:
    """Tell whether an address is of one host on the public internet, seen from anywhere.

    An IPv6 address that carries an IPv4 address is as public as both are.
    """
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_FOR_US)
    if address.scope_id is not None:
        return False
    if not all(is_public(inner) for inner in _embedded(address)):
        return False
    # The two that stand for an IPv4 address lie outside of what is global unicast.
    if address.ipv4_mapped is not None or address in _NAT64:
        return True
    # 2001::/32 and 2002::/16 are not called global by every Python; what they carry has been looked at.
    carries = address.teredo is not None or address.sixtofour is not None
    return address in _GLOBAL_UNICAST and (carries or address.is_global) and not address.is_multicast


def literal(host: str) -> Address | None:
    """Return the address that a host is in itself, in any notation that a resolver takes for one; None for a name.

    Beside dotted quads and IPv6 these are ``127.1``, ``2130706433``, ``0x7f.0.0.1`` and ``0177.0.0.1``.
    """
    host = host.strip("[]")
    try:
        return ip_address(host)
    except ValueError:
        pass
    parts = host.rstrip(".").split(".")
    if len(parts) > 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    try:
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None


def resolve(host: str, port: int) -> list[str]:
    """Ask the system's resolver for all addresses of a host.

    Raises:
        OSError: if there are none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def checked(texts: Iterable[str], networks: Iterable[Network]) -> list[Address]:
    """Return the addresses that a host resolved to.

    Args:
        texts: the addresses; an empty answer is as bad as a private one.
        networks: allowed although they are not public.

    Raises:
        PermissionError: unless every one of them is allowed: a name that leads to several places is not picked from.
    """
    networks = tuple(networks)
    addresses = [ip_address(text) for text in texts]
    for address in addresses:
        if not is_allowed(address, networks):
            raise PermissionError(f"{address} is not a public address")
    if not addresses:
        raise PermissionError("no address")
    return addresses


def is_allowed(address: Address, networks: Iterable[Network]) -> bool:
    """Tell whether an address is public, or in one of ``networks``, as itself or by the IPv4 address it stands for."""
    standing_for = [address]
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        standing_for.append(address.ipv4_mapped)
    return is_public(address) or any(form in network for form in standing_for for network in networks)


def _embedded(address: IPv6Address) -> Iterator[IPv4Address]:
    """Yield the IPv4 addresses that an IPv6 address carries, by any of the schemes that ever did."""
    last = IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _NAT64 or address in _V4_COMPATIBLE:
        yield last
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        yield last
