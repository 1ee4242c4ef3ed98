"""Where other nodes reach this one, and the network interface that has that address."""

import socket
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

import psutil

from workers.settings import WorkerSettings


def address_of(settings: WorkerSettings) -> str:
    """Where other nodes reach this one."""
    return settings.node_address or _own_address(settings.redis_url)


def interface_of(address: str) -> str | None:
    """The network interface that has an address or the address of a name; None if none here has it."""
    number = _resolve(address)
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == number for each in addresses):
            return interface
    return None


@lru_cache  # a name that no server knows takes seconds to be refused
def _own_address(redis_url: str) -> str:
    """What this host's name means, if others can reach that; else from which address it reaches the broker.

    Debian writes the host's name down as a loopback address.
    """
    named = _resolve(socket.gethostname())
    if named and not ip_address(named).is_loopback and interface_of(named):
        return named
    return _towards(redis_url) or named or "127.0.0.1"


def _towards(url: str) -> str | None:
    """This host's address on the way to a server; nothing is sent."""
    server = urlsplit(url)
    if not server.hostname:  # a socket file
        return None
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            server.hostname, server.port or 6379, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    except OSError:  # no such name, or no way there
        return None


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:  # a host without a name that anybody knows
        return None
