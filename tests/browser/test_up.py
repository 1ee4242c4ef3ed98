"""`residency up` starts the dashboard too, and goes on without it where it must."""

import socket
from pathlib import Path

import httpx

from tests.deploy.compose import free_port
from tests.stack import processes_of, start_stack, wait_for


def test_up_serves_the_dashboard_and_the_api_leads_there(tmp_path: Path) -> None:
    port = free_port()
    stack = start_stack(tmp_path / "home", import_dirs=[tmp_path], dashboard_port=port)
    try:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/login", timeout=5, trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers, within_s=120, what="the dashboard")
        api = stack.url.removesuffix("/v1")
        led = httpx.get(f"{api}/dashboard", trust_env=False)
        assert (led.status_code, led.headers["location"]) == (307, f"{url}/")
        entered = httpx.post(f"{url}/login", data={"key": stack.key}, trust_env=False, timeout=60)
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        assert url in stack.home.with_suffix(".log").read_text()
    finally:
        assert stack.stop() == 0
    assert processes_of(stack.home) == []
    assert stack.key not in stack.log("dashboard")


def test_up_goes_on_without_it_where_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = start_stack(tmp_path / "home", import_dirs=[tmp_path], dashboard_port=port)
        try:
            api = stack.url.removesuffix("/v1")
            assert httpx.get(f"{api}/dashboard", trust_env=False).status_code == 404
            told = stack.home.with_suffix(".log").read_text()
            assert "No dashboard" in told
            assert str(port) in told
        finally:
            assert stack.stop() == 0
