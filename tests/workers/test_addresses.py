"""Under which address the nodes of a gang find each other, whatever the host calls itself."""

import socket

import psutil
import pytest

from workers import launch
from workers.addresses import address_of, interface_of
from workers.settings import WorkerSettings


def own_address() -> str:
    """An address of this machine that others reach."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return each.address
    return "127.0.0.1"


def gloo_of(address: str | None) -> str | None:
    env = launch.environment("mark", [], nproc=1, settings=WorkerSettings(), address=address)
    return env.get("GLOO_SOCKET_IFNAME")


def test_what_the_operator_says_counts() -> None:
    assert address_of(WorkerSettings(node_address="10.1.2.3", redis_url="redis://127.0.0.1/0")) == "10.1.2.3"


def test_a_node_is_reached_where_it_reaches_the_broker_not_on_its_loopback() -> None:
    own = own_address()
    found = address_of(WorkerSettings(redis_url=f"redis://{own}:6379/0"))
    assert interface_of(found) == interface_of(own)


@pytest.mark.parametrize("url", ["redis+socket:///run/redis.sock", "redis://no.such.host.invalid/0"])
def test_without_a_way_to_the_broker_the_name_has_to_do(url: str) -> None:
    assert interface_of(address_of(WorkerSettings(redis_url=url))) is not None


def test_gloo_takes_the_interface_of_that_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert gloo_of(own_address()) == interface_of(own_address())
    assert gloo_of("203.0.113.7") is None, "an address that only others know, as behind a container's port"
    assert gloo_of(None) is None

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert gloo_of(own_address()) == "ib0"
