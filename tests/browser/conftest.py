"""A browser, and one live service with its dashboard, for the tests that look at pages."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

from tests.stack import Stack, users_shell, wait_for

CHROMIUM = "/usr/bin/chromium"
PATIENCE_MS = 30_000  # tests share a small machine
ARGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser and a service are slow to start."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.long)


@dataclass
class Dashboard:
    """A running dashboard of a running service."""

    url: str
    stack: Stack
    log: Path

    def log_in(self, page: Page, *, at: str = "/", key: str | None = None) -> None:
        """Ask for the page at `at`, log in, and be there."""
        page.goto(self.url + at)
        page.get_by_label("Key").fill(key or self.stack.key)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(self.url + at)


def start_dashboard(api_url: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`residency dashboard` on a free port, and its address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "api.cli", "dashboard", "--api-url", api_url, "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, env=users_shell(), stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/login", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    wait_for(answers, within_s=120, what="the dashboard")
    return process, url


@pytest.fixture(scope="session")
def dashboard(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """The dashboard of the shared service."""
    log = tmp_path_factory.mktemp("dashboard") / "dashboard.log"
    process, url = start_dashboard(stack.url.removesuffix("/v1"), log)
    yield Dashboard(url, stack, log)
    process.terminate()
    assert process.wait(timeout=60) in (0, -15)
    assert stack.key not in log.read_text()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@dataclass
class Watched:
    """What a browser did that no page may make it do."""

    home: str
    faults: list[str]
    allowed: list[str]

    def hear(self, message: ConsoleMessage) -> None:
        """Keep what the console calls an error, unless the test expects it."""
        if message.type == "error" and not any(words in message.text for words in self.allowed):
            self.faults.append(f"console: {message.text} ({message.location.get('url')})")

    def see(self, request: Request) -> None:
        """Keep every request to another host."""
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != urlsplit(self.home).netloc:
            self.faults.append(f"request to {request.url}")


@pytest.fixture
def watched(dashboard: Dashboard) -> Iterator[Watched]:
    """Fails a test whose pages make the console complain, fail with an exception, or ask another host.

    A test that provokes an error appends its words to `allowed`.
    """
    watched = Watched(dashboard.url, [], [])
    yield watched
    assert watched.faults == []


@pytest.fixture
def context(browser: Browser, watched: Watched) -> Iterator[BrowserContext]:
    """A browser that has seen nothing yet, 1280 by 800."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE_MS)
    context.on("console", watched.hear)
    context.on("weberror", lambda error: watched.faults.append(f"exception: {error.error}"))
    context.on("request", watched.see)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """An empty tab of it."""
    return context.new_page()
