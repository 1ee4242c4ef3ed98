"""Pages that stay fresh: what they say while no server answers, and that they ask for nothing unseen."""

import re
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard, Watched, start_dashboard
from tests.faults.injections import Proxy
from tests.stack import Stack


def test_a_server_that_goes_away_is_told_once_and_then_forgotten(
    stack: Stack, page: Page, watched: Watched, tmp_path: Path
) -> None:
    with Proxy(("127.0.0.1", stack.port)) as proxy:
        process, url = start_dashboard(f"http://127.0.0.1:{proxy.port}", tmp_path / "dashboard.log")
        watched.home = url
        try:
            Dashboard(url, stack, tmp_path / "dashboard.log").log_in(page)
            machines = page.get_by_role("heading", name="Machines")
            place = machines.bounding_box()
            proxy.turn("cut")
            trouble = page.get_by_role("alert")
            expect(trouble).to_contain_text("This page goes on trying")
            page.wait_for_timeout(9_000)  # two more turns
            expect(trouble).to_have_count(1)
            assert machines.bounding_box() == place
            proxy.turn("open")
            expect(trouble).to_have_count(0)
            proxy.turn("cut")
            watched.allowed.append("503")
            page.goto(f"{url}/jobs")
            expect(page.get_by_role("alert")).to_contain_text(
                re.compile("No server answers|The connection to")
            )
            proxy.turn("open")
            page.get_by_role("link", name="Try again").click()
            expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
        finally:
            process.terminate()
            process.wait(timeout=60)
    assert "Traceback" not in (tmp_path / "dashboard.log").read_text()


def test_a_hidden_page_asks_for_nothing(stack: Stack, page: Page, watched: Watched, tmp_path: Path) -> None:
    with Proxy(("127.0.0.1", stack.port)) as proxy:
        process, url = start_dashboard(f"http://127.0.0.1:{proxy.port}", tmp_path / "dashboard.log")
        watched.home = url
        try:
            Dashboard(url, stack, tmp_path / "dashboard.log").log_in(page)
            page.evaluate(
                "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
                "document.dispatchEvent(new Event('visibilitychange'))"
            )
            page.wait_for_timeout(5_000)  # a look that had begun ends
            proxy.turn("cut")
            page.wait_for_timeout(9_000)
            expect(page.get_by_role("alert")).to_have_count(0)
            page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
            expect(page.get_by_role("alert")).to_contain_text("This page goes on trying")
        finally:
            process.terminate()
            process.wait(timeout=60)
