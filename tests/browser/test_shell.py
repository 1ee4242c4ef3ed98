"""Logging in and out, the frame around the pages, and who may ask for them."""

from pathlib import Path

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Dashboard, Watched, start_dashboard

PLACES = ["Overview", "Jobs", "New job", "Pipelines", "Data", "Models", "Playground", "Admin"]


def test_a_deep_link_leads_back_after_logging_in(dashboard: Dashboard, page: Page) -> None:
    page.goto(f"{dashboard.url}/?seen=1")
    assert "/login?next=" in page.url
    dashboard.log_in(page, at="/?seen=1")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    for place in PLACES:
        expect(page.get_by_role("navigation").get_by_role("link", name=place, exact=True)).to_be_visible()


@pytest.mark.parametrize("elsewhere", ["//evil.test/", "https://evil.test/", "/\\evil.test"])
def test_logging_in_leads_nowhere_else(dashboard: Dashboard, elsewhere: str) -> None:
    with httpx.Client(base_url=dashboard.url, trust_env=False) as http:
        answer = http.post("/login", params={"next": elsewhere}, data={"key": dashboard.stack.key})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_a_wrong_key_is_told(dashboard: Dashboard, page: Page, watched: Watched) -> None:
    watched.allowed.append("401")
    page.goto(dashboard.url)
    page.get_by_label("Key").fill("rsd_admin_wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_have_text("The server does not know this key.")


def test_logging_out_forgets_the_key(dashboard: Dashboard, page: Page, context: BrowserContext) -> None:
    dashboard.log_in(page)
    cookies = context.cookies()
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(f"{dashboard.url}/login")
    context.clear_cookies()
    context.add_cookies(cookies)  # whoever kept them has nothing
    page.goto(dashboard.url)
    assert page.url.startswith(f"{dashboard.url}/login")


def test_the_key_stays_on_the_server(dashboard: Dashboard, page: Page, context: BrowserContext) -> None:
    dashboard.log_in(page)
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    seen = page.content() + stored + str(context.cookies())
    assert dashboard.stack.key not in seen
    cookie = next(cookie for cookie in context.cookies() if cookie["name"] == "residency_dashboard")
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Lax"


def test_other_sites_cannot_ask(dashboard: Dashboard) -> None:
    foreign = {"origin": "https://evil.test"}
    with httpx.Client(base_url=dashboard.url, trust_env=False) as http:
        assert http.post("/logout", headers=foreign).status_code == 403
        assert http.post("/logout", headers={"sec-fetch-site": "cross-site"}).status_code == 403
        sockets = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"
        assert http.get(sockets, headers=foreign).status_code == 403
        assert http.get(sockets).status_code == 200
        upgrade = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
            "sec-websocket-version": "13",
        }
        socket = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        assert http.get(socket, headers=upgrade | foreign).status_code == 403


def test_light_or_dark_follows_the_system_until_chosen(dashboard: Dashboard, page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    dashboard.log_in(page)
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.emulate_media(color_scheme="light")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    page.get_by_role("button", name="Dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.get_by_role("button", name="Auto").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_the_navigation_on_a_narrow_screen(dashboard: Dashboard, page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    dashboard.log_in(page)
    jobs = page.get_by_role("link", name="Jobs", exact=True)
    expect(jobs).to_be_hidden()
    page.get_by_role("button", name="Menu").click()
    expect(jobs).to_be_visible()
    page.keyboard.press("Escape")
    expect(jobs).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_that_is_not_there(dashboard: Dashboard, page: Page, watched: Watched) -> None:
    watched.allowed.append("404")
    dashboard.log_in(page)
    page.goto(f"{dashboard.url}/nothing")
    expect(page.get_by_text("There is no such page")).to_be_visible()


def test_a_key_that_is_revoked_is_logged_out(dashboard: Dashboard, page: Page) -> None:
    with dashboard.stack.http() as http:
        made = http.post("/keys", json={"name": "for a while", "role": "admin"}).json()
        dashboard.log_in(page, key=made["key"])
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        assert http.delete(f"/keys/{made['id']}").status_code == 200
    page.wait_for_url(f"{dashboard.url}/login")  # by itself, when it next asks for news


def test_logging_in_while_no_server_answers(tmp_path: Path) -> None:
    process, url = start_dashboard("http://127.0.0.1:9", tmp_path / "dashboard.log")
    try:
        answer = httpx.post(f"{url}/login", data={"key": "rsd_admin_x"}, trust_env=False, timeout=30)
        assert answer.status_code == 503
        assert "No server answers at http://127.0.0.1:9" in answer.text
        assert "residency up" in answer.text
        assert "rsd_admin_x" not in answer.text
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_the_description_of_the_api_needs_no_other_host(
    dashboard: Dashboard, page: Page, watched: Watched
) -> None:
    watched.home = dashboard.stack.url
    page.goto(dashboard.stack.url.removesuffix("/v1") + "/docs")
    expect(page.get_by_text("Create fine-tuning job")).to_be_visible()
